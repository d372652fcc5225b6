"""The tiny profile's fine-tuning task as a plain torch loop, for benchmarks of optimizers.

Needs what `make repro` (or `dvc repro prepare_base`) leaves in `models/base` and `data`.
"""

import multiprocessing
import os
import random
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.tasks import Item, render
from grit import GRITConfig, GRITManager, GritOptimizer
from pipelines.base_model import load_reference
from pipelines.config import load_params
from pipelines.runinfo import read_jsonl
from trainers.data import encode_example
from trainers.models import load_tokenizer


@dataclass(frozen=True)
class Recipe:
    """One way of training.

    Attributes:
        lr: Peak learning rate, linear decay to 0.
        alpha: LoRA's α.
        grit: Settings of GRIT; None = AdamW alone.
        rank: LoRA's r.
        betas: Of Adam's moments, in GRIT's eigenbasis too.
    """

    lr: float
    alpha: float = 32.0
    grit: dict[str, Any] | None = None
    rank: int = 16
    betas: tuple[float, float] = (0.9, 0.999)


def examples(split: str) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of every item of data/<split>.jsonl."""
    tokenizer = load_tokenizer(load_reference()[0])
    template = load_params().prompt.template
    items = [Item.from_json(row) for row in read_jsonl(Path(f"data/{split}.jsonl"))]
    return [encode_example(tokenizer, render(template, item.prompt), item.completion) for item in items]


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """A padded batch: input_ids, attention_mask, labels [items, tokens]; loss on the completion."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (tokens, prompt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batches(rows: list[tuple[list[int], int]], size: int, seed: int) -> Any:
    """Endless shuffled batches, the same for the same seed."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(rows, len(rows))
        for start in range(0, len(shuffled) - size + 1, size):
            yield collate(shuffled[start : start + size])


def lora_model(recipe: Recipe, seed: int, targets: list[str] | None = None) -> Any:
    """The base of the pipeline with fresh LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(load_reference()[0].location, dtype=torch.float32)
    base.config.use_cache = False
    torch.manual_seed(seed)
    return get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=targets or load_params().train.target_modules,
        ),
    )


def eval_loss(model: Any, rows: list[tuple[list[int], int]], size: int = 64) -> float:
    """Mean cross-entropy of a completion token, nats."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = collate(rows[start : start + size])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    model.train()
    return total / count


@dataclass(frozen=True)
class Job:
    """One training run, for `train_all`.

    Attributes:
        recipe: How.
        steps: Optimizer steps.
        seed: Of LoRA's start and the order of the items.
        label: What the caller wants back with the loss.
    """

    recipe: Recipe
    steps: int
    seed: int
    label: dict[str, Any] = field(default_factory=dict)


_data: dict[str, Any] = {}


def _prepare() -> None:
    torch.set_num_threads(1)  # a model this small gains little from a second thread, and spinning threads cost much
    _data["train"], _data["valid"] = examples("train"), examples("valid")


def _work(job: Job) -> float:
    try:
        return train(job.recipe, job.steps, job.seed, _data["train"], _data["valid"])[job.steps]
    except FloatingPointError:
        return float("inf")


def train_all(jobs: Iterable[Job]) -> list[float]:
    """The evaluation loss at the end of every job, one process a CPU core; inf where it diverged."""
    jobs = list(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context, initializer=_prepare) as pool:
        losses = []
        for job, loss in zip(jobs, pool.map(_work, jobs), strict=True):
            losses.append(loss)
            print(f"  {job.label} {job.steps} steps, seed {job.seed}: {loss:.4f}", flush=True)
    return losses


def train(
    recipe: Recipe, steps: int, seed: int, rows: Any, valid: Any, checks: tuple[int, ...] = (), batch_size: int = 16
) -> dict[int, float]:
    """Train and return {step: evaluation loss} at `checks` and at the end."""
    model = lora_model(recipe, seed)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    inner: torch.optim.Optimizer
    if recipe.grit is not None and recipe.grit.get("mode") == "sgd":
        inner = torch.optim.SGD(weights, lr=recipe.lr, momentum=0.9)
    else:
        inner = torch.optim.AdamW(weights, lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    manager = GRITManager(model, GRITConfig.from_dict(recipe.grit)) if recipe.grit is not None else None
    optimizer: torch.optim.Optimizer = GritOptimizer(inner, manager, max_grad_norm=1.0) if manager else inner
    warm_up = min(20, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm_up, (steps - s) / (steps - warm_up))
    )
    stream, losses = batches(rows, batch_size, seed), {}
    for step in range(1, steps + 1):
        model(**next(stream)).loss.backward()
        if manager is None:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step in checks or step == steps:
            losses[step] = eval_loss(model, valid)
    if manager is not None:
        manager.finish()
        manager.close()
        losses[-1] = eval_loss(model, valid)  # after ranks have shrunk
    if any(loss != loss for loss in losses.values()):
        raise FloatingPointError("the evaluation loss is NaN")
    return losses
