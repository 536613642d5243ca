"""Layouts of prompt files, of evaluation suites and attack tools: one pure function row -> prompts each, by name.

Attacks get the kind "harmful", questions that any model should answer "benign". A row gives one prompt; some rows hold
a table of prompts, others none (a tool's own records). A prompt without an id has an empty one here; the reader makes
one from its content. Ids that are plain numbers get the suite's name as a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bfpo.core.schema import Message, Prompt
from bfpo.data.fields import CONTEXT, Columns, category_of, instruction_of, optional_text, prompt_of, value_of
from bfpo.data.layouts import Layouts
from bfpo.data.messages import messages_of, text_of
from bfpo.data.pair_layouts import transcript_of
from bfpo.data.rejects import RowError

__all__ = ["PROMPT_LAYOUTS"]

PROMPT_LAYOUTS: Layouts[Sequence[Prompt]] = Layouts(reads=CONTEXT)

HARMFUL, BENIGN = "harmful", "benign"
_XSTEST_KINDS = {"safe": BENIGN, "unsafe": HARMFUL}
_ALERT_CATEGORIES = ("crime_", "hate_", "self_harm_", "sex_", "substance_", "weapon_")
_ALERT_TEMPLATE = re.compile(r"\s*###\s*Instruction:\s*(.*?)\s*###\s*Response:\s*", re.DOTALL)
_HARMBENCH = "SemanticCategory"  # its column of categories
_CONTEXT_ENDS = "\n\n---\n\n"  # how HarmBench's own attacks join a context and a behaviour


# --------------------------------------------------------------------------------------------- exports of tools


@PROMPT_LAYOUTS.register("garak", "garak report: its attempts", needs=("entry_type",), reads=("prompt",))
def garak_prompts(row: Columns) -> Sequence[Prompt]:
    """garak's report: its attempts are prompts, its other entries (setup, evaluations) are not."""
    return garak_hit_prompts(row) if value_of(row, "entry_type") == "attempt" else []


@PROMPT_LAYOUTS.register("garak_hitlog", "garak hit log", needs=("goal", "prompt", "probe", "detector"))
def garak_hit_prompts(row: Columns) -> list[Prompt]:
    """An attempt or a hit: by version, `prompt` is text, `{text}` or `{turns: [{role, content: {text}}]}`."""
    prompt = value_of(row, "prompt")
    if isinstance(prompt, dict) and "turns" in prompt:
        turns = prompt["turns"]
        if not isinstance(turns, list):
            raise RowError("prompt", "wrong type (a list of turns is needed)", turns)
        messages = messages_of([_garak_turn(turn) for turn in turns], "prompt")
    else:
        text = prompt.get("text") if isinstance(prompt, dict) else prompt
        messages = (Message("user", text_of(text, "prompt")),)
    if not any(message.content.strip() for message in messages):
        raise RowError("prompt", "empty prompt", prompt)
    return [prompt_of(row, "", messages, HARMFUL)]


def _garak_turn(turn: object) -> object:
    content = turn.get("content") if isinstance(turn, dict) else None
    return {**turn, "content": content.get("text")} if isinstance(turn, dict) and isinstance(content, dict) else turn


@PROMPT_LAYOUTS.register(
    "pyrit",
    "PyRIT memory export: the user's turns",
    needs=("role", "converted_value", "conversation_id"),
    reads=("converted_value_data_type",),
)
def pyrit_prompts(row: Columns) -> list[Prompt]:
    """PyRIT's memory: the user's messages after conversion, one prompt per turn; other roles give none."""
    if value_of(row, "role") != "user":
        return []
    type_ = optional_text(row, "converted_value_data_type") or "text"
    if type_ != "text":
        raise RowError("converted_value", "not text", type_)
    return [_user_prompt(row, value_of(row, "converted_value"), "converted_value", kind=HARMFUL)]


# ------------------------------------------------------------------------------------- suites, one prompt a row


def _one_column(
    name: str,
    summary: str,
    needs: tuple[str, ...],
    text_field: str,
    kind: str,
    id_field: str = "",
    prefix: str = "",
    category: str = "",
) -> None:
    """Register a layout with a prompt's text in one column; `prefix` is of the id, `category` names a column."""

    @PROMPT_LAYOUTS.register(name, summary, needs=needs, reads=tuple(filter(None, (id_field, category))))
    def prompts(row: Columns) -> list[Prompt]:
        id_ = optional_text(row, id_field) if id_field else ""
        return [_user_prompt(row, value_of(row, text_field), text_field, id_ and prefix + id_, kind, category)]


@PROMPT_LAYOUTS.register(
    "harmbench", "HarmBench", needs=("Behavior", "BehaviorID"), reads=("ContextString", _HARMBENCH)
)
def harmbench_prompts(row: Columns) -> list[Prompt]:
    """HarmBench: a behaviour, after its context where it has one."""
    behaviour, context = text_of(value_of(row, "Behavior"), "Behavior"), optional_text(row, "ContextString")
    if not behaviour.strip():
        raise RowError("Behavior", "empty prompt", behaviour)
    text = f"{context}{_CONTEXT_ENDS}{behaviour}" if context.strip() else behaviour
    return [_user_prompt(row, text, "Behavior", optional_text(row, "BehaviorID"), HARMFUL, _HARMBENCH)]


_one_column("advbench", "AdvBench", ("goal", "target"), "goal", HARMFUL)
_one_column("strongreject", "StrongREJECT", ("forbidden_prompt",), "forbidden_prompt", HARMFUL, category="category")
_one_column(
    "simplesafetytests", "SimpleSafetyTests", ("prompts_final",), "prompts_final", HARMFUL, "id", category="harm_area"
)


@PROMPT_LAYOUTS.register("xstest", "XSTest", needs=("prompt", "type", "focus"), reads=("id", "label"))
def xstest_prompts(row: Columns) -> list[Prompt]:
    """XSTest: `label` says safe or unsafe; the first version lacks it and names the unsafe types contrasts."""
    type_ = optional_text(row, "type")
    label = optional_text(row, "label") or ("unsafe" if type_.startswith("contrast") else "safe")
    if label not in _XSTEST_KINDS:
        raise RowError("label", "neither safe nor unsafe", label)
    number = optional_text(row, "id")
    name = number and f"xstest-{number}"
    return [_user_prompt(row, value_of(row, "prompt"), "prompt", name, _XSTEST_KINDS[label], "type")]


_one_column(
    "ailuminate", "AILuminate", ("prompt_text", "hazard"), "prompt_text", HARMFUL, "release_prompt_id", "", "hazard"
)
_one_column("ifeval", "IFEval", ("key", "prompt", "instruction_id_list"), "prompt", BENIGN, "key", "ifeval-")


@PROMPT_LAYOUTS.register(
    "sorry_bench", "SORRY-Bench", needs=("question_id", "turns", "prompt_style"), reads=("category",)
)
def sorry_bench_prompts(row: Columns) -> list[Prompt]:
    """SORRY-Bench: MT-Bench's columns, with unsafe requests of one turn."""
    name = f"sorry_bench-{optional_text(row, 'question_id')}"
    return [_user_prompt(row, _first_turn(row), "turns", name, HARMFUL, "category")]


@PROMPT_LAYOUTS.register(
    "mt_bench", "MT-Bench and Arena-Hard: the first turn", needs=("question_id", "turns"), reads=("category",)
)
def mt_bench_prompts(row: Columns) -> list[Prompt]:
    """MT-Bench and Arena-Hard: the first of several turns."""
    name = f"mt_bench-{optional_text(row, 'question_id')}"
    return [_user_prompt(row, _first_turn(row), "turns", name, BENIGN, "category")]


def _first_turn(row: Columns) -> object:
    turns = value_of(row, "turns")
    if not isinstance(turns, list) or not turns:
        raise RowError("turns", "wrong type (a list of texts is needed)", turns)
    return turns[0].get("content") if isinstance(turns[0], dict) else turns[0]  # Arena-Hard has objects


_one_column("truthfulqa", "TruthfulQA", ("Question", "Best Answer"), "Question", BENIGN, category="Category")


@PROMPT_LAYOUTS.register(
    "alert",
    "ALERT",
    needs=("prompt", "category"),
    reads=("id",),
    fits=lambda row: "prompt" in row and "kind" not in row and _is_alert(row.get("category")),
)
def alert_prompts(row: Columns) -> list[Prompt]:
    """ALERT: its texts come in an instruction template, which is removed: the chat template is applied later."""
    text = text_of(value_of(row, "prompt"), "prompt")
    framed = _ALERT_TEMPLATE.fullmatch(text)
    name = optional_text(row, "id")
    text = text if framed is None else framed.group(1)
    return [_user_prompt(row, text, "prompt", name and f"alert-{name}", HARMFUL, "category")]


def _is_alert(category: object) -> bool:
    """Whether the category is of ALERT's taxonomy: files of harmless prompts have such columns too."""
    return isinstance(category, str) and category.startswith(_ALERT_CATEGORIES)


_one_column("jailbreakbench", "JailbreakBench", ("Goal", "Behavior", "Category"), "Goal", "", category="Category")
_WILD_KINDS = {"harmful": HARMFUL, "unharmful": BENIGN, "": ""}


@PROMPT_LAYOUTS.register("wildguard", "WildGuardMix", needs=("prompt", "prompt_harm_label", "subcategory"))
def wildguard_prompts(row: Columns) -> list[Prompt]:
    """WildGuardMix: the prompt's label by people; a few prompts have none."""
    label = optional_text(row, "prompt_harm_label")
    if label not in _WILD_KINDS:
        raise RowError("prompt_harm_label", "neither harmful nor unharmful", label)
    return [_user_prompt(row, value_of(row, "prompt"), "prompt", "", _WILD_KINDS[label], "subcategory")]


@PROMPT_LAYOUTS.register("wildjailbreak", "WildJailbreak", needs=("adversarial", "data_type"), reads=("vanilla",))
def wildjailbreak_prompts(row: Columns) -> list[Prompt]:
    """WildJailbreak: `data_type` says the form and the kind; a plain request is in `vanilla`."""
    data_type = optional_text(row, "data_type")
    form, _, kind = data_type.partition("_")
    if form not in ("adversarial", "vanilla") or kind not in (HARMFUL, BENIGN):
        raise RowError("data_type", "none of adversarial or vanilla, harmful or benign", data_type)
    return [_user_prompt(row, value_of(row, form), form, "", kind, "data_type")]


@PROMPT_LAYOUTS.register(
    "prompts", "our columns: prompt (text or messages)", needs=("prompt",), reads=("id", "kind", "category")
)
def plain_prompts(row: Columns) -> list[Prompt]:
    """Our columns: `prompt` as text or messages, `id`, `kind` and `category` if there."""
    messages = messages_of(value_of(row, "prompt"), "prompt")
    if not any(message.content.strip() for message in messages):
        raise RowError("prompt", "empty prompt", row["prompt"])
    name, kind = optional_text(row, "id"), optional_text(row, "kind")
    return [prompt_of(row, name, messages, kind, category_of(row, "category"))]


@PROMPT_LAYOUTS.register(
    "alpaca",
    "Alpaca: instruction (and input, history)",
    needs=("instruction",),
    reads=("input", "id", "kind", "category"),
    fits=lambda row: "instruction" in row and "prompt" not in row,
    order=1,
)
def alpaca_prompts(row: Columns) -> list[Prompt]:
    """Alpaca's columns: `instruction`, with `input` below it where there is one."""
    messages = instruction_of(row)
    if not messages:
        raise RowError("instruction", "empty prompt", row["instruction"])
    name, kind = optional_text(row, "id"), optional_text(row, "kind")
    return [prompt_of(row, name, messages, kind, category_of(row, "category"))]


@PROMPT_LAYOUTS.register(
    "hh",
    "HH-RLHF: the first turn of a transcript",
    needs=("chosen",),
    fits=lambda row: str(row.get("chosen")).lstrip().startswith("Human:") and "prompt" not in row,
)
def hh_prompts(row: Columns) -> list[Prompt]:
    """HH-RLHF: what a person said first; both transcripts of a pair begin with it."""
    first = transcript_of(value_of(row, "chosen"), "chosen")[0]
    if first.role != "user":
        raise RowError("chosen", "the transcript does not begin with Human:", first.content)
    return [_user_prompt(row, first.content, "chosen")]


_one_column(
    "catqa_rows", "CatQA: a question a row", ("Category", "Subcategory", "Question"), "Question", HARMFUL,
    category="Category",
)  # fmt: skip


@PROMPT_LAYOUTS.register("catqa", "CatQA: category -> subcategory -> questions", fits=lambda row: _is_catqa(row))
def catqa_prompts(row: Columns) -> list[Prompt]:
    """CatQA as one object, category -> subcategory -> questions; on the hub it has a question a row."""
    prompts: list[Prompt] = []
    for category, parts in row.items():
        if not isinstance(parts, dict):
            raise RowError(category, "wrong type (an object of subcategories is needed)", parts)
        for questions in parts.values():
            if not isinstance(questions, list):
                raise RowError(category, "wrong type (a list of questions is needed)", questions)
            prompts += [
                _user_prompt({"Category": category}, question, category, "", HARMFUL, "Category")
                for question in questions
            ]
    return prompts


def _is_catqa(row: Columns) -> bool:
    return bool(row) and all(
        isinstance(parts, dict) and parts and all(isinstance(questions, list) for questions in parts.values())
        for parts in row.values()
    )


def _user_prompt(row: Columns, value: object, field: str, name: str = "", kind: str = "", category: str = "") -> Prompt:
    """Return a prompt of one user message; `category` is the name of a column."""
    text = text_of(value, field)
    if not text.strip():
        raise RowError(field, "empty prompt", text)
    return prompt_of(row, name, (Message("user", text),), kind, category_of(row, category))
