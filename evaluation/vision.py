"""Small pictures drawn by code, and general questions about them: what the embedded vision base is trained on.

Coordinates are shares of the side, from 0 to 1, x to the right and y downwards. Pictures are drawn four times as large
and averaged, so that edges are smooth at the 32 to 64 pixels that a tiny vision model takes.

A general task is a function of a random generator and a size that returns a picture, a question and its only right
answer. None of them mentions air, pollutants or an index. A picture belongs to the held-out or to the training part
by a hash of its pixels, so the retention suite holds no picture that the base was trained on.
"""

import colorsys
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from evaluation.tasks import Item
from evaluation.tasks.general import HELD_OUT, WORDS

Colour = tuple[int, int, int]
Point = tuple[float, float]

_FINE = 4
LARGEST_NOISE = 8.0

BLACK: Colour = (25, 25, 25)
GREY: Colour = (150, 150, 150)


def shaded(colour: Colour, brightness: float) -> Colour:
    red, green, blue = (min(255, round(part * brightness)) for part in colour)
    return red, green, blue


def any_colour(rng: random.Random) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.35, 1.0), rng.uniform(0.35, 0.85))
    return round(red * 255), round(green * 255), round(blue * 255)


def paper(rng: random.Random) -> Colour:
    level = rng.randint(215, 250)
    red, green, blue = (min(255, max(0, level + rng.randint(-5, 5))) for _ in range(3))
    return red, green, blue


class Canvas:
    """A picture while it is drawn, `size` pixels per side."""

    def __init__(self, size: int, background: Colour) -> None:
        from PIL import Image, ImageDraw

        self.size = size
        self._image = Image.new("RGB", (size * _FINE, size * _FINE), background)
        self._draw = ImageDraw.Draw(self._image)

    def _at(self, *numbers: float) -> list[float]:
        return [number * self.size * _FINE for number in numbers]

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self._draw.rectangle(self._at(x0, y0, x1, y1), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        self._draw.ellipse(self._at(x - radius, y - radius, x + radius, y + radius), fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self._draw.polygon([(x * self.size * _FINE, y * self.size * _FINE) for x, y in points], fill=fill)

    def line(self, start: Point, end: Point, width: float, fill: Colour) -> None:
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


def save(picture: Any, folder: Path, name: str) -> str:
    """Write `folder`/images/`name`.png, the same bytes for the same picture; how a prompt shows it, as in Markdown."""
    path = Path("images", f"{name}.png")
    (folder / path.parent).mkdir(exist_ok=True)
    picture.save(folder / path, compress_level=1)
    return f"![]({path.as_posix()})"


def bar_chart(rng: random.Random, size: int, heights: list[float], steps: int) -> Any:
    """A bar for each height, with lines at the whole numbers from 1 to `steps`, and a base line."""
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


# --- general questions ---

COLOURS: dict[str, Colour] = {
    "red": (255, 20, 20), "orange": (255, 130, 10), "yellow": (250, 245, 20), "green": (20, 220, 30),
    "blue": (30, 70, 240), "purple": (145, 60, 155), "maroon": (125, 5, 35), "grey": (130, 130, 130),
    "black": (20, 20, 20),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle")
# Any word can come in small letters or with a capital.
_WORDS = (*WORDS, "unhealthy", "hazardous", "groups", "for")
STEPS = 6
PARTS = 10

Question = tuple[Any, str, str]


def _shape(canvas: Canvas, shape: str, x: float, y: float, half: float, fill: Colour) -> None:
    match shape:
        case "square":
            canvas.rectangle(x - half, y - half, x + half, y + half, fill)
        case "circle":
            canvas.disc(x, y, half, fill)
        case _:
            canvas.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill)


def _shapes(rng: random.Random, size: int) -> tuple[Any, list[str], list[str]]:
    """One or two shapes of different form and colour beside each other: picture, forms, names of colours."""
    count = rng.randint(1, 2)
    shapes, names = rng.sample(SHAPES, count), rng.sample(sorted(COLOURS), count)
    canvas = Canvas(size, paper(rng))
    for number, (shape, name) in enumerate(zip(shapes, names, strict=True)):
        half = rng.uniform(0.2, 0.38) if count == 1 else rng.uniform(0.15, 0.2)
        left, right = (0.0, 1.0) if count == 1 else (number * 0.5, number * 0.5 + 0.5)
        x = rng.uniform(left + half + 0.03, right - half - 0.03)
        y = rng.uniform(half + 0.03, 0.97 - half)
        _shape(canvas, shape, x, y, half, shaded(COLOURS[name], rng.uniform(0.85, 1.0)))
    return canvas.finished(rng), shapes, names


def visual_colour(rng: random.Random, size: int) -> Question:
    picture, shapes, names = _shapes(rng, size)
    return picture, f"Which colour is the {shapes[0]}?", names[0]


def visual_shape(rng: random.Random, size: int) -> Question:
    picture, shapes, names = _shapes(rng, size)
    return picture, f"Which shape is {names[0]}?", shapes[0]


def _heights(rng: random.Random, count: int) -> list[float]:
    """Heights of bars; the tallest is clearly the tallest, and none ends near a line."""
    tallest = rng.randrange(STEPS) + rng.uniform(0.15, 0.85)
    heights = [tallest, *(rng.uniform(0.1, max(0.12, tallest - 0.3)) for _ in range(count - 1))]
    rng.shuffle(heights)
    return heights


def visual_bar_count(rng: random.Random, size: int) -> Question:
    count = rng.randint(1, 5)
    return bar_chart(rng, size, _heights(rng, count), STEPS), "How many bars are there?", str(count)


def visual_tallest_bar(rng: random.Random, size: int) -> Question:
    heights = _heights(rng, rng.randint(2, 4))
    answer = heights.index(max(heights)) + 1
    return bar_chart(rng, size, heights, STEPS), "Which bar is the tallest?", str(answer)


def visual_bar_height(rng: random.Random, size: int) -> Question:
    heights = _heights(rng, rng.randint(1, 4))
    return bar_chart(rng, size, heights, STEPS), "How many lines does the tallest bar reach?", str(int(max(heights)))


def visual_needle(rng: random.Random, size: int) -> Question:
    part = rng.randrange(PARTS)
    share = (part + rng.uniform(0.15, 0.85)) / PARTS
    borders = [number / PARTS for number in range(PARTS + 1)]
    fills = [shaded(GREY, rng.uniform(0.8, 1.4)) for _ in range(PARTS)]
    return dial(rng, size, share, borders, fills), "Where does the needle point?", str(part + 1)


def visual_words(rng: random.Random, size: int) -> Question:
    picture = _shapes(rng, size)[0]
    drawn = rng.sample(_WORDS, rng.randint(1, 2))
    words = " ".join(word.capitalize() if rng.random() < 0.5 else word for word in drawn)
    return picture, f"Repeat: {words}", words


VISUAL_TASKS: dict[str, Callable[[random.Random, int], Question]] = {
    f.__name__: f for f in (visual_colour, visual_shape, visual_bar_count, visual_tallest_bar, visual_bar_height,
                            visual_needle, visual_words)
}  # fmt: skip


def is_held_out(picture: Any) -> bool:
    return zlib.crc32(picture.tobytes()) % HELD_OUT == 0


def questions(
    seed: int, size: int, *, held_out: bool, tasks: Sequence[str] = tuple(VISUAL_TASKS)
) -> Iterator[tuple[str, Any, str, str]]:
    """Endless (task, picture, question, answer), tasks in turn, from one side of the held-out split."""
    rng = random.Random(f"visual-{seed}-{held_out}-{' '.join(tasks)}")
    for name in cycle(tasks):
        while is_held_out((question := VISUAL_TASKS[name](rng, size))[0]) is not held_out:
            pass
        yield name, *question


def training_examples(count: int, seed: int, size: int, folder: Path) -> list[tuple[str, str]]:
    """Training questions of the base: (prompt, answer), their pictures in `folder`/images."""
    drawn = islice(questions(seed, size, held_out=False), count)
    return [
        (f"{save(picture, folder, f'base-{number:06d}')}\n{question}", answer)
        for number, (_, picture, question, answer) in enumerate(drawn)
    ]


def retention_items(per_task: int, *, seed: int, folder: Path, image_size: int) -> list[Item]:
    """The retention suite: `per_task` held-out questions of every general task, their pictures in `folder`/images."""
    items = []
    for task in VISUAL_TASKS:
        drawn = islice(questions(seed, image_size, held_out=True, tasks=(task,)), per_task)
        for number, (_, picture, question, answer) in enumerate(drawn):
            name = f"retention-{task}-{number:04d}"
            items.append(Item(name, task, f"{save(picture, folder, name)}\n{question}", answer, {"answer": answer}))
    return items
