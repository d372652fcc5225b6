"""Small versions of the five data sets, in their hub format, written by `datasets` itself.

The questions are simple and use only words that the embedded base knows, so that a small model can learn them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evaluation.tasks.general import WORDS

Row = dict[str, Any]
NOUNS = tuple(word for word in WORDS if word not in ("very", "large", "small", "quiet", "happy", "good", "moderate"))
COLOURS = ("yellow", "orange", "silver", "light")


def _gsm8k(rng: random.Random) -> Row:
    a, b, noun = rng.randint(2, 60), rng.randint(2, 39), rng.choice(NOUNS)
    if rng.random() < 0.5:
        question = f"Tom has {a} {noun}s and buys {b} more. How many {noun}s has Tom now?"
        working, right = f"{a}+{b}", a + b
    else:
        a += b
        question = f"Anna has {a} {noun}s and gives {b} away. How many {noun}s are left?"
        working, right = f"{a}-{b}", a - b
    spaced = working.replace("+", " + ").replace("-", " - ")
    return {"question": question, "answer": f"{spaced} = <<{working}={right}>>{right} {noun}s.\n#### {right}"}


def _boolq(rng: random.Random) -> Row:
    things, colours = rng.sample(NOUNS, 2), [rng.choice(COLOURS) for _ in range(2)]
    passage = " ".join(f"The {t} is {c}." for t, c in zip(things, colours, strict=True))
    asked = rng.randrange(2)
    colour = colours[asked] if rng.random() < 0.5 else rng.choice(COLOURS)
    return {"question": f"is the {things[asked]} {colour}", "answer": colour == colours[asked], "passage": passage}


def _qnli(rng: random.Random) -> Row:
    thing, place, other = rng.sample(NOUNS, 3)
    entails = rng.random() < 0.5
    return {
        "question": f"What colour is the {thing} near the {place}?",
        "sentence": f"The {thing if entails else other} near the {place} is {rng.choice(COLOURS)}.",
        "label": 0 if entails else 1,
        "idx": rng.randrange(10**6),
    }


def _alpaca(rng: random.Random) -> Row:
    words = rng.sample(NOUNS, 3)
    if rng.random() < 0.8:
        instruction, given, output = "Write the words in reverse order.", " ".join(words), " ".join(words[::-1])
    else:
        instruction, given, output = f"Write the word {words[0]} twice.", "", f"{words[0]} {words[0]}"
    text = f"### Instruction:\n{instruction}\n\n### Response:\n{output}"
    return {"instruction": instruction, "input": given, "output": output, "text": text}


def _dolly(rng: random.Random) -> Row:
    (a, b), (home, work) = rng.sample(("Anna", "Tom", "Mia", "Ben", "Eva", "Leo"), 2), rng.sample(NOUNS, 2)
    if rng.random() < 0.7:
        context = f"{a} lives near the {home}. {b} lives near the {work}."
        name, place = rng.choice(((a, home), (b, work)))
        question, answer, category = f"Where does {name} live?", f"near the {place}", "closed_qa"
    else:
        context, question, answer, category = "", f"Name the {home} and the {work}.", f"{home} {work}", "open_qa"
    return {"instruction": question, "context": context, "response": answer, "category": category}


MAKERS: dict[str, Callable[[random.Random], Row]] = {
    make.__name__[1:]: make for make in (_alpaca, _boolq, _dolly, _gsm8k, _qnli)
}


def rows(task: str, n: int, seed: int = 0) -> list[Row]:
    """Different rows with the hub's field names and types."""
    rng = random.Random(f"{task}-{seed}")
    unique: dict[str, Row] = {}
    while len(unique) < n:
        row = MAKERS[task](rng)
        unique.setdefault(repr({k: v for k, v in row.items() if k != "idx"}), row)
    return list(unique.values())


def data_set(task: str, rows: list[Row]) -> Any:
    from datasets import ClassLabel, Dataset

    data = Dataset.from_list(rows)
    return data.cast_column("label", ClassLabel(names=["entailment", "not_entailment"])) if task == "qnli" else data


def write(folder: Path, task: str, n: int, n_test: int = 0) -> Path:
    """A data set in a new folder as on the hub: Parquet files, or JSON lines for Dolly.

    `n_test` rows go to the split that the data set tests with; Alpaca and Dolly have none.
    """
    every = rows(task, n + n_test)
    (folder if task == "dolly" else folder / "data").mkdir(parents=True)
    if task == "dolly":
        data_set(task, every).to_json(folder / "databricks-dolly-15k.jsonl")
        return folder
    splits = {"train": every[:n]}
    if task != "alpaca":
        splits["test" if task == "gsm8k" else "validation"] = every[n:]
    for split, part in splits.items():
        data_set(task, part).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder
