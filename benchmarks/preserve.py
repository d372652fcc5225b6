"""What `train.preserve` costs: training steps with each method and without, in turn.

The Trainer's own steps, as in stage train, on AQI items, with general questions in place of the base's texts (a random
base writes nothing of a realistic length), in blocks of 32 steps. Memory is the peak of all tensors from the
building of the trainer to the end of 4 steps. Run as `python -m benchmarks.preserve`, on an idle machine.
"""

import gc
import statistics
import time
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks._harness import blocks_in_turn, command, peak_tensor_bytes, show, step_time, step_time_text, write
from evaluation.splits import PrepareData, make_splits
from evaluation.tasks import general, render
from pipelines.profile import merged
from pipelines.train import Params
from trainers import arms
from trainers.embedded_base import EmbeddedSettings, build_model, train_tokenizer
from trainers.run import TrainingJob, build
from trainers.settings import BaseReference

SHAPES = {128: (384, 4, 4, 4)}  # hidden size: MLP size, layers, heads, blocks
FORMS = ("distill", "activations", "kfac")
BLOCK, WARM_UP, MEMORY_STEPS, TEXTS = 32, 4, 4, 640


class Loop:
    """One contender: a Trainer that takes single steps."""

    def __init__(self, job: TrainingJob, arm: str):
        self.trainer, *_ = build(arms.load(arm), job)
        self.trainer.create_optimizer_and_scheduler(10_000)
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = iter(self.trainer.get_train_dataloader())
        self.weights = [p for p in self.trainer.model.parameters() if p.requires_grad]

    def step(self) -> float:
        inputs = next(self.batches)
        started = time.perf_counter()
        self.trainer.training_step(self.trainer.model, inputs)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.trainer.state.global_step += 1
        return time.perf_counter() - started


def job_of(hidden: int, folder: Path, method: str, raw: dict[str, Any], arm: str) -> TrainingJob:
    """A job of the tiny profile on a random base of that width, created on first use."""
    template, own = raw["prompt"]["template"], raw["arms"][arm]
    asked = [
        (render(template, prompt), answer) for _, prompt, answer in islice(general.questions(0, held_out=False), TEXTS)
    ]
    base = folder / str(hidden)
    if not base.is_dir():
        base.mkdir()
        mlp, layers, heads, _ = SHAPES[hidden]
        shape = {"hidden_size": hidden, "intermediate_size": mlp, "layers": layers, "heads": heads}
        known = {name: raw["prepare_base"][name] for name in EmbeddedSettings.model_fields}
        settings = EmbeddedSettings(**{**known, **shape})
        tokenizer = train_tokenizer([text for pair in asked for text in pair], settings.vocab_size, base)
        build_model(settings, tokenizer).save_pretrained(base)
    data = PrepareData(**{**raw["prepare_data"], "test_items": 20})
    items = make_splits(data, folder)[0]["train"]
    settings_of = Params.model_validate({**raw, "arms": {arm: {**own, "preserve": {"method": method}}}}).train_for(arm)
    return TrainingJob(
        base=BaseReference(str(base)),
        settings=settings_of,
        seed=0,
        train=[(render(template, item.prompt), item.completion) for item in items],
        valid=[(render(template, item.prompt), item.completion) for item in items[:8]],
        output=folder,
        checkpoints=folder,
        texts=[(prompt + answer, True) for prompt, answer in asked],
    )


def peak_bytes(job: TrainingJob, arm: str) -> int:
    def work() -> None:
        loop = Loop(job, arm)
        for _ in range(MEMORY_STEPS):
            loop.step()

    gc.collect()
    return peak_tensor_bytes(work)


def main() -> None:
    raw, _ = merged("tiny")
    rows = []
    with TemporaryDirectory() as name:
        for hidden, (*_, blocks) in SHAPES.items():
            for arm in ("baseline_lora", "pure_grit"):
                jobs = {form: job_of(hidden, Path(name), form, raw, arm) for form in ("none", *FORMS)}
                steps = {form: Loop(job, arm).step for form, job in jobs.items()}
                seconds = blocks_in_turn(steps, blocks, BLOCK, WARM_UP)
                memory = {form: peak_bytes(job, arm) for form, job in jobs.items()}
                for form in FORMS:
                    rows.append({
                        "hidden_size": hidden, "arm": arm, "preserve": form, **step_time(seconds, form, "none"),
                        "plain_ms_per_step": 1000 * statistics.fmean(seconds["none"]),
                        "memory_ratio": memory[form] / memory["none"],
                    })  # fmt: skip
    columns = {
        "hidden": lambda row: row["hidden_size"],
        "arm": lambda row: row["arm"],
        "preserve": lambda row: row["preserve"],
        "step time / without [min, max]": step_time_text,
        "ms without": lambda row: f"{row['plain_ms_per_step']:.1f}",
        "memory / without": lambda row: f"{row['memory_ratio']:.3f}",
    }
    title = "Step time and memory with train.preserve over without"
    show(title, columns, rows)
    write("preserve", title, rows=rows, threads=torch.get_num_threads())


if __name__ == "__main__":
    command(main)
