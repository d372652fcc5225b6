"""Scoring questions: several at once against one by one, Hugging Face in batches, and bare llama.cpp.

The bare loop decodes the same batches as ours, recorded beforehand, without text, sampling or scores. Its time is that
of the model; the ratio to ours is what the harness adds. One thread everywhere. `PROMPTS` questions a
call; needs what `make repro` leaves (or the stages up to `export@baseline_lora-0`). Run as
`python -m benchmarks.scoring_throughput`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
import torch

from benchmarks._harness import alternate, command, ratios, report, spread
from db.files import read_json, read_jsonl
from evaluation.measure import answers
from evaluation.tasks import Item
from export.engines.engine import Engine
from export.engines.hf import HfEngine
from export.engines.llama_cpp import N_BATCH, BatchContext, LlamaCppEngine
from export.gguf import save_merged
from pipelines.base_model import load_reference
from pipelines.check import load_params

ARM, ROUNDS, PROMPTS, THREADS, HF_BATCH = "baseline_lora", 15, 500, 1, 32
OURS, BARE = "llama.cpp, ours, several at once", "llama.cpp, bare loop, same batches"


@dataclass
class Step:
    """One batch: of every token its id, position, sequence and whether its logits are wanted; what ended with it."""

    tokens: list[tuple[int, int, int, bool]]
    ended: list[int]


def recorded(work: Callable[[], Any]) -> tuple[Any, list[Step]]:
    """The result of a call, and every batch that it decoded."""
    steps: list[Step] = []

    class Recording(BatchContext):
        def decode(self) -> None:
            batch = self.batch.filled()
            places = range(batch.n_tokens)
            rows = [(batch.token[i], batch.pos[i], batch.seq_id[i][0], bool(batch.logits[i])) for i in places]
            steps.append(Step(rows, []))
            super().decode()

        def forget(self, sequence: int) -> None:
            steps[-1].ended.append(sequence)
            super().forget(sequence)

    with mock.patch("export.engines.llama_cpp.BatchContext", Recording):
        return work(), steps


def bare(llm: llama_cpp.Llama, num_ctx: int, sequences: int, steps: list[Step]) -> Callable[[], None]:
    """A function that decodes recorded batches with llama.cpp's own functions, and does nothing else.

    Model, context and batches are made beforehand and are not timed.
    """
    params = llama_cpp.llama_context_params.from_buffer_copy(llm.context_params)
    params.n_ctx, params.n_seq_max, params.kv_unified = sequences * num_ctx, sequences, True
    params.n_batch = params.n_ubatch = N_BATCH
    context = llama_cpp.llama_init_from_model(llm.model, params)
    memory = llama_cpp.llama_get_memory(context)
    batches = []
    for step in steps:
        batch = llama_cpp.llama_batch_init(len(step.tokens), 0, 1)
        batch.n_tokens = len(step.tokens)
        for i, (token, position, sequence, wanted) in enumerate(step.tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        batches.append((batch, step.ended))

    def work() -> None:
        for batch, ended in batches:
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed in the bare loop")
            for sequence in ended:
                llama_cpp.llama_memory_seq_rm(memory, sequence, -1, -1)
        llama_cpp.llama_synchronize(context)

    return work


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(THREADS)
    folder = Path(f"gguf/{ARM}/0")
    facts, section = read_json(folder / "serving.json"), load_params().evaluate
    template, num_ctx, sequences = facts["template"], facts["num_ctx"], section.parallel
    items = [Item.from_json(row) for row in read_jsonl(Path("data/test.jsonl"))[:PROMPTS]]
    gguf = folder / "model.gguf"

    def llama(parallel: int) -> LlamaCppEngine:
        return LlamaCppEngine(gguf, template, num_ctx=num_ctx, threads=THREADS, parallel=parallel)

    def score(backend: Engine) -> list[Any]:
        return answers.ask(backend, items, "test", max_tokens=section.max_tokens, stop=facts["stop"])

    ours, one = llama(sequences), llama(1)
    with tempfile.TemporaryDirectory() as merged:
        base = load_reference()[0].location
        save_merged(base, Path(f"adapters/{ARM}/0"), Path(merged) / "model", {})
        transformers = HfEngine(f"{merged}/model", template, tokenizer=base, parallel=HF_BATCH)
    several, steps = recorded(lambda: score(ours))
    alone, batched = score(one), score(transformers)
    tokens = sum(len(step.tokens) for step in steps)
    model = llama_cpp.Llama(str(gguf), n_ctx=num_ctx, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    seconds = alternate(
        {
            BARE: bare(model, num_ctx, sequences, steps),
            OURS: lambda: score(ours),
            "llama.cpp, one by one": lambda: score(one),
            f"transformers, batches of {HF_BATCH}": lambda: score(transformers),
        },
        ROUNDS,
    )
    rates = {name: [len(items) / s for s in values] for name, values in seconds.items()}
    per_second = {name: spread(values) for name, values in rates.items()}
    for name, rate in per_second.items():
        print(f"{name}: {rate['median']:.0f} [{rate['low']:.0f}, {rate['high']:.0f}] items/s")
    share = ratios(rates, BARE)[OURS]
    print("ours / bare: {median:.3f} [{low:.3f}, {high:.3f}] of its items/s".format(**share))
    report(
        "scoring_throughput",
        f"{len(items)} questions, {tokens} tokens evaluated, {sequences} at once",
        seconds,
        BARE,
        items=len(items),
        tokens=tokens,
        batches=len(steps),
        parallel=sequences,
        threads=THREADS,
        arm=ARM,
        items_per_second=per_second,
        share_of_bare=share,
        answers_that_differ={"ours and one by one": _differ(several, alone), "transformers": _differ(several, batched)},
    )


def _differ(one: list[Any], other: list[Any]) -> int:
    return sum(a["answer"].strip() != b["answer"].strip() for (a, _), (b, _) in zip(one, other, strict=True))


if __name__ == "__main__":
    command(main)
