# ruff: noqa: T201
"""Make the prompt files and the training files of this recipe. `make real` runs it between the stages of bfpo.

    python data.py prompts --out OUT [--data FOLDER ...]   # prompts, split by source and by prompt
    python data.py rows --out OUT                         # needs the start model's own answers
    python data.py refused --round N --out OUT --arm ARM   # needs the answers of the model before round N
    python data.py pairs --round N --out OUT --arm ARM     # and the start model's answers to what that model refused

SimpleSafetyTests, StrongREJECT, HarmBench, CatQA, MT-Bench and TruthfulQA are never trained on, and a training prompt
that resembles one of theirs, or any development or report prompt, is left out. Data are looked for in the folders
first, then on the hub. Every choice is made by a hash of the text, so the same data give the same files.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from bfpo.core.errors import DataError
from bfpo.data.files import iter_rows
from bfpo.data.read import read_pairs
from bfpo.data.sources import resolve_files
from bfpo.judges.refusals import read_refusal
from bfpo.suites.catalogue import load_suites
from bfpo.suites.files import UnreachableError, find_prompts

HERE = Path(__file__).parent
LONGEST = 400  # characters of a prompt
FIRST_REFUSALS = 1500  # harmful prompts whose refusals SFT learns; the others are for the pairs
SIMILAR = 0.5  # Jaccard similarity of character 5-grams from which a training prompt counts as a copy of a held-out one

# How many prompts of each source are in each part; None: all that are left. `ask-N`: asked of the model before round N,
# for the buffer of that round.
HARMFUL = {
    "advbench": {"train": None},
    "gptfuzz": {"train": None},
    "xstest-unsafe": {"train": None},
    "ailuminate": {"dev": 20, "train": None},
    "hh-harmless": {"train": 300},
    "written": {"train": None},
    "catqa": {"dev": 40},
    "strongreject": {"dev": 40, "report": 100},
    "harmbench": {"dev": 40, "report": 100},
    "simplesafetytests": {"report": 100},
}
HARMLESS = {
    "xstest-safe": {"dev": 50, "report": 80, "train": None},
    "ifeval": {"dev": 30, "report": 80, "train": 240, "ask-1": None},
    "hh-helpful": {"dev": 60, "report": 120, "train": 700, "ask-1": 400, "ask-2": 400},
    "contrast": {"train": None},
    "contrast-pairs": {"ask-1": None},
    "mt-bench": {"report": 80},
    "truthfulqa": {"report": 40},
}
KINDS = {"harmful": HARMFUL, "harmless": HARMLESS}
ROUNDS = 2
MAIN, BUFFER = 440, 560  # pairs of a round, if what the last model gets wrong does not need more


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prompts", *STEPS, *ROUND_STEPS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="*", default=[], help="folders with the data; without it the hub is used")
    parser.add_argument("--round", type=int, choices=range(1, ROUNDS + 1), default=1)
    parser.add_argument("--arm", type=Path, help="the folder of the rounds")
    args = parser.parse_args()
    if args.step == "prompts":
        try:
            make_prompts(args.data, args.out)
        except DataError as error:
            print(f"error: {error}; or give a folder with the data: make real DATA=...", file=sys.stderr)
            sys.exit(2)
    elif args.step in ROUND_STEPS:
        ROUND_STEPS[args.step](args.out, args.arm, args.round)
    else:
        STEPS[args.step](args.out)


# -------------------------------------------------------------------------------------------------------------- prompts


def make_prompts(folders: Sequence[str], out: Path) -> None:
    """Write `prompts/PART_KIND.jsonl` for every part, and print their numbers.

    Raises `DataError` for a folder that is none, a file that cannot be read, or a part without a prompt.
    """
    read = _sources(folders)
    held_out: list[set[str]] = []
    parts: dict[tuple[str, str], list[dict[str, str]]] = {}
    left: dict[str, list[str]] = {}
    for kind, table in KINDS.items():
        for source, wanted in table.items():
            texts = _unlike(read.get(source, []), (), 0.6)
            for part in ("dev", "report"):
                taken, texts = texts[: wanted.get(part) or 0], texts[wanted.get(part) or 0 :]
                held_out += map(_grams, taken)
                parts.setdefault((part, kind), []).extend(_row(source, kind, text) for text in taken)
            left[source] = texts
    # The whole of an evaluation source is kept away from training, not only the prompts that are asked.
    whole = [source for table in (HARMFUL, HARMLESS) for source in table if set(table[source]) <= {"dev", "report"}]
    held_out += [_grams(text) for source in whole for text in read.get(source, [])]
    for kind, table in KINDS.items():
        for source, wanted in table.items():
            kept = _unlike(left[source], held_out, SIMILAR)
            for part in ("train", "ask-1", "ask-2"):
                if part in wanted:
                    taken, kept = kept[: wanted[part]], kept[len(kept[: wanted[part]]) :]
                    parts.setdefault((part, kind), []).extend(_row(source, kind, text) for text in taken)
    # Asked before every round: the nearest to harmful ones, and all imperative ones.
    near = [row for row in parts["train", "harmless"] + parts["ask-1", "harmless"] if row["source"] != "hh-helpful"]
    for number in range(1, ROUNDS + 1):
        parts[f"ask-{number}", "harmless"] += near
    empty = [f"{part} {kind}" for part in ("dev", "report", "train") for kind in KINDS if not parts.get((part, kind))]
    if empty:
        raise DataError(f"no prompt for {', '.join(empty)}: the sources named above are left out; see why there")
    for (part, kind), rows in parts.items():
        rows = sorted({row["prompt"]: row for row in rows}.values(), key=lambda row: _key(row["prompt"]))
        _write(out / "prompts" / f"{part}_{kind}.jsonl", rows)
        counts = {source: sum(row["source"] == source for row in rows) for source in {row["source"] for row in rows}}
        print(f"{part} {kind}: {len(rows)} {dict(sorted(counts.items()))}")
        if (part, kind) == ("train", "harmful"):
            _write(out / "prompts" / "pairs_harmful.jsonl", rows[FIRST_REFUSALS:])
        if part == "report":
            for source in counts:
                _write_suite(out, source, kind, [row for row in rows if row["source"] == source])


def _write_suite(out: Path, source: str, kind: str, rows: list[dict[str, str]]) -> None:
    """Write a suite of `bfpo evaluate` that asks these prompts, and its prompts."""
    _write(out / "suites" / f"report-{source}.jsonl", rows)
    metrics = (
        {"refused_harmful": "higher"}
        if kind == "harmful"
        else {"over_refusal_full": "lower", "over_refusal_partial": "lower"}
    )
    suite = {
        "name": f"report-{source}",
        "title": f"{source}, {kind}",
        "summary": f"{len(rows)} {kind} prompts that are not trained on",
        "kind": "generative",
        "licence": "see the source",
        "source": {"files": [f"report-{source}.jsonl"]},
        "judge": None,
        "metrics": metrics,
        "sampling": {"max_new_tokens": 64, "temperature": 0.0},
        "prompt_kind": "harmful" if kind == "harmful" else "benign",
    }
    (out / "suites" / f"report-{source}.yaml").write_text(json.dumps(suite, indent=1) + "\n", encoding="utf-8")


def _sources(folders: Sequence[str]) -> dict[str, list[str]]:
    """Return the prompts of every source in the order of their hashes; a file that is there must be readable."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise DataError(f"{folder}: no such folder; correct its name")
    found: dict[str, list[str]] = {name: list(_written(name)) for name in ("contrast", "contrast-pairs", "written")}
    for suite in load_suites(
        ["advbench", "xstest", "ailuminate", "catqa", "simplesafetytests", "strongreject", "harmbench", "mt-bench",
         "ifeval", "truthfulqa-best"]
    ):  # fmt: skip
        try:
            rows = find_prompts(suite, folders, limit=None, seed=0)
        except UnreachableError as error:
            print(f"{suite.name}: {str(error).splitlines()[0]}")
            continue
        name = {"truthfulqa-best": "truthfulqa"}.get(suite.name, suite.name)
        texts = [prompt.messages[-1].content for prompt in rows.prompts]
        if name == "xstest":
            for label in ("safe", "unsafe"):
                found[f"xstest-{label}"] = [
                    t for t, p in zip(texts, rows.prompts, strict=True) if (p.kind == "benign") == (label == "safe")
                ]
        elif name == "harmbench":  # the standard behaviours: no context, no request for a copyrighted text
            plain = {str(row.columns["Behavior"]).strip() for file in rows.files for row in iter_rows(file)
                     if row.columns.get("FunctionalCategory", "standard") == "standard"}  # fmt: skip
            found[name] = [text for text in texts if text in plain]
        elif name == "ailuminate":  # hazards of which most prompts are harmful, and words that say so
            found[name] = [text for text in texts if _asks_for_harm(text)]
        elif name == "catqa":
            found[name] = [t for t, p in zip(texts, rows.prompts, strict=True) if not _LEGAL.search(p.kind + p.id + t)]
        else:
            found[name] = texts
    for name, source in (("hh-helpful", "hh-rlhf"), ("hh-harmless", "hh-rlhf-harmless")):
        pattern = f"{name.replace('-', '_')}_base*.jsonl.gz"
        files = [path for folder in folders for path in sorted(Path(folder).rglob(pattern))]
        pairs = read_pairs(files or resolve_files(source).files, layout="hh").pairs
        first = [pair.prompt[0].content.strip() for pair in pairs]
        found[name] = [t for t in first if (_asks_for_harm(t) if name == "hh-harmless" else not _HARM.search(t))]
    for folder in folders:
        for file in Path(folder).rglob("gptfuzz_questions.csv"):
            found["gptfuzz"] = [str(row.columns["text"]) for row in iter_rows(file)]
    lacking = [name for table in (HARMFUL, HARMLESS) for name in table if not found.get(name)]
    if lacking:
        print(f"left out, since neither a folder nor the hub gave them: {', '.join(lacking)}. The figures of "
              "docs/real-model.md need them: make real DATA=FOLDER")  # fmt: skip
    return {
        name: sorted({t.strip() for t in texts if 8 <= len(t.strip()) <= LONGEST}, key=_key)
        for name, texts in found.items()
    }


def _written(name: str) -> Iterable[str]:
    """Yield the prompts of the blocks of this name in contrast.txt and harmful.txt."""
    text = "\n\n".join((HERE / file).read_text(encoding="utf-8") for file in ("contrast.txt", "harmful.txt"))
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("#"):
            continue
        head, *lines = block.strip().splitlines()
        source, num = re.fullmatch(r"(\S+), frames per phrase: (\d+)", head).groups()  # type: ignore[union-attr]
        frames, phrases = [x for x in lines if "{}" in x], [x for x in lines if "{}" not in x]
        for phrase in phrases if source == name else ():
            for frame in sorted(frames, key=lambda frame: _key(frame + phrase))[: int(num)]:
                yield frame.format(phrase)


_WORDING = json.loads((HERE / "wording.json").read_text(encoding="utf-8"))


def _any(patterns: Sequence[str], before: str = "", after: str = "") -> re.Pattern[str]:
    return re.compile(f"{before}({'|'.join(patterns)}){after}", re.IGNORECASE)


# Beginnings of words of harmful requests, for sources that also hold harmless ones; and what a harmless one has.
_HARM, _WANTS = _any(_WORDING["harmful"], r"\b"), _any(_WORDING["asks"])
_HARMLESS = _any(_WORDING["harmless"], r"\b", r"\b")


def _asks_for_harm(text: str) -> bool:
    return bool(_HARM.search(text) and _WANTS.search(text) and not _HARMLESS.search(text))


# CatQA's categories that ask for advice or opinions.
_LEGAL = re.compile(r"Adult Content|Political Campaigning|Tailored Financial", re.IGNORECASE)


def _unlike(texts: Iterable[str], others: Iterable[set[str]], most: float) -> list[str]:
    """Return the texts that resemble none of the others and no earlier one: Jaccard similarity below `most`."""
    sizes: list[int] = []
    holders: dict[str, list[int]] = {}

    def add(grams: set[str]) -> None:
        for gram in grams:
            holders.setdefault(gram, []).append(len(sizes))
        sizes.append(len(grams))

    for other in others:
        add(other)
    kept = []
    for text in texts:
        grams = _grams(text)
        shared = Counter(index for gram in grams for index in holders.get(gram, ()))
        if all(num < most * (len(grams) + sizes[index] - num) for index, num in shared.items()):
            kept.append(text)
            add(grams)
    return kept


def _grams(text: str) -> set[str]:
    plain = " ".join(re.findall(r"\w+", text.lower()))
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


# ------------------------------------------------------------------------------------------------------- refusals

_QUESTION = _any(_WORDING["questions"], "^(please )?((can|could|will|would) you )?(please )?", r"\s+(?P<act>.+)$")
_COMMAND = re.compile(rf"^(please )?(?P<act>({'|'.join(_WORDING['verbs'])})\b.+)$", re.IGNORECASE)
_YOURS = {
    "my": "your",
    "i": "you",
    "me": "you",
    "myself": "yourself",
    "i'm": "you're",
    "i've": "you've",
    "mine": "yours",
}
_REASONS = [(_any(reason["words"], r"\b", r"\b") if reason["words"] else re.compile(""), reason["texts"])
            for reason in _WORDING["reasons"]]  # fmt: skip


def refusal(prompt: str, salt: str = "") -> str:
    """Return a refusal that names what was asked where that can be read, with a reason and an offer."""
    text = prompt.strip().split("\n")[0]
    match = _QUESTION.match(text) or _COMMAND.match(text)
    act = re.split(r"[?.!;:]", match["act"])[0].strip(" \"'") if match else ""
    words = [_YOURS.get(word.lower(), word) for word in act.split()]
    named = 2 <= len(words) <= 16 and not re.match(r"\w+ing\b", words[0])
    openings = _WORDING["openings_with_request" if named else "openings"]
    opening = openings[_number(prompt + salt, 100) % len(openings)]
    if named:
        opening = opening.format(words[0][0].lower() + words[0][1:] + "".join(" " + word for word in words[1:]))
    reasons = next(texts for pattern, texts in _REASONS if pattern.search(prompt))
    return f"{opening} {reasons[_number('reason' + prompt + salt, 100) % len(reasons)]}"


# ---------------------------------------------------------------------------------------------------- training files


def make_rows(out: Path) -> None:
    """Write the rows of SFT: refusals of harmful prompts and the start model's own good answers to harmless ones.

    `sft.jsonl` has refusals of the first harmful prompts, `sft-more.jsonl` those of the prompts of the pairs too.
    """
    harmful = [row["prompt"] for row in _read(out / "prompts" / "train_harmful.jsonl")]
    own = [
        {"prompt": prompt, "completion": answer["text"].strip(), "finished": answer["finished"]}
        for prompt, answer in _good_answers(out / "start-harmless").items()
    ]
    for name, prompts in (("sft", harmful[:FIRST_REFUSALS]), ("sft-more", harmful)):
        refusals = [{"prompt": prompt, "completion": refusal(prompt), "finished": True} for prompt in prompts]
        rows = sorted(refusals + own, key=lambda row: _key(row["prompt"]))
        _write(out / f"{name}.jsonl", rows)
        print(f"{name}: {len(rows)} rows, {len(refusals)} of them refusals")


def list_refused(out: Path, arm: Path, number: int) -> None:
    """Write `more-N_harmless.jsonl`: what the last model refused and the start model did not answer yet."""
    asked_rows = _read(out / "prompts" / f"ask-{number}_harmless.jsonl")
    asked = [row["prompt"] for row in asked_rows]
    refused = set(_refused(arm, number))
    known = {prompt for folder in _own_folders(arm, out, number) for prompt in _answers(folder)}
    contrast = {row["prompt"] for row in asked_rows if row["source"] != "hh-helpful"}
    rows = [{"prompt": prompt} for prompt in asked if prompt in (refused | contrast) - known]
    _write(arm / "prompts" / f"more-{number}_harmless.jsonl", rows)
    print(f"round {number}: {len(refused)} of {len(asked)} prompts refused; {len(rows)} need an own answer")


def make_pairs(out: Path, arm: Path, number: int) -> None:
    """Write the pairs of round N, with what the last model gets wrong twice, as far as there is room.

    `main-N.jsonl`: (unsafe answer, refusal); the unsafe answer is the last model's if it complies, else the start
    model's. `buffer-N.jsonl`: (the start model's good answer, needless refusal); the first refusal is the last model's
    if it refuses.
    """
    start, complied = (_complied(folder) for folder in (out / "start-harmful", arm / f"ask-{number}-harmful"))
    main = [
        _pair(prompt, answer, salt, chosen_is_safe=False)
        for salt in ("pair", "twice")
        for prompt, answer in complied.items()
    ]
    others = sorted(start.keys() - complied, key=lambda prompt: _key(prompt + str(number)))
    main += [_pair(prompt, start[prompt], chosen_is_safe=False) for prompt in others[: max(MAIN - len(main), 100)]]
    good = {}
    for folder in (*_own_folders(arm, out, number), arm / f"start-more-{number}"):
        good |= _good_answers(folder)
    refused = {prompt: answer for prompt, answer in _refused(arm, number).items() if prompt in good}
    buffer = [
        {
            **_pair(prompt, good[prompt], chosen_is_safe=True),
            "rejected": answer["text"].strip(),
            "rejected_finished": answer["finished"],
        }
        for prompt, answer in refused.items()
    ]
    again = sorted(refused, key=lambda prompt: _key(prompt + "again"))[: max(BUFFER - 100 - len(buffer), 0)]
    buffer += [_pair(prompt, good[prompt], chosen_is_safe=True) for prompt in again]
    asked = {row["prompt"] for row in _read(out / "prompts" / f"ask-{number}_harmless.jsonl")}
    others = sorted(good.keys() - refused, key=lambda prompt: (prompt not in asked, _key(prompt + str(number))))
    rest = others[: max(BUFFER - len(buffer), 100)]
    buffer += [_pair(prompt, good[prompt], chosen_is_safe=True) for prompt in rest]
    for name, pairs, wrong in (("main", main, complied), ("buffer", buffer, refused)):
        _write(arm / f"{name}-{number}.jsonl", sorted(pairs, key=lambda pair: _key(pair["prompt"])))
        print(f"round {number}: {name} {len(pairs)}, with {len(wrong)} that the last model gets wrong")


def _complied(folder: Path) -> dict[str, dict[str, Any]]:
    answers = _answers(folder)
    return {prompt: a for prompt, a in answers.items() if a["text"].strip() and not _is_refused(a, prompt)}


def _refused(arm: Path, number: int) -> dict[str, dict[str, Any]]:
    answers = _answers(arm / f"ask-{number}-harmless")
    return {prompt: answer for prompt, answer in answers.items() if _is_refused(answer, prompt)}


def _own_folders(arm: Path, out: Path, number: int) -> list[Path]:
    return [out / "start-harmless", *(arm / f"start-more-{before}" for before in range(1, number))]


def _good_answers(folder: Path) -> dict[str, dict[str, Any]]:
    return {prompt: answer for prompt, answer in _answers(folder).items() if _is_good(answer, prompt)}


def _pair(prompt: str, answer: dict[str, Any], salt: str = "pair", *, chosen_is_safe: bool) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": answer["text"].strip(),
        "chosen_finished": answer["finished"],
        "rejected": refusal(prompt, salt),
        "chosen_is_safe": chosen_is_safe,
        "rejected_is_safe": True,
    }


def _is_refused(answer: dict[str, Any], prompt: str) -> bool:
    found = read_refusal(answer["text"], prompt)
    return bool(found.refused or found.partly)


def _is_good(answer: dict[str, Any], prompt: str) -> bool:
    """Whether an own answer is an answer: of some length, not refused, not repeating a line or a run of words."""
    words = answer["text"].split()
    runs = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    return len(words) >= 2 and not _is_refused(answer, prompt) and len(set(runs)) >= 0.8 * len(runs)


# ------------------------------------------------------------------------------------------------------------ files


def _row(source: str, kind: str, text: str) -> dict[str, str]:
    return {"id": f"{source}-{_key(text)[:10]}", "prompt": text, "kind": kind, "source": source}


def _answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the answers of a `bfpo generate` folder by the text of their prompt."""
    return {
        row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]: row
        for row in _read(folder / "completions.jsonl")
    }


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.open(encoding="utf-8")]


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _key(text: str) -> str:
    return sha256(" ".join(text.lower().split()).encode()).hexdigest()


def _number(text: str, size: int) -> int:
    return int(_key(text)[:8], 16) % size


STEPS = {"rows": make_rows}
ROUND_STEPS = {"refused": list_refused, "pairs": make_pairs}

if __name__ == "__main__":
    main()
