"""Which column of a data set each field of a recipe is read from."""

from collections.abc import Mapping

from evaluation.sources.types import ColumnSpec, Table, suggest
from evaluation.tasks import Recipe


def asked_columns(
    recipe: Recipe, columns: Mapping[str, str | ColumnSpec | None]
) -> tuple[dict[str, str | None], list[str]]:
    """The user's own mapping, None for fields to be left out; and what is wrong with it."""
    asked: dict[str, str | None] = {}
    problems: list[str] = []
    for name, entry in columns.items():
        column = ColumnSpec(column=entry) if isinstance(entry, str) else entry
        if name not in recipe.FIELDS:
            known = ", ".join(recipe.FIELDS)
            problems.append(f"unknown field {name!r} in columns.{suggest(name, recipe.FIELDS)} Known: {known}.")
        elif column is None and recipe.FIELDS[name].required:
            problems.append(f"{name}: expected a column, got null; items cannot do without it.")
        elif column is None:
            asked[name] = None
        elif column.unit is not None:
            problems.append(f"{name}: expected no unit, got {column.unit!r}; only pollutants have one.")
        elif (twin := next((f for f in asked if asked[f] == column.column), None)) is not None:
            problems.append(f"column {column.column!r} is mapped to both {twin!r} and {name!r}; map it once.")
        else:
            asked[name] = column.column
    for name, taken in asked.items():
        for other, own in recipe.FIELDS.items():
            if own.required and own.column == taken and other not in asked:
                problems.append(
                    f"column {taken!r} is mapped to {name!r}, and {other!r} is read from it as well; map {other!r} "
                    "to another one."
                )
    return asked, problems


def recipe_columns(recipe: Recipe, asked: Mapping[str, str | None], table: Table) -> dict[str, str]:
    """Field → column. An optional field that was not asked for is left out where its column is missing or taken."""
    columns = {}
    for name, own in recipe.FIELDS.items():
        column = asked.get(name, own.column)
        if column is None:
            continue
        if name in asked or own.required or (column in table.columns and column not in asked.values()):
            columns[name] = column
    return columns


def left_out(recipe: Recipe, asked: Mapping[str, str | None], table: Table) -> tuple[list[str], list[str]]:
    """What is to be said of optional fields whose column is not there, and which the user's own mapping does not name.

    Returns:
        Notes, and problems: of fields that another column may be meant for.
    """
    notes: list[str] = []
    problems: list[str] = []
    taken = {*asked.values(), *(own.column for own in recipe.FIELDS.values())}
    for name, own in recipe.FIELDS.items():
        if own.required or name in asked or not table.columns or own.column in table.columns:
            continue
        notes.append(f"There is no column {own.column!r}: items have none.")
        if near := suggest(own.column, [column for column in table.columns if column not in taken]):
            problems.append(
                f"{name}: there is no column {own.column!r}.{near} Map it in columns, or say {name}: null there to do "
                "without."
            )
    return notes, problems


def how_to_name(recipe: Recipe) -> dict[str, str]:
    """Field → what to do where its column is not there."""
    return {name: f" Say which it is in columns ({name}: {own.about})." for name, own in recipe.FIELDS.items()}
