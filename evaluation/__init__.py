"""Tasks, inference backends, scoring, statistics and the comparison of all arms."""

from collections.abc import Sequence

import db as db  # its error explains how to set the environment up


class EvaluationError(ValueError):
    """Data, a task, a model's states or a benchmark that cannot be used; `problems` lists everything that is wrong."""

    def __init__(self, problems: str | Sequence[str], heading: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n  - ".join([heading, *self.problems] if heading else self.problems))
