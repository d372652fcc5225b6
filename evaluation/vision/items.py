"""Items of the task aqi_vision, with their pictures.

No two splits show the same. Bars show how high each pollutant's own index is, not which pollutant it is, so that a hash
of these indices alone decides which split bars belong to; the indices from 0 to 500 that a gauge can show are dealt out
among the splits.
"""

import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from evaluation import epa
from evaluation.tasks import Item, ItemError, aqi_vision
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
# Share of a category's readable indices that the gauges of splits other than train show; of bars, share of the hashes.
HELD_GAUGES, HELD_BARS = 0.5, 0.2
# Readings drawn in a row for other splits, after which one's own is taken to have none of a category.
_MOST_MISSES = 20_000


def _readable(index: int) -> bool:
    """Whether bars and needles tell the index's category at a few dozen pixels."""
    within = air.level(index) % 1.0
    return MARGIN <= within <= 1.0 - MARGIN


def deal_indices(sizes: Mapping[str, int], seed: int) -> dict[str, dict[int, list[int]]]:
    """Split → category number → the indices that its gauges show; every split gets some of each category.

    347 indices are readable. With the sizes of vlm/params.yaml train gets 174 of them, test 103, valid 70.

    Args:
        sizes: Split name → number of items; the splits other than train share half of the indices in this proportion.
        seed: Of the shuffle.

    Raises:
        ItemError: there are more splits than indices of a category.
    """
    rng = random.Random(f"gauge-{seed}")
    dealt: dict[str, dict[int, list[int]]] = {split: {} for split in sizes}
    held = {split: size for split, size in sizes.items() if split != "train"}
    for category, (low, high) in enumerate(epa.INDEX_RANGES):
        left = [index for index in range(low, high + 1) if _readable(index)]
        rng.shuffle(left)
        if len(left) < len(sizes):
            raise ItemError(f"expected at most {len(left)} splits, got {len(sizes)}")
        share = max(len(held), int(len(left) * HELD_GAUGES)) if "train" in sizes else len(left)
        start = 0
        for number, end in enumerate(_ends(held)):
            # One for each split, the rest in proportion.
            stop = number + 1 + round(end * (share - len(held)))
            dealt[list(held)[number]][category] = sorted(left[start:stop])
            start = stop
        if "train" in sizes:
            dealt["train"][category] = sorted(left[share:])
    return dealt


def _ends(held: Mapping[str, int]) -> list[float]:
    """Upper end of each split's share, of 1 for all together."""
    return [sum(list(held.values())[: number + 1]) / sum(held.values()) for number in range(len(held))]


def bar_key(readings: Mapping[str, str | Decimal]) -> tuple[int, ...]:
    """What bars show of readings: each pollutant's own index (0 to 500), in ascending order."""
    return tuple(sorted(epa.sub_index(key, value) for key, value in readings.items()))


def _split_of(key: tuple[int, ...], pools: Sequence[tuple[str, float]]) -> str:
    """The split that bars belong to, decided by a hash of their key alone."""
    position = zlib.crc32(repr(key).encode()) / 2**32
    return next((split for split, end in pools if position < end), pools[-1][0])


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
    share = HELD_BARS if "train" in sizes else 1.0
    return [*zip(held, [share * end for end in _ends(held)], strict=True), ("train", 1.0)]


def _readings_of(
    rng: random.Random, split: str, pools: Sequence[tuple[str, float]], category: int, pollutants: Sequence[str]
) -> dict[str, Decimal]:
    """Readings of a category that belong to a split.

    Raises:
        ItemError: none was found.
    """
    for _ in range(_MOST_MISSES):
        readings = _draw_readings(rng, category, pollutants)
        if _split_of(bar_key(readings), pools) == split:
            return readings
    raise ItemError(
        f"expected bars of the category {epa.CATEGORIES[category]} for the split {split}, found none with "
        f"{', '.join(pollutants)}: take more pollutants, or make the split larger"
    )


def _deck(rng: random.Random, indices: Sequence[int]) -> Iterator[int]:
    """Indices without end; each comes up before one comes again."""
    while True:
        yield from rng.sample(indices, len(indices))


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
        ItemError: no pollutant of these reaches one of the categories, or a split gets no bars of one.
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
        decks = {category: _deck(rng, shown) for category, shown in indices[split].items()}
        pairs = [(category, kind) for category in range(len(epa.CATEGORIES)) for kind in air.KINDS]
        for number in range(count):
            category, kind = pairs[number % len(pairs)]
            name = f"{split}-{number:05d}"
            readings: dict[str, Decimal] = {}
            if kind == "gauge":
                index = next(decks[category])
                shown: dict[str, str] = {"aqi": str(index)}
            else:
                readings = _readings_of(rng, split, pools, category, pollutants)
                index = epa.aqi(readings)
                shown = {key: str(value) for key, value in readings.items()}
            save(_picture(rng, kind, image_size, index, readings), folder, name)
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
