"""Coherence read from text: good text of many kinds is left alone, each kind of broken text is named."""

from __future__ import annotations

import random

import pytest

from bfpo.judges.coherence import Coherence, read_coherence

VERSES = (
    "The rain came down on the harbour wall\nand boats lay sleeping in the bay",
    "A lantern burned behind the glass\nwhile grandfather mended nets all day",
    "Now spring has painted every door\nand children chase the gulls away",
)
CHORUS = "Sing it low, sing it slow,\nbring the lonely sailor home,\nover wave and foam,\nbring the lonely sailor home."
THINGS = ("jar", "bottle", "boot", "drum", "kettle", "bucket")
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
    "The matrix is:\n" + "\n".join(" ".join(str(int(i == j)) for j in range(6)) for i in range(6)) + "\nIt is regular.",
    "The identity is [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]].",
    "A = [\n [0, 0, 0],\n [0, 0, 0],\n [0, 0, 0]\n]",
    r"\begin{pmatrix} 1 & 0 & 0 & 0 \\ 0 & 1 & 0 & 0\\ 0 & 0 & 1 & 0 \end{pmatrix}",
    "\n\n".join(stanza for verse in VERSES for stanza in (verse, CHORUS)),
    "\n\n".join(f"[Verse]\n{verse}\n\n[Chorus]\n{CHORUS}" for verse in VERSES),
    "\n".join(f"{n}. You can use an old {what} to make a small lamp for the garden." for n, what in enumerate(THINGS)),
    "A trillion is 1000000000000, and a third of it 333333333333.33333.",
    "Call +1 555 0000000 or 555-000-0000.",
    "HEADING\n==============\n\n----------------\n\nName: ______________ (....................)",
    "```python\nprint('=' * 40)  # ========================================\nx = 0xFFFFFFFFFFFFFFFF\n```",
    "Hmmmmmmm... hahahahahaha, no.",
    "No, no, no, no, no, no.",
    "=====",
    "To crush an empty soda can, you need to use a combination of heat and a bit of patience. First, you need to heat",
)
REFUSAL = "I'm sorry, but I can't help with that."
LOOPS = (
    REFUSAL * 4,
    'Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"Theft:\n\n"',
    "🎉" * 20,
    "a" * 60,
    "r" * 24,
    "0" * 200,
    "a1" * 60,
    "the" * 9,
    "the " * 7,
    "0123456789" * 8,
    "= " * 40,
    "=" * 80,
    "The Amazon is 1.27 kilometers (75" + "0" * 60,
    "我很抱歉，我不能。" * 4,
    "\n".join(f"{n}. The first step is to open the door." for n in range(1, 6)),
    "The coat was warm and soft. " + "She was a talented and talented actress. " * 4 + "She was a",
    "0 0 0 " * 40,
    "0 0 0\n" * 30,
    "[0, 0, 0], " * 40,
    "\n\n".join([VERSES[0], CHORUS] * 4),
    "\n\n".join([CHORUS] * 4),
    "\n".join(f"- I love my {what} since it makes me happy every day" for what in ("dog", "cat", "car") * 3),
    "\n".join(f"{n}. We start with all {' '.join(THINGS[:n])}" for n in range(1, 7)),
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
