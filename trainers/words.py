"""Suggestions for error messages."""

import difflib
from collections.abc import Iterable
from typing import Any


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
