"""Items × engine → samples and metrics, with a journal of the answers on disk."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from db.files import write_text
from evaluation import EvaluationError, knowledge, paraphrase
from evaluation.tasks import Item, Score, Task, general, load, mean_credit, metric, share
from export import ExportError
from export.engines.engine import Engine, EngineError, asked_for

RETENTION = "retention"
CUT = "answers_cut"
_CUT_METRIC = metric(
    "share", "lower", "Share of answers that reached evaluate.max_tokens, where they are cut; the end may be missing"
)
_PARAPHRASED = {
    paraphrase.SPLIT: "Mean credit on test items",
    f"{paraphrase.SPLIT}_{RETENTION}": "Share of right answers to items of the retention suite",
}
_ANSWER = ("split", "item_id", "answer", "prompt_tokens", "answer_tokens", "finish_reason")


class Journal:
    """Answers of an unfinished evaluation, one JSON line each, so that a killed run resumes where it was.

    To be used in a `with` block, by one process at a time. A line that a kill cut short, or that is not an answer, is
    dropped when the file is opened again; if an item is there twice, its first answer counts. The file's name must
    change with everything that decides the answers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}
        # What follows the last line break is nothing, or a line cut short.
        for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
            if (row := _answer(line)) is not None:
                self._rows.setdefault((row["split"], row["item_id"]), row)
        self.resumed = len(self._rows)  # answers that were there when the file was opened
        write_text(path, "".join(json.dumps(row) + "\n" for row in self._rows.values()))
        self._file = path.open("a", encoding="utf-8")

    def get(self, split: str, item_id: str) -> dict[str, Any] | None:
        """The answer {split, item_id, answer, prompt_tokens, answer_tokens, finish_reason}; None: none yet."""
        return self._rows.get((split, item_id))

    def add(self, row: dict[str, Any]) -> None:
        """Store an answer, as `get` returns it; from here on it survives a kill of this process."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._rows[row["split"], row["item_id"]] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _answer(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and tuple(row) == _ANSWER else None


def task_of(item: Item, split: str) -> Task:
    """The module that scores an item of a split: `general` for the retention suite, whose items name general tasks."""
    of_suite = split == RETENTION or item.task in general.GENERAL_TASKS or item.task in knowledge.NAMES
    return load(general.NAME if of_suite else item.task)


def transcript(item: Item) -> str:
    """What the model was shown, for a reader."""
    if not item.turns and not item.system:
        return item.prompt
    parts = [("System", item.system)] if item.system else []
    for question, answer in item.turns:
        parts += [("User", question), ("Assistant", answer)]
    return "\n\n".join(f"{role}: {text}" for role, text in [*parts, ("User", item.prompt)])


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

    Items that the journal already answers are not asked. Raises EngineError if the engine gives up; with a journal, the
    answers so far are in it.
    """
    items = list(items)
    answers = {item.id: row for item in items if journal and (row := journal.get(split, item.id))}
    open_items = [item for item in items if item.id not in answers]
    try:
        for place, reply in engine.generate_many([asked_for(item) for item in open_items], max_tokens, stop):
            item = open_items[place]
            figures = (reply.text, reply.prompt_tokens, reply.answer_tokens, reply.finish_reason)
            row = dict(zip(_ANSWER, (split, item.id, *figures), strict=True))
            if journal is not None:
                journal.add(row)
            answers[item.id] = row
            progress()
    except ExportError as error:
        stored = " and stored; the same command resumes from there" if journal is not None else ""
        raise EngineError(f"{error}. {len(answers)} of {len(items)} items of {split} are done{stored}") from error
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

    Split paraphrased has one row for the test items, one for the retention items, and one for each form of both. If
    any of `finish_reasons` is known, there is also the share of answers that were cut.
    """

    def row(name: str, split: str, value: float, n: int) -> dict[str, Any]:
        return {"name": name, "split": split, "value": value, "n": n}

    rows = [row(name, "test", value, len(test)) for name, value in task.summarize(list(test)).items()]
    if known := [reason for reason in finish_reasons if reason is not None]:
        rows.append(row(CUT, "test", known.count("length") / len(known), len(known)))
    suite = general.summarize([score for _, score in retention])
    rows += [row(name, RETENTION, value, len(retention)) for name, value in suite.items()]
    groups: dict[tuple[str, str], list[Score]] = defaultdict(list)  # (name, split) → scores
    for name, score in retention:
        groups[f"{RETENTION}/{name}", RETENTION].append(score)
    for item, score in paraphrased:
        of = paraphrase.SPLIT if item.task == task.NAME else f"{paraphrase.SPLIT}_{RETENTION}"
        for name in (of, f"{of}/{paraphrase.plain(item.id)[1]}"):
            groups[name, paraphrase.SPLIT].append(score)
    return rows + [row(name, split, mean_credit(s), len(s)) for (name, split), s in groups.items()]


def metric_defs(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Unit, direction and description of every metric in `rows`.

    Raises EvaluationError: the task summarizes by a metric that it does not describe.
    """
    known: dict[str, Mapping[str, str]] = {**task.METRICS, **general.METRICS, CUT: _CUT_METRIC}
    for name in (row["name"] for row in rows if row["name"] not in known):
        prefix, _, part = name.partition("/")
        if prefix == RETENTION and part:
            description = f"Share of right answers in the general task {part}"
        elif prefix in _PARAPHRASED:
            description = f"{_PARAPHRASED[prefix]}, typed as other people would{f' ({part})' if part else ''}"
        else:
            raise EvaluationError(f"{task.NAME}: expected every metric of summarize in METRICS, got {name!r}")
        known[name] = share(description)
    return {row["name"]: dict(known[row["name"]]) for row in rows}
