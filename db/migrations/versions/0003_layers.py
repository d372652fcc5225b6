"""Numbers for each layer, spectra of the Fisher factors, and starts of stages.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from db.migrations import views_0003

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Copies of what db.models says today: this file must keep meaning the same when db.models changes.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
LARGEST_INT = 9223372036854775807
OLD_SPLITS = "test, retention, parity; train and eval for training curves"
NEW_SPLITS = "test, retention, parity, general, weights, hidden, alignment; train and eval for training curves"


def _check(table: str, name: str, rule: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(rule, name=op.f(f"ck_{table}_{name}"))


def _count(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_count", f"{column} BETWEEN 0 AND {LARGEST_INT}")


def _of_run(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f(f"fk_{table}_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    ]


def upgrade() -> None:
    """Add three tables, a view, and to `run` how many rows a run has; no row is touched."""
    op.add_column(
        "run",
        sa.Column(
            "row_counts",
            sa.JSON(none_as_null=True),
            nullable=True,
            comment="table to number of this run's rows there, as written; NULL: unknown, an older version wrote them",
        ),
    )
    op.create_table(
        "layer_metric",
        *_of_run("layer_metric"),
        sa.Column(
            "name",
            sa.Text(),
            nullable=False,
            comment="see metric_def; of split probe: angles in degrees, cosines and ratios",
        ),
        sa.Column(
            "split",
            sa.Text(),
            nullable=False,
            comment="weights, hidden, alignment: measured; probe, grit: logged while training",
        ),
        sa.Column(
            "layer",
            sa.Text(),
            nullable=False,
            comment="module (layers.0.self_attn.q_proj) or hidden layer (layer 2)",
        ),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="optimizer step; -1: of the finished run"),
        sa.Column("value", sa.Double(), nullable=True, comment="NULL unless value_kind is finite"),
        sa.Column(
            "value_kind",
            sa.Text(),
            nullable=False,
            comment="finite, nan, inf, -inf: SQLite would turn NaN into NULL",
        ),
        _check("layer_metric", "named", "name <> '' AND split <> '' AND layer <> ''"),
        _check("layer_metric", "step", f"step BETWEEN -1 AND {LARGEST_INT}"),
        _check("layer_metric", "value_kind", "value_kind IN ('finite', 'nan', 'inf', '-inf')"),
        _check("layer_metric", "value_typed", "(value_kind = 'finite') = (value IS NOT NULL)"),
        _check("layer_metric", "value_finite", "value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308"),
        sa.UniqueConstraint(
            "run_id", "name", "split", "layer", "step", name=op.f("uq_layer_metric_run_id_name_split_layer_step")
        ),
    )
    op.create_table(
        "spectrum",
        *_of_run("spectrum"),
        sa.Column("layer", sa.Text(), nullable=False),
        sa.Column(
            "factor",
            sa.Text(),
            nullable=False,
            comment="a: of A's outputs (precondition B); g: of gradients there (for A)",
        ),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="optimizer step"),
        sa.Column(
            "eigenvalues",
            sa.JSON(none_as_null=True),
            nullable=False,
            comment="largest first, perhaps only the largest ones; squares of activations (a) or gradients (g) a token",
        ),
        _check("spectrum", "named", "layer <> ''"),
        _check("spectrum", "factor", "factor IN ('a', 'g')"),
        _check("spectrum", "step", f"step BETWEEN 0 AND {LARGEST_INT}"),
        _check("spectrum", "eigenvalues_known", "length(CAST(eigenvalues AS TEXT)) > 2"),
        sa.UniqueConstraint("run_id", "layer", "factor", "step", name=op.f("uq_spectrum_run_id_layer_factor_step")),
    )
    op.create_table(
        "attempt",
        sa.Column("id", sa.Text(), nullable=False, comment="name of the file under attempts/, without .json"),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=True, comment="NULL: a stage for all arms, such as prepare_data"),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column(
            "status",
            sa.Text(),
            nullable=False,
            comment="crashed: its process was gone without a word, noticed later",
        ),
        sa.Column("error", sa.Text(), nullable=True, comment="why it failed"),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False, comment="UTC"),
        sa.Column(
            "ended", sa.DateTime(timezone=True), nullable=True, comment="UTC; of a crash NULL or when it was noticed"
        ),
        sa.Column("host", sa.Text(), nullable=False, comment="a process id means something on its own machine only"),
        sa.Column("pid", sa.BigInteger(), nullable=False, comment="process id"),
        sa.Column("git_commit", sa.Text(), nullable=True, comment="commit at the start"),
        _check("attempt", "named", "id <> '' AND stage <> '' AND arm <> '' AND host <> ''"),
        _check("attempt", "status", "status IN ('running', 'finished', 'failed', 'crashed')"),
        _check("attempt", "running_has_no_end", "status <> 'running' OR ended IS NULL"),
        _check("attempt", "ended_has_end", "status NOT IN ('finished', 'failed') OR ended IS NOT NULL"),
        _check("attempt", "ended_after_start", "ended >= started"),
        _count("attempt", "seed"),
        _count("attempt", "pid"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempt")),
    )
    _say_splits(NEW_SPLITS)
    for statement in views_0003.STATEMENTS:
        op.execute(statement)


def downgrade() -> None:
    """Back to 0002; numbers of layers, spectra and starts go."""
    for view in views_0003.NAMES:
        op.execute(f"DROP VIEW {view}")
    for table in ("attempt", "spectrum", "layer_metric"):
        op.drop_table(table)
    op.execute("ALTER TABLE run DROP COLUMN row_counts")
    _say_splits(OLD_SPLITS)


def _say_splits(comment: str) -> None:
    """SQLite keeps no comments on columns."""
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("metric", "split", existing_type=sa.Text(), existing_nullable=False, comment=comment)
