"""One file per arm. To add one, put a file with `ARM = Arm(...)` here and an entry into params.yaml.

`ARM.settings` is the class of the arm's settings: section `train` plus the arm's own sections, if any. Heavy packages
load in the hooks, so that params.yaml is checked without them.
"""

import importlib
from pathlib import Path
from typing import Any

from trainers import BASELINE


def names() -> list[str]:
    """Every arm with its own code, the baseline first."""
    stems = (file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))
    return sorted(stems, key=lambda name: (name != BASELINE, name))


def load(name: str) -> Any:
    """The `trainers.run.Arm` of that name; KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"trainers.arms.{name}").ARM
