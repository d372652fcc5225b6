"""Stage evaluate: scores/<arm>/<seed>/ with scores.json and samples.jsonl."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from evaluation import scoring, speed
from evaluation.backends import Backend
from evaluation.journal import Journal
from evaluation.tasks import Item, Score, render
from export.files import sha256
from pipelines.answering import Models, models_for
from pipelines.config import check_arm, load_params
from pipelines.outputs import exclusive, staged
from pipelines.prompt import prompt_text
from pipelines.runinfo import RunRecord, hash_inputs, key_of, read_jsonl, write_json, write_jsonl
from pipelines.schema import Evaluate, Params
from pipelines.stage import (
    BASE_ARM,
    DATA,
    ArmOption,
    FirstSeedOption,
    SeedOption,
    cli,
    main_for,
    model_name,
    scores_dir,
    split_files,
)

if TYPE_CHECKING:
    from pipelines.schema_vision import VisionParams

CHECKPOINTS = Path("checkpoints/scores")


def measure_speed(
    params: "Params | VisionParams", models: Models, arms: dict[str, int], template: str, items: list[Item]
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


def answers_key(
    params: "Params | VisionParams", backend: Backend, inputs: dict[str, str], facts: dict[str, Any]
) -> str:
    """Hash of everything that decides the answers, save rounding: evaluate.parallel is not part of it.

    Args:
        params: Settings.
        backend: That answers.
        inputs: Hashes of the items, and of everything that weights may be read from.
        facts: Template and stop words, for exported models serving.json.
    """
    section = params.evaluate
    threads = section.threads if isinstance(section, Evaluate) else 0
    asked = {"max_tokens": section.max_tokens, "threads": threads, "serving": facts}
    engine = [backend.name, backend.version, backend.device_class, backend.mode]
    return key_of({"backend": engine, "inputs": inputs, **asked})


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


def run(params: "Params | VisionParams", arm: str, seed: int, first_seed: int) -> None:
    """Score one arm with one seed."""
    if arm != BASE_ARM:
        check_arm(arm, params)
    section, template = params.evaluate, prompt_text(params.prompt)
    models = models_for(params, arm, first_seed)
    facts = models.facts(arm, seed)
    out = scores_dir(arm, seed)
    splits = {
        split: [Item.from_json(row) for row in read_jsonl(DATA / f"{split}.jsonl")] for split in ("test", "retention")
    }
    shown = {"evaluate": section.model_dump(), "prompt": params.prompt.model_dump()}
    inputs = hash_inputs(*split_files("test", "retention"), *models.made_of(arm, seed))
    kept = CHECKPOINTS / arm / str(seed)
    lock = kept.with_name(f"{seed}.lock")
    with exclusive(lock, f"evaluate {arm} seed {seed}"), _removed_in_the_end(kept), staged(out) as folder:
        record = RunRecord("evaluate", params=shown, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        with closing(models.open(arm, seed)) as mine:
            read = {**inputs, **hash_inputs(*models.also_read(arm, seed))}
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
            "backend": {"name": models.backend, "version": version, "device_class": device_class, "mode": mode},
            **({} if models.exported else {"exported": False}),
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
