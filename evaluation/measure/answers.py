"""Items × engine → samples and metrics, with a journal of the answers on disk."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from db.files import write_text
from evaluation import EvaluationError, paraphrase
from evaluation.tasks import Item, Score, Task, general, load, mean_credit, share
from export import ExportError
from export.engines.base import Engine, EngineError, asked_for

_TEXTS, _COUNTS, _WHY = ("split", "item_id", "answer"), ("prompt_tokens", "answer_tokens"), "finish_reason"
RETENTION = "retention"
CUT = "answers_cut"
_CUT_DEF = {
    "unit": "share",
    "direction": "lower",
    "description": "Share of answers that reached evaluate.max_tokens, where an answer is cut; its end may be missing",
}


_AGAIN = {
    paraphrase.SPLIT: "Mean credit on test items",
    f"{paraphrase.SPLIT}_{RETENTION}": "Share of right answers to items of the retention suite",
}


class Journal:
    """Answers of a half-done evaluation, one JSON line each, so that a killed run goes on where it was.

    To be used in a `with` block, by one process at a time. A line that a kill cut short, or that is no answer, is
    dropped when the file is opened again; of an item that is there twice, the first answer counts. The file's name must
    change with everything that decides the answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        for row in _read(path):
            self._rows.setdefault((row["split"], row["item_id"]), row)
        self.resumed = len(self._rows)  # answers that were there when the file was opened
        write_text(path, "".join(_line(row) for row in self._rows.values()))
        self._file = path.open("a", encoding="utf-8")

    def get(self, split: str, item_id: str) -> dict[str, Any] | None:
        """The answer {split, item_id, answer, prompt_tokens, answer_tokens, finish_reason}; None: none yet."""
        return self._rows.get((split, item_id))

    def add(self, row: dict[str, Any]) -> None:
        """Keep an answer, as `get` returns it; it outlives a kill of this process from here on.

        Raises ValueError: the item has an answer already.
        """
        key = (row["split"], row["item_id"])
        if key in self._rows:
            raise ValueError(f"expected one answer for each item, got a second one for {key}")
        self._file.write(_line(row))
        self._file.flush()
        self._rows[key] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # after the last line break comes nothing, or a line cut short
    return [row for line in lines if (row := _answer(line)) is not None]


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or row.keys() != {*_TEXTS, *_COUNTS, _WHY}:
        return None
    texts = all(isinstance(row[name], str) for name in _TEXTS)
    counts = all(row[name] is None or type(row[name]) is int for name in _COUNTS)
    return row if texts and counts and row[_WHY] in ("stop", "length", None) else None


def task_of(item: Item, split: str) -> Task:
    """The module that scores an item of a split: in the retention suite, whose items name general tasks, `general`.

    Raises EvaluationError: there is no such task.
    """
    return load(general.NAME if split == RETENTION or item.task in general.GENERAL_TASKS else item.task)


def transcript(item: Item) -> str:
    """What the model was shown, for a reader."""
    if not item.turns and not item.system:
        return item.prompt
    said = [("System", item.system)] if item.system else []
    for question, answer in item.turns:
        said += [("User", question), ("Assistant", answer)]
    return "\n\n".join(f"{who}: {text}" for who, text in [*said, ("User", item.prompt)])


def ask(
    engine: Engine,
    items: Iterable[Item],
    split: str,
    *,
    max_tokens: int,
    stop: Sequence[str],
    journal: Journal | None = None,
    progress: Callable[[], object] = lambda: None,
) -> list[tuple[dict[str, Any], Score]]:
    """Answer and score every item: (row of samples.jsonl, score) for each, in order.

    Items that the journal already answers are not asked. Raises EngineError: the engine gave up; with a journal, what
    was answered is kept there.
    """
    items = list(items)
    answers = {item.id: row for item in items if journal and (row := journal.get(split, item.id))}
    left = [item for item in items if item.id not in answers]
    try:
        for place, made in engine.generate_many([asked_for(item) for item in left], max_tokens, stop):
            item = left[place]
            row = {
                "split": split,
                "item_id": item.id,
                "answer": made.text,
                "prompt_tokens": made.prompt_tokens,
                "answer_tokens": made.answer_tokens,
                "finish_reason": made.finish_reason,
            }
            if journal is not None:
                journal.add(row)
            answers[item.id] = row
            progress()
    except ExportError as error:
        kept = " and kept; the same command goes on from there" if journal is not None else ""
        raise EngineError(f"{error}. {len(answers)} of {len(items)} items of {split} are done{kept}") from error
    missing = [item.id for item in items if item.id not in answers]
    if missing:
        raise EngineError(f"{engine.name} left {len(missing)} of {len(items)} items of {split} out: {missing[:3]} …")
    return [_scored(item, answers[item.id]) for item in items]


def _scored(item: Item, row: Mapping[str, Any]) -> tuple[dict[str, Any], Score]:
    score = task_of(item, row["split"]).score(item, row["answer"])
    return {
        "item_id": item.id,
        "task": item.task,
        "split": row["split"],
        "prompt": transcript(item),
        "truth": item.completion,
        "answer": row["answer"],
        "predicted": score.predicted if isinstance(score.predicted, int | float) else None,
        "correct": score.correct,
        "credit": score.credit,
        "abs_error": score.abs_error,
        **({"remark": score.remark} if score.remark else {}),
        "prompt_tokens": row["prompt_tokens"],
        "answer_tokens": row["answer_tokens"],
        "finish_reason": row["finish_reason"],
    }, score


def metrics(
    task: Task,
    test: Sequence[Score],
    retention: Sequence[tuple[str, Score]],
    paraphrased: Sequence[tuple[Item, Score]] = (),
    *,
    finish_reasons: Sequence[str | None] = (),
) -> list[dict[str, Any]]:
    """Rows {name, split, value, n} over the test items of `task`, the retention suite and each of its tasks.

    Of split paraphrased there is one for the test items and one for those of the retention suite, and one a form.
    With `finish_reasons` there is a row more, the share of answers that were cut among those of which it is known why
    they ended, unless it is of none.
    """
    rows = [
        {"name": name, "split": "test", "value": value, "n": len(test)}
        for name, value in task.summarize(list(test)).items()
    ]
    if told := [reason for reason in finish_reasons if reason is not None]:
        rows.append({"name": CUT, "split": "test", "value": told.count("length") / len(told), "n": len(told)})
    by_task: dict[str, list[Score]] = defaultdict(list)
    for name, score in retention:
        by_task[name].append(score)
    for name, value in general.summarize([s for _, s in retention]).items():
        rows.append({"name": name, "split": RETENTION, "value": value, "n": len(retention)})
    for name, scores in by_task.items():
        rows.append({"name": f"{RETENTION}/{name}", "split": RETENTION, "value": mean_credit(scores), "n": len(scores)})
    forms: dict[str, list[Score]] = defaultdict(list)
    for item, score in paraphrased:
        of = paraphrase.SPLIT if item.task == task.NAME else f"{paraphrase.SPLIT}_{RETENTION}"
        forms[of].append(score)
        forms[f"{of}/{paraphrase.plain(item.id)[1]}"].append(score)
    rows += [
        {"name": name, "split": paraphrase.SPLIT, "value": mean_credit(scores), "n": len(scores)}
        for name, scores in forms.items()
    ]
    return rows


def metric_defs(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Unit, direction and meaning of every metric in `rows`.

    Raises EvaluationError: the task summarizes by a metric that it does not describe.
    """
    known: dict[str, Mapping[str, str]] = {**task.METRICS, **general.METRICS, CUT: _CUT_DEF}
    for name in (row["name"] for row in rows if row["name"] not in known):
        prefix, _, of = name.partition("/")
        if prefix == RETENTION and of:
            told = f"Share of right answers in the general task {of}"
        elif prefix in _AGAIN:
            told = f"{_AGAIN[prefix]}, typed as other people would{f' ({of})' if of else ''}"
        else:
            raise EvaluationError(f"{task.NAME}: expected every metric of summarize in METRICS, got {name!r}")
        known[name] = share(told)
    return {row["name"]: dict(known[row["name"]]) for row in rows}
