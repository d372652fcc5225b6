"""One file an arm. A new one is a file here with an `ARM = Arm(...)`, and its entry in params.yaml.

`ARM.settings` is the class of what the arm can set: section `train` and, if it has any, sections of its own. Heavy
packages load in the hooks, so that params.yaml is checked without them.
"""

import importlib
from pathlib import Path
from typing import Any

from trainers import BASELINE


def names() -> list[str]:
    """Every arm that has code of its own, the baseline first."""
    found = (file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))
    return sorted(found, key=lambda name: (name != BASELINE, name))


def load(name: str) -> Any:
    """The `trainers.run.Arm` of that name; KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"trainers.arms.{name}").ARM
