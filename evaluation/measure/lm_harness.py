"""Benchmarks of lm-evaluation-harness, and task files in its format, run item by item on a model in memory."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from evaluation import EvaluationError
from trainers.words import nearest

SPLIT = "harness/"
"""Followed by a benchmark's name, the split of its items."""
LONGEST = 2_000
"""Characters of a prompt that are stored, from its end: examples before the question are the same for all models."""
_INSTALL = "`make setup EXTRAS=harness` installs it, or `pip install lm-eval`"


# --- which benchmarks there are ---


def problems(names: Sequence[str], folder: Path) -> list[str]:
    """Why these benchmarks cannot run, one sentence each; `folder` has the user's task files."""
    if not names:
        return []
    if find_spec("lm_eval") is None:
        return [f"lm-evaluation-harness is not installed; {_INSTALL}"]
    files = sorted(folder.rglob("*.yaml"))
    try:
        known = _manager(names, folder).all_tasks
    except Exception as error:  # noqa: BLE001  # a task file can make lm-eval raise anything
        return [f"lm-eval cannot read the task files below {folder}/: {type(error).__name__}: {error}"]
    lines = [f"{name!r} is the name of several tasks below {folder}/; rename all but one" for name in _twice(files)]
    lines += [f"{file} is not YAML: {why}" for file in files if (why := _yaml_error(file))]
    for name in names:
        if name not in known:
            meant = nearest(name, known)
            searched = f"lm-eval {metadata.version('lm-eval')}, which has {len(known):,} tasks, groups and tags"
            own = f"{len(files)} files {folder}/**/*.yaml" if files else f"{folder}/, which has no *.yaml"
            hint = f"; did you mean {meant!r}?" if meant else "."
            lines.append(f"unknown benchmark {name!r}{hint} Searched {searched}, and {own}")
    return lines


def _twice(files: Sequence[Path]) -> list[str]:
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    names = [name for text in texts for name in re.findall(r"""^task:\s*["']?([\w.-]+)""", text, re.MULTILINE)]
    return sorted({name for name in names if names.count(name) > 1})


def own_files(name: str, folder: Path) -> list[Path]:
    """All files of `folder` if a task file in it defines this benchmark; none if it is one of lm-eval's own."""
    if not folder.is_dir() or name not in _manager([], folder).task_index:
        return []
    return sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)


def _manager(names: Iterable[str], folder: Path) -> Any:
    """lm-eval's index of tasks: only the user's if these are enough, since reading all of its own files is slow."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=str(folder))


def _yaml_error(file: Path) -> str:
    try:
        list(yaml.parse(file.read_text(encoding="utf-8")))  # only the syntax: !function is lm-eval's
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return ""


# --- running one ---


def ask(
    model: Any, tokenizer: Any, name: str, folder: Path, *, limit: int | None, batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a benchmark with lm-eval's defaults: no chat template, the task's own few-shot examples and seeds.

    Returns `tasks`, `metrics` and `metric_defs` of `db.records.HarnessRecord`, and its samples. The credit of an item
    is the metric that its task names; the metrics are lm-eval's own figures.
    """
    manager = _manager([name], folder)
    loaded = _load(manager, name)
    if unsafe := [task for task, content in loaded["tasks"].items() if getattr(content, "UNSAFE_CODE", False)]:
        raise EvaluationError(f"{name}: {', '.join(unsafe)} would run code that a model writes, which is not done here")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda row: "`pretrained` model kwarg" not in row.msg)
    # Of nested groups, the outermost one contains all tasks.
    tasks = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        output = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    except Exception as error:
        raise EvaluationError(f"{name}: lm-eval cannot run this: {error} ({type(error).__name__})") from error
    content, samples = _results(name, output)
    if not content["metrics"]:
        raise EvaluationError(f"{name}: expected figures, lm-eval gave none; does its metric_list name known metrics?")
    return content, samples


def _load(manager: Any, name: str) -> Any:
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import constants

    try:
        return manager.load(name)
    except Exception as error:
        data = ((manager.task_index[name].cfg or {}).get("dataset_path")) or "of one of its tasks"
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if not isinstance(error, ConnectionError | DatasetNotFoundError | httpx.HTTPError):
            raise EvaluationError(f"{name}: the task or its data set {data} cannot be loaded ({text})") from error
        offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise EvaluationError(
            f"{name}: the hub did not give the data set {data} ({text}{offline}). With a network this stage leaves it "
            "in the cache below HF_HOME; without one, write a task file that reads files of your own (docs/tasks.md)"
        ) from error


# --- its results ---


def _results(name: str, output: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    better, tasks, samples = output["higher_is_better"], dict[str, dict[str, Any]](), list[dict[str, Any]]()
    shares: dict[str, bool] = {}  # metric → whether it is a share for every item
    for task, rows in output["samples"].items():
        credited = None
        for part in dict.fromkeys(row["filter"] for row in rows):
            filtered = [row for row in rows if row["filter"] == part]
            for metric in filtered[0]["metrics"]:
                key = _key(metric, part)
                share = all(_is_share(row[metric]) for row in filtered)
                shares[key] = shares.get(key, True) and share
                if share and credited is None and better[task].get(metric) is not False:
                    credited = key
                    samples += [_sample(name, task, row, metric) for row in filtered]
        tasks[task] = {
            "version": str(output["versions"].get(task)),
            "shots": output["n-shot"].get(task, 0),
            "items": output["n-samples"][task]["effective"],
            "metric": credited,
        }
    metrics, definitions = [], dict[str, dict[str, str]]()
    for task, numbers in {**output["results"], **output.get("groups", {})}.items():
        for label, value in numbers.items():
            metric, comma, part = label.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            key = _key(metric, part)
            count = tasks[task]["items"] if task in tasks else None
            number = float(value) if math.isfinite(value) else None
            metrics.append({"name": key, "split": f"{SPLIT}{task}", "value": number, "n": count})
            definitions[key] = {
                "unit": "share" if shares.get(key) else "",
                "direction": {True: "higher", False: "lower", None: "none"}[(better.get(task) or {}).get(metric)],
                "description": f"{key} as lm-evaluation-harness defines it",
            }
    return {"tasks": tasks, "metrics": metrics, "metric_defs": definitions}, samples


def _key(metric: str, part: str) -> str:
    """Name of a metric of filtered answers; lm-eval calls no filter `none`."""
    return metric if part == "none" else f"{metric}/{part}"


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _sample(name: str, task: str, row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """One item; its id includes a hash of the document, so that only equal ones are paired."""
    requests, target = row["arguments"], row["target"]
    choices = [request[1] for request in requests]
    if isinstance(choices[0], str):  # each request is the likelihood of a choice
        values = [response[0] for response in row["filtered_resps"]]
        best = max(range(len(values)), key=values.__getitem__)
        answer = choices[best].strip() if len(choices) > 1 else f"log-likelihood {values[0]:.3f}"
        if isinstance(target, int) and 0 <= target < len(choices):
            target = choices[target].strip()
    else:
        answer = str(row["resps"][0][0])
    prompt, credit = str(requests[0][0]), float(row[metric])
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
