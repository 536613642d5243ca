"""Whatever the mixture file or the source files hold: one clear error and no output, or all rows accounted for."""

from __future__ import annotations

import gzip
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bfpo.config import PrepareConfig, load_config
from bfpo.core.errors import BfpoError
from bfpo.runs.stages import run_stage
from mixtures import prepare, row, rows_of

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
plausible = {
    "name": st.sampled_from(["a", "pku-saferlhf", "bfpo", "", "a b", "é", "../x"]),
    "stream": st.sampled_from(["main", "buffer", "sft", "test"]),
    "use": st.sampled_from(["all", "safe", "chosen"]),
    "layout": st.sampled_from(["auto", "bfpo", "trl", "pku", "completions", "x"]),
    "columns": st.sampled_from([{}, {"prompt": "chosen"}, {"chosen": "none"}, {"x": "y"}]),
    "revision": st.sampled_from(["main", ""]),
    "count": st.integers(0, 60),
    "weight": st.floats(0, 3),
    "oversample": st.booleans(),
    "unknown_label": st.sampled_from(["error", "safe", "drop", "keep"]),
    "bad_rows": st.sampled_from(["stop", "skip"]),
    "total": st.integers(0, 60),
    "seed": st.integers(-1, 2**64),
    "splits": st.fixed_dictionaries({}, optional={"validation": st.floats(0, 1), "test": st.floats(0, 1)}),
    "near_duplicates": st.sampled_from([None, {}, {"threshold": 0.4}, {"threshold": 1.0, "permutations": 16}]),
    "duplicates": st.sampled_from(["drop", "keep"]),
    "contradictory_labels": st.sampled_from(["drop", "keep"]),
    "alpha": st.floats(),
    "contained_words": st.integers(0, 5),
}
OF_A_SOURCE = list(plausible)[:11]


@st.composite
def mixtures(draw: st.DrawFn, files: str = "FILES") -> dict[str, Any]:
    """Draw a mixture that is right but for some keys."""

    def some(keys: list[str]) -> dict[str, Any]:
        chosen = draw(st.lists(st.sampled_from(keys), unique=True, max_size=4))
        return {key: draw(st.one_of(*[plausible[key]] * 7, anything)) for key in chosen}

    sources = [{"name": f"s{i}", "files": files} | some(OF_A_SOURCE) for i in range(draw(st.integers(1, 2)))]
    rest = [key for key in plausible if key not in OF_A_SOURCE]
    return {"sources": draw(st.one_of(*[st.just(sources)] * 7, anything))} | some(rest)


def all_parquet(folder: Path) -> list[Path]:
    return list(folder.glob("*/*.parquet"))


@FEW
@given(mixtures())
def test_a_mixture_runs_or_is_refused_with_a_clear_error(mixture: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, config = folder / "data.jsonl", folder / "mixture.yaml"
        data.write_text("".join(json.dumps(row(i)) + "\n" for i in range(40)))
        text = yaml.safe_dump(mixture, allow_unicode=True).replace("FILES", str(data))
        config.write_text(text, encoding="utf-8", errors="surrogatepass")
        out = folder / "out"
        try:
            loaded = load_config(PrepareConfig, config, ["processes=1", "language_sample=0"])
            with patch("bfpo.commands.prepare.draw_data", lambda _: {}):
                run_stage("prepare", loaded, out)
        except BfpoError:
            assert not all_parquet(out)
            assert not (out / "manifest.json").exists()
            return
        assert (out / "manifest.json").is_file()
        assert all_parquet(out)


HOSTILE = (b"", b"\x00", b"\xff\xfe", b"\r", b"\n", b'"', b"{", b"]", b"null", b"\xef\xbb\xbf", b"\\ud800")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return the content with some bytes replaced, removed, put in or repeated."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice([0, 1, 20, 400]))
        put = draw.choice(
            [
                b"",
                b"\x00",
                b"\xff\xfe",
                b"\r",
                b"\n",
                b'"',
                b"{",
                b"]",
                b"null",
                b"\xef\xbb\xbf",
                b"\\ud800",
                content[at:end] * 2,
            ]
        )
        content = content[:at] + put + content[end:]
    return content


def as_file(rows: list[dict[str, Any]], kind: str) -> bytes:
    if kind == "parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if kind == "csv":
        names = list(rows[0])
        cells = [[json.dumps(each[name]) for name in names] for each in rows]
        return "\n".join([",".join(names), *(",".join(line) for line in cells)]).encode() + b"\n"
    lines = "".join(json.dumps(each) + "\n" for each in rows).encode()
    return gzip.compress(lines, mtime=0) if kind == "jsonl.gz" else lines


@FEW
@given(st.sampled_from(["jsonl", "jsonl.gz", "csv", "parquet"]), st.integers(0, 10**6), st.booleans())
def test_damaged_files_are_refused_or_their_rows_counted(kind: str, seed: int, skip: bool) -> None:
    rows = [row(i, prompt=f"{row(i)['prompt']} é\u2028日本") for i in range(40)]
    content = damaged(as_file(rows, kind), random.Random(seed))
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / f"data.{kind}", Path(name) / "out"
        file.write_bytes(content)
        part = {"name": "a", "files": str(file), "bad_rows": "skip" if skip else "stop", "unknown_label": "keep"}
        try:
            data = prepare(out, [part]).read_json("data.json")
        except BfpoError:
            assert not all_parquet(out)
            return
        [source] = data["sources"]
        written = sum(len(split) for split in rows_of(out).values())
        assert source["rows"] == sum(source["rejected"].values()) + sum(source["units"].values())
        assert source["units"]["used"] == written
        assert skip or not source["rejected"]
