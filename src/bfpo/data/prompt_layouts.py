"""Layouts of prompt files, those of evaluation suites and attack tools among them: row -> prompts, in one table.

Attacks get the kind "harmful", questions that any model should answer "benign". A prompt without an id of its own has
an empty one here; the reader makes one from its content. Ids that are plain numbers get the suite's name in front.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bfpo.core.schema import Message, Prompt
from bfpo.data.fields import Columns, messages_of, optional_text, text_of, value_of
from bfpo.data.rejects import RowError

__all__ = ["PROMPT_LAYOUTS", "PromptLayout", "detect_prompt_layout"]

HARMFUL, BENIGN = "harmful", "benign"
_XSTEST_KINDS = {"safe": BENIGN, "unsafe": HARMFUL}
_ALERT_CATEGORIES = ("crime_", "hate_", "self_harm_", "sex_", "substance_", "weapon_")
_ALERT_FRAME = re.compile(r"\s*###\s*Instruction:\s*(.*?)\s*###\s*Response:\s*", re.DOTALL)
_CONTEXT_ENDS = "\n\n---\n\n"  # as HarmBench's own attacks put a context in front of a behaviour


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A way to write prompts in columns, as `Layout` is of pairs.

    A row gives one prompt, except where it is a whole table of them, or no prompt at all (a tool's own notes): then
    `to_prompts` returns none. It raises `RowError`.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    reads: tuple[str, ...]
    to_prompts: Callable[[Columns], Sequence[Prompt]]
    fits_too: Callable[[Columns], bool] = lambda row: True

    def fits(self, row: Columns) -> bool:
        """Whether a row has what this layout needs."""
        return row.keys() >= set(self.needs) and self.fits_too(row)


def detect_prompt_layout(columns: Columns) -> PromptLayout | None:
    """Return the first layout that fits these columns, `None` where none does."""
    return next((layout for layout in PROMPT_LAYOUTS.values() if layout.fits(columns)), None)


# ----------------------------------------------------------------------------------------------- one text a row


def _one(
    text_field: str, id_field: str | None = None, kind: str = "", prefix: str = ""
) -> Callable[[Columns], list[Prompt]]:
    """Return the function of a layout that has a prompt's text in one column."""

    def prompts(row: Columns) -> list[Prompt]:
        name = optional_text(row, id_field) if id_field else ""
        return [_asked(value_of(row, text_field), text_field, name and prefix + name, kind)]

    return prompts


def _asked(value: object, field: str, name: str = "", kind: str = "") -> Prompt:
    text = text_of(value, field)
    if not text.strip():
        raise RowError(field, "empty prompt", text)
    return Prompt(name, (Message("user", text),), kind)


def _plain(row: Columns) -> list[Prompt]:
    """Our columns: `prompt` as text or messages, `id` and `kind` if there."""
    messages = messages_of(value_of(row, "prompt"), "prompt")
    if not any(message.content.strip() for message in messages):
        raise RowError("prompt", "empty prompt", row["prompt"])
    return [Prompt(optional_text(row, "id"), messages, optional_text(row, "kind"))]


def _harmbench(row: Columns) -> list[Prompt]:
    behaviour, context = text_of(value_of(row, "Behavior"), "Behavior"), optional_text(row, "ContextString")
    if not behaviour.strip():
        raise RowError("Behavior", "empty prompt", behaviour)
    asked = f"{context}{_CONTEXT_ENDS}{behaviour}" if context.strip() else behaviour
    return [_asked(asked, "Behavior", optional_text(row, "BehaviorID"), HARMFUL)]


def _xstest(row: Columns) -> list[Prompt]:
    """XSTest: `label` says safe or unsafe; its first version has none, and calls the unsafe types contrasts."""
    type_ = optional_text(row, "type")
    label = optional_text(row, "label") or ("unsafe" if type_.startswith("contrast") else "safe")
    if label not in _XSTEST_KINDS:
        raise RowError("label", "neither safe nor unsafe", label)
    number = optional_text(row, "id")
    return [_asked(value_of(row, "prompt"), "prompt", number and f"xstest-{number}", _XSTEST_KINDS[label])]


def _mt_bench(row: Columns) -> list[Prompt]:
    turns = value_of(row, "turns")
    if not isinstance(turns, list) or not turns:
        raise RowError("turns", "wrong type (a list of texts is needed)", turns)
    first = turns[0].get("content") if isinstance(turns[0], dict) else turns[0]  # Arena-Hard has objects
    return [_asked(first, "turns", f"mt_bench-{optional_text(row, 'question_id')}", BENIGN)]


def _alert(row: Columns) -> list[Prompt]:
    """ALERT: its texts stand in the frame of a model without chat template, which is left out; ours puts its own."""
    text = text_of(value_of(row, "prompt"), "prompt")
    framed = _ALERT_FRAME.fullmatch(text)
    name = optional_text(row, "id")
    return [_asked(text if framed is None else framed.group(1), "prompt", name and f"alert-{name}", HARMFUL)]


def _catqa(row: Columns) -> list[Prompt]:
    """CatQA as one object, category -> subcategory -> questions; on the hub it has a question a row."""
    prompts: list[Prompt] = []
    for category, parts in row.items():
        if not isinstance(parts, dict):
            raise RowError(category, "wrong type (an object of subcategories is needed)", parts)
        for questions in parts.values():
            if not isinstance(questions, list):
                raise RowError(category, "wrong type (a list of questions is needed)", questions)
            prompts += [_asked(question, category, kind=HARMFUL) for question in questions]
    return prompts


def _is_catqa(row: Columns) -> bool:
    return bool(row) and all(
        isinstance(parts, dict) and parts and all(isinstance(questions, list) for questions in parts.values())
        for parts in row.values()
    )


def _is_alert(row: Columns) -> bool:
    """Whether the category is of ALERT's taxonomy: files of harmless prompts have such columns too."""
    return isinstance(row["category"], str) and row["category"].startswith(_ALERT_CATEGORIES)


# --------------------------------------------------------------------------------------------- exports of tools


def _garak_report(row: Columns) -> list[Prompt]:
    """garak's report: its attempts are prompts, its other entries (setup, evaluations) none."""
    return _garak_prompt(row) if value_of(row, "entry_type") == "attempt" else []


def _garak_prompt(row: Columns) -> list[Prompt]:
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
    return [Prompt("", messages, HARMFUL)]


def _garak_turn(turn: object) -> object:
    content = turn.get("content") if isinstance(turn, dict) else None
    return {**turn, "content": content.get("text")} if isinstance(turn, dict) and isinstance(content, dict) else turn


def _pyrit(row: Columns) -> list[Prompt]:
    """PyRIT's memory: what the user's side sent, after its converters, each turn by itself; other roles are none."""
    if value_of(row, "role") != "user":
        return []
    type_ = optional_text(row, "converted_value_data_type") or "text"
    if type_ != "text":
        raise RowError("converted_value", "not text", type_)
    return [_asked(value_of(row, "converted_value"), "converted_value", kind=HARMFUL)]


PROMPT_LAYOUTS: dict[str, PromptLayout] = {
    layout.name: layout
    for layout in (
        PromptLayout("garak", "garak report: its attempts", ("entry_type",), ("prompt",), _garak_report),
        PromptLayout("garak_hitlog", "garak hit log", ("goal", "prompt", "probe", "detector"), (), _garak_prompt),
        PromptLayout(
            "pyrit",
            "PyRIT memory export: the user's turns",
            ("role", "converted_value", "conversation_id"),
            ("converted_value_data_type",),
            _pyrit,
        ),
        PromptLayout("harmbench", "HarmBench", ("Behavior", "BehaviorID"), ("ContextString",), _harmbench),
        PromptLayout("advbench", "AdvBench", ("goal", "target"), (), _one("goal", kind=HARMFUL)),
        PromptLayout("strongreject", "StrongREJECT", ("forbidden_prompt",), (), _one("forbidden_prompt", kind=HARMFUL)),
        PromptLayout(
            "simplesafetytests",
            "SimpleSafetyTests",
            ("prompts_final",),
            ("id",),
            _one("prompts_final", "id", HARMFUL),
        ),
        PromptLayout("xstest", "XSTest", ("prompt", "type", "focus"), ("id", "label"), _xstest),
        PromptLayout(
            "ailuminate",
            "AILuminate",
            ("prompt_text", "hazard"),
            ("release_prompt_id",),
            _one("prompt_text", "release_prompt_id", HARMFUL),
        ),
        PromptLayout(
            "ifeval",
            "IFEval",
            ("key", "prompt", "instruction_id_list"),
            (),
            _one("prompt", "key", BENIGN, "ifeval-"),
        ),
        PromptLayout("mt_bench", "MT-Bench and Arena-Hard: the first turn", ("question_id", "turns"), (), _mt_bench),
        PromptLayout("truthfulqa", "TruthfulQA", ("Question", "Best Answer"), (), _one("Question", kind=BENIGN)),
        PromptLayout(
            "alert",
            "ALERT",
            ("prompt", "category"),
            ("id",),
            _alert,
            _is_alert,
        ),
        PromptLayout("prompts", "our columns: prompt (text or messages)", ("prompt",), ("id", "kind"), _plain),
        PromptLayout(
            "catqa_rows",
            "CatQA: a question a row",
            ("Category", "Subcategory", "Question"),
            (),
            _one("Question", kind=HARMFUL),
        ),
        PromptLayout("catqa", "CatQA: category -> subcategory -> questions", (), (), _catqa, _is_catqa),
    )
}
