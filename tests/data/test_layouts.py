"""A layout is one function: registered where it stands, it is read, found from the columns, and named by configs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bfpo.config import AlignConfig, DataConfig, SftDataConfig, load_config
from bfpo.config.describe import allowed
from bfpo.core.errors import ConfigError, SettingError
from bfpo.core.schema import Pair
from bfpo.data.completion_layouts import COMPLETION_LAYOUTS
from bfpo.data.fields import Columns, messages_of, pair_of, text_of, value_of
from bfpo.data.layouts import Layouts
from bfpo.data.load import load_pairs
from bfpo.data.pair_layouts import PAIR_LAYOUTS
from bfpo.data.prompt_layouts import PROMPT_LAYOUTS
from bfpo.data.read import read_pairs
from bfpo.preparation.rows import kind_of_layout, reader_of
from messages import raises

ROW = {"question": "q", "best": "yes", "worst": "no", "id": 7}


@pytest.fixture
def arena() -> Iterator[None]:
    """A layout of pairs that the package does not have."""

    @PAIR_LAYOUTS.register("arena", "a question with two answers", needs=("question", "best", "worst"))
    def arena_pair(row: Columns) -> Pair:
        best, worst = (text_of(value_of(row, field), field) for field in ("best", "worst"))
        return pair_of(row, messages_of(row["question"], "question"), best, worst, (None, None), ("best", "worst"))

    yield
    del PAIR_LAYOUTS._layouts["arena"]


@pytest.mark.usefixtures("arena")
def test_a_new_layout_is_known_wherever_layouts_are_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    for layout in ("auto", "arena"):
        result = read_pairs([file], layout=layout)
        assert ([pair.id for pair in result.pairs], list(result.layouts.values())) == (["7"], ["arena"])
    renamed = read_pairs([file], layout="arena", columns={"best": "worst", "worst": "best"})
    assert (renamed.pairs[0].chosen, renamed.pairs[0].rejected) == ("no", "yes")
    config = load_config(
        AlignConfig, overrides=["model=m", f"data.files={file}", "data.layout=arena", "data.unknown_label=drop"]
    )
    assert config.data.layout == "arena"
    assert len(load_pairs(config.data.model_copy(update={"unknown_label": "safe"})).pairs) == 1
    assert SftDataConfig(files=[str(file)], layout="arena").layout == "arena"
    assert allowed(DataConfig.model_fields["layout"]).endswith("alpaca_pairs, arena")
    reader = reader_of(file, layout="auto", columns={})
    assert reader is not None
    assert (reader.layout, kind_of_layout("arena")) == ("arena", "pairs")


def test_a_config_names_the_layouts_it_allows() -> None:
    with raises(ConfigError, "data.layout"):
        load_config(AlignConfig, overrides=["model=m", "data.files=a", "data.layout=arena"])
    with raises(ConfigError, "data.layout"):
        load_config(AlignConfig, overrides=["model=m", "data.files=a", "data.layout=3"])


@pytest.mark.parametrize("name", ["auto", "pku"])
def test_a_name_is_given_once(name: str) -> None:
    with raises(SettingError, "layout", repr(name)):
        PAIR_LAYOUTS.register(name, "another")(PAIR_LAYOUTS["pku"].parse)


def test_layouts_are_tried_in_their_order() -> None:
    pairs = "pku redteam helpsteer2 helpsteer3 sharegpt messages alpaca_pairs bfpo trl hh"
    assert list(PAIR_LAYOUTS) == pairs.split()
    assert list(COMPLETION_LAYOUTS) == ["completions", "wildguardmix", "alpaca", "beavertails", "conversations"]
    prompts = "garak garak_hitlog pyrit harmbench advbench strongreject simplesafetytests xstest ailuminate ifeval"
    prompts += " sorry_bench mt_bench truthfulqa alert jailbreakbench wildguard wildjailbreak prompts hh catqa_rows"
    prompts += " catqa alpaca"
    assert list(PROMPT_LAYOUTS) == prompts.split()
    some: Layouts[str] = Layouts()
    some.register("general", "", order=1)(lambda row: "general")
    some.register("special", "", needs=("a",))(lambda row: "special")
    assert [layout.name for row in ({"a": 1}, {"b": 1}) if (layout := some.detect(row))] == ["special", "general"]
