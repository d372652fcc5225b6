"""The air quality category read off a picture: a colour, bars of pollutants' readings, or a gauge.

Pictures are drawn by code; each kind alone tells the EPA category. The six categories are equally frequent, and so are
the three kinds. No two splits show the same: bars show how high each pollutant's own index is, not which pollutant it
is, so a hash of these indices alone decides which split they belong to; the indices from 0 to 500 that a gauge can show
are dealt out among the splits.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from evaluation import EvaluationError, epa
from evaluation.tasks import Item, Score, mean, mean_credit, metric, share
from evaluation.tasks.aqi import LONGEST_FIRST, ends, pools_of, split_of
from evaluation.vision import BLACK, GREY, Canvas, Colour, bar_chart, dial, paper, save, shaded
from evaluation.vision import retention_items as retention_items

NAME = "aqi_vision"
TITLE = "AQI category accuracy"
PRIMARY = "aqi_vision_accuracy"
KINDS = ("colour", "bars", "gauge")
SETTINGS = ("image_size",)
METRICS = {
    "aqi_vision_accuracy": share("Share of items whose answer names the true EPA category (primary)"),
    **{
        f"aqi_vision_{kind}_accuracy": share(f"The same of the items that show {shown}; NaN where there is none")
        for kind, shown in zip(KINDS, ("the category's colour", "bars of readings", "a gauge"), strict=True)
    },
    "aqi_vision_distance": metric(
        "categories",
        "lower",
        "Mean distance of the named category from the true one over the items whose answer names one; "
        "NaN where none does",
    ),
    "aqi_vision_unparseable": share("Share of items whose answer names no EPA category, or several", "lower"),
}

_NAMES = "|".join(LONGEST_FIRST).replace(" ", r"\s+")
_CATEGORY = re.compile(rf"\b(?:{_NAMES})\b", re.IGNORECASE)

# Green, yellow, orange, red, purple, maroon: in the order of epa.CATEGORIES.
COLOURS: tuple[Colour, ...] = ((0, 228, 0), (255, 255, 0), (255, 126, 0), (255, 0, 0), (143, 63, 151), (126, 0, 35))
# Lowest and highest factor on a colour: below, red would look like maroon.
BRIGHTNESS = (0.8, 1.0)
WORDINGS = (
    "What is the air quality category?", "Which air quality category is shown?", "Name the air quality category."
)  # fmt: skip
# Share of the items asked in the first wording; the others share the rest.
_FIRST = 0.8
MOST_BARS = 4
# Ozone over one hour has no index in the lower categories, where its bar would have no height.
POLLUTANTS = tuple(key for key in epa.POLLUTANTS if key != "o3_1h")
# Share of a category's range at either end that pictures leave out: there a bar ends, or a needle points, less than a
# pixel from the border.
MARGIN = 0.15
# Share of a category's readable indices that the gauges of splits other than train show.
HELD_GAUGES = 0.5
# Readings drawn in a row for other splits, after which one's own is taken to have none of a category.
_MOST_MISSES = 20_000


def parse(answer: str) -> str | None:
    """The one EPA category that the answer names, or None; a longer name takes precedence over one inside it."""
    named = {" ".join(found.split()).casefold() for found in _CATEGORY.findall(answer)}
    return next((name for name in epa.CATEGORIES if name.casefold() in named), None) if len(named) == 1 else None


def score(item: Item, answer: str) -> Score:
    truth = str(item.truth["category"])
    predicted = parse(answer)
    kind = {str(item.truth["kind"]): 1.0}
    if predicted is None:
        return Score(correct=False, predicted=None, exact=False, extra=kind)
    distance = abs(epa.CATEGORIES.index(predicted) - epa.CATEGORIES.index(truth))
    return Score(distance == 0, predicted, distance == 0, abs_error=distance, label_agrees=True, extra=kind)


def summarize(scores: list[Score]) -> dict[str, float]:
    return {
        "aqi_vision_accuracy": mean_credit(scores),
        **{f"aqi_vision_{kind}_accuracy": mean_credit(s for s in scores if kind in s.extra) for kind in KINDS},
        "aqi_vision_distance": mean(s.abs_error for s in scores if s.abs_error is not None),
        "aqi_vision_unparseable": mean(s.predicted is None for s in scores),
    }


# --- pictures ---


def level(index: int) -> float:
    """How high an index stands where every category is one step high: 0 to 6."""
    number = epa.category_number(index)
    low, high = epa.INDEX_RANGES[number]
    return number + (index - low) / (high - low)


def colour(rng: random.Random, size: int, index: int) -> Any:
    canvas = Canvas(size, paper(rng) if rng.random() < 0.5 else shaded(GREY, rng.uniform(0.5, 1.3)))
    fill = shaded(COLOURS[epa.category_number(index)], rng.uniform(*BRIGHTNESS))
    half = rng.uniform(0.22, 0.4)
    x, y = rng.uniform(half + 0.05, 0.95 - half), rng.uniform(half + 0.05, 0.95 - half)
    match rng.choice(("tile", "face", "flag")):
        case "tile":
            canvas.rectangle(x - half, y - half, x + half, y + half, fill)
        case "face":
            canvas.disc(x, y, half, fill)
            for side in (-1, 1):
                canvas.disc(x + side * half * 0.4, y - half * 0.25, half * 0.13, BLACK)
            canvas.line((x - half * 0.4, y + half * 0.4), (x + half * 0.4, y + half * 0.4), half * 0.14, BLACK)
        case _:
            canvas.line((x - half, y - half), (x - half, y + half), 0.05, BLACK)
            canvas.rectangle(x - half + 0.03, y - half, x + half, y + half * 0.3, fill)
    return canvas.finished(rng)


def bars(rng: random.Random, size: int, readings: Mapping[str, Decimal]) -> Any:
    """A bar for each reading, as high as its own index; lines mark where categories meet."""
    return bar_chart(rng, size, [level(epa.sub_index(key, value)) for key, value in readings.items()], 6)


def gauge(rng: random.Random, size: int, index: int) -> Any:
    """A half dial from 0 to 500 with a needle at the index; its arc shows the categories' colours, or grey parts."""
    borders = [0.0, *(high / epa.AQI_MAX for _, high in epa.INDEX_RANGES)]
    if rng.random() < 0.5:
        fills = [shaded(colour_of, rng.uniform(*BRIGHTNESS)) for colour_of in COLOURS]
    else:
        fills = [shaded(GREY, 1.25 if number % 2 else 0.85) for number in range(len(COLOURS))]
    return dial(rng, size, index / epa.AQI_MAX, borders, fills)


# --- items ---


def _readable(index: int) -> bool:
    """Whether bars and needles show the index's category at a few dozen pixels."""
    within = level(index) % 1.0
    return MARGIN <= within <= 1.0 - MARGIN


def deal_indices(sizes: Mapping[str, int], seed: int) -> dict[str, dict[int, list[int]]]:
    """Split → category number → which of the 347 readable indices its gauges show; every split gets some of each."""
    rng = random.Random(f"gauge-{seed}")
    dealt: dict[str, dict[int, list[int]]] = {split: {} for split in sizes}
    held = {split: size for split, size in sizes.items() if split != "train"}
    for category, (low, high) in enumerate(epa.INDEX_RANGES):
        left = [index for index in range(low, high + 1) if _readable(index)]
        rng.shuffle(left)
        share = max(len(held), int(len(left) * HELD_GAUGES)) if "train" in sizes else len(left)
        start = 0
        for number, end in enumerate(ends(held)):
            # One for each split, the rest in proportion.
            stop = number + 1 + round(end * (share - len(held)))
            dealt[list(held)[number]][category] = sorted(left[start:stop])
            start = stop
        if "train" in sizes:
            dealt["train"][category] = sorted(left[share:])
    return dealt


def bar_key(readings: Mapping[str, str | Decimal]) -> tuple[int, ...]:
    """What bars show of readings: each pollutant's own index (0 to 500), in ascending order."""
    return tuple(sorted(epa.sub_index(key, value) for key, value in readings.items()))


def _concentration(rng: random.Random, key: str, category: int, margin: float) -> Decimal:
    """A concentration from a pollutant's band of a category, that share of it left out at either end."""
    pollutant = epa.POLLUTANTS[key]
    edges = pollutant.bands[category]
    if edges is None:
        raise EvaluationError(f"{pollutant.label} has no band of {epa.CATEGORIES[category]}")
    low, high = edges
    return pollutant.truncate(low + (high - low) * Decimal(str(rng.uniform(margin, 1.0 - margin))))


def _draw_readings(rng: random.Random, category: int) -> dict[str, Decimal]:
    leader = rng.choice([key for key in POLLUTANTS if epa.POLLUTANTS[key].bands[category] is not None])
    readings = {leader: _concentration(rng, leader, category, MARGIN)}
    for key in rng.sample([key for key in POLLUTANTS if key != leader], rng.randrange(min(MOST_BARS, len(POLLUTANTS)))):
        bands = [n for n in range(category + 1) if epa.POLLUTANTS[key].bands[n] is not None]
        if bands:
            number = rng.choice(bands)
            readings[key] = _concentration(rng, key, number, MARGIN if number == category else 0.0)
    return {key: readings[key] for key in rng.sample(sorted(readings), len(readings))}


def _readings_of(
    rng: random.Random, split: str, pools: Sequence[tuple[str, float]], category: int
) -> dict[str, Decimal]:
    for _ in range(_MOST_MISSES):
        readings = _draw_readings(rng, category)
        if split_of(bar_key(readings), pools) == split:
            return readings
    raise EvaluationError(
        f"expected bars of the category {epa.CATEGORIES[category]} for the split {split}, found none: "
        "make the split larger"
    )


def _deck(rng: random.Random, indices: Sequence[int]) -> Iterator[int]:
    while True:
        yield from rng.sample(indices, len(indices))


def generate(sizes: Mapping[str, int], *, seed: int, folder: Path, image_size: int) -> dict[str, list[Item]]:
    """Items of each split (name → how many), their pictures in `folder`/images; the same seed gives the same items.

    Categories and kinds are equally frequent: every 18 items hold each pair once. EvaluationError where a
    split gets no bars of a category.
    """
    rng = random.Random(f"aqi-vision-{seed}")
    pools, indices = pools_of(sizes), deal_indices(sizes, seed)
    splits: dict[str, list[Item]] = {}
    for split, count in sizes.items():
        items = []
        decks = {category: _deck(rng, shown) for category, shown in indices[split].items()}
        pairs = [(category, kind) for category in range(len(epa.CATEGORIES)) for kind in KINDS]
        for number in range(count):
            category, kind = pairs[number % len(pairs)]
            name = f"{split}-{number:05d}"
            if kind == "gauge":
                index = next(decks[category])
                shown: dict[str, str] = {"aqi": str(index)}
                picture = gauge(rng, image_size, index)
            else:
                readings = _readings_of(rng, split, pools, category)
                index = epa.aqi(readings)
                shown = {key: str(value) for key, value in readings.items()}
                picture = bars(rng, image_size, readings) if kind == "bars" else colour(rng, image_size, index)
            wording = WORDINGS[0] if rng.random() < _FIRST else rng.choice(WORDINGS[1:])
            truth: dict[str, Any] = {"kind": kind, "aqi": index, "category": epa.category(index), "readings": shown}
            prompt = f"{save(picture, folder, name)}\n{wording}"
            items.append(Item(f"{NAME}-{name}", NAME, prompt, truth["category"], truth))
        rng.shuffle(items)
        splits[split] = items
    return splits


def facts(items: Sequence[Item]) -> dict[str, Any]:
    by_category = Counter(str(item.truth["category"]) for item in items)
    by_kind = Counter(str(item.truth["kind"]) for item in items)
    counts = {"categories": {c: by_category[c] for c in epa.CATEGORIES}, "kinds": {k: by_kind[k] for k in KINDS}}
    return {"test_counts": counts}
