"""The AQI task: "Predict AQI given: …", scored against the US EPA index.

Items are drawn so that the six categories are equally frequent, over one to several pollutants and varied
wording. Two items with the same readings never land in different splits, however they are worded or ordered.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal

from evaluation import epa
from evaluation.tasks import Item, ItemError, Score

NAME = "aqi"
TITLE = "AQI accuracy"
PRIMARY = "aqi_category_accuracy"
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
    "Predict AQI given: measured {readings}",
    "Predict AQI given: in the air {readings}",
)
READINGS = ("{label} {value} {unit}", "{label}: {value} {unit}", "{label} = {value} {unit}")

Key = tuple[tuple[str, str], ...]


def item_key(readings: Mapping[str, float | str | Decimal]) -> Key:
    """Readings in one canonical form: sorted, each cut to the precision that EPA looks at."""
    return tuple(sorted((k, str(epa.POLLUTANTS[k].truncate(v))) for k, v in readings.items()))


def completion(index: int) -> str:
    """The answer trained on: category and number.

    The category comes first because its first token already is a class, where a number's first digit is not (1 begins
    12 and 126): small models learn this order faster (LOG.md, 2026-11-21).
    """
    return f"{epa.category(index)}: {index}"


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


def _pools(sizes: Mapping[str, int]) -> list[tuple[str, float]]:
    """Split name → upper end of its share of the hash range; the splits other than train take a fifth together."""
    held = {split: n for split, n in sizes.items() if split != "train"}
    # Small splits need a pool several times their size, or they would use up all simple questions.
    share = 0.2 if "train" in sizes else 1.0
    ends: list[tuple[str, float]] = []
    end = 0.0
    for split, n in held.items():
        end += share * n / sum(held.values())
        ends.append((split, end))
    return [*ends, ("train", 1.0)]


def split_of(key: Key, pools: Sequence[tuple[str, float]]) -> str:
    """The split that readings belong to, decided by a hash of the readings alone."""
    position = zlib.crc32(repr(key).encode()) / 2**32
    return next((split for split, end in pools if position < end), pools[-1][0])


def generate(
    sizes: Mapping[str, int], *, seed: int, pollutants: Sequence[str], max_pollutants: int
) -> dict[str, list[Item]]:
    """Seeded items for each split, without leakage.

    Args:
        sizes: Split name → number of items.
        seed: Same seed, same items.
        pollutants: Keys of epa.POLLUTANTS to draw from.
        max_pollutants: Largest number of pollutants in one question. Each further pollutant makes a question a third
            as frequent.

    Returns:
        Split name → items, the categories equally frequent as far as the pollutants allow. Readings belong to one
        split only. Readings occur once in a split other than "train", where they may come again in other words.

    Raises:
        ItemError: the pollutants do not offer enough different questions.
    """
    rng = random.Random(f"aqi-{seed}")
    pools = _pools(sizes)
    categories = [c for c in range(len(epa.CATEGORIES)) if any(epa.POLLUTANTS[k].bands[c] for k in pollutants)]
    most = min(max_pollutants, len(pollutants))
    lengths, weights = range(1, most + 1), [3.0**-k for k in range(most)]
    splits: dict[str, list[Item]] = {}
    for split, n in sizes.items():
        seen: set[Key | str] = set()
        items: list[Item] = []
        misses = 0
        while len(items) < n:
            category = categories[len(items) % len(categories)]
            readings = _draw_readings(rng, category, pollutants, rng.choices(lengths, weights)[0])
            key = item_key(readings)
            if split_of(key, pools) != split:
                continue
            item = make_item(f"aqi-{split}-{len(items):05d}", readings, rng)
            mark: Key | str = item.prompt if split == "train" else key
            if mark in seen:
                misses += 1
                if misses > 20 * n + 1000:
                    raise ItemError(
                        f"expected {n} different {split} items, found {len(items)} with pollutants "
                        f"{', '.join(pollutants)}: ask for fewer items, more pollutants or a larger max_pollutants"
                    )
                continue
            seen.add(mark)
            items.append(item)
        rng.shuffle(items)
        splits[split] = items
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
