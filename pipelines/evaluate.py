"""Stage evaluate: scores/<arm>/<seed>/ with scores.json and samples.jsonl."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation import scoring, speed
from evaluation.backends import Backend, BackendError
from evaluation.backends.hf import HfBackend
from evaluation.backends.llama_cpp import LlamaCppBackend
from evaluation.journal import Journal
from evaluation.tasks import Item, Score, render
from export.files import sha256
from export.ollama import resolve_host, server_version
from export.registration import keep_registered, register_served
from export.serving import served_in
from pipelines.base_model import load_reference
from pipelines.config import ConfigError, check_arm, load_params
from pipelines.outputs import exclusive, staged
from pipelines.prompt import prompt_text
from pipelines.runinfo import RunRecord, hash_inputs, key_of, read_json, read_jsonl, write_json, write_jsonl
from pipelines.schema import Params
from pipelines.stage import (
    BASE,
    BASE_ARM,
    DATA,
    ArmOption,
    FirstSeedOption,
    SeedOption,
    adapter_dir,
    cli,
    gguf_dir,
    main_for,
    model_name,
    scores_dir,
)

CHECKPOINTS = Path("checkpoints/scores")


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
        self.backend = backend
        self._params, self._first_seed = params, first_seed
        self._missing: list[set[str]] = []  # of each backend, which adds to it as it answers

    @property
    def missing(self) -> list[str]:
        """Figures that a server left out, in scoring or timing, of any model."""
        return sorted(set().union(*self._missing))

    def open(self, arm: str, seed: int) -> Any:
        """Backend that answers for an arm."""
        folder = gguf_dir(arm, seed)
        facts = read_json(folder / "serving.json")
        threads = self._params.evaluate.threads
        parallel = self._params.evaluate.parallel
        if self.backend == "llama_cpp":
            return LlamaCppBackend(
                folder / "model.gguf", facts["template"], num_ctx=facts["num_ctx"], threads=threads, parallel=parallel
            )
        reference, _ = load_reference()
        if self.backend == "hf":
            adapter = None if arm == BASE_ARM else adapter_dir(arm, seed)
            return HfBackend(
                reference.merge_from,
                facts["template"],
                adapter=adapter,
                load_kwargs=reference.merge_kwargs,
                parallel=parallel,
            )
        return self._ollama(arm, seed, folder, facts)

    def _ollama(self, arm: str, seed: int, folder: Path, facts: dict[str, Any]) -> Any:
        from evaluation.backends.ollama import OllamaBackend
        from trainers.models import load_tokenizer

        name = model_name(arm, seed, self._first_seed)
        host, served = resolve_host(), served_in(folder, name)

        form = keep_registered(host, served)
        tokenizer = load_tokenizer(load_reference()[0])

        def expected(prompt: str) -> list[int]:
            return list(tokenizer(render(facts["template"], prompt))["input_ids"])

        backend = OllamaBackend(
            host,
            name,
            facts["num_ctx"],
            num_threads=self._params.evaluate.threads or None,
            expected=expected,
            parallel=self._params.evaluate.parallel,
            restore=partial(register_served, host, form),
            mode=form.mode,
        )
        self._missing.append(backend.missing)
        return backend


def measure_speed(
    params: Params, models: Models, arms: dict[str, int], template: str, items: list[Item]
) -> list[dict[str, Any]]:
    """Speed rows of the arms (arm → seed), timed in turn: loading, then requests.

    Nothing else of theirs may be loaded meanwhile: a third model need not fit a GPU's memory.
    """
    section, in_process = params.evaluate, models.backend != "ollama"

    def open_anew(arm: str) -> int | None:
        with closing(models.open(arm, arms[arm])) as model:
            return model.load_ns

    loaders: dict[str, Any] = {arm: partial(open_anew, arm) for arm in arms}
    rows = speed.loads(loaders, repetitions=section.speed_repetitions) if in_process else []
    with ExitStack() as stack:
        opened = {arm: stack.enter_context(closing(models.open(arm, seed))) for arm, seed in arms.items()}
        if not in_process:
            loaders = {arm: model.load_cold for arm, model in opened.items()}
            rows = speed.loads(loaders, repetitions=section.speed_repetitions)
        # A server puts the template round the question itself.
        asked = [
            render(template, item.prompt) if in_process else item.prompt for item in items[: section.speed_prompts]
        ]
        return rows + speed.alternate(
            {arm: speed.embedded(model) if in_process else model.timed for arm, model in opened.items()},
            asked,
            repetitions=section.speed_repetitions,
            tokens=section.speed_tokens,
        )


def answers_key(params: Params, backend: Backend, inputs: dict[str, str], facts: dict[str, Any]) -> str:
    """Hash of everything that decides the answers, save rounding: evaluate.parallel is not part of it.

    Args:
        params: Settings.
        backend: That answers.
        inputs: Hashes of the items, and of everything that weights may be read from.
        facts: serving.json.
    """
    section = params.evaluate
    asked = {"max_tokens": section.max_tokens, "threads": section.threads, "serving": facts}
    engine = [backend.name, backend.version, backend.device_class, backend.mode]
    return key_of({"backend": engine, "inputs": inputs, **asked})


def weights(backend: str, arm: str, seed: int) -> list[Path]:
    """Every folder that a backend may read weights of an arm from."""
    if backend == "hf":
        return [BASE / "base.json", *([] if arm == BASE_ARM else [adapter_dir(arm, seed)])]
    return [gguf_dir(BASE_ARM, 0)] if backend == "ollama" and arm != BASE_ARM else []  # in mode adapter


def _base_backend() -> str | None:
    file = scores_dir(BASE_ARM, 0) / "scores.json"
    return str(read_json(file)["backend"]["name"]) if file.is_file() else None


def answer(
    backend: Backend, splits: dict[str, list[Item]], journal: Journal, max_tokens: int, stop: list[str], title: str
) -> dict[str, list[tuple[dict[str, Any], Score]]]:
    """Rows and scores of every split; what the journal holds already is not asked again."""
    if journal.resumed:
        print(f"{title}: going on with {journal.resumed} answers of an earlier run ({journal.path})")
    total = sum(map(len, splits.values()))
    with journal, tqdm(total=total, initial=journal.resumed, desc=title, mininterval=1) as bar:
        return {
            split: scoring.ask(
                backend, items, split, max_tokens=max_tokens, stop=stop, journal=journal, progress=bar.update
            )
            for split, items in splits.items()
        }


@contextmanager
def _removed_in_the_end(kept: Path) -> Iterator[None]:
    """Remove the journal when the block has ended well: only then are the answers in their place."""
    yield
    shutil.rmtree(kept)


def run(params: Params, arm: str, seed: int, first_seed: int) -> None:
    """Score one arm with one seed."""
    if arm != BASE_ARM:
        check_arm(arm, params)
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
    kept = CHECKPOINTS / arm / str(seed)
    lock = kept.with_name(f"{seed}.lock")
    with exclusive(lock, f"evaluate {arm} seed {seed}"), _removed_in_the_end(kept), staged(out) as folder:
        record = RunRecord("evaluate", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        models = Models(params, backend_name, first_seed)
        facts = read_json(gguf_dir(arm, seed) / "serving.json")
        with closing(models.open(arm, seed)) as mine:
            read = {**inputs, **hash_inputs(*weights(backend_name, arm, seed))}
            journal = Journal(kept / f"{answers_key(params, mine, read, facts)[:16]}.jsonl")
            results = answer(mine, splits, journal, section.max_tokens, facts["stop"], f"{arm}-{seed}")
            version, device_class, mode = mine.version, mine.device_class, mine.mode
        rows = measure_speed(params, models, {arm: seed, BASE_ARM: 0}, template, splits["test"])
        task = scoring.task_of(splits["test"][0], "test")
        table = scoring.metrics(
            task,
            [s for _, s in results["test"]],
            [(i.task, s) for i, (_, s) in zip(splits["retention"], results["retention"], strict=True)],
            answer_tokens=[row["answer_tokens"] for row, _ in results["test"]],
            max_tokens=section.max_tokens,
        )
        write_jsonl(folder / "samples.jsonl", [row for split in results.values() for row, _ in split])
        scores = {
            "schema": 1,
            "arm": arm,
            "seed": seed,
            "model_name": model_name(arm, seed, first_seed),
            "backend": {"name": backend_name, "version": version, "device_class": device_class, "mode": mode},
            "test_items_sha256": sha256(DATA / "test.jsonl"),
            "metrics": table,
            "task": {"name": task.NAME, "title": task.TITLE, "primary": task.PRIMARY},
            "metric_defs": scoring.metric_defs(task, table),
            "speed": rows,
            "speed_summary": speed.summary(rows),
        }
        write_json(folder / "scores.json", scores)
        record.extra = {
            "backend": scores["backend"],
            "resumed_items": journal.resumed,
            "missing_figures": models.missing,
        }
        record.write(folder)
    shown_metrics = {m["name"]: round(m["value"], 4) for m in table if "/" not in m["name"]}
    print(json.dumps({**shown_metrics, "decode_tokens_per_s": round(speed.tokens_per_second(rows, arm, "decode"), 1)}))


def main(arm: ArmOption, seed: SeedOption = 0, first_seed: FirstSeedOption = 0) -> None:
    """Score one arm with one seed."""
    main_for("evaluate", lambda: run(load_params(), arm, seed, first_seed), arm, seed)


if __name__ == "__main__":
    cli(main)
