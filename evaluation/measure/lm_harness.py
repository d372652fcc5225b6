"""Benchmarks of lm-evaluation-harness, and task files in its format, asked of a model in memory, item by item."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from evaluation import EvaluationError
from trainers.words import nearest

SPLIT = "harness/"
"""Before a benchmark's name, the split of its items."""
LONGEST = 2_000
"""Characters of a prompt that are kept, from its end: examples stand before the question, the same for all models."""
_INSTALL = "`make setup EXTRAS=harness` installs it, or `pip install lm-eval`"


@dataclass(frozen=True)
class Asked:
    """What a model said, as `db.records` has it."""

    tasks: dict[str, dict[str, Any]]  # version, few-shot examples, items; metric whose value an item's credit is
    metrics: list[dict[str, Any]]  # lm-eval's own figures
    metric_defs: dict[str, dict[str, str]]
    samples: list[dict[str, Any]]


# --- which benchmarks there are ---


def problems(names: Sequence[str], folder: Path) -> list[str]:
    """What speaks against these benchmarks, one sentence each; `folder` has task files of the user's own."""
    if not names:
        return []
    if find_spec("lm_eval") is None:
        return [f"lm-evaluation-harness is not installed; {_INSTALL}"]
    files = sorted(folder.rglob("*.yaml"))
    try:
        known = _manager(names, folder).all_tasks
    except Exception as error:  # noqa: BLE001  # whatever a file of somebody's makes lm-eval raise
        return [f"lm-eval cannot read the task files below {folder}/: {type(error).__name__}: {error}"]
    lines = [f"{name!r} is the name of several tasks below {folder}/; rename all but one" for name in _twice(files)]
    lines += [f"{file} is no YAML: {why}" for file in files if (why := _no_yaml(file))]
    for name in names:
        if name not in known:
            meant = nearest(name, known)
            looked = f"lm-eval {metadata.version('lm-eval')}, which has {len(known):,} tasks, groups and tags"
            own = f"the {len(files)} files {folder}/**/*.yaml" if files else f"{folder}/, which has no *.yaml"
            hint = f"; did you mean {meant!r}?" if meant else "."
            lines.append(f"unknown benchmark {name!r}{hint} Looked in {looked} with those of {own}")
    return lines


def _twice(files: Sequence[Path]) -> list[str]:
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    names = [name for text in texts for name in re.findall(r"""^task:\s*["']?([\w.-]+)""", text, re.MULTILINE)]
    return sorted({name for name in names if names.count(name) > 1})


def own_files(name: str, folder: Path) -> list[Path]:
    """The files beside the one in `folder` that defines this benchmark, and below; none where none does.

    All of `folder` for a tag, which has no file of its own, a group, and a task that includes another file.
    """
    if not folder.is_dir() or (entry := _manager([], folder).task_index.get(name)) is None:
        return []
    place = folder
    if entry.yaml_path:
        said = Path(entry.yaml_path).read_text(encoding="utf-8")
        place = folder if re.search(r"^(group|include):", said, re.MULTILINE) else Path(entry.yaml_path).parent
    return sorted(file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _manager(names: Iterable[str], folder: Path) -> Any:
    """lm-eval's index of tasks: of the user's own where these are enough, since reading all of its files takes long."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=str(folder))


def _no_yaml(file: Path) -> str:
    try:
        list(yaml.parse(file.read_text(encoding="utf-8")))  # the syntax alone: !function is lm-eval's
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return ""


# --- asking ---


def ask(model: Any, tokenizer: Any, name: str, folder: Path, *, limit: int | None, batch_size: int) -> Asked:
    """Ask a benchmark as lm-eval does by default: no chat template, the task's own few-shot examples and seeds."""
    manager = _manager([name], folder)
    loaded = _load(manager, name)
    if unsafe := [task for task, found in loaded["tasks"].items() if getattr(found, "UNSAFE_CODE", False)]:
        raise EvaluationError(f"{name}: {', '.join(unsafe)} would run code that a model writes, which is not done here")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda row: "`pretrained` model kwarg" not in row.msg)
    # With several groups in a group, the outermost one has them all.
    wanted = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(lm, tasks=wanted, task_manager=manager, limit=limit, bootstrap_iters=0)
    except Exception as error:
        raise EvaluationError(f"{name}: lm-eval cannot ask this: {error} ({type(error).__name__})") from error
    told = _told(name, found)
    if not told.metrics:
        raise EvaluationError(f"{name}: expected figures, lm-eval gave none; does its metric_list name metrics it has?")
    return told


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load(name)
    except Exception as error:
        data = ((manager.task_index[name].cfg or {}).get("dataset_path")) or "of one of its tasks"
        raise EvaluationError(f"{name}: {_why(error, str(data))}") from error


def _why(error: BaseException, data: str) -> str:
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, ConnectionError | DatasetNotFoundError | httpx.HTTPError):
        offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        return (
            f"the hub did not give the data set {data} ({text}{offline}). Where there is a network this stage leaves "
            "it in the cache below HF_HOME; without one, write a task file that reads files of your own (docs/tasks.md)"
        )
    return f"the task or its data set {data} cannot be loaded ({text})"


# --- what came of it ---


def _told(name: str, found: Mapping[str, Any]) -> Asked:
    better, tasks, samples = found["higher_is_better"], dict[str, dict[str, Any]](), list[dict[str, Any]]()
    shares: dict[str, bool] = {}  # metric → whether it is a share of every item
    for task, rows in found["samples"].items():
        credited = None
        for part in dict.fromkeys(row["filter"] for row in rows):
            own = [row for row in rows if row["filter"] == part]
            for metric in own[0]["metrics"]:
                key = _key(metric, part)
                share = all(_is_share(row[metric]) for row in own)
                shares[key] = shares.get(key, True) and share
                if share and credited is None and better[task].get(metric) is not False:
                    credited = key
                    samples += [_sample(name, task, row, metric) for row in own]
        tasks[task] = {
            "version": str(found["versions"].get(task)),
            "shots": found["n-shot"].get(task, 0),
            "items": found["n-samples"][task]["effective"],
            "metric": credited,
        }
    metrics, meanings = [], dict[str, dict[str, str]]()
    for task, numbers in {**found["results"], **found.get("groups", {})}.items():
        for key, value in numbers.items():
            metric, comma, part = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            told = _key(metric, part)
            count = tasks[task]["items"] if task in tasks else None
            number = float(value) if math.isfinite(value) else None
            metrics.append({"name": told, "split": f"{SPLIT}{task}", "value": number, "n": count})
            direction = {True: "higher", False: "lower", None: "none"}[(better.get(task) or {}).get(metric)]
            meanings[told] = {
                "unit": "share" if shares.get(told) else "",
                "direction": direction,
                "description": f"{told} as lm-evaluation-harness defines it",
            }
    return Asked(tasks, metrics, meanings, samples)


def _key(metric: str, part: str) -> str:
    """Name of a metric of answers that went through a filter; `none` is lm-eval's word for none."""
    return metric if part == "none" else f"{metric}/{part}"


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _sample(name: str, task: str, row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One item; its id names the document's content too, so that only equal ones are paired."""
    asked, target = row["arguments"], row["target"]
    chosen = [argument[1] for argument in asked]
    if isinstance(chosen[0], str):  # the likelihood of each choice is what was asked for
        values = [response[0] for response in row["filtered_resps"]]
        at = max(range(len(values)), key=values.__getitem__)
        answer = chosen[at].strip() if len(chosen) > 1 else f"log-likelihood {values[0]:.3f}"
        if isinstance(target, int) and 0 <= target < len(chosen):
            target = chosen[target].strip()
    else:
        answer = str(row["resps"][0][0])
    prompt, credit = str(asked[0][0]), float(row[metric])
    return {
        "item_id": f"{task}/{row['doc_id']}-{row['doc_hash'][:8]}",
        "task": task,
        "split": f"{SPLIT}{name}",
        "prompt": prompt if len(prompt) <= LONGEST else f"… {prompt[-LONGEST:]}",
        "truth": target if isinstance(target, str) else str(target),
        "answer": answer,
        "correct": credit == 1,
        "credit": credit,
        "metrics": {each: float(row[each]) for each in row["metrics"] if isinstance(row[each], int | float)},
    }
