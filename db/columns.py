"""What the tables are built from: the declarative base, column types, and rules used more than once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedColumn, mapped_column

FINAL_STEP = -1
"""The `step` of a metric that belongs to the finished run and not to a moment of training."""

LARGEST_INT = 2**63 - 1
SHA256 = String(64)


def count_rule(column: str) -> CheckConstraint:
    """A whole number from 0 up. BETWEEN also refuses text, which SQLite sorts above every number."""
    return CheckConstraint(f"{column} BETWEEN 0 AND {LARGEST_INT}", name=f"{column}_count")


def share_rule(column: str) -> CheckConstraint:
    """A number from 0 to 1."""
    return CheckConstraint(f"{column} BETWEEN 0 AND 1", name=f"{column}_share")


def typed_value_rules() -> tuple[CheckConstraint, ...]:
    """Rules of the pair `value`, `value_kind`."""
    return (
        CheckConstraint("value_kind IN ('finite', 'nan', 'inf', '-inf')", name="value_kind"),
        CheckConstraint("(value_kind = 'finite') = (value IS NOT NULL)", name="value_typed"),
        CheckConstraint("value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308", name="value_finite"),
    )


def flag(name: str) -> Boolean:
    """A truth value; SQLite has no such type, so a rule keeps it at 0 and 1."""
    return Boolean(create_constraint=True, name=f"{name}_flag")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment with a time zone, stored in UTC; SQLite forgets zones, so UTC is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC; a time without a zone is refused."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"expected a time with a time zone, came {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Common metadata; named constraints, so that later migrations can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012  SQLAlchemy reads this as a plain class attribute
        str: Text,
        int: BigInteger,
        float: Double,
        datetime: UtcDateTime,
        dict[str, Any]: JSON(none_as_null=True),
    }


def primary_key() -> MappedColumn[int]:
    """A 64-bit key; on SQLite it must be called INTEGER to be the row's own id."""
    return mapped_column(BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, sort_order=-10)


class OfRun:
    """Rows that belong to a run and go with it."""

    id: Mapped[int] = primary_key()
    run_id: Mapped[int] = mapped_column(ForeignKey("run.id", ondelete="CASCADE"), sort_order=-9)
