"""Which results were made from files that have been replaced since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from db.records import RunRecord

BaseFiles = Mapping[str, Mapping[str, tuple[str, str]]]
"""Stage of an arm -> path of a file of the base that it used -> (who made it, sha256 of it as it is now)."""


def stale_stages(stages: Mapping[str, RunRecord], of_base: BaseFiles) -> Iterator[tuple[str, str]]:
    """Name the stages that used another file than the one that now lies in the earlier stage's folder, and how.

    Args:
        stages: Of one arm with one seed.
        of_base: The base's files that stages of an arm use, as they are now.
    """
    made = {
        artifact.path: (stage, artifact.sha256) for stage, record in stages.items() for artifact in record.artifacts
    }
    for stage, record in stages.items():
        known = {**made, **of_base.get(stage, {})}
        for path, sha256 in record.inputs.items():
            maker, now = known.get(path, (stage, sha256))
            if maker != stage and now != sha256:
                yield stage, f"its stage {stage} used an older {path} than {maker} made; run `dvc repro`"
                break
