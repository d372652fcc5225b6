"""Tasks: what a run was asked, and credit between right and wrong.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from alembic import op

from db.migrations import views_0001, views_0002, views_0003, views_0004

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# Copies of what db.models says today: this file must keep meaning the same when db.models changes.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LARGEST_INT = 9223372036854775807
LARGEST_FLOAT = "1.7976931348623157e308"
RUN_COLUMNS = {
    "task": ("'aqi'", "what is asked: aqi, gsm8k, …"),
    "task_title": ("'AQI accuracy'", "of the primary metric, as tables show it"),
    "primary_metric": (
        "'aqi_category_accuracy'",
        "name in metric, split test: the mean credit of the test items, by which arms are compared",
    ),
    "base_key": ("''", "sha256 of base.json: the base model, its place and prompt template; '': not known"),
    "train_key": ("''", "sha256 of the canonical JSON of params and inputs of stage train; '': nothing was trained"),
}
RULES = {"primary_metric": ("ck_run_task_named", "task <> '' AND task_title <> '' AND primary_metric <> ''")}
REFERENCE = "base run with the same task, items, backend and base_key, where both have one; NULL: no fair one"
REFERENCE_BEFORE = "current base run with the same items and backend; NULL: no fair reference"
# Table -> what the credit of rows from before is, and the comment.
CREDITS = {
    "sample": (
        "CASE WHEN correct THEN 1.0 ELSE 0.0 END",
        "0 to 1: what the answer is worth; between them where a task gives credit for parts",
    ),
    "quantized_sample": ("CASE WHEN correct THEN 1.0 ELSE 0.0 END", "0 to 1, as in sample"),
    "quantization": ("category_accuracy", "mean credit of the test items"),
}


def _check(table: str, name: str, rule: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(rule, name=op.f(f"ck_{table}_{name}"))


def _count(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_count", f"{column} BETWEEN 0 AND {LARGEST_INT}")


def _share(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_share", f"{column} BETWEEN 0 AND 1")


def _of_run(table: str, *unique: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f(f"fk_{table}_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
        sa.UniqueConstraint("run_id", *unique, name=op.f(f"uq_{table}_run_id_{'_'.join(unique)}")),
    ]


def _correct() -> sa.Column[bool]:
    return sa.Column("correct", sa.Boolean(create_constraint=True, name="correct_flag"), nullable=False)


def _tables() -> dict[str, list[sa.schema.SchemaItem]]:
    """The tables as revision 0003 has them."""
    return {
        "sample": [
            *_of_run("sample", "split", "item_id"),
            *(sa.Column(n, sa.Text(), nullable=False) for n in "item_id task split prompt truth answer".split()),
            sa.Column("predicted", sa.Double(), nullable=True),
            _correct(),
            sa.Column("abs_error", sa.Double(), nullable=True),
            sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
            sa.Column("answer_tokens", sa.BigInteger(), nullable=True),
            _check("sample", "named", "item_id <> '' AND split <> '' AND task <> ''"),
            _check("sample", "predicted_finite", f"predicted BETWEEN -{LARGEST_FLOAT} AND {LARGEST_FLOAT}"),
            _check("sample", "abs_error_finite", f"abs_error BETWEEN 0 AND {LARGEST_FLOAT}"),
            _count("sample", "prompt_tokens"),
            _count("sample", "answer_tokens"),
        ],
        "quantized_sample": [
            *_of_run("quantized_sample", "type", "item_id"),
            sa.Column("type", sa.Text(), nullable=False),
            sa.Column("item_id", sa.Text(), nullable=False),
            _correct(),
            sa.Column("answer", sa.Text(), nullable=False),
            _check("quantized_sample", "named", "type <> '' AND item_id <> ''"),
        ],
        "quantization": [
            *_of_run("quantization", "type"),
            sa.Column("type", sa.Text(), nullable=False),
            sa.Column("bytes", sa.BigInteger(), nullable=False),
            sa.Column("bits_per_weight", sa.Double(), nullable=False),
            sa.Column("tensor_types", sa.JSON(), nullable=False),
            sa.Column("category_accuracy", sa.Double(), nullable=False),
            sa.Column("correct", sa.BigInteger(), nullable=False),
            sa.Column("n", sa.BigInteger(), nullable=False),
            sa.Column("answers_equal_to_f16", sa.Double(), nullable=False),
            sa.Column("fallbacks", sa.BigInteger(), nullable=False),
            _check("quantization", "named", "type <> ''"),
            _check("quantization", "bits_per_weight", "bits_per_weight > 0 AND bits_per_weight <= 64"),
            _check("quantization", "correct_of_n", "correct <= n"),
            _check("quantization", "f16_equals_itself", "type <> 'f16' OR answers_equal_to_f16 = 1"),
            *(_count("quantization", column) for column in ("bytes", "correct", "n", "fallbacks")),
            *(_share("quantization", column) for column in ("category_accuracy", "answers_equal_to_f16")),
        ],
    }


def upgrade() -> None:
    """Add a task to runs and credit to answers; all that is there is of task aqi, right or wrong."""
    _drop_views((*views_0003.NAMES, *views_0002.NAMES, *views_0001.NAMES))
    for column, (default, comment) in RUN_COLUMNS.items():
        # Not in batch mode: copying `run` would empty its children on SQLite.
        rule = " CONSTRAINT {} CHECK ({})".format(*RULES[column]) if column in RULES else ""
        op.execute(f"ALTER TABLE run ADD COLUMN {column} TEXT DEFAULT {default} NOT NULL{rule}")
        if _postgresql():
            op.alter_column("run", column, existing_type=sa.Text(), existing_nullable=False, comment=comment)
    _comment_reference(REFERENCE)
    _fill_keys()
    choice = "is_current status task ended arm seed backend_name base_key train_key"
    op.create_index(op.f("ix_run_choice"), "run", choice.split())
    for table, (credit, comment) in CREDITS.items():
        if _postgresql():
            op.add_column(table, sa.Column("credit", sa.Double(), nullable=True, comment=comment))
            op.execute(f"UPDATE {table} SET credit = {credit}")  # noqa: S608  fixed names
            op.alter_column(table, "credit", existing_type=sa.Double(), nullable=False)
            op.create_check_constraint(op.f(f"ck_{table}_credit_share"), table, "credit BETWEEN 0 AND 1")
        else:
            _copy(table, credit)
    _create_views(views_0004.statements(_dialect()))


def downgrade() -> None:
    """Back to 0003; credit for parts goes, and other tasks look like AQI's, with metrics that it does not have."""
    _drop_views((*views_0004.NAMES, *views_0003.NAMES, *views_0002.NAMES, *views_0001.NAMES))
    for table in CREDITS:
        if _postgresql():
            op.drop_column(table, "credit")
        else:
            _copy(table, None)
    op.drop_index(op.f("ix_run_choice"), "run")
    for column in reversed(RUN_COLUMNS):  # the rule goes with the column that has it, before the others that it names
        op.execute(f"ALTER TABLE run DROP COLUMN {column}")
    _comment_reference(REFERENCE_BEFORE)
    _create_views([])


def _comment_reference(comment: str) -> None:
    if _postgresql():
        op.alter_column(
            "run", "reference_run_id", existing_type=sa.BigInteger(), existing_nullable=True, comment=comment
        )


def _fill_keys() -> None:
    """What runs from before were trained from and with, as their files say: the same keys as of these files today."""
    run = sa.table("run", sa.column("id", KEY), sa.column("params", sa.JSON()), sa.column("inputs", sa.JSON()),
                   sa.column("base_key", sa.Text()), sa.column("train_key", sa.Text()))  # fmt: skip
    connection = op.get_bind()
    for run_id, params, inputs in connection.execute(sa.select(run.c.id, run.c.params, run.c.inputs)).all():
        base = (inputs.get("export") or {}).get("models/base/base.json") or ""
        trained = [params["train"], inputs.get("train", {})] if "train" in params else None
        keys = {"base_key": base, "train_key": "" if trained is None else _digest(trained)}
        connection.execute(sa.update(run).where(run.c.id == run_id).values(keys))


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _copy(table: str, credit: str | None) -> None:
    """On SQLite: a copy of a table, since a column without a default cannot be added to rows that are there.

    Args:
        table: Nothing refers to it.
        credit: SQL for the new column's values; None: without it.
    """
    old = [*_tables()[table]]
    new = [] if credit is None else [sa.Column("credit", sa.Double(), nullable=False), _share(table, "credit")]
    kept = ", ".join(item.name for item in old if isinstance(item, sa.Column))
    op.execute(f"ALTER TABLE {table} RENAME TO {table}_before")
    op.create_table(table, *old, *new)
    into, what = (f"{kept}, credit", f"{kept}, {credit}") if credit else (kept, kept)
    op.execute(f"INSERT INTO {table} ({into}) SELECT {what} FROM {table}_before ORDER BY id")  # noqa: S608  fixed names
    op.drop_table(f"{table}_before")


def _create_views(changed: list[str]) -> None:
    """Create the views of 0001 to 0003, those that a revision changed as they are there."""
    by_name = {
        text.split()[2]: text
        for text in (*views_0001.statements(_dialect()), *views_0002.STATEMENTS, *views_0003.STATEMENTS, *changed)
    }
    for text in by_name.values():
        op.execute(text)


def _drop_views(names: tuple[str, ...]) -> None:
    for view in names:
        op.execute(f"DROP VIEW IF EXISTS {view}")  # a lost one comes back


def _dialect() -> str:
    return op.get_bind().dialect.name


def _postgresql() -> bool:
    return _dialect() != "sqlite"
