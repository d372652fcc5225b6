"""The first tables and views.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from db.migrations import views_0001

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Copies of what db.models says today: this file must keep meaning the same when db.models changes.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SHA256 = sa.String(length=64)
LARGEST_INT = 9223372036854775807


def _check(table: str, name: str, rule: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(rule, name=op.f(f"ck_{table}_{name}"))


def _count(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_count", f"{column} BETWEEN 0 AND {LARGEST_INT}")


def _typed_value(table: str) -> list[sa.CheckConstraint]:
    return [
        _check(table, "value_kind", "value_kind IN ('finite', 'nan', 'inf', '-inf')"),
        _check(table, "value_typed", "(value_kind = 'finite') = (value IS NOT NULL)"),
        _check(table, "value_finite", "value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308"),
    ]


def _of_run(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f(f"fk_{table}_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    ]


def upgrade() -> None:
    """Create everything."""
    op.create_table(
        "environment",
        sa.Column("id", KEY, nullable=False),
        sa.Column("key", SHA256, nullable=False, comment="sha256 of the canonical JSON of all other columns"),
        sa.Column("device_class", sa.Text(), nullable=False, comment="cpu, cuda or mps"),
        sa.Column("device_name", sa.Text(), nullable=True),
        sa.Column("cores", sa.BigInteger(), nullable=True, comment="cores of the machine"),
        sa.Column("threads", sa.BigInteger(), nullable=True, comment="threads that were used"),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True, comment="bytes"),
        sa.Column("platform", sa.Text(), nullable=True),
        sa.Column("python", sa.Text(), nullable=True),
        sa.Column("packages", sa.JSON(), nullable=False, comment="package name to version"),
        _check("environment", "key_sha256", "length(key) = 64"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environment")),
        sa.UniqueConstraint("key", name=op.f("uq_environment_key")),
    )
    op.create_table(
        "metric_def",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False, comment="share is a number from 0 to 1"),
        sa.Column("direction", sa.Text(), nullable=False, comment="which way is better"),
        sa.Column("description", sa.Text(), nullable=False),
        _check("metric_def", "direction", "direction IN ('higher', 'lower', 'none')"),
        _check("metric_def", "named", "name <> ''"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_metric_def")),
    )
    op.create_table(
        "run",
        sa.Column("id", KEY, nullable=False),
        sa.Column(
            "run_key",
            SHA256,
            nullable=False,
            comment="identity: sha256 of arm, seed, params and inputs per stage, backend, device class",
        ),
        sa.Column(
            "source_sha256",
            SHA256,
            nullable=False,
            comment="sha256 of the files this row was read from; equal means nothing to do",
        ),
        sa.Column("arm", sa.Text(), nullable=False, comment="the way of training; base is the untouched model"),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False, comment="name of the model in Ollama"),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column(
            "is_current",
            sa.Boolean(create_constraint=True, name="is_current_flag"),
            nullable=False,
            comment="false once other files stand in this arm's and seed's folders",
        ),
        sa.Column("error", sa.Text(), nullable=True, comment="why the run failed"),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False, comment="start of the evaluation, UTC"),
        sa.Column("ended", sa.DateTime(timezone=True), nullable=True, comment="end of the evaluation, UTC"),
        sa.Column(
            "stages",
            sa.JSON(),
            nullable=False,
            comment="per stage: start, end, git, environment key; stages run on different days",
        ),
        sa.Column("params", sa.JSON(), nullable=False, comment="resolved parameters per stage"),
        sa.Column("inputs", sa.JSON(), nullable=False, comment="sha256 of the inputs per stage"),
        sa.Column("git_commit", sa.Text(), nullable=True, comment="commit at evaluation"),
        sa.Column(
            "git_dirty",
            sa.Boolean(create_constraint=True, name="git_dirty_flag"),
            nullable=True,
            comment="true when any stage ran on changed files: not reproducible",
        ),
        sa.Column("prompt_template", sa.Text(), nullable=True),
        sa.Column("backend_name", sa.Text(), nullable=False, comment="llama_cpp, ollama or hf"),
        sa.Column("backend_version", sa.Text(), nullable=False),
        sa.Column("device_class", sa.Text(), nullable=False, comment="device of the evaluation: cpu, cuda or mps"),
        sa.Column("environment_id", KEY, nullable=False, comment="where it was evaluated"),
        sa.Column(
            "test_items_sha256",
            SHA256,
            nullable=False,
            comment="sha256 of the scored items; only equal ones compare",
        ),
        sa.Column(
            "reference_run_id",
            KEY,
            nullable=True,
            comment="current base run with the same items and backend; NULL: no fair reference",
        ),
        sa.Column(
            "parity_first_difference",
            sa.JSON(),
            nullable=True,
            comment="first prompt on which the exported model disagreed with the trained one",
        ),
        _check("run", "named", "arm <> '' AND model_name <> ''"),
        _check("run", "base_has_no_reference", "arm <> 'base' OR reference_run_id IS NULL"),
        _check("run", "finished_has_end", "status <> 'finished' OR ended IS NOT NULL"),
        _check("run", "status", "status IN ('running', 'finished', 'failed', 'crashed')"),
        _check("run", "ended_after_start", "ended >= started"),
        _check("run", "run_key_sha256", "length(run_key) = 64"),
        _check("run", "source_sha256", "length(source_sha256) = 64"),
        _check("run", "test_items_sha256", "length(test_items_sha256) = 64"),
        _check("run", "not_its_own_reference", "reference_run_id <> id"),
        _count("run", "seed"),
        sa.ForeignKeyConstraint(
            ["environment_id"], ["environment.id"], name=op.f("fk_run_environment_id"), ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["reference_run_id"], ["run.id"], name=op.f("fk_run_reference_run_id"), ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.UniqueConstraint("run_key", name=op.f("uq_run_run_key")),
    )
    op.create_index(op.f("ix_run_environment_id"), "run", ["environment_id"], unique=False)
    op.create_index(op.f("ix_run_reference_run_id"), "run", ["reference_run_id"], unique=False)
    op.create_index(
        "uq_run_current",
        "run",
        ["arm", "seed"],
        unique=True,
        sqlite_where=sa.text("is_current"),
        postgresql_where=sa.text("is_current"),
    )
    op.create_table(
        "artifact",
        *_of_run("artifact"),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False, comment="relative to the project's root"),
        sa.Column("sha256", SHA256, nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False, comment="bytes"),
        sa.Column(
            "parent_sha256",
            SHA256,
            nullable=True,
            comment="content, not row: the parent may belong to the base run or stand outside",
        ),
        _check(
            "artifact",
            "kind",
            "kind IN ('adapter', 'merged_gguf', 'adapter_gguf', 'base_gguf', 'modelfile', 'base_model', 'dataset')",
        ),
        _count("artifact", "bytes"),
        _check("artifact", "parent_sha256", "length(parent_sha256) = 64"),
        _check("artifact", "sha256", "length(sha256) = 64"),
        sa.UniqueConstraint("run_id", "stage", "path", name=op.f("uq_artifact_run_id_stage_path")),
    )
    op.create_index(op.f("ix_artifact_sha256"), "artifact", ["sha256"], unique=False)
    op.create_table(
        "metric",
        *_of_run("metric"),
        sa.Column("name", sa.Text(), nullable=False, comment="see metric_def"),
        sa.Column(
            "split",
            sa.Text(),
            nullable=False,
            comment="test, retention, parity; train and eval for training curves",
        ),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="optimizer step; -1: final value of the run"),
        sa.Column("value", sa.Double(), nullable=True, comment="NULL unless value_kind is finite"),
        sa.Column(
            "value_kind",
            sa.Text(),
            nullable=False,
            comment="finite, nan, inf, -inf: SQLite would turn NaN into NULL",
        ),
        sa.Column("n", sa.BigInteger(), nullable=True, comment="items behind the number"),
        _check("metric", "named", "name <> '' AND split <> ''"),
        _count("metric", "n"),
        _check("metric", "step", f"step BETWEEN -1 AND {LARGEST_INT}"),
        *_typed_value("metric"),
        sa.UniqueConstraint("run_id", "name", "split", "step", name=op.f("uq_metric_run_id_name_split_step")),
    )
    op.create_table(
        "probe",
        *_of_run("probe"),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("layer", sa.Text(), nullable=False, comment="'': the whole model"),
        sa.Column("step", sa.BigInteger(), nullable=False, comment="optimizer step; -1: over the whole run"),
        sa.Column("value", sa.Double(), nullable=True, comment="NULL unless value_kind is finite"),
        sa.Column("value_kind", sa.Text(), nullable=False),
        sa.Column("threshold", sa.Double(), nullable=True, comment="the value it was judged against"),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("diagnosis", sa.Text(), nullable=False, comment="in words: what this reading means"),
        _check("probe", "named", "name <> ''"),
        _check("probe", "verdict", "verdict IN ('pass', 'fail', 'inconclusive', 'skipped')"),
        _check("probe", "step", f"step BETWEEN -1 AND {LARGEST_INT}"),
        *_typed_value("probe"),
        sa.UniqueConstraint("run_id", "name", "layer", "step", name=op.f("uq_probe_run_id_name_layer_step")),
    )
    op.create_table(
        "sample",
        *_of_run("sample"),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("truth", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False, comment="the model's text, unshortened"),
        sa.Column("predicted", sa.Double(), nullable=True, comment="number read from the answer; NULL: none found"),
        sa.Column("correct", sa.Boolean(create_constraint=True, name="correct_flag"), nullable=False),
        sa.Column("abs_error", sa.Double(), nullable=True, comment="|predicted - truth|; NULL: not a number task"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("answer_tokens", sa.BigInteger(), nullable=True),
        _check("sample", "named", "item_id <> '' AND split <> '' AND task <> ''"),
        _check("sample", "abs_error_finite", "abs_error BETWEEN 0 AND 1.7976931348623157e308"),
        _count("sample", "answer_tokens"),
        _check(
            "sample",
            "predicted_finite",
            "predicted BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308",
        ),
        _count("sample", "prompt_tokens"),
        sa.UniqueConstraint("run_id", "split", "item_id", name=op.f("uq_sample_run_id_split_item_id")),
    )
    op.create_table(
        "speed",
        *_of_run("speed"),
        sa.Column(
            "arm",
            sa.Text(),
            nullable=False,
            comment="the run's own arm, or base: machines drift, so deltas stay here",
        ),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("repetition", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=True, comment="tokens; NULL: not measured"),
        sa.Column("nanoseconds", sa.BigInteger(), nullable=True, comment="ns; NULL: not measured"),
        _check("speed", "named", "arm <> ''"),
        _check("speed", "phase", "phase IN ('load', 'prefill', 'decode')"),
        _count("speed", "nanoseconds"),
        _count("speed", "repetition"),
        _count("speed", "tokens"),
        sa.UniqueConstraint("run_id", "arm", "phase", "repetition", name=op.f("uq_speed_run_id_arm_phase_repetition")),
    )

    for statement in views_0001.statements(op.get_bind().dialect.name):
        op.execute(statement)


def downgrade() -> None:
    """Drop everything."""
    for view in views_0001.NAMES:
        op.execute(f"DROP VIEW {view}")
    for table in ("speed", "sample", "probe", "metric", "artifact", "run", "metric_def", "environment"):
        op.drop_table(table)
