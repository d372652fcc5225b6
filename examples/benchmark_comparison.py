"""Vanilla LoRA against GRIT-VLM: the same layers, ranks, steps, items and choice of learning rates, several seeds.

    python examples/benchmark_comparison.py                          # a tiny Idefics3, about two minutes
    python examples/benchmark_comparison.py --seeds 5 --steps 400 --learning-rates 1e-3 3e-3 1e-2

Each arm takes the learning rate with the lowest validation loss on a seed of its own, which is not counted. Intervals
are 95%: those of accuracy for other seeds and items (evaluation/seeds.py), the others for other seeds, by Student's t.
The full comparison, with probe, forgetting and report, is `make repro-vlm`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import PIPELINE_BASE, TEMPLATE, image_size, questions, quiet, rendered, trained_base, work_folder
from rich.console import Console
from rich.table import Table

from benchmarks._harness import peak_tensor_bytes
from evaluation.seeds import crossed_interval
from evaluation.statistics import Interval, judge
from evaluation.student import quantile
from evaluation.tasks import Item, aqi_vision, render
from grit_vlm import GRITLoRAConfig, create_grit_optimizer, create_vlm_grit_adapter
from grit_vlm.data import VisionProcessor, load_processor
from trainers.settings import BaseReference

ARMS = {"vanilla": "vanilla LoRA", "grit": "GRIT-VLM"}
OPTIMIZERS = ("grit_adam", "adaptive_adam", "grit_adam_preconditioned")
"""Those that, like vanilla LoRA's, are of Adam's kind."""
TUNING_SEED = 1000
EVALUATIONS = 10
"""Of the validation loss in a run."""


@dataclass
class Task:
    """What every run works on.

    Attributes:
        base: Model folder or hub id.
        processor: Of the model.
        rows: Split → encoded items.
        test: Items to be answered.
        options: The command line's.
    """

    base: str
    processor: VisionProcessor
    rows: dict[str, list[dict[str, Any]]]
    test: list[Item]
    options: argparse.Namespace


@dataclass
class Run:
    """What came out of one run.

    Attributes:
        losses: Step → validation loss.
        seconds: Of each step.
        correct: Whether each test item was answered rightly, 1 or 0.
        parameters: Weights that were trained.
    """

    losses: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)
    parameters: int = 0

    @property
    def final_loss(self) -> float:
        """After the last step."""
        return self.losses[max(self.losses)]

    def steps_to(self, loss: float) -> int | None:
        """The first evaluated step with that validation loss or less; None: there was none."""
        return next((step for step, own in sorted(self.losses.items()) if own <= loss), None)


class Training:
    """One arm with one learning rate and seed; LoRA starts alike in both arms."""

    def __init__(self, task: Task, arm: str, rate: float, seed: int):
        torch.manual_seed(seed)
        options = task.options
        config = GRITLoRAConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, fisher_approximation=options.estimate, enable_projection=False
        )
        self.task, self.rate = task, rate
        self.model, adapter = create_vlm_grit_adapter(task.base, config)
        self.model.train()
        weights = adapter.get_trainable_parameters()
        self.parameters = sum(p.numel() for p in weights)
        if arm == "vanilla":
            self.optimizer: Any = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
        else:
            self.optimizer = create_grit_optimizer(weights, options.optimizer, adapter.get_grit_layers(), lr=rate)
        self.order = torch.Generator().manual_seed(seed)
        self.left: list[int] = []

    def step(self, number: int) -> float:
        """One optimizer step, the learning rate falling linearly to 0; its seconds, reading items not counted."""
        rows, options = self.task.rows["train"], self.task.options
        while len(self.left) < options.batch:
            self.left += torch.randperm(len(rows), generator=self.order).tolist()
        chosen, self.left = self.left[: options.batch], self.left[options.batch :]
        batch = self.task.processor.collate([rows[i] for i in chosen], self.model.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (1 - number / options.steps)
        started = time.perf_counter()
        self.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    @torch.no_grad()
    def loss(self, split: str) -> float:
        """Mean over the tokens of all answers of a split."""
        total, tokens = 0.0, 0
        rows = self.task.rows[split]
        for start in range(0, len(rows), 32):
            batch = self.task.processor.collate(rows[start : start + 32], self.model.device)
            count = int((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + float(self.model(**batch).loss) * count, tokens + count
        return total / tokens

    @torch.no_grad()
    def answers(self) -> list[float]:
        """1 for each test item that is answered rightly, else 0."""
        credit = []
        for start in range(0, len(self.task.test), 32):
            items = self.task.test[start : start + 32]
            batch = self.task.processor.collate(
                [self.task.processor.encode(render(TEMPLATE, item.prompt)) for item in items], self.model.device
            )
            ids = self.model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
            texts = self.task.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            credit += [aqi_vision.score(item, text).credit for item, text in zip(items, texts, strict=True)]
        return credit


def run(task: Task, arm: str, rate: float, seed: int) -> Run:
    """Train, looking at the validation loss now and then."""
    training, found = Training(task, arm, rate, seed), Run()
    every = max(1, task.options.steps // EVALUATIONS)
    for number in range(task.options.steps):
        found.seconds.append(training.step(number))
        if (number + 1) % every == 0 or number + 1 == task.options.steps:
            training.model.eval()
            found.losses[number + 1] = training.loss("valid")
            training.model.train()
    training.model.eval()
    found.parameters = training.parameters
    if seed != TUNING_SEED:
        found.correct = training.answers()
    return found


def peak_mebibytes(task: Task, arm: str, rate: float) -> float:
    """Most that torch's tensors take on the CPU at any moment of three steps, model and optimizer included."""

    def work() -> None:
        training = Training(task, arm, rate, 0)
        for number in range(3):
            training.step(number)

    return peak_tensor_bytes(work) / 2**20


def over_seeds(values: list[float]) -> Interval:
    """Mean with its 95% interval by Student's t."""
    mean, n = statistics.fmean(values), len(values)
    half = quantile(n - 1) * statistics.stdev(values) / n**0.5
    return Interval(mean, mean - half, mean + half)


def said(interval: Interval, digits: int = 3) -> str:
    """An interval as text."""
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def steps_said(runs: list[Run], baseline: list[Run]) -> str:
    """Steps to the baseline's last loss, seed by seed against the baseline of that seed."""
    steps = [own.steps_to(other.final_loss) for own, other in zip(runs, baseline, strict=True)]
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        mean = f", {statistics.fmean(reached):.0f} there" if reached else ""
        return f"reached by {len(reached)} of {len(steps)} seeds{mean}"
    return said(over_seeds([float(step) for step in reached]), 0)


def compare(task: Task, console: Console) -> None:
    """Tune, run all seeds, print the table."""
    rates, seeds = task.options.learning_rates, range(task.options.seeds)
    best: dict[str, float] = {}
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for arm, title in ARMS.items():
        losses = {rate: run(task, arm, rate, TUNING_SEED).final_loss for rate in rates}
        best[arm] = min(losses, key=lambda rate: losses[rate])
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in losses.items())
        console.print(
            f"{title}: validation loss by learning rate {tried}; takes {best[arm]:g}.", highlight=False, soft_wrap=True
        )
    # Seeds of both arms in turn, so that a machine that slows down slows both.
    for seed in seeds:
        for arm in ARMS:
            runs[arm].append(run(task, arm, best[arm], seed))
    peaks = {arm: peak_mebibytes(task, arm, best[arm]) for arm in ARMS}
    table = Table(title=f"{len(seeds)} seeds, {task.options.steps} steps, {len(task.test)} test items")
    table.add_column("")
    for title in ARMS.values():
        table.add_column(title)
    right = {arm: np.array([own.correct for own in runs[arm]]) for arm in ARMS}
    rows: dict[str, Callable[[str], str]] = {
        "learning rate": lambda arm: f"{best[arm]:g}",
        "evaluation loss": lambda arm: said(over_seeds([own.final_loss for own in runs[arm]])),
        "accuracy (by chance 0.167)": lambda arm: said(crossed_interval(right[arm])[0]),
        "steps to the baseline's loss": lambda arm: steps_said(runs[arm], runs["vanilla"]),
        "trained parameters": lambda arm: f"{runs[arm][0].parameters:,}",
        "seconds a step": lambda arm: said(over_seeds([statistics.fmean(own.seconds) for own in runs[arm]]), 4),
        "peak of tensors, MiB": lambda arm: f"{peaks[arm]:.1f}",
    }
    for name, text in rows.items():
        table.add_row(name, *(text(arm) for arm in ARMS))
    console.print(table)
    gains = [own.final_loss - other.final_loss for own, other in zip(runs["grit"], runs["vanilla"], strict=True)]
    difference, p_value = crossed_interval(right["grit"] - right["vanilla"])
    console.print(f"GRIT-VLM minus vanilla LoRA: evaluation loss {said(over_seeds(gains))}; accuracy "
                  f"{said(difference)}, {judge(difference, p_value)}.", highlight=False, soft_wrap=True)  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the base of make repro-vlm, or a tiny one")
    parser.add_argument("--pretraining", type=int, default=3000, help="questions for the tiny one (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm, 2 or more (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="items a step (%(default)s)")
    parser.add_argument("--items", type=int, default=360, help="training items (%(default)s)")
    parser.add_argument("--test-items", type=int, default=90, help="to be answered (%(default)s)")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2, 1e-1], help="to choose from"
    )
    parser.add_argument("--estimate", choices=("diagonal", "kfac", "block_diagonal"), default="kfac")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="grit_adam", help="of GRIT-VLM (%(default)s)")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, for intervals; got {options.seeds}")
    quiet()
    console = Console(width=110)
    with work_folder() as made:
        folder = Path(made)
        trained = (PIPELINE_BASE / "config.json").is_file()
        base = options.model or (str(PIPELINE_BASE) if trained else trained_base(folder, options.pretraining))
        sizes = {"train": options.items, "valid": 90, "test": options.test_items}
        items = questions(folder, sizes, image_size(base))
        processor = load_processor(BaseReference(base), folder)
        rows = {split: [processor.encode(*pair) for pair in rendered(items[split])] for split in ("train", "valid")}
        compare(Task(base, processor, rows, items["test"], options), console)
    console.print("The full comparison, with probe, forgetting and report: make repro-vlm.")


if __name__ == "__main__":
    main()
