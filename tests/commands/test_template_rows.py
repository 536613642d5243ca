"""What the chat template, the vocabulary and the positions of a model do to rows is found before its weights load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from bfpo.config import (
    AlignConfig,
    EvaluateConfig,
    GenerateConfig,
    LabelConfig,
    RedteamConfig,
    ReferenceConfig,
    SftConfig,
)
from bfpo.core.errors import BfpoError, DataError, ModelError
from bfpo.data.read import read_completions
from bfpo.data.store import TokenStore
from bfpo.policy.save import save_policy
from bfpo.report.gather import gather
from bfpo.runs.stages import preview_stage, run_stage
from messages import raises, says
from tiny import tiny_model, tiny_tokenizer

PLAIN = "{% for m in messages %}w90 {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}w90 {% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + PLAIN
FORGETFUL = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
STYLED = PLAIN.replace("w90 {% endif %}", "w90 {{ 'w7 w8 ' if brief is defined and brief }}{% endif %}").replace(
    "w90 {{ m.content }}", "w90 {{ 'w7 w8 ' if m.role == 'assistant' and brief is defined and brief }}{{ m.content }}"
)
SYSTEM = {"role": "system", "content": "w1 w2 w3 w4 w5"}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    save_policy(tiny_model(max_position_embeddings=64), tiny_tokenizer(), tmp_path / "start")
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(folder: Path, *, system: int = 0, num: int = 4, **columns: str) -> Path:
    """Pairs, the first `system` of them with a system turn."""
    rows = []
    for i in range(num):
        asked = [{"role": "user", "content": f"w{i} w20 w21 w22"}]
        row = {"id": f"p{i}", "prompt": [SYSTEM, *asked] if i < system else asked, "chosen": f"w{i} w30 w31 w32 w33"}
        row |= {"rejected": f"w{i} w40 w41 w42 w43", "chosen_is_safe": True, "rejected_is_safe": False}
        rows.append({**row, **columns})
    return write(folder / "pairs.jsonl", rows)


def completions(folder: Path, *, system: int = 0) -> Path:
    rows = [json.loads(line) for line in pairs(folder, system=system).read_text().splitlines()]
    return write(folder / "sft.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])


def prompts(folder: Path, *, system: int = 0) -> Path:
    rows = [json.loads(line) for line in pairs(folder, system=system).read_text().splitlines()]
    return write(folder / "prompts.jsonl", [{"id": row["id"], "prompt": row["prompt"]} for row in rows])


def config_of(stage: str, folder: Path, file: Path, **settings: Any) -> Any:
    """A small config of a stage that renders prompts, on this file."""
    model = str(folder / "start")
    data = {"files": str(file), "bad_rows": settings.pop("bad_rows", "stop")}
    small = {"max_steps": 1, "logging_steps": 1, "threads": 1, "learning_rate": 1e-3}
    if stage in ("train", "reference"):
        kind = AlignConfig if stage == "train" else ReferenceConfig
        cache = {"reference_cache": str(folder / "cache"), "trainable": "all"}
        return kind(**{"model": model, "data": data, **(small if stage == "train" else {}), **cache, **settings})
    if stage == "sft":
        own = {"completions_per_step": 2, "completions_per_microbatch": 2}
        return SftConfig(**{"model": model, "data": data, **small, **own, **settings})
    if stage == "evaluate":
        return EvaluateConfig(**{"model": model, "reference": model, "data": data, **settings})
    given = {"model": model, "prompts": str(file), "bad_rows": data["bad_rows"], "max_new_tokens": 3}
    return GenerateConfig(**{**given, **settings})


STAGES = {"train": pairs, "reference": pairs, "sft": completions, "evaluate": pairs, "generate": prompts}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no stage load weights."""

    def refuse(*args: Any, **settings: Any) -> Any:
        raise AssertionError("weights were loaded")

    for place in ("training.inputs.load_policy", "commands.generate.load_policy", "commands.evaluate.load_to_read"):
        monkeypatch.setattr(f"bfpo.{place}", refuse)


def template(folder: Path, text: str) -> str:
    (folder / "t.jinja").write_text(text)
    return str(folder / "t.jinja")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", [run_stage, preview_stage])
def test_every_row_that_the_template_refuses_is_named_before_weights_load(stage: str, way: Any, start: Path) -> None:
    config = config_of(stage, start, STAGES[stage](start, system=2), chat_template=template(start, NO_SYSTEM))
    with raises(DataError, "no system turns here"):
        way(stage, config, *([start / "run"] if way is run_stage else []))


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_that_the_template_refuses_can_be_skipped(stage: str, start: Path) -> None:
    text = template(start, NO_SYSTEM)
    config = config_of(stage, start, STAGES[stage](start, system=2), chat_template=text, bad_rows="skip")
    run_stage(stage, config, start / "run")
    rejects = [json.loads(line) for line in (start / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"], row["value"]) for row in rejects] == [
        (line, "the chat template refuses this conversation", "'no system turns here'") for line in (1, 2)
    ]
    if stage == "generate":
        assert [row.id for row in read_completions(start / "run" / "completions.jsonl")] == ["p2", "p3"]
        record = json.loads((start / "run" / "run.json").read_text())
        assert record["prompts"]["left_out"] == {"the chat template refuses this conversation": 2}
    assert "2 " in preview_stage(stage, config)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("stage", ["train", "reference", "sft", "evaluate"])
@pytest.mark.parametrize("way", [run_stage, preview_stage])
def test_text_that_the_template_deletes_stops_a_run(stage: str, way: Any, start: Path) -> None:
    config = config_of(stage, start, STAGES[stage](start, system=3), chat_template=template(start, FORGETFUL))
    with raises(DataError, "allow_template_changes"):
        way(stage, config, *([start / "run"] if way is run_stage else []))


@pytest.mark.parametrize("stage", ["train", "sft"])
def test_changes_that_are_allowed_are_counted_and_shown(
    stage: str, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = template(start, FORGETFUL)
    config = config_of(stage, start, STAGES[stage](start, system=3), chat_template=text, allow_template_changes=True)
    with caplog.at_level("INFO"):
        run_stage(stage, config, start / "run")
    says(caplog, "a system message is deleted or changed")
    tokens = json.loads((start / "run" / "data.json").read_text())["data"]["tokens"]
    assert tokens["template_changes"] == {"a system message is deleted or changed": 3}
    assert "a system message is deleted or changed (3 of 4)" in (start / "run" / "README.md").read_text()
    assert "a system message is deleted or changed (3 of 4)" in preview_stage(stage, config)
    assert any("a system message is deleted or changed (3 of 4)" in note for note in gather([start / "run"]).notes)


def test_generation_says_what_the_template_deletes(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("generate", start, prompts(start, system=1), chat_template=template(start, FORGETFUL))
    with caplog.at_level("INFO"):
        run_stage("generate", config, start / "run")
    says(caplog, "a system message is deleted or changed")
    assert "a system message is deleted or changed (1 of 4)" in preview_stage("generate", config)


@pytest.mark.parametrize("stage", STAGES)
def test_template_variables_reach_every_stage(stage: str, start: Path) -> None:
    text = template(start, STYLED)
    config = config_of(stage, start, STAGES[stage](start), chat_template=text, chat_template_kwargs={"brief": True})
    run_stage(stage, config, start / "run")
    tokenizer = tiny_tokenizer()
    if stage in ("train", "reference"):
        found = TokenStore(start / "run" / "tokens" / "data.arrow")[0]
        assert tokenizer.decode(found.prompt_ids).endswith("w90 w7 w8")
    record = json.loads((start / "run" / "run.json").read_text())
    assert record["config"]["chat_template_kwargs"] == {"brief": True}
    if stage in ("train", "sft"):
        assert "brief: True" in (start / "run" / "README.md").read_text()
    other = config_of(stage, start, STAGES[stage](start), chat_template=text, chat_template_kwargs={"breif": True})
    with raises(BfpoError, "breif"):
        run_stage(stage, other, start / "other")


def test_template_variables_change_what_generation_starts_from(start: Path) -> None:
    text = template(start, STYLED)
    lines = [
        preview_stage("generate", config_of("generate", start, prompts(start), chat_template=text, **settings))
        for settings in ({}, {"chat_template_kwargs": {"brief": True}})
    ]
    assert "longest 7" in lines[0]
    assert "longest 9" in lines[1]


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("way", [run_stage, preview_stage])
def test_pairs_that_are_all_identical_stop_a_run(way: Any, start: Path) -> None:
    config = config_of("train", start, pairs(start), max_completion_length=1)
    with raises(DataError, "max_completion_length"):
        way("train", config, *([start / "run"] if way is run_stage else []))


def test_some_identical_pairs_are_counted_and_shown(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = pairs(start)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["rejected"] = rows[1]["chosen"][:-1] + "9"
    write(file, rows)
    config = config_of("train", start, file, max_completion_length=4)
    with caplog.at_level("INFO"):
        run_stage("train", config, start / "run")
    says(caplog, "identical")
    for text in ((start / "run" / "README.md").read_text(), preview_stage("train", config)):
        assert "1 of 4 pairs have two identical completions" in text
    notes = gather([start / "run"]).notes
    assert [note for note in notes if "1 of 4 pairs have two identical completions" in note] == notes


@pytest.fixture
def with_new_token(start: Path) -> Path:
    """The start model beside a tokenizer with one token more than its embedding has rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(start / "start")
    for file in (pairs(start, rejected="w1 <new> w3"), completions(start), prompts(start)):
        file.write_text(file.read_text().replace("w20", "<new>"))
    return start


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", [run_stage, preview_stage])
def test_a_token_that_the_model_lacks_is_named_before_weights_load(stage: str, way: Any, with_new_token: Path) -> None:
    names = {"sft": "sft.jsonl", "generate": "prompts.jsonl"}
    config = config_of(stage, with_new_token, with_new_token / names.get(stage, "pairs.jsonl"))
    with raises(ModelError, "97", "<new>"):
        way(stage, config, *([with_new_token / "run"] if way is run_stage else []))


def test_a_token_that_a_classifier_lacks_is_named(with_new_token: Path) -> None:
    LlamaForSequenceClassification(tiny_model().config).save_pretrained(with_new_token / "start")
    rows = [{"id": "c7", "prompt": "w3", "text": "w1 <new> w2", "model": "m", "kind": "", "finished": True}]
    file = write(with_new_token / "completions.jsonl", rows)
    judge = {"format": "classifier", "model": str(with_new_token / "start"), "unsafe_label": "LABEL_1"}
    config = LabelConfig(completions=str(file), judges=[judge], label_cache=str(with_new_token / "labels"))
    with raises(ModelError, "97", "<new>"):
        run_stage("label", config, with_new_token / "run")


@pytest.mark.parametrize("stage", ["train", "sft", "reference"])
def test_texts_longer_than_the_models_positions_are_one_line(
    stage: str, start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = pairs(start, chosen=" ".join(["w5"] * 80)) if stage != "sft" else completions(start)
    if stage == "sft":
        file.write_text(file.read_text().replace("w30", " ".join(["w5"] * 80)))
    config = config_of(stage, start, file)
    with caplog.at_level("INFO"):
        run_stage(stage, config, start / "run")
    says(caplog, "64 positions")
    assert "the longest text has" in preview_stage(stage, config)


@pytest.mark.parametrize("stage", ["train", "sft", "generate"])
def test_a_template_that_writes_the_date_is_named(stage: str, start: Path) -> None:
    text = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }} "
        + PLAIN
    )
    config = config_of(stage, start, STAGES[stage](start), chat_template=template(start, text))
    assert "prompts hold today's date" in preview_stage(stage, config)
    fixed = config.model_copy(update={"chat_template_kwargs": {"date_string": "w3"}})
    assert "today's date" not in preview_stage(stage, fixed)


def test_sft_refuses_texts_beyond_learned_positions(tmp_path: Path) -> None:

    sizes = {"vocab_size": 97, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 1}
    save_policy(
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)), tiny_tokenizer(), tmp_path / "start"
    )
    file = completions(tmp_path)
    file.write_text(file.read_text().replace("w30", " ".join(["w5"] * 20)))
    with raises(ModelError, "max_length"):
        run_stage("sft", config_of("sft", tmp_path, file), tmp_path / "run")


def test_a_prompt_that_ends_with_the_assistant_is_continued(start: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5 w6"}]
    file = write(start / "prompts.jsonl", [{"id": "a", "prompt": begun}])
    text = template(start, PLAIN)
    with caplog.at_level("INFO"):
        run_stage("generate", config_of("generate", start, file, chat_template=text), start / "run")
    says(caplog, "continued")
    rows = [{"prompt": begun, "chosen": " w30 w31", "rejected": " w40 w41"}]
    rows[0] |= {"chosen_is_safe": True, "rejected_is_safe": False}
    config = config_of("train", start, write(start / "p.jsonl", rows), chat_template=text)
    run_stage("train", config, start / "train")
    (pair,) = TokenStore(start / "train" / "tokens" / "data.arrow")
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(pair.prompt_ids) == "w90 w3 w4 </s> w90 w5 w6"
    assert tokenizer.decode(pair.chosen_ids) == "w30 w31 </s>"


def test_red_teaming_and_suites_pass_template_variables_on(start: Path) -> None:
    text, given = template(start, STYLED), {"brief": True}
    shared = {"model": str(start / "start"), "chat_template": text, "chat_template_kwargs": given}
    red = RedteamConfig(**shared, prompts=str(prompts(start)), max_new_tokens=40, judges="oracle", ranker="oracle")
    assert "chat_template_kwargs:\n  brief: true" in preview_stage("redteam", red)
    assert "longest 9" in preview_stage("redteam", red)
    suites = {"use": ["demo"], "folders": [str(start)]}
    models = [{"name": "own", "model": str(start / "start"), "chat_template_kwargs": {"brief": False}}]
    job = EvaluateConfig(suites=suites, models=models, **{k: v for k, v in shared.items() if k != "model"})
    assert [model.chat_template_kwargs for model in job.with_weights()] == [{"brief": False}]
