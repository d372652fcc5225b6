"""Precisions and verification of what is served; time to first token; how an evaluation ran the adapter.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from db.migrations import views_0001, views_0002

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Copies of what db.models says today: this file must keep meaning the same when db.models changes.
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SHA256 = sa.String(length=64)
LARGEST_INT = 9223372036854775807
OLD_PHASES = "phase IN ('load', 'prefill', 'decode')"
NEW_PHASES = "phase IN ('load', 'ttft', 'prefill', 'decode')"


def _check(table: str, name: str, rule: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(rule, name=op.f(f"ck_{table}_{name}"))


def _count(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_count", f"{column} BETWEEN 0 AND {LARGEST_INT}")


def _share(table: str, column: str) -> sa.CheckConstraint:
    return _check(table, f"{column}_share", f"{column} BETWEEN 0 AND 1")


def _of_run(table: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", KEY, nullable=False),
        sa.Column("run_id", KEY, nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f(f"fk_{table}_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
    ]


def upgrade() -> None:
    """Add three tables, a phase and a column; no row is lost."""
    _drop_views(views_0001.NAMES)  # SQLite changes a rule by copying the table, which a view would not survive
    _change_phases(OLD_PHASES, NEW_PHASES)
    # Not in batch mode: copying `run` would empty its children on SQLite.
    op.execute(
        "ALTER TABLE run ADD COLUMN serving_mode TEXT DEFAULT 'merged' NOT NULL "
        "CONSTRAINT ck_run_serving_mode CHECK (serving_mode IN ('merged', 'adapter'))"
    )
    op.execute("UPDATE run SET serving_mode = 'adapter' WHERE backend_name = 'hf' AND arm <> 'base'")
    if op.get_bind().dialect.name == "postgresql":
        comment = "how the evaluation ran an adapter: merged into the model, or beside it"
        op.alter_column("run", "serving_mode", existing_type=sa.Text(), existing_nullable=False, comment=comment)
    _create_tables()
    for statement in (*views_0001.statements(op.get_bind().dialect.name), *views_0002.STATEMENTS):
        op.execute(statement)


def _create_tables() -> None:
    op.create_table(
        "quantization",
        *_of_run("quantization"),
        sa.Column("type", sa.Text(), nullable=False, comment="llama.cpp's name: f16, bf16, q8_0, q4_K_M, …"),
        sa.Column("bytes", sa.BigInteger(), nullable=False, comment="of the whole file, bytes"),
        sa.Column("bits_per_weight", sa.Double(), nullable=False, comment="of the tensors alone, bits"),
        sa.Column(
            "tensor_types", sa.JSON(), nullable=False, comment="type of a tensor to number of tensors, read back"
        ),
        sa.Column(
            "category_accuracy", sa.Double(), nullable=False, comment="share of the test items answered correctly"
        ),
        sa.Column("correct", sa.BigInteger(), nullable=False, comment="test items answered correctly"),
        sa.Column("n", sa.BigInteger(), nullable=False, comment="test items"),
        sa.Column(
            "answers_equal_to_f16",
            sa.Double(),
            nullable=False,
            comment="share of the test items answered with the same text",
        ),
        sa.Column(
            "fallbacks",
            sa.BigInteger(),
            nullable=False,
            comment="tensors in another format than asked for, since their rows are no multiple of its block",
        ),
        _check("quantization", "named", "type <> ''"),
        _check("quantization", "bits_per_weight", "bits_per_weight > 0 AND bits_per_weight <= 64"),
        _check("quantization", "correct_of_n", "correct <= n"),
        _check("quantization", "f16_equals_itself", "type <> 'f16' OR answers_equal_to_f16 = 1"),
        *(_count("quantization", column) for column in ("bytes", "correct", "n", "fallbacks")),
        *(_share("quantization", column) for column in ("category_accuracy", "answers_equal_to_f16")),
        sa.UniqueConstraint("run_id", "type", name=op.f("uq_quantization_run_id_type")),
    )
    op.create_table(
        "quantized_sample",
        *_of_run("quantized_sample"),
        sa.Column("type", sa.Text(), nullable=False, comment="as in quantization"),
        sa.Column("item_id", sa.Text(), nullable=False),
        sa.Column("correct", sa.Boolean(create_constraint=True, name="correct_flag"), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False, comment="the model's text, unshortened"),
        _check("quantized_sample", "named", "type <> '' AND item_id <> ''"),
        sa.UniqueConstraint("run_id", "type", "item_id", name=op.f("uq_quantized_sample_run_id_type_item_id")),
    )
    op.create_table(
        "verification",
        *_of_run("verification"),
        sa.Column("backend", sa.Text(), nullable=False, comment="llama_cpp or ollama"),
        sa.Column("backend_version", sa.Text(), nullable=False),
        sa.Column("mode", sa.Text(), nullable=False, comment="merged GGUF, or base with GGUF adapter"),
        sa.Column("prompts", sa.BigInteger(), nullable=False, comment="0: this backend does not support the mode"),
        sa.Column(
            "rendered",
            sa.Double(),
            nullable=True,
            comment="share of the prompts rendered as in training; NULL with prompts: the server does not tell",
        ),
        sa.Column(
            "counted",
            sa.Double(),
            nullable=True,
            comment="share read as the tokens that training had; NULL with prompts: the server does not tell",
        ),
        sa.Column("answered", sa.Double(), nullable=True, comment="share answered greedily as by Hugging Face"),
        sa.Column(
            "equal_to_merged",
            sa.Double(),
            nullable=True,
            comment="share answered as in mode merged; NULL: not compared",
        ),
        sa.Column(
            "perturbed_noticed",
            sa.Boolean(create_constraint=True, name="perturbed_noticed_flag"),
            nullable=True,
            comment="another adapter scale changed an answer; NULL: not tried",
        ),
        sa.Column("first_difference", sa.Text(), nullable=True, comment="where and why the first prompt differs"),
        sa.Column("gguf_sha256", SHA256, nullable=False, comment="of the exported model or base"),
        sa.Column("adapter_sha256", SHA256, nullable=True, comment="of the exported adapter"),
        sa.Column("server_digest", sa.Text(), nullable=True, comment="the server's digest of the model"),
        sa.Column("stored_sha256", sa.Text(), nullable=True, comment="of the weights as the server keeps them"),
        _check("verification", "named", "backend <> '' AND backend_version <> ''"),
        _check("verification", "mode", "mode IN ('merged', 'adapter')"),
        _check(
            "verification",
            "asked_or_unsupported",
            "(prompts > 0) = (answered IS NOT NULL) AND (prompts > 0 OR (rendered IS NULL AND counted IS NULL))",
        ),
        _check("verification", "gguf_sha256", "length(gguf_sha256) = 64"),
        _check("verification", "adapter_sha256", "length(adapter_sha256) = 64"),
        _count("verification", "prompts"),
        *(_share("verification", column) for column in ("rendered", "counted", "answered", "equal_to_merged")),
        sa.UniqueConstraint("run_id", "backend", "mode", name=op.f("uq_verification_run_id_backend_mode")),
    )


def downgrade() -> None:
    """Back to 0001; precisions, verifications and times to first token go."""
    _drop_views((*views_0002.NAMES, *views_0001.NAMES))
    for table in ("verification", "quantized_sample", "quantization"):
        op.drop_table(table)
    op.execute("ALTER TABLE run DROP COLUMN serving_mode")
    op.execute("DELETE FROM speed WHERE phase = 'ttft'")
    _change_phases(NEW_PHASES, OLD_PHASES)
    for statement in views_0001.statements(op.get_bind().dialect.name):
        op.execute(statement)


def _drop_views(names: tuple[str, ...]) -> None:
    for view in names:
        op.execute(f"DROP VIEW {view}")


def _change_phases(old: str, new: str) -> None:
    """Change which phases `speed` takes; on SQLite by a copy, for which the table is spelled out."""
    speed = sa.Table(
        "speed",
        sa.MetaData(),
        *_of_run("speed"),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("repetition", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=True),
        sa.Column("nanoseconds", sa.BigInteger(), nullable=True),
        _check("speed", "named", "arm <> ''"),
        _check("speed", "phase", old),
        *(_count("speed", column) for column in ("nanoseconds", "repetition", "tokens")),
        sa.UniqueConstraint("run_id", "arm", "phase", "repetition", name=op.f("uq_speed_run_id_arm_phase_repetition")),
    )
    with op.batch_alter_table("speed", copy_from=speed) as batch:
        batch.drop_constraint(op.f("ck_speed_phase"), type_="check")
        batch.create_check_constraint(op.f("ck_speed_phase"), new)
