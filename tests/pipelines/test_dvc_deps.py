"""Every module of this project that a stage imports is a dependency of that stage, or cannot change its result."""

from __future__ import annotations

import ast
import posixpath
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.schema import Params
from pipelines.schema_vision import VisionParams

ROOT = Path(__file__).resolve().parents[2]
ARMS = {"": Params.registry, "vlm": VisionParams.registry}
"""Pipeline, by its folder → its arms."""


def read_stages() -> dict[str, dict[str, Any]]:
    """Stages by `folder/name`, their dependencies as paths from the project's folder."""
    found = {}
    for folder in ARMS:
        content = yaml.safe_load((ROOT / folder / "dvc.yaml").read_text(encoding="utf-8"))
        for name, stage in content["stages"].items():
            deps = [posixpath.normpath(posixpath.join(folder, str(dep))) for dep in stage["deps"]]
            found[posixpath.join(folder, name)] = {**stage, "deps": deps}
    return found


STAGES = read_stages()

_PARAMS = "reads and checks params.yaml: check_params depends on it, and a stage on the params that it names"
_BOOKS = "keeps books (paths, folders, run.json, errors in words); what is in the results comes from other modules"
_SHOWS = "shows results, and makes none"
NO_RESULT = {
    "pipelines/config.py": _PARAMS,
    "pipelines/schema.py": _PARAMS,
    "pipelines/schema_common.py": _PARAMS,
    "pipelines/schema_data.py": _PARAMS,
    "pipelines/schema_vision.py": _PARAMS,
    "trainers/settings.py": _PARAMS,
    "trainers/__init__.py": "names of the arms; what they build on is in outputs/code",
    "pipelines/attempts.py": _BOOKS,
    "pipelines/outputs.py": _BOOKS,
    "pipelines/runinfo.py": _BOOKS,
    "pipelines/stage.py": _BOOKS,
    "export/errors.py": _BOOKS,
    "export/files.py": "hashes a file: sha256 has one right answer",
    "export/processes.py": "whether a process runs: decides what is cleaned up",
    "export/ollama_cli.py": _SHOWS,
    "export/verify_table.py": _SHOWS,
    "grit/__init__.py": "names what other modules of the package hold; those are followed",
    "grit_vlm/__init__.py": "names what other modules of the package hold; those are followed",
    "probes/__init__.py": "names what other modules of the package hold; those are followed",
}
"""Modules that no result depends on, with the reason; what they import is not followed."""
CALLED_ONLY_IN = {
    # The others read in base.json what stage prepare_base made of the chat template (pipelines.prompt).
    "export/chat.py": ("prepare_base", "vlm/prepare_base"),
    # probes.readings needs it where there is GRIT: train's dependency on that is outputs/code.
    "grit/factors.py": ("probe", "vlm/probe"),
    # The pipelines share modules of stages; what they do with pictures, or with what is exported, is in these.
    "pipelines/exported_models.py": ("evaluate", "evaluate_base"),
    "pipelines/vision_data.py": ("vlm/prepare_data",),
    "pipelines/vision_base.py": ("vlm/prepare_base",),
    "pipelines/vision_models.py": ("vlm/evaluate", "vlm/evaluate_base"),
}
"""Modules that come along with another one, and the stages that call them."""


def file_of(module: str, root: Path = ROOT) -> str | None:
    """A module's file; None for one that is not this project's."""
    place = root.joinpath(*module.split("."))
    found = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file()), None)
    return found.relative_to(root).as_posix() if found else None


def statements(tree: ast.AST, *, types: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports at any depth; those for type checkers alone only where asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types:
            continue
        else:
            yield from statements(node, types=types)


@cache
def imports(file: str, root: Path = ROOT) -> set[str]:
    """Files of this project that a file imports; a name that a package only passes on counts as its home module."""
    found: set[str] = set()
    for node in statements(ast.parse((root / file).read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: expected absolute imports"
        names = [alias.name for alias in node.names]
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        for module in modules:
            parts = module.split(".")
            found |= {f for n in range(1, len(parts) + 1) if (f := file_of(".".join(parts[:n]), root))}
        if isinstance(node, ast.ImportFrom):
            found |= {f for name in names if (f := home(node.module or "", name, root))}
    return found


def home(package: str, name: str, root: Path = ROOT) -> str | None:
    """Where `from package import name` finds the name, if not in the package's own file."""
    if submodule := file_of(f"{package}.{name}", root):
        return submodule
    file = file_of(package, root)
    if file is None or not file.endswith("__init__.py"):
        return None
    for node in statements(ast.parse((root / file).read_text(encoding="utf-8")), types=True):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return file_of(node.module or "", root)
    return None


def empty(file: str, root: Path = ROOT) -> bool:
    """Whether a module holds nothing but its docstring."""
    body = ast.parse((root / file).read_text(encoding="utf-8")).body
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def closure(files: set[str], root: Path = ROOT, allowed: dict[str, str] = NO_RESULT) -> set[str]:
    """The files, and all that they import over any number of steps; allowed ones count for nothing."""
    seen: set[str] = set()
    left = set(files)
    while left:
        file = left.pop()
        if file in seen or file in allowed or empty(file, root):
            continue
        seen.add(file)
        left |= imports(file, root)
    return seen


def covered(file: str, deps: list[str]) -> bool:
    return any(file == dep or file.startswith(f"{dep}/") for dep in deps)


def pipeline(stage: str) -> str:
    """The folder of a stage's pipeline."""
    return posixpath.dirname(stage)


def cases() -> list[tuple[str, str]]:
    """(stage, arm); the arm is empty where the stage has no matrix."""
    return [
        (name, arm)
        for name, stage in STAGES.items()
        for arm in (ARMS[pipeline(name)].arms if "matrix" in stage else [""])
    ]


def module_of(stage: str) -> str:
    """The file of the module that a stage runs."""
    words = STAGES[stage]["cmd"].split()
    if pipeline(stage):
        assert words.pop(0) == "PYTHONPATH=..", "the code of this working copy, also where another one is installed"
    assert words[:2] == ["python", "-m"] and words[2].startswith("pipelines.")
    found = file_of(words[2])
    assert found
    return found


@pytest.mark.parametrize(("name", "arm"), cases())
def test_a_stage_depends_on_all_code_that_makes_its_result(name: str, arm: str) -> None:
    stage = STAGES[name]
    deps = list(stage["deps"])
    files = {module_of(name)}
    if posixpath.join(pipeline(name), "outputs/code/${item.arm}") in deps:  # the hash of pipelines.config.arm_code
        registry = ARMS[pipeline(name)]
        module = file_of(registry.arms[arm])
        assert module
        deps += [module, *registry.builds_on.get(arm, ())]
        files.add(module)
    aside = {file: "" for file, stages in CALLED_ONLY_IN.items() if name not in stages}
    missing = sorted(f for f in closure(files, allowed=NO_RESULT | aside) if not covered(f, deps))
    assert not missing, f"dvc.yaml, stage {name}: expected these among deps, or in NO_RESULT with a reason: {missing}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_no_code_that_it_does_not_import(name: str) -> None:
    """Such a dependency reruns the stage for nothing."""
    stage = STAGES[name]
    used = closure({module_of(name)}, allowed={})
    code = [dep for dep in stage["deps"] if dep.split("/")[0] in PACKAGES]
    assert not [dep for dep in code if not any(covered(file, [dep]) for file in used)]


PACKAGES = ("pipelines", "trainers", "grit", "grit_vlm", "probes", "export", "evaluation", "db")


def test_the_training_stages_stay_when_reports_and_servers_change() -> None:
    names = [posixpath.join(folder, s) for folder in ARMS for s in ("prepare_data", "prepare_base", "train", "probe")]
    for name in names:
        deps = STAGES[name]["deps"]
        for file in (
            "evaluation/report.py",
            "evaluation/serving.py",
            "export/ollama.py",
            "export/verify.py",
            "db/rows.py",
        ):
            assert not covered(file, deps), f"{name} reruns when {file} changes"


@pytest.mark.parametrize("name", [name for name in STAGES if pipeline(name) == "vlm"])
def test_a_stage_depends_on_the_pictures_of_its_own_items_alone(name: str) -> None:
    files = [posixpath.basename(dep) for dep in STAGES[name]["deps"] if posixpath.dirname(dep) == "vlm/data"]
    splits = {file.removesuffix(".jsonl") for file in files if file.endswith(".jsonl")}
    pictures = {file.split(".")[1] for file in files if file.startswith("images.")}
    assert pictures == splits
    assert not ({"train", "valid"} & splits and {"test", "retention"} & splits)


def test_an_allowed_module_is_one_that_exists_and_is_used() -> None:
    used = closure({module_of(name) for name in STAGES}, allowed={})
    assert {*NO_RESULT, *CALLED_ONLY_IN} <= used


def test_imports_are_found_where_they_hide(tmp_path: Path) -> None:
    files = {
        "pipelines/stage_a.py": "import os\ndef f():\n    if os.name:\n        from pack import lazy, Name\n",
        "pack/__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from pack.home import Name\n    from pack.other import Other\n",
        "pack/lazy.py": "import deep.inner.leaf as leaf\n",
        "pack/home.py": "x = 1\n",
        "pack/other.py": "x = 1\n",
        "deep/__init__.py": '"""Only words."""\n',
        "deep/inner/__init__.py": "y = 1\n",
        "deep/inner/leaf.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.other\n",
        "pipelines/unused.py": "z = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = closure({"pipelines/stage_a.py"}, tmp_path, allowed={"pack/home.py": "a reason"})
    assert found == {
        "pipelines/stage_a.py", "pack/__init__.py", "pack/lazy.py", "deep/inner/__init__.py", "deep/inner/leaf.py"
    }  # fmt: skip
    assert not covered("grit/eigen.py", ["grit/eig", "gri"]) and covered("grit/eigen.py", ["grit"])
