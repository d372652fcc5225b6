"""Names: which of them look alike, and suggestions for error messages."""

import difflib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")


def tidy(text: str) -> str:
    """A name or label as it looks: composed (NFC), without invisible characters, one blank between words."""
    return " ".join(_INVISIBLE.sub("", unicodedata.normalize("NFC", text)).split())


def look(text: str) -> str:
    """The same for names that look alike, such as those with µ (U+00B5) and μ (U+03BC)."""
    return unicodedata.normalize("NFKC", tidy(text))


def as_written(name: str, known: Iterable[str]) -> str:
    """`name`, or the only known name that looks like it where there is none of that very spelling."""
    names = list(known)
    alike = [other for other in names if look(other) == look(name)]
    return alike[0] if name not in names and len(alike) == 1 else name


def nearest(word: str, known: Iterable[Any]) -> str | None:
    """The known name closest to a word, ignoring case; None if none is close."""
    names = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(word.lower(), names, n=1)
    return names[close[0]] if close else None


def suggest(word: str, known: Iterable[Any]) -> str:
    """The end of an error message: a suggestion, and all known names."""
    names = [str(name) for name in known]
    meant = nearest(word, names)
    return (f"; did you mean {meant!r}?" if meant else ".") + f" Available: {', '.join(names)}"
