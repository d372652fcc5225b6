"""Vanilla LoRA against GRIT-VLM: same layers, ranks, steps, items and tuning of the learning rate, several seeds.

    python examples/benchmark_comparison.py                          # a tiny Idefics3, about two minutes
    python examples/benchmark_comparison.py --seeds 5 --steps 400 --learning-rates 1e-3 3e-3 1e-2

Each arm uses the learning rate with the lowest validation loss on a separate seed. Brackets show the lowest and highest
seed; for accuracy, the 95% interval over seeds and items. The full comparison,
with probe, forgetting and report, is `make repro PROFILE=vision`.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import encode, prepare
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, Trainer, TrainingArguments

from evaluation.statistics.intervals import judge
from evaluation.statistics.seeds import crossed_interval
from evaluation.tasks import Item, aqi_vision
from grit_vlm import GRITLoRAConfig, GRITTrainer, GRITTrainingArguments, create_vlm_grit_adapter
from trainers.pictures import VisionProcessor

ARMS = {"vanilla": "vanilla LoRA", "grit": "GRIT-VLM"}
TUNING_SEED = 1000


@dataclass
class Task:
    """What every run shares; `rows` are encoded items, `test` items to be answered."""

    folder: Path
    base: str
    processor: VisionProcessor
    rows: dict[str, list[dict[str, Any]]]
    test: list[Item]
    options: argparse.Namespace

    def run(self, arm: str, rate: float, seed: int) -> tuple[float, float, int, list[float]]:
        """Validation loss, seconds per step, trained parameters, and 1 for each correctly answered test item."""
        torch.manual_seed(seed)
        steps = self.options.steps
        config = GRITLoRAConfig(r=8, lora_alpha=16, lora_dropout=0.0, fisher_approximation="kfac")
        model, adapter = create_vlm_grit_adapter(self.base, config)
        arguments: dict[str, Any] = {
            "output_dir": str(self.folder / "run"), "max_steps": steps, "per_device_train_batch_size": 8,
            "learning_rate": rate, "seed": seed, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_strategy": "no", "per_device_eval_batch_size": 32, "remove_unused_columns": False,
        }  # fmt: skip
        data: dict[str, Any] = {"train_dataset": self.rows["train"], "eval_dataset": self.rows["valid"]}
        data["data_collator"] = self.processor.collate
        if arm == "vanilla":
            trainer = Trainer(model, TrainingArguments(**arguments), **data)
        else:
            trainer = GRITTrainer(model, GRITTrainingArguments(**arguments), grit_adapter=adapter, **data)
        trainer.remove_callback(PrinterCallback)
        seconds = trainer.train().metrics["train_runtime"] / steps
        loss = trainer.evaluate()["eval_loss"]
        right = self.answers(model.eval()) if seed != TUNING_SEED else []
        return loss, seconds, sum(p.numel() for p in adapter.get_trainable_parameters()), right

    @torch.no_grad()
    def answers(self, model: Any) -> list[float]:
        credit = []
        for start in range(0, len(self.test), 32):
            items = self.test[start : start + 32]
            batch = self.processor.collate(encode(self.processor, items, taught=False), model.device)
            ids = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
            texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            credit += [aqi_vision.score(item, text).credit for item, text in zip(items, texts, strict=True)]
        return credit


def shown(middle: float, low: float, high: float, digits: int = 3) -> str:
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def compare(task: Task, console: Console) -> None:
    best: dict[str, float] = {}
    for arm, title in ARMS.items():
        tuned = {rate: task.run(arm, rate, TUNING_SEED)[0] for rate in task.options.learning_rates}
        best[arm] = min(tuned, key=lambda rate: tuned[rate])
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in tuned.items())
        text = f"{title}: validation loss by learning rate {tried}; using {best[arm]:g}."
        console.print(text, highlight=False, soft_wrap=True)
    # Seeds of both arms in turn, so that a machine that slows down slows both.
    seeds = range(task.options.seeds)
    runs = [{arm: task.run(arm, best[arm], seed) for arm in ARMS} for seed in seeds]
    right = {arm: np.array([run[arm][3] for run in runs]) for arm in ARMS}
    table = Table(title=f"{len(seeds)} seeds, {task.options.steps} steps, {len(task.test)} test items")
    for title in ("", *ARMS.values()):
        table.add_column(title)
    table.add_row("learning rate", *(f"{best[arm]:g}" for arm in ARMS))
    losses = {arm: [run[arm][0] for run in runs] for arm in ARMS}
    seconds = {arm: [run[arm][1] for run in runs] for arm in ARMS}
    for name, found, digits in (("validation loss", losses, 3), ("seconds a step", seconds, 4)):
        table.add_row(name, *(shown(sum(v) / len(v), min(v), max(v), digits) for v in found.values()))
    accuracies = [crossed_interval(right[arm])[0] for arm in ARMS]
    table.add_row("accuracy (by chance 0.167)", *(shown(a.estimate, a.low, a.high) for a in accuracies))
    table.add_row("trained parameters", *(f"{runs[0][arm][2]:,}" for arm in ARMS))
    console.print(table)
    difference, p_value = crossed_interval(right["grit"] - right["vanilla"])
    text = shown(difference.estimate, difference.low, difference.high)
    console.print(f"GRIT-VLM minus vanilla LoRA: accuracy {text}, {judge(difference, p_value)}.", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: a tiny one")
    parser.add_argument("--pretraining", type=int, default=3000, help="questions for the tiny one (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each arm, 2 or more (%(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run (%(default)s)")
    parser.add_argument("--items", type=int, default=360, help="training items (%(default)s)")
    parser.add_argument("--test-items", type=int, default=90, help="to be answered (%(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2, 1e-1], help="tried")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds: expected at least 2, for intervals; got {options.seeds}")
    with tempfile.TemporaryDirectory(prefix="grit-vlm-") as name:
        folder = Path(name)
        sizes = {"train": options.items, "valid": 90, "test": options.test_items}
        base, processor, items = prepare(options.model, folder, options.pretraining, sizes)
        rows = {split: encode(processor, items[split]) for split in ("train", "valid")}
        compare(Task(folder, base, processor, rows, items["test"], options), Console(width=110))


if __name__ == "__main__":
    main()
