"""Characters that a reader does not see: found in untrusted text and replaced by symbols."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["visible"]

# Unicode's Default_Ignorable_Code_Point, controls, line separators, surrogates and noncharacters, without what is kept
# below. The fillers U+115F, U+1160, U+17B4, U+17B5, U+3164 and U+FFA0 are letters that have no shape.
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Scripts whose letters join or form conjuncts: a joiner or non-joiner behind one of them changes its shape.
_JOINING = (
    "\u0600-\u060b\u060d-\u061a\u0620-\u08ff\u0900-\u0dff\u0f00-\u0fff\u1000-\u109f\u1780-\u17b3\u17b6-\u17ff"
    "\u1800-\u180a\u1810-\u18af\ufb50-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc"
)
_EMOJI = "\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff"
_KEPT = "|".join(
    (
        f"(?<=[{_JOINING}])[\u200c\u200d]",
        f"(?<=[{_EMOJI}\ufe0f])\u200d(?=[{_EMOJI}])",
        f"(?<=[{_EMOJI}0-9#*])[\ufe0e\ufe0f]",  # one selector of text or emoji style
        "(?<=[\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af])[\ufe00-\ufe0f\U000e0100-\U000e01ef]",  # of an ideograph
        "(?<=[\u1800-\u18af])[\u180b-\u180d\u180f](?=[^\u180b-\u180f])",  # Mongolian forms
        "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f",  # flags of regions, such as Wales
    )
)
_FIND = re.compile(f"({_KEPT})|[{_UNSEEN}]")


def visible(text: str, symbol: Callable[[str], str] | None = None) -> str:
    """Return text with every character that a reader would not see replaced by a symbol; breaks and tabs stay.

    By default controls become their pictures (U+2400 to U+2421), all others U+FFFD: changes of direction, zero-width
    spaces, tags, soft hyphens, fillers, stray variation selectors. Joiners and selectors that shape the characters
    beside them, as in Persian, Hindi and emoji, stay.
    """
    replacement = symbol or _picture
    return _FIND.sub(lambda found: found.group(1) or replacement(found.group()), text)


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"
