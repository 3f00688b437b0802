"""Text of any origin, such as a file's name, as pages, figures and terminals can show it."""

import unicodedata
from contextlib import suppress


def printable(text: str) -> str:
    r"""Return `text` with escapes for characters that cannot be shown: \xe9 (a byte that is no UTF-8), \n, \x1b."""
    with suppress(UnicodeEncodeError):  # of half a character, as names on Windows may have it
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if shows(c) else c.encode("unicode_escape").decode() for c in text)


def shows(character: str) -> bool:
    """Return whether a character can be shown. Spaces of other scripts and marks that join letters and emoji can."""
    return character.isprintable() or unicodedata.category(character) in ("Zs", "Cf")
