"""General tasks: what the embedded base model is trained on, and the retention suite that tests it.

Each task is a function of a random generator that returns a question and its only right answer. None of them mentions
air, pollutants or an index. A hash of its text puts a question into the held-out or the training part, so the suite
never contains a question that the base was trained on.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import cycle, islice

from evaluation import EvaluationError, knowledge
from evaluation.tasks import Item, Score, mean, repunctuate, share

NAME = "general"
TITLE = "retention"
PRIMARY = "retention_accuracy"
METRICS = {
    "retention_accuracy": share("Share of general questions answered correctly, over all items of the retention suite")
}
REWORDINGS = {"mark": repunctuate}
# One question in HELD_OUT is never trained on.
HELD_OUT = 10

WORDS = tuple(
    (
        "apple river stone maple window garden silver orange table bridge candle forest island jacket ladder market "
        "ocean pepper school valley yellow anchor basket dragon engine hammer lemon mirror nature office pencil queen "
        "summer ticket winter good moderate healthy sensitive very large small quiet happy group level person "
        "hazard bread cloud flower house light mountain night paper sugar train voice water year"
    ).split()
)

UNITS = ("kg", "km", "cm", "%", "°C", "µg", "µg/m³", "m³", "ppm", "ppb", "W", "mg")
# Names that the AQI task uses, which random codes must avoid.
_RESERVED = ("PM", "O3", "CO", "SO", "NO")

Question = tuple[str, str]


def _number(rng: random.Random) -> int:
    return rng.choice((rng.randint(0, 9), rng.randint(10, 99), rng.randint(100, 999)))


def _decimal(rng: random.Random) -> str:
    return rng.choice((str(_number(rng)), f"{_number(rng)}.{rng.randint(0, 9)}", f"0.{rng.randint(0, 999):03d}"))


def _code(rng: random.Random) -> str:
    while True:
        letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 2)))
        digits = rng.choice(("", str(rng.randint(1, 9)), "10", f"{rng.randint(1, 9)}.{rng.randint(1, 9)}"))
        if not any(name in letters + digits for name in _RESERVED):
            return letters + digits


def addition(rng: random.Random) -> Question:
    a, b = rng.randint(0, 30), rng.randint(0, 30)
    return rng.choice(("What is {} + {}?", "Add {} and {}.")).format(a, b), str(a + b)


def larger(rng: random.Random) -> Question:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return rng.choice(("Which is larger: {} or {}?", "Largest of {}, {}?")).format(a, b), str(max(a, b))


def sorting(rng: random.Random) -> Question:
    a = [rng.randint(0, 9) for _ in range(rng.randint(3, 4))]
    return f"Sort: {' '.join(map(str, a))}", " ".join(map(str, sorted(a)))


def copying(rng: random.Random) -> Question:
    words = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    return rng.choice(("Repeat: {}", "Copy these words: {}")).format(words), words


def copying_numbers(rng: random.Random) -> Question:
    measured = f"{_decimal(rng)} {rng.choice(UNITS)}"
    return f"Repeat: {measured}", measured


def reading_values(rng: random.Random) -> Question:
    names: list[str] = []
    while len(names) < 4:
        name = rng.choice((rng.choice(WORDS), _code(rng)))
        if name not in names:
            names.append(name)
    count = rng.randint(1, 3)
    values = [f"{_decimal(rng)} {rng.choice(UNITS)}" for _ in range(count)]
    style = rng.choice(("{} {}", "{} = {}", "{}: {}"))
    listed = ", ".join(style.format(n, v) for n, v in zip(names[:count], values, strict=True))
    if rng.random() < 0.15:
        return f"Given: {listed}. What is {names[3]}?", "not given"
    i = rng.randrange(count)
    return f"Given: {listed}. What is {names[i]}?", values[i].split()[0]


def rounding(rng: random.Random) -> Question:
    whole, tenth = rng.randint(0, 99), rng.randint(0, 9)
    return f"Round {whole}.{tenth} to a whole number.", str(whole + (tenth >= 5))


def truncating(rng: random.Random) -> Question:
    whole, tenth = _number(rng), rng.randint(0, 9)
    return f"Cut {whole}.{tenth} to a whole number.", str(whole)


def even_or_odd(rng: random.Random) -> Question:
    n = _number(rng)
    return f"Is {n} even or odd?", "odd" if n % 2 else "even"


def within_range(rng: random.Random) -> Question:
    low, high = sorted((_number(rng), _number(rng)))
    n = rng.randint(low, high) if rng.random() < 0.5 else _number(rng)
    return f"Is {n} from {low} to {high}?", "yes" if low <= n <= high else "no"


def last_word(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(2, 3))
    which = rng.choice(("first", "last"))
    return f"Which word is {which}: {' '.join(words)}", words[0 if which == "first" else -1]


GENERAL_TASKS: dict[str, Callable[[random.Random], Question]] = {
    f.__name__: f for f in (addition, larger, sorting, copying, copying_numbers, reading_values, rounding, truncating,
                            even_or_odd, within_range, last_word)
}  # fmt: skip
# Looking up a value is the hardest to learn, so training asks it more often.
TRAINING_TURNS = (*GENERAL_TASKS, "reading_values", "reading_values")


def bare(prompt: str) -> str:
    """The part of a question that evaluation.paraphrase never changes."""
    return prompt.strip().rstrip("?.! ")


def is_held_out(prompt: str) -> bool:
    return zlib.crc32(bare(prompt).encode()) % HELD_OUT == 0


def questions(seed: int, *, held_out: bool, tasks: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Endless (task, prompt, answer), held out or not, cycling through the tasks (default: TRAINING_TURNS)."""
    rng = random.Random(f"general-{seed}-{held_out}")
    for name in cycle(tasks or TRAINING_TURNS):
        while is_held_out((question := GENERAL_TASKS[name](rng))[0]) is not held_out:
            pass
        yield name, *question


def retention_items(per_task: int, seed: int) -> list[Item]:
    """The retention suite: `per_task` different held-out questions per task; EvaluationError if there are fewer."""
    items: list[Item] = []
    for name in GENERAL_TASKS:
        answers: dict[str, str] = {}
        for _, prompt, answer in islice(questions(seed, held_out=True, tasks=(name,)), 100 * per_task + 1000):
            answers[prompt] = answer
            if len(answers) == per_task:
                break
        else:
            raise EvaluationError(
                f"expected {per_task} different held-out questions of {name}, got {len(answers)}. "
                "Lower prepare_data.retention_items_per_task"
            )
        items += [
            Item(f"retention-{name}-{i:04d}", name, prompt, answer, {"answer": answer})
            for i, (prompt, answer) in enumerate(answers.items())
        ]
    return items


_SPACE = re.compile(r"\s+")


def score(item: Item, answer: str) -> Score:
    """Correct if the answer is the expected one, up to case, white space and final periods.

    One of evaluation.knowledge has to contain it.
    """
    if "accepted" in item.truth:
        right = knowledge.is_right(item.truth, answer)
        return Score(correct=right, predicted=answer.strip() or None, exact=right)
    given = _SPACE.sub(" ", answer).strip().rstrip(".").casefold()
    right = given == str(item.truth["answer"]).casefold()
    return Score(correct=right, predicted=given or None, exact=right)


def summarize(scores: list[Score]) -> dict[str, float]:
    return {"retention_accuracy": mean(s.correct for s in scores)}
