"""Items × backend → samples and metrics."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from evaluation.backends import Backend
from evaluation.tasks import Item, Score, aqi, general


def task_of(item: Item) -> Any:
    """The module that scores an item."""
    return aqi if item.task == aqi.NAME else general


def ask(
    backend: Backend, items: Iterable[Item], split: str, *, max_tokens: int, stop: Sequence[str]
) -> list[tuple[dict[str, Any], Score]]:
    """Answer and score every item.

    Returns:
        (row of samples.jsonl, score) for each item, in order.

    Raises:
        BackendError: the backend gave up.
    """
    results = []
    for item in items:
        answer = backend.generate(item.prompt, max_tokens, stop)
        score = task_of(item).score(item, answer.text)
        row = {
            "item_id": item.id,
            "task": item.task,
            "split": split,
            "prompt": item.prompt,
            "truth": item.completion,
            "answer": answer.text,
            "predicted": score.predicted if isinstance(score.predicted, int | float) else None,
            "correct": score.correct,
            "abs_error": score.abs_error,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": answer.answer_tokens,
        }
        results.append((row, score))
    return results


def metrics(test: Sequence[Score], retention: Sequence[tuple[str, Score]]) -> list[dict[str, Any]]:
    """Rows {name, split, value, n} over the test items, the retention suite and each of its tasks."""
    rows = [
        {"name": name, "split": "test", "value": value, "n": len(test)}
        for name, value in aqi.summarize(list(test)).items()
    ]
    by_task: dict[str, list[Score]] = defaultdict(list)
    for task, score in retention:
        by_task[task].append(score)
    for name, value in general.summarize([s for _, s in retention]).items():
        rows.append({"name": name, "split": "retention", "value": value, "n": len(retention)})
    for task, scores in by_task.items():
        value = sum(s.correct for s in scores) / len(scores)
        rows.append({"name": f"retention/{task}", "split": "retention", "value": value, "n": len(scores)})
    return rows


def metric_defs(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Unit, direction and meaning of every metric in `rows`."""
    known: dict[str, dict[str, str]] = {**aqi.METRICS, **general.METRICS}
    return {
        row["name"]: known.get(row["name"])
        or {
            "unit": "share",
            "direction": "higher",
            "description": f"Share of right answers in the general task {row['name'].split('/', 1)[-1]}",
        }
        for row in rows
    }
