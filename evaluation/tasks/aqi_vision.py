"""The air quality category read off a picture: a colour, bars of pollutants' readings, or a gauge.

`evaluation.vision.items` draws the pictures. The six EPA categories are equally frequent, and so are the three kinds
of pictures.
"""

import re

from evaluation import epa
from evaluation.tasks import Item, Score, mean_credit

NAME = "aqi_vision"
TITLE = "AQI category accuracy"
PRIMARY = "aqi_vision_accuracy"
KINDS = ("colour", "bars", "gauge")
METRICS = {
    "aqi_vision_accuracy": {
        "unit": "share",
        "direction": "higher",
        "description": "Share of items whose answer names the true EPA category (primary)",
    },
    **{
        f"aqi_vision_{kind}_accuracy": {
            "unit": "share",
            "direction": "higher",
            "description": f"The same of the items that show {shown}; NaN where there is none",
        }
        for kind, shown in zip(KINDS, ("the category's colour", "bars of readings", "a gauge"), strict=True)
    },
    "aqi_vision_distance": {
        "unit": "categories",
        "direction": "lower",
        "description": "Mean distance of the named category from the true one over the items whose answer names one; "
        "NaN where none does",
    },
    "aqi_vision_unparseable": {
        "unit": "share",
        "direction": "lower",
        "description": "Share of items whose answer names no EPA category, or several",
    },
}

_LONGEST_FIRST = sorted(epa.CATEGORIES, key=len, reverse=True)
_NAMES = "|".join(_LONGEST_FIRST).replace(" ", r"\s+")
_CATEGORY = re.compile(rf"\b(?:{_NAMES})\b", re.IGNORECASE)


def parse(answer: str) -> str | None:
    """The one EPA category that the answer names, or None; a longer name counts before a shorter one within it."""
    named = {" ".join(found.split()).casefold() for found in _CATEGORY.findall(answer)}
    return next((name for name in epa.CATEGORIES if name.casefold() in named), None) if len(named) == 1 else None


def score(item: Item, answer: str) -> Score:
    """Right when the answer names the true category; the error is counted in categories."""
    truth = str(item.truth["category"])
    predicted = parse(answer)
    kind = {str(item.truth["kind"]): 1.0}
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False, extra=kind)
    distance = abs(epa.CATEGORIES.index(predicted) - epa.CATEGORIES.index(truth))
    return Score(
        correct=predicted == truth,
        predicted=predicted,
        exact=predicted == truth,
        abs_error=distance,
        label_agrees=True,
        extra=kind,
    )


def summarize(scores: list[Score]) -> dict[str, float]:
    """The task's metrics over a split; NaN for what no item tells of."""
    errors = [s.abs_error for s in scores if s.abs_error is not None]
    nan = float("nan")
    return {
        "aqi_vision_accuracy": mean_credit(scores),
        **{f"aqi_vision_{kind}_accuracy": mean_credit([s for s in scores if kind in s.extra]) for kind in KINDS},
        "aqi_vision_distance": sum(errors) / len(errors) if errors else nan,
        "aqi_vision_unparseable": sum(s.predicted is None for s in scores) / len(scores) if scores else nan,
    }
