"""Items of a recipe: each row of a data set becomes one, or is refused with row, column and reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.sources.columns import asked_columns, how_to_name, left_out, recipe_columns
from evaluation.sources.hub import HUB, DataSet, open_data_set
from evaluation.sources.readers import read_table
from evaluation.sources.types import (
    ColumnSpec,
    RawRow,
    Rejection,
    SourceError,
    SourceSpec,
    Table,
    check_columns,
    no_row_left,
)
from evaluation.tasks import Item, Recipe, RowError

OWN = "hub"


@dataclass(frozen=True)
class RecipeSpec:
    """Where a recipe's rows lie, and which column means what.

    Attributes:
        source: `hub` for the recipe's own data set, `hub:org/name[@revision]`, a file or a folder as in `SourceSpec`.
        columns: The recipe's field → the data set's column; what is not named is read from the recipe's own.
            None: an optional field that items are to have nothing of.
        split: That training items are taken from; None: the recipe's.
        test_split: That test items are taken from; None: the recipe's, where the data set has it. The same as `split`:
            they are drawn from that.
        subset: Configuration of a data set that has several; None: the recipe's, where the data set has it.
        delimiter: Separator of a CSV file, one character.
        max_chars: Of prompt and completion together; longer rows are refused.
    """

    source: str
    columns: Mapping[str, str | ColumnSpec | None]
    split: str | None = None
    test_split: str | None = None
    subset: str | None = None
    delimiter: str = ","
    max_chars: int | None = None


@dataclass(frozen=True)
class RecipeRows:
    """All rows of a recipe's splits: each is an item or refused.

    Attributes:
        train: Items of the training split, in its order; their ids are `<task>-<split>-<row>`.
        test: Items of the split for tests; None where test items are to be drawn from `train`.
        rejected: The refused rows.
        too_long: How many of those for max_chars.
        duplicates: How many of those for a prompt that an earlier row of the split has.
        most_refused: Split → share of its rows that were refused, where that is more than half.
        notes: What a user should know, one sentence each.
        facts: For run.json: where the rows come from.
    """

    train: list[Item]
    test: list[Item] | None
    rejected: list[Rejection]
    too_long: int
    duplicates: int
    most_refused: dict[str, float]
    notes: list[str]
    facts: dict[str, object]


def read_recipe(recipe: Recipe, spec: RecipeSpec) -> RecipeRows:
    """Reads a recipe's rows; every one ends as an item or among the rejected.

    Raises:
        SourceError: the source or the mapping as a whole cannot be used, or no row of a split is left. It lists every
            problem.
    """
    asked, problems = asked_columns(recipe, spec.columns)
    if spec.source == OWN:
        subset = spec.subset or recipe.SOURCE.subset
        spec = replace(
            spec, source=f"{HUB}{recipe.SOURCE.hub}", subset=subset, test_split=spec.test_split or recipe.SOURCE.test
        )
    try:
        tables, facts, notes = _tables(recipe, spec)
    except SourceError as error:
        raise SourceError(spec.source, [*problems, *error.problems]) from error.__cause__
    # The splits of a data set have the same columns.
    missing, near = left_out(recipe, asked, next(iter(tables.values())))
    notes += missing
    problems += near
    makers = []
    for split, table in tables.items():
        columns = recipe_columns(recipe, asked, table)
        found = check_columns(table, columns, how_to_name(recipe))
        problems += [f"split {split!r}: {p}" if len(tables) > 1 else p for p in found]
        makers.append(_Maker(recipe, spec, split, columns, table))
    if problems:
        raise SourceError(spec.source, list(dict.fromkeys(problems)))
    for maker in makers:
        maker.read(several=len(tables) > 1)
        notes += maker.notes
    train, test = makers[0], makers[1] if len(makers) > 1 else None
    return RecipeRows(
        train=train.items,
        test=test.items if test else None,
        rejected=[r for m in makers for r in m.rejected],
        too_long=sum(m.too_long for m in makers),
        duplicates=sum(m.duplicates for m in makers),
        most_refused={m.split: s for m in makers if (s := len(m.rejected) / len(m.table.rows)) > 0.5},
        notes=notes,
        facts={**facts, "columns": train.columns, "rows": {m.split: len(m.table.rows) for m in makers}},
    )


def _tables(recipe: Recipe, spec: RecipeSpec) -> tuple[dict[str, Table], dict[str, object], list[str]]:
    """(split → its rows, the training split first; where they come from; notes)."""
    own = recipe.SOURCE
    facts: dict[str, object] = dict.fromkeys(("subset", "test_split", "revision"))
    facts |= {"source": spec.source, "train_split": own.train}
    if not spec.source.startswith(HUB) and not Path(spec.source).is_dir():
        table = read_table(SourceSpec(source=spec.source, columns={}, delimiter=spec.delimiter))
        return {own.train: table}, facts, ["A file has no split for tests: test items are drawn from its rows."]
    with open_data_set(spec.source, spec.subset, own.subset) as data:
        train = spec.split or own.train
        test, notes = _test_split(recipe, spec, data, train)
        names = [train] if test is None else [train, test]
        missing = [s for s in names if s not in data.splits]
        problems = []
        for split in missing:
            try:
                data.table(split)
            except SourceError as error:
                problems += error.problems
        if problems:
            raise SourceError(spec.source, problems)
        tables = {split: data.table(split) for split in names}
    facts |= {
        "subset": data.subset,
        "train_split": train,
        "test_split": test,
        "available_splits": list(data.splits),
        "revision": tables[train].revision,
    }
    return tables, facts, notes


def _test_split(recipe: Recipe, spec: RecipeSpec, data: DataSet, train: str) -> tuple[str | None, list[str]]:
    """The split that test items are taken from, None where they are drawn from `train`; and what to say of it."""
    test = spec.test_split or recipe.SOURCE.test
    if test is not None and test != train and (spec.test_split or test in data.splits):
        return test, []
    why = f"The data set has no split {test!r} (it has {', '.join(data.splits)})"
    if test is None:
        why = f"No split of {recipe.NAME} is for tests"
    elif test == train:
        why = f"Split {train!r} is used for training and tests"
    return None, [f"{why}: test items are drawn from {train!r}."]


class _Maker:
    """Makes items of the rows of one split, in order; remembers prompts, to find duplicates."""

    def __init__(self, recipe: Recipe, spec: RecipeSpec, split: str, columns: dict[str, str], table: Table):
        self._recipe, self._spec = recipe, spec
        self.split, self.columns, self.table = split, columns, table
        self.items: list[Item] = []
        self.rejected: list[Rejection] = []
        self.notes: list[str] = []
        self.too_long = self.duplicates = 0

    def read(self, several: bool) -> None:
        """Fill `items` and `rejected`.

        Args:
            several: Whether other splits are read as well, for errors.

        Raises:
            SourceError: no row is left.
        """
        named = self._named()
        seen: dict[str, tuple[int, str]] = {}
        for raw in self.table.rows:
            if raw.problem is not None:
                self._reject(raw, None, raw.problem)
                continue
            values = {name: raw.values.get(column) for name, column in self.columns.items()}
            try:
                item = self._item(raw.row, values, named)
            except RowError as error:
                column = self.columns.get(error.name, error.name)
                self._reject(raw, column, f"{column}: {error.reason}")
                continue
            size, most = len(item.prompt) + len(item.completion), self._spec.max_chars
            if most is not None and size > most:
                self.too_long += 1
                self._reject(
                    raw, None, f"too long: expected prompt and completion of at most {most} characters, got {size}"
                )
                continue
            twin = seen.setdefault(item.prompt, (raw.row, item.completion))
            if twin[0] != raw.row:
                self.duplicates += 1
                other = "" if twin[1] == item.completion else ", with another answer"
                self._reject(raw, None, f"duplicate: same prompt as row {twin[0]}{other}")
                continue
            self.items.append(item)
        if not self.items:
            where = f"split {self.split!r}: " if several else ""
            raise no_row_left(self._spec.source, self.rejected, where)

    def _item(self, row: int, values: dict[str, object], named: Mapping[str, Sequence[str]]) -> Item:
        for name, labels in named.items():
            number = values[name]
            if isinstance(number, int) and 0 <= number < len(labels):
                values[name] = labels[number]
        return self._recipe.make_item(f"{self._recipe.NAME}-{self.split}-{row}", values)

    def _named(self) -> dict[str, list[str]]:
        """Fields whose classes this data set numbers otherwise than the recipe's own; their names are read instead."""
        found: dict[str, list[str]] = {}
        for name, labels in ((n, self.table.labels[c]) for n, c in self.columns.items() if c in self.table.labels):
            answers = {k: (self._answer(name, k), self._answer(name, label)) for k, label in enumerate(labels)}
            if any(by_name is not None and by_name != by_number for by_number, by_name in answers.values()):
                found[name] = labels
                self.notes.append(
                    f"Split {self.split!r}: {self.columns[name]} numbers its classes otherwise than "
                    f"{self._recipe.NAME} does; they are read by name ({', '.join(labels)})."
                )
        return found

    def _answer(self, name: str, value: object) -> str | None:
        """The completion of the first sound row, with another value in one field."""
        for raw in self.table.rows[:100]:
            values = {n: raw.values.get(column) for n, column in self.columns.items()}
            try:
                return self._recipe.make_item("", {**values, name: value}).completion
            except RowError:
                continue
        return None

    def _reject(self, raw: RawRow, column: str | None, reason: str) -> None:
        value = raw.values.get(column) if column is not None else None
        self.rejected.append(
            Rejection(self._spec.source, raw.row, raw.line, column, value, reason, raw.values, self.split)
        )
