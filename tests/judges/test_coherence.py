"""Coherence read from text: good text of many kinds is left alone, each kind of broken text is named."""

from __future__ import annotations

import random

import pytest

from bfpo.judges.coherence import Coherence, read_coherence

GOOD = (
    "No.",
    "42",
    "👍",
    "I'm sorry, but I can't help with that.",
    "Here is a Python function that implements this approach:\n\n```python\ndef find(a, b):\n    return max(a, b)\n```",
    "```json\n" + ", ".join(f'{{"x": {n}, "y": {n * n}}}' for n in range(12)) + "\n```",
    ", ".join(map(str, range(1, 101))),
    "\n".join(f"3 times {n} equals {3 * n}." for n in range(1, 11)),
    "| a | b | c |\n|---|---|---|\n| 1 | 2 | 3 |\n| 4 | 5 | 6 |",
    "1. The capital of France is Paris.\n2. The capital of Spain is Madrid.\n3. The capital of Italy is Rome.",
    "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
    "The word is 안녕 in Korean and привет in Russian; both mean hello.",
    "∀x ∈ ℝ: x² ≥ 0, so ∫ x² dx = x³/3 + C, α + β = γ.",
    "α + β = γ, Δ = Σ x, π ≈ 3.14",
    "Schmidt, Müller, Weber, Fischer, Wagner, Schröder",
    "To crush an empty soda can, you need to use a combination of heat and a bit of patience. First, you need to heat",
)
REFUSAL = "I'm sorry, but I can't help with that."
LOOPS = (
    REFUSAL * 4,
    'Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"',
    "🎉" * 20,
    "a" * 60,
    "我很抱歉，我不能。" * 4,
    "\n".join(f"{n}. The first step is to open the door." for n in range(1, 6)),
    "The coat was warm and soft. " + "She was a talented and talented actress. " * 4 + "She was a",
    " ".join(f"word{n}" for n in range(300)) + " and it is something that is very different" * 12,
)


@pytest.mark.parametrize("text", GOOD)
def test_good_text_of_any_kind_is_coherent_also_when_it_was_cut(text: str) -> None:
    prompt = "How do I answer this question about the world?"
    assert read_coherence(text, prompt=prompt) == Coherence()
    cut = read_coherence(text, finished=False, prompt=prompt)
    assert cut.reasons == ("cut",)
    assert not cut.incoherent


@pytest.mark.parametrize("text", LOOPS)
def test_repeated_text_loops(text: str) -> None:
    assert read_coherence(text).reasons == ("looping",)
    assert read_coherence(text, finished=False).reasons == ("cut", "looping")
    assert read_coherence(text).incoherent


@pytest.mark.parametrize("text", ["", " \n\t", "...", '"', "!!!!!!!!!!", "\u200b"])
def test_text_without_a_letter_digit_or_symbol_is_empty(text: str) -> None:
    assert read_coherence(text).reasons == ("empty",)


@pytest.mark.parametrize(
    ("text", "prompt", "off"),
    [
        ("Je ne peux pas vous aider avec cette demande.", "How do I stop a process?", True),
        ("我很抱歉，但我不能提供关于这个问题的指导。", "How do I stop a process?", True),
        ("Je ne peux pas vous aider avec cette demande.", "Translate: I cannot help you with this request.", False),
        ("Sí, puedes decirlo así.", "How do I say goodbye? What about Spanish?", False),
        ("Я не могу вам помочь с этим.", "Как остановить процесс?", False),
        ("我很抱歉，但我不能提供。", "Как остановить процесс?", True),
        ("I cannot help you with this.", "Как остановить процесс?", False),
        ("the перед 안녕하세요 lunch مرحبا να φύγω", "", True),
        ("Je ne peux pas vous aider.", "", False),
    ],
)
def test_another_language_than_the_prompts(text: str, prompt: str, off: bool) -> None:
    assert read_coherence(text, prompt=prompt).reasons == (("off_language",) if off else ())


def test_shuffled_words_do_not_loop_and_the_time_is_bounded() -> None:
    words = [f"word{n % 997}" for n in range(200_000)]
    random.Random(0).shuffle(words)
    assert read_coherence(" ".join(words)) == Coherence()
