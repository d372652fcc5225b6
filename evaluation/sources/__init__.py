"""Rows of data from CSV, JSON and Parquet files, folders or the Hugging Face hub, with nothing dropped silently."""

from collections.abc import Iterable
from pathlib import Path

from evaluation import EvaluationError
from evaluation.sources.hub import HUB, open_data_set
from evaluation.sources.tabular import Table, read_file


def read_table(source: str, *, split: str = "train", subset: str | None = None, names: Iterable[str] = ()) -> Table:
    """Columns and raw rows of a file, or of one split of a folder or hub data set; EvaluationError if unreadable.

    `names`: the columns that will be read, which help to recognize a CSV file's header.
    """
    try:
        if source.startswith(HUB) or Path(source).is_dir():
            with open_data_set(source, subset, split=split) as data:
                return data.table(split)
        table = read_file(source, names=names)
    except EvaluationError as error:
        raise EvaluationError(error.problems, f"{source} cannot be used:") from error.__cause__
    if table.note:
        print(table.note)
    return table
