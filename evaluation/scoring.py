"""Items × backend → samples and metrics."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evaluation.backends import Backend, BackendError
from evaluation.journal import Journal
from evaluation.tasks import Item, ItemError, Score, Task, general, load, mean_credit

RETENTION = "retention"
CUT = "answers_cut"
_CUT_DEF = {
    "unit": "share",
    "direction": "lower",
    "description": "Share of answers that reached evaluate.max_tokens, where an answer is cut; its end may be missing",
}


def task_of(item: Item, split: str) -> Task:
    """The module that scores an item of a split: in the retention suite, whose items name general tasks, `general`.

    Raises:
        ItemError: there is no such task.
    """
    return load(general.NAME if split == RETENTION or item.task in general.GENERAL_TASKS else item.task)


def ask(
    backend: Backend,
    items: Iterable[Item],
    split: str,
    *,
    max_tokens: int,
    stop: Sequence[str],
    journal: Journal | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[tuple[dict[str, Any], Score]]:
    """Answer and score every item.

    Args:
        backend: Answers; as many items at once as it was told to.
        items: Each with an id of its own.
        split: Name of the data set.
        max_tokens: Limit of each answer.
        stop: Words that end an answer.
        journal: Where answers are kept as they come. Items that it already answers are not asked.
        progress: Called after every answer that was asked for.

    Returns:
        (row of samples.jsonl, score) for each item, in order.

    Raises:
        BackendError: the backend gave up; with a journal, what was answered is kept there.
    """
    items = list(items)
    answers = {item.id: row for item in items if journal and (row := journal.get(split, item.id))}
    left = [item for item in items if item.id not in answers]
    try:
        for place, made in backend.generate_many([item.prompt for item in left], max_tokens, stop):
            item = left[place]
            row = {
                "split": split,
                "item_id": item.id,
                "answer": made.text,
                "prompt_tokens": made.prompt_tokens,
                "answer_tokens": made.answer_tokens,
            }
            if journal is not None:
                journal.add(row)
            answers[item.id] = row
            progress()
    except BackendError as error:
        kept = " and kept; the same command goes on from there" if journal is not None else ""
        raise BackendError(f"{error}. {len(answers)} of {len(items)} items of {split} are done{kept}") from error
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise BackendError(f"{backend.name} left {len(missing)} of {len(items)} items of {split} out: {missing[:3]} …")
    return [_scored(item, answers[item.id]) for item in items]


def _scored(item: Item, row: Mapping[str, Any]) -> tuple[dict[str, Any], Score]:
    score = task_of(item, row["split"]).score(item, row["answer"])
    return {
        "item_id": item.id,
        "task": item.task,
        "split": row["split"],
        "prompt": item.prompt,
        "truth": item.completion,
        "answer": row["answer"],
        "predicted": score.predicted if isinstance(score.predicted, int | float) else None,
        "correct": score.correct,
        "credit": score.credit,
        "abs_error": score.abs_error,
        "prompt_tokens": row["prompt_tokens"],
        "answer_tokens": row["answer_tokens"],
    }, score


def metrics(
    task: Task,
    test: Sequence[Score],
    retention: Sequence[tuple[str, Score]],
    *,
    answer_tokens: Sequence[int | None] = (),
    max_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Rows {name, split, value, n} over the test items of `task`, the retention suite and each of its tasks.

    Args:
        task: Of the test items.
        test: Their scores.
        retention: (general task, score) of the retention suite.
        answer_tokens: Of each answer to a test item; None where the backend did not say.
        max_tokens: The limit of each answer. With it there is a row more, the share of answers that reached it among
            those whose length is known, unless none is.
    """
    rows = [
        {"name": name, "split": "test", "value": value, "n": len(test)}
        for name, value in task.summarize(list(test)).items()
    ]
    told = [tokens for tokens in answer_tokens if tokens is not None]
    if max_tokens is not None and told:
        cut = sum(tokens >= max_tokens for tokens in told)
        rows.append({"name": CUT, "split": "test", "value": cut / len(told), "n": len(told)})
    by_task: dict[str, list[Score]] = defaultdict(list)
    for name, score in retention:
        by_task[name].append(score)
    for name, value in general.summarize([s for _, s in retention]).items():
        rows.append({"name": name, "split": RETENTION, "value": value, "n": len(retention)})
    for name, scores in by_task.items():
        rows.append({"name": f"{RETENTION}/{name}", "split": RETENTION, "value": mean_credit(scores), "n": len(scores)})
    return rows


def metric_defs(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Unit, direction and meaning of every metric in `rows`.

    Raises:
        ItemError: the task summarizes by a metric that it does not describe.
    """
    known: dict[str, Mapping[str, str]] = {**task.METRICS, **general.METRICS, CUT: _CUT_DEF}
    return {row["name"]: dict(known.get(row["name"]) or _general_def(task, row["name"])) for row in rows}


def _general_def(task: Task, name: str) -> dict[str, str]:
    prefix, _, general_task = name.partition("/")
    if prefix != RETENTION or not general_task:
        raise ItemError(f"{task.NAME}: expected every metric of summarize in METRICS, got {name!r}, which is not there")
    return {
        "unit": "share",
        "direction": "higher",
        "description": f"Share of right answers in the general task {general_task}",
    }
