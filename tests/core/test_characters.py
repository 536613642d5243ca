from __future__ import annotations

import pytest

from bfpo.core.characters import visible


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u06cc\u200c\u0631\u0648\u0645 \u06a9\u062a\u0627\u0628\u200c\u0647\u0627",  # Persian
        "\u0915\u094d\u200d\u0937 \u0930\u094d\u200c\u092f",  # Devanagari
        "\U0001f468\u200d\U0001f469\u200d\U0001f466 \u2764\ufe0f\u200d\U0001f525 \U0001f44b\U0001f3fe",  # emoji
        "\U0001f3f4\u200d\u2620\ufe0f \U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3 \u00a9\ufe0e",
        "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # the flag of Scotland
        "\u845b\U000e0100",  # a form of an ideograph
        "tab\tline\nno-break\u00a0space",
    ],
)
def test_what_shapes_the_characters_beside_it_stays(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    "character",
    [
        *"\u00ad\u034f\u115f\u1160\u17b4\u180e\u200b\u200e\u202e\u2060\u2066\u3164\ufeff\uffa0\ufff9",
        *"\u200c\u200d\ufe00\ufe0f\U000e0001\U000e0041\U000e007f\U000e0100\U000e01ef\U0001d173",
    ],
)
def test_what_is_not_seen_becomes_a_symbol(character: str) -> None:
    assert visible(f"a{character}b") == "a\ufffdb"
    assert visible(f"{character}") == "\ufffd"
    assert visible(f"\U0001f600\ufe0f{character}{character}").endswith("\ufffd")


def test_controls_become_their_pictures() -> None:
    assert visible("\x1b[31m \x00 \x7f \x9b \r") == "\u241b[31m \u2400 \u2421 \ufffd \u240d"
    assert visible("\ud83d") == "\ufffd"


def test_a_message_in_variation_selectors_is_seen() -> None:
    hidden = "".join(chr(0xE0100 + byte) for byte in b"do it")
    assert visible(f"\U0001f600{hidden}").count("\ufffd") == 5
    assert visible(f"ok{hidden}").count("\ufffd") == 5
