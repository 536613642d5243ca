"""Configs: what loads, and that every problem is named with its place, its value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bfpo.config import (
    AlignConfig,
    DemoConfig,
    EvaluateConfig,
    GenerateConfig,
    PrepareConfig,
    SftConfig,
    ToyConfig,
    load_config,
)
from bfpo.config.describe import describe_keys
from bfpo.core.errors import ConfigError
from bfpo.core.yaml_text import dump_yaml, parse_yaml

ALIGN = ["model=m", "data.files=a.jsonl"]


def refused(cls, *overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value)


def test_defaults_of_train_are_the_published_settings():
    config = load_config(AlignConfig, None, ALIGN)
    assert (config.method, config.beta, config.alpha, config.safety_weight) == ("bfpo", 0.01, 0.5, 3.0)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (5e-7, "cosine", 0.1)
    assert (config.pairs_per_step, config.max_length, config.num_train_epochs, config.seed) == (32, 1024, 1.0, 42)
    assert config.trainable == ["*.down_proj.weight"]
    assert config.reduction == "sum"


def test_set_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: {files: [a.jsonl], limit: 5}\nbeta: 0.2\n")
    config = load_config(AlignConfig, file, ["beta=0.3", "data.split.held_out=60"])
    assert config.beta == 0.3
    assert config.data.limit == 5
    assert config.data.split is not None
    assert config.data.split.held_out == 60
    assert config.data.files == ["a.jsonl"]


def test_a_key_set_on_top_takes_the_place_of_the_one_that_it_excludes(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("model: m\ndata: {files: a}\ntrainable: all\nnum_train_epochs: 3\n")
    config = load_config(AlignConfig, file, ["max_steps=5", "lora={r: 4}"])
    assert config.max_steps == 5
    assert "trainable" not in config.resolved()
    assert load_config(AlignConfig, file, ["max_steps=null"]).num_train_epochs == 3
    with pytest.raises(ConfigError, match="num_train_epochs: not read where max_steps is set"):
        load_config(AlignConfig, file, ["max_steps=5", "num_train_epochs=2"])


def test_one_path_stands_for_a_list_and_a_path_object_for_text(tmp_path):
    assert load_config(AlignConfig, None, ALIGN).data.files == ["a.jsonl"]
    assert ToyConfig(steps=3).steps == 3
    assert GenerateConfig(model=tmp_path, prompts=tmp_path / "p.txt").prompts == str(tmp_path / "p.txt")


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", ".00001", "+1e-05"])
def test_floats_are_read_as_people_write_them(text):
    assert load_config(AlignConfig, None, [*ALIGN, f"learning_rate={text}"]).learning_rate == 1e-5


def test_unknown_key_names_file_line_and_nearest_key(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata:\n  files: a\n  lmit: 3\nsafety_wieght: 2\nheld_out: 4\nzzz: 1\n")
    text = refused(AlignConfig, path=file)
    assert f"{file}:4: data.lmit: unknown key; did you mean 'data.limit'?" in text
    assert f"{file}:5: safety_wieght: unknown key; did you mean 'safety_weight'?" in text
    assert f"{file}:6: held_out: unknown key; did you mean 'data.split.held_out'?" in text
    assert f"{file}:7: zzz: unknown key; allowed: " in text
    assert len(text.splitlines()) == 4  # all at once


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("beta=0", "--set beta=0: beta: got 0; allowed: a number > 0"),
        ("beta=.nan", "allowed: a number > 0"),
        ("safety_weight=1", "got 1; allowed: a number > 1"),
        ("seed=true", "got True; allowed: a whole number >= 0"),
        ("gradient_checkpointing=1", "got 1; allowed: true or false"),
        ("bf16=true", "bf16: this key is gone; write dtype: bfloat16"),
        ("pairs_per_microbatch=2", "this key is gone; max_tokens_per_microbatch bounds a forward pass in tokens now"),
        ("dtype=float16", "got 'float16'; allowed: float32, bfloat16, float64"),
        ("alpha=no", "got 'no'; allowed: a number"),
        ("max_steps=1.5", "allowed: a whole number >= 1, or null"),
        ("method=dpo", "allowed: bfpo, ipo, dpo_h"),
        ("trainable=some", "allowed: all, or a list of text"),
        ("data=a.jsonl", "data: got 'a.jsonl'; allowed: a section"),
        ("data.files=[]", "data.files: got []"),
        ("lora.r=0", "lora.r: got 0; allowed: a whole number >= 1"),
        ("buffer.limit=3", "--set buffer.limit=3: buffer.files: missing; needed: "),
        ("model.name=3", "model is 'm', not a section"),
        ("beta", "got no key=value"),
        ("a..b=1", "got no key=value"),
        ("model=[", "not valid YAML"),
        ("model={{ x }}", "not valid YAML"),
    ],
)
def test_a_bad_value_is_shown_beside_what_is_allowed(override, words):
    assert words in refused(AlignConfig, *ALIGN, override)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: m\nmodel: n\n", ":2: not valid YAML: the key 'model' is given twice"),
        ("model: [m\nbeta: 1", ":2: not valid YAML"),
        ("- model\n", "a config is a mapping"),
        ("\tmodel: m", "not valid YAML"),
        ("[a, b]: 3\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, content, words):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    text = refused(AlignConfig, path=file)
    assert text.startswith(str(file))
    assert words in text


def test_a_file_that_cannot_be_read(tmp_path):
    assert "No such file" in refused(ToyConfig, path=tmp_path / "none.yaml")
    assert "cannot read" in refused(ToyConfig, path=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe4")
    assert "not UTF-8" in refused(ToyConfig, path=tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("cls", "overrides", "words"),
    [
        (AlignConfig, [*ALIGN, "lora={}", "trainable=all"], "trainable: not read where lora is set"),
        (AlignConfig, [*ALIGN, "max_steps=3", "num_train_epochs=2"], "num_train_epochs: not read where max_steps"),
        (AlignConfig, [*ALIGN, "buffer_weight=2"], "buffer_weight: not read without buffer"),
        (AlignConfig, [*ALIGN, "quantize=nf4"], "quantize: needs lora"),
        (AlignConfig, [*ALIGN, "eval_steps=2"], "eval_steps: not read without eval_data"),
        (AlignConfig, [*ALIGN, "lora={lora_dropout: 0.1}"], "lora_dropout: got 0.1; allowed here: 0"),
        (AlignConfig, [*ALIGN, "reference=adapter_off"], "reference: 'adapter_off' needs lora"),
        (SftConfig, ["data.files=a"], "model, init: exactly one"),
        (SftConfig, ["data.files=a", "model=m", "completions_per_microbatch=5"], "got 5; it must divide"),
        (SftConfig, ["data.files=a", "model=m", "init.tokenizer=t", "init.config={}"], "model, init: exactly one"),
        (SftConfig, ["data.files=a", "init.tokenizer=t", "init.config={}", "lora={}"], "lora: not read where init"),
        (EvaluateConfig, ["data.files=a", "reference=r"], "model: missing; needed: trained model"),
        (EvaluateConfig, ["data.files=a", "model=m"], "reference: missing; needed: frozen reference"),
        (EvaluateConfig, ["model=m", "reference=r"], "data: missing; needed: pairs"),
        (EvaluateConfig, [], "nothing to evaluate"),
        (EvaluateConfig, ["completions=c", "beta=1"], "beta: not a key of 'completions'; it belongs to 'data', "),
        (GenerateConfig, ["model=m", "prompts=p", "temperature=0", "num_completions=2"], "num_completions: got 2"),
    ],
)
def test_keys_that_contradict_one_another(cls, overrides, words):
    assert words in refused(cls, *overrides)


@pytest.mark.parametrize(
    ("cls", "overrides"),
    [
        (AlignConfig, ALIGN),
        (AlignConfig, [*ALIGN, "lora={}", "max_steps=3", "buffer.files=[b]", "chat_template='no'", "revision='1e5'"]),
        (SftConfig, ["data.files=a", "init.tokenizer=t", "init.config={hidden_size: 8}"]),
        (GenerateConfig, ["model=m", "prompts=p"]),
        (EvaluateConfig, ["completions=c"]),
        (EvaluateConfig, ["model=m", "reference=r", "data.files=a"]),
        (DemoConfig, []),
        (ToyConfig, []),
    ],
)
def test_the_resolved_config_loads_as_an_equal_run(tmp_path, cls, overrides):
    config = load_config(cls, None, overrides)
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config.resolved()))
    assert load_config(cls, file).resolved() == config.resolved()


def test_what_a_run_is_about_comes_first():
    assert next(iter(load_config(AlignConfig, None, ALIGN).resolved())) == "model"
    names = [key.name for key in describe_keys(AlignConfig)]
    assert names.index("data.files") < names.index("method") < names.index("weight_decay")


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ToyConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("cls", [AlignConfig, DemoConfig, EvaluateConfig, GenerateConfig, SftConfig, ToyConfig])
def test_every_key_says_what_it_is(cls):
    keys = list(describe_keys(cls))
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert key.description, key.name
        assert key.allowed, key.name
        assert "typing" not in key.allowed, key.name
        assert "<class" not in key.allowed, key.name


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(values)
@example("\x85 \u2028 \u2029 \ufeff \x07")
@example({"<<": "=", "1e5": "1e5", "null": "~", "": " "})
def test_yaml_reads_back_what_it_wrote(value):
    again, _ = parse_yaml(dump_yaml(value))
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e5", 1e5),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text, value):
    parsed, _ = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


MIXTURE = """
sources:
  - {name: a, files: [a.jsonl]}
  - name: b
    count: -1
    cout: 3
"""


def test_problems_in_a_list_of_sections_have_their_place(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(MIXTURE)
    with pytest.raises(ConfigError) as error:
        load_config(PrepareConfig, path)
    assert str(error.value).splitlines() == [
        f"{path}:5: sources[1].count: got -1; allowed: a whole number >= 1, or null",
        f"{path}:6: sources[1].cout: unknown key; did you mean 'sources[].count'?",
    ]


def test_an_item_of_a_list_can_be_set(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(MIXTURE.replace("-1", "1").replace("cout: 3", "files: b.jsonl"))
    config = load_config(PrepareConfig, path, ["sources[1].count=7", "sources[0].files[0]=c.jsonl"])
    assert (config.sources[1].count, config.sources[0].count, config.sources[0].files) == (7, None, ["c.jsonl"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sources[2].count=1", "for an item of a list of 2"),
        ("sources.count=1", "for an item of a list of 2"),
        ("sources[0].name[0]=x", "sources\\[0\\].name is 'a', not a section"),
        ("seed[0]=1", "is an item of a list, and there is a section"),
        ("sources[a].count=1", "got no key=value"),
    ],
)
def test_a_setting_that_misses_a_list_is_refused(tmp_path, setting, message):
    path = tmp_path / "data.yaml"
    path.write_text(MIXTURE)
    with pytest.raises(ConfigError, match=message):
        load_config(PrepareConfig, path, [setting])
