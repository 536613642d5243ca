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
    RedteamConfig,
    SftConfig,
    ToyConfig,
    load_config,
    read_template,
)
from bfpo.config.describe import describe_keys
from bfpo.config.load import _apply_override
from bfpo.core.errors import ConfigError
from bfpo.core.yaml_text import dump_yaml, parse_yaml
from bfpo.runs.stages import STAGES
from messages import raises

ALIGN = ["model=m", "data.files=a.jsonl"]


def refused(cls, overrides, *keys: str | None, path: Path | None = None) -> None:
    with raises(ConfigError, *keys):
        load_config(cls, path, overrides)


def test_defaults_of_train_are_the_published_settings():
    config = load_config(AlignConfig, None, ALIGN)
    assert (config.method, config.beta, config.alpha, config.safety_weight) == ("bfpo", 0.01, 0.5, 3.0)
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (5e-7, "cosine", 0.1)
    assert (config.pairs_per_step, config.max_length, config.num_train_epochs, config.seed) == (32, 1024, 1.0, 42)
    assert config.trainable == ["*.down_proj.weight"]
    assert config.reduction == "sum"


@pytest.mark.parametrize(
    ("cls", "override", "key"),
    [
        (EvaluateConfig, "suites.each.everyday.limit=0", "suites.each.everyday.limit"),
        (EvaluateConfig, "suites.each.everyday.limt=3", "suites.each.everyday.limit"),
        (EvaluateConfig, "suites.each.everyday=3", "suites.each.everyday"),
        (EvaluateConfig, "suites.each.everyday.split.parts.a=x", "suites.each.everyday.split.parts.a"),
        (EvaluateConfig, "suites.judges.harm.batch_size=0", "suites.judges.harm.batch_size"),
        (AlignConfig, "data.split.parts.test=many", "data.split.parts.test"),
        (AlignConfig, "data.columns.prompt=3", "data.columns.prompt"),
        (AlignConfig, "data.split.parts=3", "data.split.parts"),
    ],
)
def test_a_value_below_a_name_that_the_user_chose_is_named(cls, override, key):
    model = ["models=[{name: a, model: m}]", "suites.use=demo"] if cls is EvaluateConfig else ALIGN
    more = ["suites.judges.harm.format=refusals"] if "judges" in override else []
    refused(cls, [*model, *more, override], key)


def test_a_value_below_a_chosen_name_has_its_line(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("models:\n- {name: a, model: m}\nsuites:\n  use: demo\n  each:\n    xstest:\n      limit: 0\n")
    refused(EvaluateConfig, [], f"{file}:7: suites.each.xstest.limit: got 0; allowed: a whole number >= 1", path=file)


def test_a_constant_schedule_may_say_that_it_has_no_warm_up():
    constant = [*ALIGN, "lr_scheduler_type=constant"]
    config = load_config(AlignConfig, None, constant)
    assert AlignConfig.model_validate(config.resolved()) == config  # where the default stands
    assert load_config(AlignConfig, None, [*constant, "warmup_steps=0"]).resolved()["warmup_steps"] == 0
    assert load_config(AlignConfig, None, [*ALIGN, "lr_scheduler_type=constant_with_warmup", "warmup_steps=20"])


def test_harmful_prompts_of_a_red_teaming_need_judges_and_a_ranker():
    config = load_config(RedteamConfig, None, ["model=m", "harmless=h.jsonl"])
    assert not {"judges", "ranker", "columns", "label_cache"} & set(config.resolved())
    assert RedteamConfig.model_validate(config.resolved()) == config
    refused(RedteamConfig, ["model=m", "harmless=h.jsonl", "prompts=p.jsonl"], "judges", "ranker")


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
    with raises(ConfigError, "num_train_epochs"):
        load_config(AlignConfig, file, ["max_steps=5", "num_train_epochs=2"])
    file.write_text("model: m\ndata: {files: a}\nwarmup_steps: 50\n")
    assert load_config(AlignConfig, file, ["lr_scheduler_type=cosine"]).warmup_steps == 50
    assert load_config(AlignConfig, file, ["lr_scheduler_type=constant"]).warmup_steps != 50  # as of a grid of both
    with raises(ConfigError, "warmup_steps"):
        load_config(AlignConfig, file, ["lr_scheduler_type=constant", "warmup_steps=20"])


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["buffer=null", "buffer_weight=null"], {"buffer": None, "buffer_weight": 1.0}),
        (["buffer_weight=null", "buffer=null", "buffer.limit=null"], {"buffer": None, "buffer_weight": 1.0}),
        (["method=dpo_h", "alpha=null", "safety_weight=null"], {"method": "dpo_h", "alpha": 0.5, "safety_weight": 3.0}),
        (["reference=swap", "reference_cache=null"], {"reference": "swap", "reference_cache": None}),
        (["lora.r=null", "eval_data.limit=null"], {"eval_data": None}),
    ],
)
def test_null_takes_a_key_of_the_file_back_to_its_default_with_what_belongs_to_it(tmp_path, overrides, changed):
    file = tmp_path / "train.yaml"
    file.write_text(
        "model: m\ndata: {files: a}\nbuffer: {files: b}\nbuffer_weight: 2\nreference_cache: c\nmethod: bfpo\n"
        "alpha: 0.3\nsafety_weight: 2\nlora: {r: 4}\n"
    )
    config = load_config(AlignConfig, file, overrides)
    assert {key: getattr(config, key) for key in changed} == changed
    assert config.lora.r == (16 if "lora.r=null" in overrides else 4)


def test_a_key_of_the_file_that_is_no_longer_read_is_named_with_its_line_and_the_way_out(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("model: m\ndata: {files: a}\nbuffer: {files: b}\nbuffer_weight: 2\n")
    refused(AlignConfig, ["buffer=null"], f"{file}:4: buffer_weight", "--set buffer_weight=null", path=file)
    refused(AlignConfig, ["buffer=null", "buffer_weight=3"], "buffer_weight", path=file)


@pytest.mark.parametrize("override", ["data.files=null", "model=null", "buffr=null", "data.lmit=null"])
def test_null_for_a_key_without_a_default_or_an_unknown_one_is_refused(override):
    refused(AlignConfig, [*ALIGN, override], override.partition("=")[0])


@pytest.mark.parametrize("stage", STAGES)
def test_null_leaves_out_every_key_that_has_a_default(stage):
    cls = STAGES[stage].config_class()
    for key in describe_keys(cls):
        *steps, leaf = key.name.split(".")
        section: dict = {leaf: "of the file"}
        values = section
        for step in reversed(steps):
            values = {step.removesuffix("[]"): [values] if step.endswith("[]") else values}
        _apply_override(cls, values, {}, f"{key.name.replace('[]', '[0]')}=null")
        # Null stays where it is a value beside another default, such as that of save_total_limit.
        kept = key.default is None or (key.default != "null" and key.allowed.endswith("or null"))
        assert section == ({leaf: None} if kept else {}), key.name


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
    lines = (f"{file}:4: data.lmit", f"{file}:5: safety_wieght", f"{file}:6: held_out", f"{file}:7: zzz")
    refused(AlignConfig, [], *lines, "data.limit", "safety_weight", "data.split.held_out", path=file)  # all at once


def test_a_dotted_key_in_a_file_is_shown_as_a_section(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata:\n  files: a\n  split.held_out: 3\nlora.r: 2\n")
    refused(AlignConfig, [], f"{file}:4: data.split.held_out", "split: {held_out: ...}", "lora: {r: ...}", path=file)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("beta=0", "beta"),
        ("beta=.nan", "beta"),
        ("safety_weight=1", "safety_weight"),
        ("seed=true", "seed"),
        ("seed=4294967296", "seed"),
        ("gradient_checkpointing=1", "gradient_checkpointing"),
        ("bf16=true", "bf16"),
        ("pairs_per_microbatch=2", "pairs_per_microbatch"),
        ("dtype=float16", "dtype"),
        ("alpha=no", "alpha"),
        ("max_steps=1.5", "max_steps"),
        ("method=dpo", "method"),
        ("trainable=some", "trainable"),
        ("report_to=all", "report_to"),
        ("data=a.jsonl", "data"),
        ("data.files=[]", "data.files"),
        ("lora.r=0", "lora.r"),
        ("buffer.limit=3", "buffer.files"),
        ("model.name=3", "model"),
        ("beta", "--set beta"),
        ("a..b=1", "--set a..b=1"),
        ("model=[", "--set model=["),
        ("model={{ x }}", "--set model={{ x }}"),
    ],
)
def test_a_bad_value_is_shown_beside_what_is_allowed(override, key):
    refused(AlignConfig, [*ALIGN, override], key)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("model: m\nmodel: n\n", "c.yaml:2"),
        ("model: [m\nbeta: 1", "c.yaml:2"),
        ("- model\n", "c.yaml"),
        ("\tmodel: m", "c.yaml"),
        ("[a, b]: 3\n", "c.yaml"),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path, content, place):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    refused(AlignConfig, [], place, path=file)


def test_a_file_that_cannot_be_read(tmp_path):
    refused(ToyConfig, [], "none.yaml", path=tmp_path / "none.yaml")
    refused(ToyConfig, [], str(tmp_path), path=tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe4")
    refused(ToyConfig, [], "latin.yaml", path=tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("cls", "overrides", "key"),
    [
        (AlignConfig, [*ALIGN, "lora={}", "trainable=all"], "trainable"),
        (AlignConfig, [*ALIGN, "max_steps=3", "num_train_epochs=2"], "num_train_epochs"),
        (AlignConfig, [*ALIGN, "buffer_weight=2"], "buffer_weight"),
        (AlignConfig, [*ALIGN, "quantize=nf4"], "quantize"),
        (AlignConfig, [*ALIGN, "eval_steps=2"], "eval_steps"),
        (AlignConfig, [*ALIGN, "lora={lora_dropout: 0.1}"], "lora_dropout"),
        (AlignConfig, [*ALIGN, "reference=adapter_off"], "reference"),
        (SftConfig, ["data.files=a"], "model, init"),
        (SftConfig, ["data.files=a", "model=m", "init.tokenizer=t", "init.config={}"], "model, init"),
        (SftConfig, ["data.files=a", "init.tokenizer=t", "init.config={}", "lora={}"], "lora"),
        (EvaluateConfig, ["data.files=a", "reference=r"], "model"),
        (EvaluateConfig, ["data.files=a", "model=m"], "reference"),
        (EvaluateConfig, ["model=m", "reference=r"], "data"),
        (EvaluateConfig, [], "data"),
        (EvaluateConfig, ["completions=c", "beta=1"], "beta"),
        (GenerateConfig, ["model=m", "prompts=p", "temperature=0", "num_completions=2"], "num_completions"),
        (AlignConfig, [*ALIGN, "lr_scheduler_type=constant", "warmup_steps=20"], "warmup_steps"),
    ],
)
def test_keys_that_contradict_one_another(cls, overrides, key):
    refused(cls, overrides, key)


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
    with raises(ValueError):
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
    ("setting", "key"),
    [
        ("sources[2].count=1", "[2]"),
        ("sources.count=1", "count"),
        ("sources[0].name[0]=x", "sources[0].name"),
        ("seed[0]=1", "[0]"),
        ("sources[a].count=1", "sources[a].count=1"),
    ],
)
def test_a_setting_that_misses_a_list_is_refused(tmp_path, setting, key):
    path = tmp_path / "data.yaml"
    path.write_text(MIXTURE)
    with raises(ConfigError, key):
        load_config(PrepareConfig, path, [setting])


def test_a_byte_order_mark_is_no_part_of_a_chat_template(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_bytes(b"\xef\xbb\xbf{{ messages }}\r\n")
    assert read_template(str(file)) == "{{ messages }}\n"
