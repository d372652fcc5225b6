"""Marks: what rows and turns say, beside their texts, about whether an answer is learned.

A mark whose meaning is plain is honoured; one that could mean two things is refused by name.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum

from evaluation.tasks import brief, is_missing


class Mark(Enum):
    """What a truth value under a name means."""

    LEARNED = "train trainable training trained learn learnable loss computeloss lossmask lossweight weight"
    GOOD = (
        "label ktotag accepted isaccepted chosen ischosen preferred ispreferred correct iscorrect valid isvalid good "
        "isgood passed reward score rating"
    )
    BAD = "rejected isrejected deleted isdeleted bad isbad skip exclude excluded ignore ignored masked ismasked"
    UNCLEAR = "mask maskloss traindetail trainingdetail"


NOT_LEARNED = "not to be learned: "
"""How the reason begins for which a row with such a mark is left out."""
_MARKS = {name: mark for mark in Mark for name in mark.value.split()}
_YES = "true yes 1 1.0 good chosen accepted preferred desirable correct"
_NO = "false no 0 0.0 -1 -1.0 bad rejected dispreferred undesirable incorrect"
_TRUTH = dict.fromkeys(_YES.split(), True) | dict.fromkeys(_NO.split(), False)


def mark_of(name: str) -> Mark | None:
    """The mark that a column, or a key of a turn, is by its name: `lossMask` is `loss_mask`."""
    return _MARKS.get(re.sub(r"[\W_]", "", name.casefold()))


def is_empty(value: object) -> bool:
    return is_missing(value) or value in ([], {})


def in_cell(cell: object) -> object:
    """What a cell says; in a CSV file a list is JSON."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def is_mark(name: str, cells: Iterable[object]) -> bool:
    """Whether a column says what is learned: `weight: 0.5` and `label: false` do, `label: sports` does not."""
    if (mark := mark_of(name)) is None:
        return False
    lists = (cell if isinstance(cell, list) else [cell] for cell in map(in_cell, cells))
    values = [value for cell in lists for value in cell if not is_empty(value)]
    if mark is Mark.LEARNED:
        return any(not isinstance(value, str) or _truth(value) is not None for value in values)
    return bool(values) and (mark is Mark.UNCLEAR or all(_truth(value) is not None for value in values))


def _truth(value: object) -> bool | None:
    return _TRUTH.get(str(value).strip().casefold()) if isinstance(value, bool | int | float | str) else None


def is_learned(name: str, value: object) -> bool | None:
    """Whether an answer with this mark is learned; None if the mark says nothing. ValueError if that is unclear."""
    mark, truth = mark_of(name), _truth(value)
    if mark is None or is_empty(value):
        return None
    if mark is Mark.UNCLEAR:
        raise ValueError(
            f"expected train: true or false, got {name}: {brief(value)}, which may mean learned or left out"
        )
    if mark is Mark.LEARNED and truth is None:
        raise ValueError(f"expected {name}: true (learned) or false, got {brief(value)}")
    return truth if mark is not Mark.BAD or truth is None else not truth


def learns(marks: Mapping[str, object], of_answer: bool) -> bool:
    """Whether a turn with these marks is learned, as answers without any are; ValueError if a question would be."""
    verdicts = {name: is_learned(name, value) for name, value in marks.items()}
    for name, verdict in verdicts.items() if not of_answer else ():
        if verdict is (mark_of(name) is Mark.LEARNED):
            raise ValueError(f"expected no mark, since only answers are learned or left out, got {name}: {marks[name]}")
    return False not in verdicts.values()
