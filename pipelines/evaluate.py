"""Stage evaluate: scores/<arm>/<seed>/ with scores.json and samples.jsonl."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from db.files import (
    exclusive,
    finish_run,
    hash_inputs,
    key_of,
    read_json,
    read_jsonl,
    sha256,
    staged,
    start_run,
    write_record,
    write_records,
)
from db.records import SampleRecord, ScoresRecord
from evaluation import paraphrase
from evaluation.measure import answers, speed
from evaluation.measure.answers import Journal
from evaluation.tasks import Item, Score
from export import ExportError
from export.engines.engine import Engine, EngineError
from export.engines.ollama_engine import OllamaEngine, resolve_host, server_version
from export.modelfile import Serving
from export.served import FACTS, SERVED_GGUF, served_in
from pipelines.base_model import load_reference
from pipelines.params import Evaluate, StageParams, check_arm
from pipelines.prompt import Prompt, prompt_text
from pipelines.stage import (
    BASE,
    BASE_ARM,
    DATA,
    SPEED_LOCK,
    adapter_dir,
    command,
    gguf_dir,
    model_name,
    scores_dir,
    sees_pictures,
    split_files,
)

CHECKPOINTS = Path("checkpoints/scores")


class Params(StageParams):
    evaluate: Evaluate
    prompt: Prompt


def choose_backend(wanted: str, base_backend: str | None = None) -> str:
    """The backend to use: under `auto` Ollama if a server answers, else llama.cpp in this process.

    Under `auto` an arm uses the base's backend, because otherwise the two could not be compared. Raises EngineError if
    Ollama was requested, or scored the base, and does not answer.
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
        raise EngineError(
            f"evaluate.backend is ollama, and no server answers at {host}; start one (`ollama serve`), set "
            "OLLAMA_HOST, or set evaluate.backend to auto or llama_cpp"
        )
    if base_backend == "ollama":
        raise EngineError(
            f"the base was scored through Ollama, and no server answers at {host} now; start it, or score the base "
            "again with `dvc repro --force evaluate_base`"
        )
    print(f"backend: no Ollama server at {host}, using llama.cpp in this process")
    return "llama_cpp"


class Models:
    """The models of one evaluation on one backend.

    Vision-language models are run as trained, because llama.cpp supports no adapter in a vision tower. All others are
    run as stage export wrote them.
    """

    def __init__(self, params: Params, arm: str) -> None:
        self._params = params
        self.exported = not sees_pictures()  # whether the models come from stage export
        scored = scores_dir(BASE_ARM, 0) / "scores.json"
        follows = self.exported and arm != BASE_ARM and scored.is_file()
        base_backend = str(read_json(scored)["backend"]["name"]) if follows else None
        self.backend = choose_backend(params.evaluate.backend, base_backend)

    def facts(self, arm: str, seed: int) -> dict[str, Any]:
        """How to prompt an arm: serving.json, or only template and stop words (an end token ends an answer anyway).

        Raises ExportError if the stage that writes it has not run.
        """
        if self.exported:
            return self._serving(arm, seed).as_json()
        return {"template": prompt_text(self._params.prompt), "stop": []}

    def made_of(self, arm: str, seed: int) -> list[Path]:
        """Files and folders of an arm's model, for run.json; of an adapter without the logs beside it."""
        if self.exported:
            return [gguf_dir(arm, seed)]
        adapter = [adapter_dir(arm, seed) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        return [BASE / "base.json", *([] if arm == BASE_ARM else adapter)]

    def open(self, arm: str, seed: int) -> Engine:
        return self._ollama(arm, seed) if self.backend == "ollama" else self._local(arm, seed)

    def _serving(self, arm: str, seed: int) -> Serving:
        file = gguf_dir(arm, seed) / FACTS
        if not file.is_file():
            raise ExportError(f"{file.parent}: nothing exported there; run `dvc repro export`")
        return Serving.read(file)

    def _local(self, arm: str, seed: int) -> Engine:
        parallel = self._params.evaluate.parallel
        if self.backend == "llama_cpp":
            from export.engines.llama_cpp import LlamaCppEngine

            serving = self._serving(arm, seed)
            gguf, context = gguf_dir(arm, seed) / SERVED_GGUF, serving.num_ctx
            return LlamaCppEngine(gguf, serving.render, num_ctx=context, parallel=parallel)
        from export.engines.hf import HfEngine

        reference, _ = load_reference()
        location, kwargs = reference.merge_from, reference.merge_kwargs
        return HfEngine(
            location if self.exported else reference.location,
            self._serving(arm, seed).render if self.exported else str(self.facts(arm, seed)["template"]),
            adapter=None if arm == BASE_ARM else adapter_dir(arm, seed),
            load_kwargs=dict(kwargs if self.exported else reference.load_kwargs),
            parallel=parallel,
            pictures=None if self.exported else DATA,
        )

    def _ollama(self, arm: str, seed: int) -> Engine:
        from export.register import keep_registered
        from trainers.encode import encode_prompt
        from trainers.models import load_tokenizer

        name = model_name(arm, seed, self._params.first_seed)
        host, served = resolve_host(), served_in(gguf_dir(arm, seed), name)
        form = keep_registered(host, served)
        tokenizer = load_tokenizer(load_reference()[0])
        return OllamaEngine(
            host,
            name,
            served.serving.num_ctx,
            expected=lambda asked: encode_prompt(tokenizer, served.serving.render(asked)),
            parallel=self._params.evaluate.parallel,
            mode=form.mode,
        )


def weights(backend: str, arm: str, seed: int) -> list[Path]:
    """Other folders from which a backend may read weights of an exported arm."""
    if backend == "hf":
        return [BASE / "base.json", *([] if arm == BASE_ARM else [adapter_dir(arm, seed)])]
    return [gguf_dir(BASE_ARM, 0)] if backend == "ollama" and arm != BASE_ARM else []  # in mode adapter


def measure_speed(section: Evaluate, models: Models, arms: dict[str, int], items: list[Item]) -> list[dict[str, Any]]:
    """Speed rows of the arms (arm → seed), timed in turn: loading, then requests.

    No other model of these arms may be loaded meanwhile, because a third one may not fit a GPU's memory.
    """

    def open_anew(arm: str) -> int | None:
        with models.open(arm, arms[arm]) as model:
            return model.load_ns

    loaders: dict[str, Any] = {arm: partial(open_anew, arm) for arm in arms}
    rows = speed.loads(loaders, repetitions=section.speed_repetitions) if models.backend != "ollama" else []
    with ExitStack() as stack:
        opened = {arm: stack.enter_context(models.open(arm, seed)) for arm, seed in arms.items()}
        if cold := {arm: model.load_cold for arm, model in opened.items() if isinstance(model, OllamaEngine)}:
            rows = speed.loads(cold, repetitions=section.speed_repetitions)
        return rows + speed.alternate(
            {arm: model.phases for arm, model in opened.items()},
            [item.prompt for item in items[: section.speed_prompts]],
            repetitions=section.speed_repetitions,
            tokens=section.speed_tokens,
        )


def answers_key(section: Evaluate, engine: Engine, inputs: dict[str, str], facts: dict[str, Any]) -> str:
    """Hash of everything that decides the answers, except rounding: threads and evaluate.parallel are not part of it.

    `inputs` are hashes of the items and of all files with weights; `facts` are template and stop words.
    """
    settings = {"max_tokens": section.max_tokens, "serving": facts}
    named = [engine.name, engine.version, engine.device_class, engine.mode]
    return key_of({"backend": named, "inputs": inputs, **settings})


def answer(
    engine: Engine, splits: dict[str, list[Item]], journal: Journal, max_tokens: int, stop: list[str], title: str
) -> dict[str, list[tuple[dict[str, Any], Score]]]:
    """Rows and scores of every split; answers that the journal already has are reused."""
    if journal.resumed:
        print(f"{title}: resuming with {journal.resumed} answers of an earlier run ({journal.path})")
    total = sum(map(len, splits.values()))
    with journal, tqdm(total=total, initial=journal.resumed, desc=title) as bar:
        return {
            split: answers.ask(
                engine, items, split, max_tokens=max_tokens, stop=stop, journal=journal, progress=bar.update
            )
            for split, items in splits.items()
        }


@contextmanager
def _removed_in_the_end(kept: Path) -> Iterator[None]:
    """Remove the journal if the block succeeds: only then have the answers been saved."""
    yield
    shutil.rmtree(kept)


def run(params: Params, arm: str, seed: int) -> None:
    if arm != BASE_ARM:
        check_arm(arm, params)
    section, template = params.evaluate, prompt_text(params.prompt)
    models = Models(params, arm)
    facts = models.facts(arm, seed)
    out = scores_dir(arm, seed)
    split_names = ("test", "retention", paraphrase.SPLIT)
    splits = {split: [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")] for split in split_names}
    asking = section.model_dump(exclude={"harness", "harness_limit"})
    settings = {"evaluate": asking, "prompt": params.prompt.model_dump()}
    inputs = hash_inputs(*split_files(*split_names), *models.made_of(arm, seed))
    journals = CHECKPOINTS / arm / str(seed)
    lock = journals.with_name(f"{seed}.lock")
    with exclusive(lock, f"evaluate {arm} seed {seed}"), _removed_in_the_end(journals), staged(out) as folder:
        record = start_run("evaluate", params=settings, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        with models.open(arm, seed) as mine:
            read = {**inputs, **hash_inputs(*(weights(models.backend, arm, seed) if models.exported else []))}
            journal = Journal(journals / f"{answers_key(section, mine, read, facts)[:16]}.jsonl")
            results = answer(mine, splits, journal, section.max_tokens, facts["stop"], f"{arm}-{seed}")
            backend = {
                "name": models.backend,
                "version": mine.version,
                "device_class": mine.device_class,
                "mode": mine.mode,
            }
        with exclusive(SPEED_LOCK):
            rows = measure_speed(section, models, {arm: seed, BASE_ARM: 0}, splits["test"])
        task = answers.task_of(splits["test"][0], "test")
        table = answers.metrics(
            task,
            [s for _, s in results["test"]],
            [(i.task, s) for i, (_, s) in zip(splits["retention"], results["retention"], strict=True)],
            [(i, s) for i, (_, s) in zip(splits[paraphrase.SPLIT], results[paraphrase.SPLIT], strict=True)],
            finish_reasons=[row["finish_reason"] for row, _ in results["test"]],
        )
        scores = {
            "schema": 1,
            "arm": arm,
            "seed": seed,
            "model_name": model_name(arm, seed, params.first_seed),
            "backend": backend,
            **({} if models.exported else {"exported": False}),
            "test_items_sha256": sha256(DATA / "test.jsonl"),
            "metrics": table,
            "task": {"name": task.NAME, "title": task.TITLE, "primary": task.PRIMARY},
            "metric_defs": answers.metric_defs(task, table),
            "speed": rows,
            "speed_summary": (timings := speed.summary(rows)),
        }
        samples = [SampleRecord.of(row) for split in results.values() for row, _ in split]
        write_records(folder / "samples.jsonl", samples)
        write_record(folder / "scores.json", ScoresRecord.of(scores))
        record.extra = {"backend": backend, "resumed_items": journal.resumed}
        finish_run(record, folder)
    shown_metrics = {m["name"]: round(m["value"], 4) for m in table if "/" not in m["name"]}
    decode = [round(t["median"], 1) for t in timings if (t["arm"], t["phase"]) == (arm, "decode")]
    print(json.dumps({**shown_metrics, "decode_tokens_per_s": decode[0] if decode else None}))


if __name__ == "__main__":
    command("evaluate", Params, run)
