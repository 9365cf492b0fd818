"""Draw names in any script: choose installed fonts with the necessary glyphs, or transliterate to ASCII."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cache

from matplotlib import rc_context, rcParams
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

_PLACEHOLDERS = "Last Resort"  # matplotlib's fallback font, which draws a box for every character


def text_style(texts: Iterable[str]) -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws `texts` as plain text, with fonts that have all their glyphs.

    A dollar sign does not start a formula.
    """
    return rc_context({"text.parse_math": False, "font.family": [*rcParams["font.family"], *fallback_families(texts)]})


def fallback_families(texts: Iterable[str]) -> list[str]:
    """Return the font families that `texts` need in addition to the default."""
    families = {_family_with(character) for character in set().union(*texts) if not character.isascii()}
    return sorted(family for family in families if family and family not in rcParams["font.family"])


def drawable(text: str) -> str:
    """Transliterate characters that no installed font has, so that matplotlib does not warn of missing glyphs."""
    return text if text.isascii() and text.isprintable() else "".join(map(_drawable_character, text))


@cache
def _drawable_character(character: str) -> str:
    if _family_with(character):
        return character
    from anyascii import anyascii  # few pictures need it

    ascii_text = anyascii(character)
    return ascii_text if ascii_text.isprintable() and ascii_text else "?"


@cache
def _family_with(character: str) -> str | None:
    """Return an installed font family that has the character, preferably the default; None if there is none."""
    if not character.isprintable():
        return None
    if get_font(findfont(FontProperties())).get_char_index(ord(character)):
        return rcParams["font.family"][0]
    upright = [entry for entry in fontManager.ttflist if entry.style == "normal"]
    for entry in sorted(upright, key=lambda entry: (entry.weight != 400, entry.name)):
        try:
            font = get_font(entry.fname)
        except (OSError, RuntimeError):  # the file was removed, or FreeType cannot read it
            continue
        if font.scalable and font.get_char_index(ord(character)) and not entry.name.startswith(_PLACEHOLDERS):
            return entry.name
    return None
