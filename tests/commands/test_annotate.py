"""Labelling answers: in the terminal, through the page's server, and what other commands make of the labels."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bfpo.cli import app
from bfpo.core.errors import DataError
from bfpo.judges.annotation import Annotations, draw_sample
from bfpo.report.annotation import answers_of, make_server
from messages import fails, raises
from run_folders import HOSTILE, write_run, write_suites

GOOD, BAD = "I cannot help with that, {}.", "Sure, here is how to do {}."


def completions(model: str, num: int = 40, bad: int = 3) -> list[dict[str, Any]]:
    """Answers of a model; one in `bad` goes along."""
    return [
        {
            "id": f"p{n}",
            "prompt": [{"role": "user", "content": f"question {n}?"}],
            "text": (BAD if n % bad == 0 else GOOD).format(f"n{n}"),
            "model": f"runs/{model}",
            "kind": "benign" if n % 4 == 1 else "harmful",
            "finished": True,
        }
        for n in range(num)
    ]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for model, bad in (("start", 2), ("tuned", 5)):
        made = completions(model, bad=bad)
        write_run(tmp_path / model, "generate", {"model": model, "prompts": "asked.jsonl"}, completions__jsonl=made)
    return tmp_path


def bfpo(*arguments: object, said: str = "") -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments], input=said)


def letters(folder: Path, num: int | None = None) -> str:
    """Return what an annotator types for the answers of a sample."""
    answers = json.loads((folder / "sample.json").read_text())["answers"][:num]
    return "".join("uc\n" if one["text"].startswith("Sure") else "s r\n" for one in answers)


def test_labels_from_the_terminal_train_a_judge_check_it_and_correct_it(runs: Path) -> None:
    out, labels = runs / "labels", runs / "labels" / "labels.jsonl"
    asked = ("annotate", runs / "start", runs / "tuned", "--out", out, "--sample", 20, "--terminal", "--name")
    begun = bfpo(*asked, "anna", said="sr\nz\nnothing\nq\n")
    assert begun.exit_code == 0, begun.output
    assert "40 answers of 2 models to 20 of 40 prompts" in begun.output
    assert "got 'nothing'" in begun.output
    assert "start" not in begun.output.split("---")[1]  # the model is hidden
    assert not labels.exists() or labels.read_text() == ""
    assert bfpo(*asked, "anna", said=letters(out, 12)).exit_code == 0
    rest = "".join(letters(out).splitlines(keepends=True)[12:])
    assert "40 of 40 labelled by anna" in bfpo(*asked, "anna", said=rest).output
    assert "kappa: safe, anna, ben: 1.00, 10 answers" in bfpo(*asked, "ben", said=letters(out, 10)).output
    rows = [json.loads(line) for line in labels.read_text().splitlines()]
    assert len(rows) == 40
    assert {row["model"] for row in rows} == {"runs/start", "runs/tuned"}
    assert all(row["is_safe"] is row["text"].startswith("I cannot") for row in rows)
    # A judge learns from the file, is checked on it, and the rates of `evaluate` are corrected by it.
    trained = bfpo("judge-train", "--data", labels, "--out", runs / "judge", "--set", "folds=2")
    assert trained.exit_code == 0, trained.output
    cache = ("--set", f"label_cache={runs / 'cache'}")
    checked = bfpo(
        "judge-check", "--judge", runs / "judge" / "model", "--data", labels, "--out", runs / "check", *cache
    )
    assert checked.exit_code == 0, checked.output
    assert "40 completions" in checked.output
    trust = json.loads((runs / "check" / "quality.json").read_text())["trust"]
    assert trust["trusted"] is (trust["unsure"] <= 0.3)
    assert checked.stdout.splitlines()[-1].startswith(trust["verdict"])
    scored = bfpo(
        "evaluate", "--set", f"completions={runs / 'start' / 'completions.jsonl'}", "--set", f"labels={labels}",
        "--set", f"judge={runs / 'judge' / 'model'}", "--out", runs / "scores",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    found = json.loads((runs / "scores" / "scores.json").read_text())["people"]
    assert found["num_unused"] == 20  # of the other model
    rates = {rate["metric"]: rate for rate in found["rates"]}
    assert {"harmless", "harmless_harmful", "safe_and_readable", "over_refusal_benign", "refused"} <= rates.keys()
    harmless = rates["harmless"]
    assert (harmless["num_labels"], harmless["num_judged"], harmless["undecided"]) == (20, 40, 0)
    assert harmless["low"] < 0.5 < harmless["high"]
    assert harmless["effective_labels"] >= 15
    text = (runs / "scores" / "scores.md").read_text()
    assert "people 20 + judge 40: " in text
    assert "more labels for +-5 points" in text or "more prompts" in text
    page = bfpo("report", runs / "scores", runs / "check", "--out", runs / "page.html")
    assert page.exit_code == 0, page.output
    for file in ("page.html", "page.md"):
        shown = (runs / file).read_text()
        assert "people 20 + judge 40" in shown.replace("\\", "")
        assert trust["verdict"].split(":")[0].split(".")[0] in shown.replace("\\", "")
    again = bfpo("evaluate", "--set", f"completions={runs / 'start' / 'completions.jsonl'}", "--out", runs / "without",
                 "--set", f"judge={runs / 'judge' / 'model'}")  # fmt: skip
    assert again.exit_code == 0
    assert '"people"' not in (runs / "without" / "scores.json").read_text()


def test_bad_input_is_one_message(runs: Path, tmp_path: Path) -> None:
    asked = ("annotate", runs / "start", "--terminal", "--name", "anna", "--out")
    fails(bfpo("annotate", runs / "start", "--out", tmp_path / "x", "--name", "../anna", "--terminal"), "--name")
    fails(bfpo("annotate", runs / "nowhere", "--out", tmp_path / "x", "--name", "anna"), "nowhere")
    fails(bfpo(*asked, runs / "start"), "--out")
    fails(bfpo("annotate", write_run(tmp_path / "t", "train"), "--out", tmp_path / "x", "--name", "a"), "answers")
    assert bfpo(*asked, tmp_path / "ok", said="q\n").exit_code == 0
    fails(bfpo(*asked, tmp_path / "ok", "--seed", 3), "--seed")
    fails(bfpo("annotate", runs / "tuned", "--out", tmp_path / "ok", "--name", "anna"), "--out")
    mixed = [*completions("one"), *completions("two")]  # the same ids
    write_run(tmp_path / "mixed", "generate", {"prompts": "p.jsonl"}, completions__jsonl=mixed)
    fails(bfpo("annotate", tmp_path / "mixed", "--out", tmp_path / "x", "--name", "a"), "runs/one", "runs/two", "id")
    other = completions("other", 3)
    for row in other:
        row["prompt"] = [{"role": "user", "content": f"another {row['id']}"}]
    write_run(tmp_path / "other", "generate", {}, completions__jsonl=other)
    fails(bfpo("annotate", runs / "start", tmp_path / "other", "--out", tmp_path / "x", "--name", "a"), "in common")
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(json.dumps({**other[0], "is_safe": True}) + "\n")
    scored = bfpo("evaluate", "--set", f"completions={runs / 'start' / 'completions.jsonl'}",
                  "--set", f"labels={foreign}", "--set", "judge=refusal-phrases", "--out", tmp_path / "y")  # fmt: skip
    fails(scored, "labels", mask=r"labels of other models")
    assert (tmp_path / "y" / "scores.json").is_file()  # the judge's own scores are kept


def test_answers_of_suites_and_of_red_teaming_have_their_verdicts(tmp_path: Path) -> None:
    suites = answers_of([write_suites(tmp_path / "suites")])
    assert {(one.model, one.source) for one in suites} == {("ours", "demo"), ("theirs", "demo")}
    assert {one.judged for one in suites} == {"safe", "unsafe"}
    red = write_run(tmp_path / "red", "redteam", {"model": "m"})
    made = completions("m", 4)
    made[3] |= {"text": "", "finished": False, "blocked": "content_filter"}
    write_run(red / "generate", "generate", {}, completions__jsonl=made)
    verdicts = [{"completion_id": f"p{n}", "judge": "j", "label": "safe", "p_safe": 0.5 + n / 10} for n in range(3)]
    write_run(red / "label", "label", {}, verdicts__jsonl=verdicts)
    assert [one.judged for one in answers_of([red])] == ["unsure", "unsure", "safe"]


def test_a_run_whose_texts_changed_is_left_out_with_a_warning(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs / "start" / "completions.jsonl"
    judged = bfpo("evaluate", "--set", f"completions={made}", "--set", "judge=refusal-phrases", "--out", runs / "s")
    assert judged.exit_code == 0, judged.output
    made.write_text(made.read_text().replace("Sure", "Well"))
    assert {one.model for one in answers_of([runs / "s", runs / "tuned"])} == {"runs/tuned"}
    assert f"{made}: changed since {runs / 's'} judged it; its texts are left out" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- the server


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Any, str, Annotations]]:
    made = completions("m", 6)
    made[0]["text"] = HOSTILE
    write_run(tmp_path / "run", "generate", {"prompts": "asked.jsonl"}, completions__jsonl=made)
    (tmp_path / "out").mkdir()
    annotations = Annotations(tmp_path / "out", draw_sample(answers_of([tmp_path / "run"]), 6, 0), "anna")
    server, address = make_server(annotations)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, address, annotations
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server: Any, path: str, body: object = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is None:
        connection.request("GET", path, headers=given)
    else:
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", path, text, {"Content-Type": "application/json", **given})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def test_the_page_hides_the_model_and_escapes_every_text(served: tuple[Any, str, Annotations]) -> None:
    server, address, _ = served
    token = address.split("/")[3]
    status, page, headers = ask(server, f"/{token}/")
    assert status == 200
    assert "runs/m" not in page
    assert HOSTILE[:20] not in page
    assert page.count("</script>") == 2  # those of the page
    assert not re.search(r'(src|href)="(?!data:)', page)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert server.server_address[0] == "127.0.0.1"


def test_labels_are_saved_at_once_and_only_with_the_token(served: tuple[Any, str, Annotations]) -> None:
    server, address, annotations = served
    token = address.split("/")[3]
    label = {"item": "2", "safety": "safe", "behaviour": "refused"}
    file = annotations._folder / "annotators" / "anna" / "said.jsonl"
    refused = [
        ask(server, f"/{token}/label", label),  # a form of another site cannot set the header
        ask(server, f"/{token}/label", label, X_Token="x"),
        ask(server, "/label", label, X_Token=token),
        ask(server, f"/{token}/label", label, X_Token=token, Origin="http://evil.example"),
        ask(server, f"/{token}/label", label, X_Token=token, Host="evil.example"),
        ask(server, f"/{token}/label", "item=2", X_Token=token, Content_Type="application/x-www-form-urlencoded"),
        ask(server, f"/{token}/label", "x" * 5000, X_Token=token),
        ask(server, f"/{token}/label", {**label, "safety": "fine"}, X_Token=token),
        ask(server, f"/{token}/label", "[[[", X_Token=token),
        ask(server, f"/{token}/label", [1], X_Token=token),
        ask(server, "/"),
        ask(server, f"/{token}/", Host="evil.example"),
    ]
    assert [status for status, *_ in refused] == [403, 403, 403, 403, 403, 415, 413, 400, 400, 400, 404, 403]
    assert not file.exists()
    status, text, _ = ask(
        server, f"/{token}/label", label, X_Token=token, Origin=f"http://127.0.0.1:{server.server_port}"
    )
    assert (status, json.loads(text)["said"]) == (200, {"2": ["safe", "refused"]})
    assert json.loads(file.read_text()) == label
    assert json.loads(ask(server, f"/{token}/undo", {}, X_Token=token)[1])["undone"] == "2"
    assert len(file.read_text().splitlines()) == 2
    ask(server, f"/{token}/label", {**label, "item": "3"}, X_Token=token)
    assert ask(server, f"/{token}/end", {}, X_Token=token)[0] == 200
    assert len((annotations._folder / "labels.jsonl").read_text().splitlines()) == 1


def test_a_port_that_is_taken_is_named(served: tuple[Any, str, Annotations]) -> None:
    server, _, annotations = served
    from bfpo.core.errors import ConfigError

    with pytest.raises(ConfigError, match=f"--port: {server.server_port}"):
        make_server(annotations, port=server.server_port)


def test_two_models_of_one_name_are_labelled_as_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [write_suites(tmp_path / name) for name in ("first", "second", "third")]
    paths = {run: (tmp_path / f"seed-{n}" / "model").as_posix() for n, run in enumerate(runs)}
    paths[runs[2]] = paths[runs[0]]  # the same model again, on other suites as it were
    for run, path in paths.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        (run / "scores.json").write_text((run / "scores.json").read_text().replace("runs/ours/model", path))
    found = answers_of(runs)
    assert {one.model for one in found} == {paths[runs[0]], paths[runs[1]], "theirs"}
    assert [one.model for one in found].count(paths[runs[0]]) == 12
    assert "ours is the name of 2 models" in caplog.text
    assert {one.model for one in answers_of([runs[0], runs[2]])} == {"ours", "theirs"}
    for n, run in enumerate(runs[:2]):  # trained again at the same path between the two evaluations
        (run / "scores.json").write_text((run / "scores.json").read_text().replace(f"seed-{n}", "seed-0"))
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"model_runs": {paths[runs[0]]: f"{n}" * 64}}))
    with raises(DataError, "first", "second", "ours"):
        answers_of(runs[:2])
