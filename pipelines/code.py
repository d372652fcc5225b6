"""One hash of all the code that a module can reach, so that DVC reruns a stage exactly when its code changes.

The code of a module is its import closure within the project, including imports inside functions, read from the source
without running it. Comments, docstrings and layout do not affect the hash. A package's `__init__` counts only for names
that it defines: `from probes import judge` leads to probes/verdict.py alone. A string that is a module's name counts as
an import of it ("-m", "pipelines.train"), and an f-string such as f"evaluation.tasks.{name}" as an import of all the
modules there, unless `plugins` names the ones in use. grimp sees neither kind of string and follows every `__init__`:
with it, a change of probes/verdict.py would retrain every arm.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from db.files import write_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipelines", "evaluation", "export", "trainers", "db", "grit", "grit_vlm", "probes")
INSTALLED = Path(".installed_code")
"""In a project without the code: a hash of the installed one, which DVC watches."""
DISTRIBUTION = "grit-pipeline"
Plugins = Mapping[str, Sequence[str]]


def code_hash(*modules: str, plugins: Plugins | None = None) -> str:
    """Hash of the code that the modules can reach; plugins: package → its modules in use."""
    digest = hashlib.sha256()
    files = closure(*modules, plugins=plugins)
    beside = {f for folder in {file.parent for file in files} for f in folder.iterdir() if f.is_file()}
    for file in sorted({*files, *(f for f in beside if f.suffix not in (".py", ".pyc"))}):
        content = _meaning(file.read_text(encoding="utf-8")) if file.suffix == ".py" else file.read_bytes()
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def note_installed_code() -> None:
    """Write INSTALLED in a project that `grit-lora init` made."""
    if not Path("pipelines").is_dir() and (record := metadata.distribution(DISTRIBUTION).read_text("RECORD")):
        write_text(INSTALLED, hashlib.sha256(record.encode()).hexdigest() + "\n")


def closure(*modules: str, plugins: Plugins | None = None) -> set[Path]:
    """The source files of the modules and of everything that they import."""
    files: set[Path] = set()
    seen, waiting = set[str](), set(modules)
    while waiting:
        seen.add(module := waiting.pop())
        file = file_of(module)
        if file is not None and file not in files:
            files.add(file)
            waiting.update(set(imports(file, plugins or {})) - seen)
    return files


def file_of(module: str) -> Path | None:
    """The source file of a module; None if it is not one of this project."""
    if module.partition(".")[0] not in PACKAGES:  # an installed project has others beside it
        return None
    stem = ROOT.joinpath(*module.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def imports(file: Path, plugins: Plugins) -> Iterator[str]:
    """The modules, including those of other packages, that a source file may import."""
    for node in _importing(file.read_text(encoding="utf-8")):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (_home(module, alias.name) for alias in names)
            case ast.JoinedStr(values=[ast.FormattedValue(value=ast.Name(id="__name__")), ast.Constant(value="."), *_]):
                yield from _plugins(".".join(file.relative_to(ROOT).parent.parts), plugins)
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]) if text.endswith("."):
                yield from _plugins(text[:-1], plugins)
            case ast.Constant(value=str(text)):
                yield text


def _plugins(package: str, plugins: Plugins) -> list[str]:
    """The modules of a package that may be imported by a computed name."""
    folder = ROOT.joinpath(*package.split("."))
    names = [file.stem for file in sorted(folder.glob("*.py"))] if package.replace(".", "").isidentifier() else []
    return [f"{package}.{name}" for name in (plugins.get(package, names) if names else ())]


def _home(module: str, name: str) -> str:
    """The module that `from module import name` leads to."""
    if file_of(f"{module}.{name}"):
        return f"{module}.{name}"
    file = file_of(module)
    inside = _parsed(file.read_text(encoding="utf-8")) if file is not None and file.name == "__init__.py" else None
    for node in ast.walk(inside) if inside else ():
        match node:
            case ast.ImportFrom(module=str(source), names=names, level=0):
                if original := next((alias.name for alias in names if (alias.asname or alias.name) == name), None):
                    return _home(source, original)
            case ast.Dict(keys=keys, values=values):  # of a lazy __getattr__: name → module, or module → names
                for key, value in zip(keys, values, strict=True):
                    match key, value:
                        case ast.Constant(value=str(one)), ast.Constant(value=str(other)):
                            for source, exports in ((one, other), (other, one)):
                                if name in exports.split() and file_of(source):
                                    return _home(source, name)
    return module


@cache
def _importing(source: str) -> list[ast.AST]:
    """The nodes that may be imports: import statements, f-strings, strings like a module's name."""

    def may(node: ast.AST) -> bool:
        match node:
            case ast.Constant(value=str(text)):
                return "." in text and text.replace(".", "").isidentifier()
            case _:
                return isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr)

    return list(filter(may, ast.walk(_parsed(source))))


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


@cache
def _meaning(source: str) -> bytes:
    """Source without comments, docstrings and layout."""
    return ast.unparse(_WithoutDocstrings().visit(ast.parse(source))).encode()
