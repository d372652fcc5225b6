"""Greedy decoding of one AQI answer: transformers, llama.cpp with the merged model, llama.cpp with base + adapter.

Needs what `make repro` leaves. Run as `python -m benchmarks.inference`.
"""

from pathlib import Path

from benchmarks._harness import alternate, command, report
from db.files import read_json, read_jsonl
from evaluation.tasks import Item
from export.engines.engine import LocalEngine
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from pipelines.base_model import load_reference

ARM, ROUNDS, PROMPTS, TOKENS = "baseline_lora", 15, 8, 32


def main() -> None:
    """Measure and write the result."""
    folder, base = Path(f"gguf/{ARM}/0"), Path("gguf/base/0/model.gguf")
    facts = read_json(folder / "serving.json")
    template, context = facts["template"], facts["num_ctx"]
    location = load_reference()[0].location
    backends = {
        "llama.cpp merged": LlamaCppEngine(folder / "model.gguf", template, num_ctx=context),
        "llama.cpp base + adapter": LlamaCppEngine(base, template, num_ctx=context, adapter=folder / "adapter.gguf"),
        "transformers base + adapter": HfEngine(location, template, adapter=Path(f"adapters/{ARM}/0")),
    }
    items = [Item.from_json(row) for row in read_jsonl(Path("data/test.jsonl"))[:PROMPTS]]

    def work(backend: LocalEngine) -> None:
        for item in items:
            backend.prefill(backend.tokenize(template.replace("{prompt}", item.prompt)))
            backend.decode(TOKENS, ignore_end=True)

    seconds = alternate({name: lambda b=b: work(b) for name, b in backends.items()}, ROUNDS)  # type: ignore[misc]
    report(
        "inference",
        f"{PROMPTS} prompts, {TOKENS} tokens each",
        seconds,
        "llama.cpp merged",
        prompts=PROMPTS,
        tokens=TOKENS,
        arm=ARM,
    )


if __name__ == "__main__":
    command(main)
