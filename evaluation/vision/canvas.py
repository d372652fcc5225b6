"""A square canvas on which small pictures are drawn, and what makes each of them different: shades, noise, colours.

Coordinates are shares of the side, from 0 to 1, x to the right and y downwards. Pictures are drawn four times as large
and averaged, so that edges are smooth at the 32 to 64 pixels which a tiny vision model takes.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Colour = tuple[int, int, int]
Point = tuple[float, float]

_FINE = 4
LARGEST_NOISE = 8.0

BLACK: Colour = (25, 25, 25)
GREY: Colour = (150, 150, 150)


def shaded(colour: Colour, brightness: float) -> Colour:
    """A colour times a factor, cut at 255."""
    red, green, blue = (min(255, round(part * brightness)) for part in colour)
    return red, green, blue


def any_colour(rng: random.Random) -> Colour:
    """A strong colour of any hue."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.35, 1.0), rng.uniform(0.35, 0.85))
    return round(red * 255), round(green * 255), round(blue * 255)


def paper(rng: random.Random) -> Colour:
    """A light background, almost without a hue."""
    level = rng.randint(215, 250)
    red, green, blue = (min(255, max(0, level + rng.randint(-5, 5))) for _ in range(3))
    return red, green, blue


class Canvas:
    """A picture in the making.

    Args:
        size: Side in pixels.
        background: Colour of the whole.
    """

    def __init__(self, size: int, background: Colour) -> None:
        from PIL import Image, ImageDraw

        self.size = size
        self._image = Image.new("RGB", (size * _FINE, size * _FINE), background)
        self._draw = ImageDraw.Draw(self._image)

    def _at(self, *numbers: float) -> list[float]:
        return [number * self.size * _FINE for number in numbers]

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """A filled rectangle between two corners."""
        self._draw.rectangle(self._at(x0, y0, x1, y1), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """A filled circle."""
        self._draw.ellipse(self._at(x - radius, y - radius, x + radius, y + radius), fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * self.size * _FINE, y * self.size * _FINE) for x, y in points], fill=fill)

    def line(self, start: Point, end: Point, width: float, fill: Colour) -> None:
        """A straight line; `width` as a share of the side."""
        self._draw.line(self._at(*start, *end), fill=fill, width=max(1, round(width * self.size * _FINE)))

    def arc(self, x: float, y: float, radius: float, shares: tuple[float, float], width: float, fill: Colour) -> None:
        """A part of a half circle; shares run from 0 at the left over the top to 1 at the right."""
        box = self._at(x - radius, y - radius, x + radius, y + radius)
        start, end = (180 + 180 * share for share in shares)
        self._draw.arc(box, start, end, fill=fill, width=max(1, round(width * self.size * _FINE)))

    def finished(self, rng: random.Random) -> Any:
        """The picture at its size, with a little noise: a PIL image in RGB."""
        import numpy
        from PIL import Image

        small = self._image.resize((self.size, self.size), Image.Resampling.BOX)
        noise = numpy.random.default_rng(rng.getrandbits(32)).normal(
            0.0, rng.uniform(0.0, LARGEST_NOISE), (self.size, self.size, 3)
        )
        values = numpy.asarray(small, dtype=numpy.float64) + noise
        return Image.fromarray(values.round().clip(0, 255).astype(numpy.uint8))


def on_dial(x: float, y: float, radius: float, share: float) -> Point:
    """The point of a half circle at a share of the way from its left end to its right end."""
    angle = math.pi * (1.0 - share)
    return x + radius * math.cos(angle), y - radius * math.sin(angle)


def reference(name: str) -> str:
    """How a prompt shows a picture: as Markdown does, the path relative to the data folder."""
    return f"![](images/{name}.png)"


def save(picture: Any, folder: Path, name: str) -> None:
    """Write a picture to `folder`/images/`name`.png, always the same bytes for the same picture."""
    picture.save(folder / "images" / f"{name}.png", compress_level=1)
