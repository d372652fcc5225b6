"""Items of the task aqi_vision, with their pictures.

The same readings never land in two splits: which split bars and colours belong to is decided by a hash of their
readings, and the indices from 0 to 500 that a gauge can show are dealt out among the splits.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from evaluation import epa
from evaluation.tasks import Item, ItemError, aqi, aqi_vision
from evaluation.vision import air
from evaluation.vision.canvas import reference, save

WORDINGS = (
    "What is the air quality category?",
    "Which air quality category is shown?",
    "Name the air quality category.",
)
# Share of the items asked in the first wording; the others share the rest.
_FIRST = 0.8
MOST_BARS = 4
# Ozone over one hour has no index in the lower categories, where its bar would have no height.
POLLUTANTS = tuple(key for key in epa.POLLUTANTS if key != "o3_1h")
# Share of a category's range at either end that pictures leave out: there a bar ends, or a needle points, less than a
# pixel from the border.
MARGIN = 0.15


def _readable(index: int) -> bool:
    """Whether bars and needles tell the index's category at a few dozen pixels."""
    within = air.level(index) % 1.0
    return MARGIN <= within <= 1.0 - MARGIN


def deal_indices(sizes: Mapping[str, int], seed: int) -> dict[str, dict[int, list[int]]]:
    """Split → category number → the indices that its gauges show; every split gets some of each category.

    Args:
        sizes: Split name → number of items.
        seed: Of the shuffle.

    Raises:
        ItemError: there are more splits than indices of a category.
    """
    rng = random.Random(f"gauge-{seed}")
    dealt: dict[str, dict[int, list[int]]] = {split: {} for split in sizes}
    held = [split for split in sizes if split != "train"]
    for category, (low, high) in enumerate(epa.INDEX_RANGES):
        left = [index for index in range(low, high + 1) if _readable(index)]
        rng.shuffle(left)
        if len(left) < len(sizes):
            raise ItemError(f"expected at most {len(left)} splits, got {len(sizes)}")
        # A fifth for the splits other than train, as in the task aqi; all of it where there is no train.
        share = max(len(held), len(left) // 5) if "train" in sizes else len(left)
        for number, split in enumerate(held):
            dealt[split][category] = sorted(left[number : share : len(held)])
        if "train" in sizes:
            dealt["train"][category] = sorted(left[share:])
    return dealt


def _concentration(rng: random.Random, key: str, category: int, margin: float) -> Decimal:
    """A concentration from a pollutant's band of a category, that share of it left out at either end."""
    pollutant = epa.POLLUTANTS[key]
    edges = pollutant.band(category)
    if edges is None:
        raise ItemError(f"{pollutant.label} has no band of {epa.CATEGORIES[category]}")
    low, high = edges
    return pollutant.truncate(low + (high - low) * Decimal(str(rng.uniform(margin, 1.0 - margin))))


def _draw_readings(rng: random.Random, category: int, pollutants: Sequence[str]) -> dict[str, Decimal]:
    """Readings of one to four pollutants in any order, whose largest index lies in the category."""
    leader = rng.choice([key for key in pollutants if epa.POLLUTANTS[key].bands[category] is not None])
    readings = {leader: _concentration(rng, leader, category, MARGIN)}
    for key in rng.sample([key for key in pollutants if key != leader], rng.randrange(min(MOST_BARS, len(pollutants)))):
        bands = [n for n in range(category + 1) if epa.POLLUTANTS[key].bands[n] is not None]
        if bands:
            number = rng.choice(bands)
            readings[key] = _concentration(rng, key, number, MARGIN if number == category else 0.0)
    return {key: readings[key] for key in rng.sample(sorted(readings), len(readings))}


def _pools(sizes: Mapping[str, int]) -> list[tuple[str, float]]:
    """Split → upper end of its share of the hashes; the splits other than train take a fifth together."""
    held = {split: n for split, n in sizes.items() if split != "train"}
    share = 0.2 if "train" in sizes else 1.0
    ends = [share * sum(list(held.values())[: number + 1]) / sum(held.values()) for number in range(len(held))]
    return [*zip(held, ends, strict=True), ("train", 1.0)]


def generate(
    sizes: Mapping[str, int],
    *,
    seed: int,
    image_size: int,
    folder: Path,
    pollutants: Sequence[str] = POLLUTANTS,
) -> dict[str, list[Item]]:
    """Seeded items for each split, without leakage; their pictures are written to `folder`/images.

    Args:
        sizes: Split name → number of items.
        seed: Same arguments, same items and pictures.
        image_size: Side of a picture in pixels.
        folder: Exists; its folder `images` is made.
        pollutants: Keys of epa.POLLUTANTS that bars show.

    Returns:
        Split name → items. Categories and kinds are equally frequent: every 18 items hold each pair once.

    Raises:
        ItemError: no pollutant of these reaches one of the categories.
    """
    unreached = [
        name for n, name in enumerate(epa.CATEGORIES) if not any(epa.POLLUTANTS[key].bands[n] for key in pollutants)
    ]
    if unreached:
        raise ItemError(f"expected pollutants of every category, got none that reaches {', '.join(unreached)}")
    (folder / "images").mkdir(exist_ok=True)
    rng = random.Random(f"aqi-vision-{seed}")
    pools, indices = _pools(sizes), deal_indices(sizes, seed)
    splits: dict[str, list[Item]] = {}
    for split, count in sizes.items():
        items = []
        pairs = [(category, kind) for category in range(len(epa.CATEGORIES)) for kind in air.KINDS]
        for number in range(count):
            category, kind = pairs[number % len(pairs)]
            name = f"{split}-{number:05d}"
            readings: dict[str, Decimal] | None = None
            if kind == "gauge":
                index = rng.choice(indices[split][category])
                shown: dict[str, str] = {"aqi": str(index)}
            else:
                while readings is None or aqi.split_of(aqi.item_key(readings), pools) != split:
                    readings = _draw_readings(rng, category, pollutants)
                index = epa.aqi(readings)
                shown = {key: str(value) for key, value in readings.items()}
            save(_picture(rng, kind, image_size, index, readings or {}), folder, name)
            wording = WORDINGS[0] if rng.random() < _FIRST else rng.choice(WORDINGS[1:])
            truth: dict[str, Any] = {"kind": kind, "aqi": index, "category": epa.category(index), "readings": shown}
            prompt = f"{reference(name)}\n{wording}"
            items.append(Item(f"{aqi_vision.NAME}-{name}", aqi_vision.NAME, prompt, truth["category"], truth))
        rng.shuffle(items)
        splits[split] = items
    return splits


def _picture(rng: random.Random, kind: str, size: int, index: int, readings: Mapping[str, Decimal]) -> Any:
    match kind:
        case "colour":
            return air.colour(rng, size, index)
        case "bars":
            return air.bars(rng, size, readings)
        case _:
            return air.gauge(rng, size, index)


def counts(items: Sequence[Item]) -> dict[str, dict[str, int]]:
    """How many items there are of each EPA category, and of each kind of picture."""
    by_category = Counter(str(item.truth["category"]) for item in items)
    by_kind = Counter(str(item.truth["kind"]) for item in items)
    return {"categories": {c: by_category[c] for c in epa.CATEGORIES}, "kinds": {k: by_kind[k] for k in air.KINDS}}
