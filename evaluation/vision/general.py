"""General questions about pictures: what the embedded vision base is trained on, and its retention suite.

Each task is a function of a random generator and a size that returns a picture, a question and its only right answer.
None of them mentions air, pollutants or an index. A picture belongs to the held-out part or to the training part by a
hash of its pixels, so the suite holds no picture that the base was trained on.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from evaluation.tasks import Item
from evaluation.tasks.general import HELD_OUT, WORDS
from evaluation.vision.air import bar_chart, dial
from evaluation.vision.canvas import GREY, Canvas, Colour, paper, reference, save, shaded

COLOURS: dict[str, Colour] = {
    "red": (255, 20, 20),
    "orange": (255, 130, 10),
    "yellow": (250, 245, 20),
    "green": (20, 220, 30),
    "blue": (30, 70, 240),
    "purple": (145, 60, 155),
    "maroon": (125, 5, 35),
    "grey": (130, 130, 130),
    "black": (20, 20, 20),
}
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
    """The colour of a shape, alone or beside another one."""
    picture, shapes, names = _shapes(rng, size)
    return picture, f"Which colour is the {shapes[0]}?", names[0]


def visual_shape(rng: random.Random, size: int) -> Question:
    """The form of the shape of a colour."""
    picture, shapes, names = _shapes(rng, size)
    return picture, f"Which shape is {names[0]}?", shapes[0]


def _heights(rng: random.Random, count: int) -> list[float]:
    """Heights of bars; the tallest stands out, and none ends near a line."""
    tallest = rng.randrange(STEPS) + rng.uniform(0.15, 0.85)
    heights = [tallest, *(rng.uniform(0.1, max(0.12, tallest - 0.3)) for _ in range(count - 1))]
    rng.shuffle(heights)
    return heights


def visual_bar_count(rng: random.Random, size: int) -> Question:
    """How many bars a chart has."""
    count = rng.randint(1, 5)
    return bar_chart(rng, size, _heights(rng, count), STEPS), "How many bars are there?", str(count)


def visual_tallest_bar(rng: random.Random, size: int) -> Question:
    """The place of the tallest bar, from the left."""
    heights = _heights(rng, rng.randint(2, 4))
    answer = heights.index(max(heights)) + 1
    return bar_chart(rng, size, heights, STEPS), "Which bar is the tallest?", str(answer)


def visual_bar_height(rng: random.Random, size: int) -> Question:
    """How many lines the tallest bar reaches."""
    heights = _heights(rng, rng.randint(1, 4))
    return bar_chart(rng, size, heights, STEPS), "How many lines does the tallest bar reach?", str(int(max(heights)))


def visual_needle(rng: random.Random, size: int) -> Question:
    """The part of a dial that its needle points at, from the left."""
    part = rng.randrange(PARTS)
    share = (part + rng.uniform(0.15, 0.85)) / PARTS
    borders = [number / PARTS for number in range(PARTS + 1)]
    fills = [shaded(GREY, rng.uniform(0.8, 1.4)) for _ in range(PARTS)]
    return dial(rng, size, share, borders, fills), "Where does the needle point?", str(part + 1)


def visual_words(rng: random.Random, size: int) -> Question:
    """Words repeated as they stand, whatever the picture shows."""
    picture = _shapes(rng, size)[0]
    drawn = rng.sample(_WORDS, rng.randint(1, 2))
    words = " ".join(word.capitalize() if rng.random() < 0.5 else word for word in drawn)
    return picture, f"Repeat: {words}", words


VISUAL_TASKS: dict[str, Callable[[random.Random, int], Question]] = {
    f.__name__: f
    for f in (
        visual_colour,
        visual_shape,
        visual_bar_count,
        visual_tallest_bar,
        visual_bar_height,
        visual_needle,
        visual_words,
    )
}


def is_held_out(picture: Any) -> bool:
    """Whether a picture belongs to the part that the base is not trained on."""
    return zlib.crc32(picture.tobytes()) % HELD_OUT == 0


def questions(
    seed: int, size: int, *, held_out: bool, tasks: Sequence[str] = tuple(VISUAL_TASKS)
) -> Iterator[tuple[str, Any, str, str]]:
    """Endless (task, picture, question, answer), the tasks in turn, from one side of the held-out line.

    Args:
        seed: Same seed and size, same questions.
        size: Side of the pictures in pixels.
        held_out: The side of the line: False for training, True for the retention suite.
        tasks: Names to go through again and again.
    """
    rng = random.Random(f"visual-{seed}-{held_out}-{' '.join(tasks)}")
    while True:
        for name in tasks:
            picture, question, answer = VISUAL_TASKS[name](rng, size)
            while is_held_out(picture) is not held_out:
                picture, question, answer = VISUAL_TASKS[name](rng, size)
            yield name, picture, question, answer


def training_examples(count: int, seed: int, size: int, folder: Path) -> list[tuple[str, str]]:
    """Training questions of the base: (prompt, answer), their pictures in `folder`/images.

    Args:
        count: Of the questions, each with a picture of its own.
        seed: Same seed and size, same questions.
        size: Side of the pictures in pixels.
        folder: Exists; its folder `images` is made.
    """
    (folder / "images").mkdir(exist_ok=True)
    examples = []
    for number, (_, picture, question, answer) in enumerate(islice(questions(seed, size, held_out=False), count)):
        name = f"base-{number:06d}"
        save(picture, folder, name)
        examples.append((f"{reference(name)}\n{question}", answer))
    return examples


def retention_items(per_task: int, seed: int, size: int, folder: Path) -> list[Item]:
    """The retention suite: `per_task` held-out questions of every general task, their pictures in `folder`/images.

    Args:
        per_task: Questions of each task.
        seed: Same seed and size, same items.
        size: Side of the pictures in pixels.
        folder: Exists; its folder `images` is made.
    """
    (folder / "images").mkdir(exist_ok=True)
    items = []
    for task in VISUAL_TASKS:
        drawn = islice(questions(seed, size, held_out=True, tasks=(task,)), per_task)
        for number, (_, picture, question, answer) in enumerate(drawn):
            name = f"retention-{task}-{number:04d}"
            save(picture, folder, name)
            items.append(Item(name, task, f"{reference(name)}\n{question}", answer, {"answer": answer}))
    return items
