"""Text of any origin, such as a file's name, as pages, figures and terminals can show it."""

import os
import unicodedata


def printable(text: str) -> str:
    r"""Return `text` with escapes for characters that cannot be shown: \xe9 (a byte that is no UTF-8), \n, \x1b."""
    decoded = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(c if shows(c) else c.encode("unicode_escape").decode() for c in decoded)


def shows(character: str) -> bool:
    """Return whether a character can be shown. Spaces of other scripts and marks that join letters and emoji can."""
    return character.isprintable() or unicodedata.category(character) in ("Zs", "Cf")
