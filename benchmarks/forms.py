"""Does an answer depend on how a question is typed? Every exported model, every test item in every form.

The forms: plain, with a trailing newline (as from `echo`), blank or question mark, and as the second question of a
conversation, rendered by the Modelfile's TEMPLATE (identical to plain if that renders the last question only). Greedy
decoding by llama.cpp; needs what `make repro` leaves. Run as `python -m benchmarks.forms`.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks._harness import command, write
from db.files import read_jsonl
from evaluation.report.text import interval, number
from evaluation.statistics.differences import Pairs, difference
from evaluation.tasks import Item, load
from export.engines.engine import Asked, conversation
from export.engines.llama_cpp import LlamaCppEngine
from export.served import BASE, Served, find_served
from pipelines.check import load_params
from pipelines.stage import DATA

PARALLEL = 16


def forms(items: list[Item], first: str) -> dict[str, list[Asked]]:
    """`first` is the model's answer to the first item, whose question precedes all others."""
    turns = [(items[0].prompt, first)]
    return {
        "plain": [item.prompt for item in items],
        "newline": [item.prompt + "\n" for item in items],
        "blank": [item.prompt + " " for item in items],
        "question mark": [item.prompt + "?" for item in items],
        "second question": [conversation(item.prompt, turns=turns) for item in items],
    }


def credits(served: Served, items: list[Item], max_tokens: int) -> dict[str, list[float]]:
    """Form → credit of every item."""
    score, stop = load(items[0].task).score, served.serving.stop
    with LlamaCppEngine(
        served.gguf, served.serving.render, num_ctx=served.serving.num_ctx, parallel=PARALLEL
    ) as engine:
        first = engine.generate(items[0].prompt, max_tokens, stop).text
        credit = {}
        for form, prompts in forms(items, first).items():
            answers = dict(engine.generate_many(prompts, max_tokens, stop))
            credit[form] = [score(item, answers[place].text).credit for place, item in enumerate(items)]
    return credit


def main() -> None:
    params = load_params()
    items = [Item.from_json(row) for row in read_jsonl(DATA / "test.jsonl")]
    models = [served for served in find_served(Path("gguf")) if served.arm in (BASE, *params.matrix.arms)]
    by_arm: dict[str, dict[int, dict[str, list[float]]]] = {}
    for served in tqdm(models, desc="models"):
        by_arm.setdefault(served.arm, {})[served.seed] = credits(served, items, params.evaluate.max_tokens)
    table = Table("arm", "form", "seeds", "right, %", "Δ to plain, points", title=f"{len(items)} test items")
    rows: list[dict[str, object]] = []
    for arm, of_seeds in by_arm.items():
        seeds = tuple(of_seeds)
        credit = {form: np.array([of_seeds[seed][form] for seed in seeds]) for form in of_seeds[seeds[0]]}
        for form, own in credit.items():
            percent, points = 100 * float(own.mean()), difference(Pairs("plain", seeds, own, credit["plain"])).points
            table.add_row(arm, form, str(len(seeds)), number(percent), interval(points, sign=True))
            rows.append({"arm": arm, "form": form, "seeds": seeds, "percent": percent, "change": asdict(points)})
    Console(width=100).print(table)
    write("forms", "questions typed in several forms", items=len(items), rows=rows)


if __name__ == "__main__":
    command(main)
