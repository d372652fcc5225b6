"""Stage evaluate: scores/<arm>/<seed>/ with scores.json and samples.jsonl."""

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from evaluation import scoring, speed
from evaluation.backends import Backend, BackendError
from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from evaluation.tasks import Item, render
from export.modelfile import spec_of
from export.ollama import register, resolve_host, server_version
from pipelines.base_model import load_reference
from pipelines.config import ConfigError, check_arm, load_params
from pipelines.outputs import staged
from pipelines.prompt import prompt_text
from pipelines.runinfo import RunRecord, hash_inputs, read_json, read_jsonl, sha256, write_json, write_jsonl
from pipelines.schema import Params
from pipelines.stage import (
    BASE_ARM,
    DATA,
    adapter_dir,
    clear_errors,
    cli,
    gguf_dir,
    model_name,
    quiet_libraries,
    scores_dir,
)


def choose_backend(wanted: str, base_backend: str | None = None) -> str:
    """The backend to use: under `auto` Ollama where a server answers, else llama.cpp in this process.

    Args:
        wanted: Setting evaluate.backend.
        base_backend: What the base was scored on. Under `auto` an arm follows it, or the two could not be compared.

    Raises:
        BackendError: Ollama was asked for by name and does not answer.
    """
    if wanted == "auto" and base_backend not in (None, "ollama"):
        print(f"backend: {base_backend}, as for the base")
        return str(base_backend)
    if wanted not in ("auto", "ollama"):
        return wanted
    host = resolve_host()
    version = server_version(host)
    if version is not None:
        print(f"backend: Ollama {version} at {host}")
        return "ollama"
    if wanted == "ollama":
        raise BackendError(
            f"evaluate.backend is ollama, and no server answers at {host}; start one (`ollama serve`), set "
            "OLLAMA_HOST, or set evaluate.backend to auto or llama_cpp"
        )
    if base_backend == "ollama":
        raise BackendError(
            f"the base was scored through Ollama, and no server answers at {host} now; start it, or score the base "
            "anew with `dvc repro --force evaluate_base`"
        )
    print(f"backend: no Ollama server at {host}, using llama.cpp in this process")
    return "llama_cpp"


class Models:
    """Opens the models of one evaluation on one backend."""

    def __init__(self, params: Params, backend: str, first_seed: int) -> None:
        self._params, self._backend, self._first_seed = params, backend, first_seed

    def open(self, arm: str, seed: int) -> Any:
        """Backend that answers for an arm."""
        folder = gguf_dir(arm, seed)
        facts = read_json(folder / "serving.json")
        threads = self._params.evaluate.threads
        if self._backend == "llama_cpp":
            return LlamaCppBackend(folder / "model.gguf", facts["template"], num_ctx=facts["num_ctx"], threads=threads)
        reference, _ = load_reference()
        if self._backend == "hf":
            adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
            return HfBackend(
                reference.merge_from, facts["template"], adapter=adapter, load_kwargs=reference.merge_kwargs
            )
        return self._ollama(arm, seed, folder, facts)

    def _ollama(self, arm: str, seed: int, folder: Path, facts: dict[str, Any]) -> Any:
        from evaluation.backends.ollama import OllamaBackend
        from trainers.models import load_tokenizer

        name = model_name(arm, seed, self._first_seed)
        spec = spec_of(facts)
        host = resolve_host()
        register(host, name, folder / "model.gguf", spec)
        tokenizer = load_tokenizer(load_reference()[0])

        def expected(prompt: str) -> list[int]:
            return list(tokenizer(render(facts["template"], prompt))["input_ids"])

        return OllamaBackend(
            host,
            name,
            facts["num_ctx"],
            num_threads=self._params.evaluate.threads or None,
            expected=expected,
        )


def _timed(backend: Any) -> speed.Measure:
    """One timed request: fixed token counts on the embedded backends, the server's own figures on Ollama."""
    if hasattr(backend, "prefill"):
        return speed.embedded(backend)

    def measure(prompt: str, tokens: int) -> dict[str, tuple[int, int]]:
        done = backend.generate(prompt, tokens, ())
        return {
            "prefill": (done.prompt_tokens, done.prefill_ns),
            "decode": (done.answer_tokens, done.decode_ns),
        }

    return measure


def measure_speed(params: Params, models: dict[str, Any], template: str, items: list[Item]) -> list[dict[str, Any]]:
    """Speed rows of the models, timed in turn."""
    section = params.evaluate
    raw = all(hasattr(m, "prefill") for m in models.values())
    prompts = [render(template, i.prompt) if raw else i.prompt for i in items[: section.speed_prompts]]
    return speed.alternate(
        {arm: _timed(model) for arm, model in models.items()},
        prompts,
        repetitions=section.speed_repetitions,
        tokens=section.speed_tokens,
    )


def _base_backend() -> str | None:
    file = scores_dir(BASE_ARM, 0) / "scores.json"
    return str(read_json(file)["backend"]["name"]) if file.is_file() else None


def run(params: Params, arm: str, seed: int, first_seed: int) -> None:
    """Score one arm with one seed."""
    if arm != BASE_ARM:
        check_arm(arm)
    if not (gguf_dir(arm, seed) / "serving.json").is_file():
        raise ConfigError(f"{gguf_dir(arm, seed)}: nothing exported there; run `dvc repro export`")
    section, template = params.evaluate, prompt_text(params.prompt)
    backend_name = choose_backend(section.backend, None if arm == BASE_ARM else _base_backend())
    out = scores_dir(arm, seed)
    splits = {
        split: [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")] for split in ("test", "retention")
    }
    shown = {"evaluate": section.model_dump(), "prompt": params.prompt.model_dump()}
    inputs = hash_inputs(DATA / "test.jsonl", DATA / "retention.jsonl", gguf_dir(arm, seed))
    with staged(out) as folder, ExitStack() as stack:
        record = RunRecord("evaluate", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        models = Models(params, backend_name, first_seed)
        mine: Backend = stack.enter_context(closing(models.open(arm, seed)))
        stop = read_json(gguf_dir(arm, seed) / "serving.json")["stop"]
        results = {
            split: scoring.ask(
                mine,
                tqdm(items, desc=f"{arm}-{seed} {split}", mininterval=1),
                split,
                max_tokens=section.max_tokens,
                stop=stop,
            )
            for split, items in splits.items()
        }
        timed: dict[str, Any] = {arm: mine}
        if arm != BASE_ARM:
            timed[BASE_ARM] = stack.enter_context(closing(models.open(BASE_ARM, 0)))
        rows = measure_speed(params, timed, template, splits["test"])
        table = scoring.metrics(
            [s for _, s in results["test"]],
            [(i.task, s) for i, (_, s) in zip(splits["retention"], results["retention"], strict=True)],
        )
        version, device_class = mine.version, mine.device_class
        write_jsonl(folder / "samples.jsonl", [row for split in results.values() for row, _ in split])
        scores = {
            "schema": 1,
            "arm": arm,
            "seed": seed,
            "model_name": model_name(arm, seed, first_seed),
            "backend": {"name": backend_name, "version": version, "device_class": device_class},
            "test_items_sha256": sha256(DATA / "test.jsonl"),
            "metrics": table,
            "metric_defs": scoring.metric_defs(table),
            "speed": rows,
        }
        write_json(folder / "scores.json", scores)
        record.extra = {"backend": scores["backend"]}
        record.write(folder)
    shown_metrics = {m["name"]: round(m["value"], 4) for m in table if "/" not in m["name"]}
    print(json.dumps({**shown_metrics, "decode_tokens_per_s": round(speed.tokens_per_second(rows, arm, "decode"), 1)}))


def main(
    arm: Annotated[str, typer.Option(help="base, baseline_lora, …")],
    seed: Annotated[int, typer.Option(help="seed of the training run; 0 for base")] = 0,
    first_seed: Annotated[int, typer.Option(help="the seed whose model gets the name without a tag")] = 0,
) -> None:
    """Score one arm with one seed."""
    quiet_libraries()
    with clear_errors(f"evaluate {arm}-{seed}"):
        run(load_params(), arm, seed, first_seed)


if __name__ == "__main__":
    cli(main)
