"""What is needed of a resource at the worst moment, and whether this machine has it."""

from collections import defaultdict
from dataclasses import dataclass

from pipelines.planning.needs import Row

MARGIN = 1.2
"""Of what is free over what is planned, from which it is sure to fit: measured peaks were up to 1.15 times those that
were planned (benchmarks/plan.py)."""


@dataclass(frozen=True)
class Verdict:
    """What is needed of one resource, and what is there.

    Attributes:
        resource: RAM, GPU memory, disk or HF_HOME's disk.
        needed: Bytes at the worst moment.
        stage: When that is.
        free: Bytes that this machine has; None where it has no such thing.
        device: Name of what has them, where there may be several: of the GPU.
    """

    resource: str
    needed: int
    stage: str
    free: int | None
    device: str | None = None

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.free is not None and self.needed <= self.free

    @property
    def barely(self) -> bool:
        """Whether there is enough only if the plan is not too low, see `MARGIN`."""
        return self.free is not None and self.needed <= self.free < self.needed * MARGIN


def needed_by(resource: str, rows: list[Row]) -> dict[str, int]:
    """Stage → bytes of a resource that it needs for itself."""
    by_stage: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.resource == resource and not row.kept:
            by_stage[row.stage] += row.bytes
    return by_stage


def verdict_on(resource: str, rows: list[Row], free: int | None, device: str | None = None) -> Verdict:
    """Stages run one after the other: memory is that of the largest, disk what stays and the largest of the rest."""
    by_stage = needed_by(resource, rows)
    stage, most = max(by_stage.items(), key=lambda item: item[1], default=("", 0))
    kept = sum(row.bytes for row in rows if row.resource == resource and row.kept)
    return Verdict(resource, most + kept, stage, free, device)
