"""The AQI task: "Predict AQI given: …", scored against the US EPA index.

Items are drawn so that the six categories are equally frequent, over one to several pollutants and varied
wording. Two items with the same readings never land in different splits, however they are worded or ordered.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal

from evaluation import epa
from evaluation.tasks import Item, Score

NAME = "aqi"
METRICS = {
    "aqi_category_accuracy": {
        "unit": "share",
        "direction": "higher",
        "description": "Share of items whose predicted number lies in the true EPA category (primary)",
    },
    "aqi_exact": {
        "unit": "share",
        "direction": "higher",
        "description": "Share of items whose predicted number equals the true index",
    },
    "aqi_within_10": {
        "unit": "share",
        "direction": "higher",
        "description": "Share of items predicted within 10 index points",
    },
    "aqi_mae": {
        "unit": "index points",
        "direction": "lower",
        "description": "Mean absolute error over the items from which a number could be read; NaN where none could",
    },
    "aqi_unparseable": {
        "unit": "share",
        "direction": "lower",
        "description": "Share of items whose answer holds no index from 0 to 500",
    },
    "aqi_label_agrees": {
        "unit": "share",
        "direction": "higher",
        "description": "Share of items whose answer names the category that its own number lies in",
    },
}

# {readings} is a comma-separated list; every wording begins as document 004's prompt does.
WORDINGS = (
    "Predict AQI given: {readings}",
    "Predict AQI given: {readings}.",
    "Predict AQI given: measured {readings}",
    "Predict AQI given: {readings} in the air today",
)
READINGS = ("{label} {value} {unit}", "{label} = {value} {unit}", "{label}: {value} {unit}")

Key = tuple[tuple[str, str], ...]


def item_key(readings: Mapping[str, float | str | Decimal]) -> Key:
    """Readings in one canonical form: sorted, each cut to the precision that EPA looks at."""
    return tuple(sorted((k, str(epa.POLLUTANTS[k].truncate(v))) for k, v in readings.items()))


def completion(index: int) -> str:
    """The answer trained on: number and category."""
    return f"{index} ({epa.category(index)})"


def prompt(readings: Mapping[str, float | str | Decimal], wording: str, style: str, order: Sequence[str]) -> str:
    """A question about `readings`, in the given wording, style and order of pollutants."""
    parts = [
        style.format(label=(p := epa.POLLUTANTS[k]).label, value=p.truncate(readings[k]), unit=p.unit) for k in order
    ]
    return wording.format(readings=", ".join(parts))


def make_item(item_id: str, readings: Mapping[str, float | str | Decimal], rng: random.Random) -> Item:
    """An item with its exact EPA truth and a wording drawn from `rng`."""
    order = list(readings)
    rng.shuffle(order)
    index = epa.aqi(readings)
    return Item(
        id=item_id,
        task=NAME,
        prompt=prompt(readings, rng.choice(WORDINGS), rng.choice(READINGS), order),
        completion=completion(index),
        truth={
            "aqi": index,
            "category": epa.category(index),
            "readings": {k: str(v) for k, v in readings.items()},
        },
    )


def _draw_value(rng: random.Random, key: str, band: int) -> Decimal:
    """A concentration drawn evenly from a pollutant's band, at EPA's precision."""
    pollutant = epa.POLLUTANTS[key]
    edges = pollutant.band(band)
    if edges is None:
        raise ValueError(f"{pollutant.label} has no band {band}")
    scale = 10**pollutant.decimals
    return Decimal(rng.randint(int(edges[0] * scale), int(edges[1] * scale))).scaleb(-pollutant.decimals)


def _draw_readings(rng: random.Random, category: int, pollutants: Sequence[str], size: int) -> dict[str, Decimal]:
    """Readings of `size` pollutants whose overall category is number `category`."""
    leader = rng.choice([k for k in pollutants if epa.POLLUTANTS[k].bands[category] is not None])
    readings = {leader: _draw_value(rng, leader, category)}
    others = [k for k in pollutants if k != leader]
    rng.shuffle(others)
    for key in others:
        if len(readings) == size:
            break
        bands = [b for b in range(category + 1) if epa.POLLUTANTS[key].bands[b] is not None]
        if bands:
            readings[key] = _draw_value(rng, key, rng.choice(bands))
    return readings


def generate(
    sizes: Mapping[str, int], *, seed: int, pollutants: Sequence[str], max_pollutants: int
) -> dict[str, list[Item]]:
    """Seeded items for each split, without leakage.

    Args:
        sizes: Split name → number of items.
        seed: Same seed, same items.
        pollutants: Keys of epa.POLLUTANTS to draw from.
        max_pollutants: Largest number of pollutants in one question; sizes are equally frequent up to it.

    Returns:
        Split name → items. No readings occur twice, in one split or across splits.

    Raises:
        ValueError: the pollutants do not offer enough different readings.
    """
    rng = random.Random(f"aqi-{seed}")
    seen: set[Key] = set()
    drawn: list[dict[str, Decimal]] = []
    categories = [c for c in range(len(epa.CATEGORIES)) if any(epa.POLLUTANTS[k].bands[c] for k in pollutants)]
    total, misses = sum(sizes.values()), 0
    while len(drawn) < total:
        size = rng.randint(1, min(max_pollutants, len(pollutants)))
        readings = _draw_readings(rng, categories[len(drawn) % len(categories)], pollutants, size)
        key = item_key(readings)
        if key in seen:
            misses += 1
            if misses > 50 * total + 1000:
                raise ValueError(
                    f"expected {total} different readings, found {len(drawn)} with pollutants {', '.join(pollutants)}: "
                    "ask for fewer items, more pollutants or a larger max_pollutants"
                )
            continue
        seen.add(key)
        drawn.append(readings)
    rng.shuffle(drawn)
    splits: dict[str, list[Item]] = {}
    rest = iter(drawn)
    for split, n in sizes.items():
        splits[split] = [make_item(f"aqi-{split}-{i:05d}", next(rest), rng) for i in range(n)]
    return splits


# A whole number from 0 to 999 that is no part of a decimal, a longer number or a name such as PM10 or "8h".
_NUMBER = re.compile(r"(?<![\w.,-])([0-9]{1,3})(?![\w]|[.,]\d)")


def parse(answer: str) -> int | None:
    """The predicted index: the first whole number from 0 to 500 in the answer, or None.

    Where the answer says "AQI" (or "index") before a number, the numbers after its last mention are looked at first,
    so that a model which repeats the readings before it answers is read right.
    """
    mention = max(answer.upper().rfind("AQI"), answer.lower().rfind("index"))
    for text in (answer[mention:] if mention >= 0 else "", answer):
        for match in _NUMBER.finditer(text):
            if int(match.group(1)) <= epa.AQI_MAX:
                return int(match.group(1))
    return None


_CATEGORIES_LONGEST_FIRST = sorted(epa.CATEGORIES, key=len, reverse=True)


def named_category(answer: str) -> str | None:
    """The EPA category that the answer names in words, or None."""
    lower = answer.casefold()
    return next((c for c in _CATEGORIES_LONGEST_FIRST if c.casefold() in lower), None)


def score(item: Item, answer: str) -> Score:
    """Right when the predicted number's EPA category is the true one."""
    truth = int(item.truth["aqi"])
    predicted = parse(answer)
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False)
    return Score(
        correct=epa.category(predicted) == epa.category(truth),
        predicted=predicted,
        exact=predicted == truth,
        abs_error=abs(predicted - truth),
        label_agrees=named_category(answer) == epa.category(predicted),
    )


def summarize(scores: list[Score]) -> dict[str, float]:
    """The task's metrics over a split; all NaN for an empty one."""
    n = len(scores)
    if not n:
        return dict.fromkeys(METRICS, float("nan"))
    errors = [s.abs_error for s in scores if s.abs_error is not None]
    return {
        "aqi_category_accuracy": sum(s.correct for s in scores) / n,
        "aqi_exact": sum(s.exact for s in scores) / n,
        "aqi_within_10": sum(e <= 10 for e in errors) / n,
        "aqi_mae": sum(errors) / len(errors) if errors else float("nan"),
        "aqi_unparseable": sum(s.predicted is None for s in scores) / n,
        "aqi_label_agrees": sum(s.label_agrees for s in scores) / n,
    }


def category_counts(items: Sequence[Item]) -> dict[str, int]:
    """How many items fall in each EPA category."""
    counts = Counter(str(item.truth["category"]) for item in items)
    return {c: counts[c] for c in epa.CATEGORIES}
