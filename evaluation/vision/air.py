"""Pictures of the air quality: the category's colour, bars of pollutants' readings, or the index on a gauge.

Each kind alone tells the EPA category. Colours are those of EPA-454/B-24-002, table 1.
"""

import random
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from evaluation import epa
from evaluation.vision.canvas import (
    BLACK,
    GREY,
    Canvas,
    Colour,
    any_colour,
    on_dial,
    paper,
    shaded,
)

KINDS = ("colour", "bars", "gauge")
# Green, yellow, orange, red, purple, maroon: in the order of epa.CATEGORIES.
COLOURS: tuple[Colour, ...] = ((0, 228, 0), (255, 255, 0), (255, 126, 0), (255, 0, 0), (143, 63, 151), (126, 0, 35))
# Lowest and highest factor on a colour: below, red would look like maroon.
BRIGHTNESS = (0.8, 1.0)


def level(index: int) -> float:
    """How high an index stands where every category is one step high: 0 to 6.

    Args:
        index: 0 to 500.
    """
    number = epa.category_number(index)
    low, high = epa.INDEX_RANGES[number]
    return number + (index - low) / (high - low)


def colour(rng: random.Random, size: int, index: int) -> Any:
    """A tile, a face or a flag in the colour of the index's category.

    Args:
        rng: Decides shape, place, size and brightness; none of them says anything.
        size: Side in pixels.
        index: 0 to 500.

    Returns:
        A PIL image in RGB.
    """
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
    """A bar for each reading, as high as its own index; lines stand where one category ends and the next begins.

    Args:
        rng: Decides colours and widths; none of them says anything.
        size: Side in pixels.
        readings: Pollutant key → concentration; bars stand in this order.

    Returns:
        A PIL image in RGB.

    Raises:
        evaluation.epa.OffScaleError: a reading has no index of its own.
    """
    return bar_chart(rng, size, [level(epa.sub_index(key, value)) for key, value in readings.items()], 6)


def bar_chart(rng: random.Random, size: int, heights: list[float], steps: int) -> Any:
    """A bar for each height, with lines at every whole number from 1 to `steps`, and a base line."""
    canvas = Canvas(size, paper(rng))
    top, bottom, left, right = 0.05, 0.95, 0.05, 0.97
    step = (bottom - top) / steps
    for number in range(1, steps + 1):
        canvas.line((left, bottom - number * step), (right, bottom - number * step), 0.01, GREY)
    place = (right - left) / len(heights)
    width = min(place * rng.uniform(0.55, 0.8), 0.3)
    for number, height in enumerate(heights):
        middle = left + place * (number + 0.5)
        canvas.rectangle(middle - width / 2, bottom - height * step, middle + width / 2, bottom, any_colour(rng))
    canvas.line((left, bottom), (right, bottom), 0.025, BLACK)
    canvas.line((left, top), (left, bottom), 0.025, BLACK)
    return canvas.finished(rng)


def gauge(rng: random.Random, size: int, index: int) -> Any:
    """A half dial from 0 to 500 with a needle at the index; its arc shows the categories' colours, or grey parts.

    Args:
        rng: Decides place, size and whether the arc is coloured.
        size: Side in pixels.
        index: 0 to 500.

    Returns:
        A PIL image in RGB.
    """
    borders = [0.0, *(high / epa.AQI_MAX for _, high in epa.INDEX_RANGES)]
    if rng.random() < 0.5:
        fills = [shaded(colour_of, rng.uniform(*BRIGHTNESS)) for colour_of in COLOURS]
    else:
        fills = [shaded(GREY, 1.25 if number % 2 else 0.85) for number in range(len(COLOURS))]
    return dial(rng, size, index / epa.AQI_MAX, borders, fills)


def dial(rng: random.Random, size: int, share: float, borders: list[float], fills: list[Colour]) -> Any:
    """A half dial whose parts lie between `borders` (shares of the way), with a needle at a share of the way."""
    canvas = Canvas(size, paper(rng))
    radius = rng.uniform(0.42, 0.46)
    x, y = rng.uniform(radius + 0.02, 0.98 - radius), rng.uniform(0.68, 0.8)
    for start, end, fill in zip(borders, borders[1:], fills, strict=False):
        canvas.arc(x, y, radius, (start, end), 0.14, fill)
    for border in borders:
        canvas.line(on_dial(x, y, radius - 0.15, border), on_dial(x, y, radius, border), 0.015, BLACK)
    canvas.line((x, y), on_dial(x, y, radius - 0.04, share), 0.05, BLACK)
    canvas.disc(x, y, 0.05, BLACK)
    return canvas.finished(rng)
