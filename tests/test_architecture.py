"""The house: imports run downward only, in no circle, and take no private names; lazy imports count."""

import ast
from graphlib import TopologicalSorter

import pytest

from pipelines.code import ROOT, imports

FLOORS = {"grit": 1, "probes": 1, "db": 1, "grit_vlm": 2, "trainers": 3, "export": 4, "evaluation": 5, "pipelines": 6}
FILES = sorted(file for package in FLOORS for file in (ROOT / package).rglob("*.py"))
# Loaded by name and made of what the package defines, or only named.
PLUGINS = {"evaluation.tasks": (), "trainers.arms": (), "pipelines": ()}


def module(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


IMPORTED = {module(file): set(imports(file, PLUGINS)) - {module(file)} for file in FILES}
GRAPH = {name: found & IMPORTED.keys() for name, found in IMPORTED.items()}
GRAPH["evaluation.tasks"] -= {"evaluation.tasks.general"}  # by name, as every task


@pytest.mark.parametrize("name", GRAPH)
def test_imports_run_downward(name):
    own = name.split(".")[0]
    above = {
        found for found in GRAPH[name] if FLOORS[found.split(".")[0]] >= FLOORS[own] and found.split(".")[0] != own
    }
    assert not above


def test_there_is_no_circle():
    TopologicalSorter(GRAPH).prepare()  # the error names one


@pytest.mark.parametrize("file", FILES, ids=module)
def test_no_private_name_and_no_import_for_types_alone(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.ImportFrom(module=str(source), names=names) if source.split(".")[0] in FLOORS:
                private = [alias.name for alias in names if alias.name.startswith("_")]
                assert not private and not any(part.startswith("_") for part in source.split(".")), source
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                inside = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                sources = [getattr(n, "module", None) or n.names[0].name for n in inside]
                assert not [source for source in sources if source.split(".")[0] in FLOORS]
