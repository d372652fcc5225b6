"""The results of a finished pipeline run, without clocks and hosts, to compare two versions of the code.

`python -m tests.witness FOLDER > before.json`; after a change: `python -m tests.witness FOLDER --against before.json`.
Adapters are compared to the bit, so run both versions with the same number of threads on the same machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = ("adapters", "verdicts", "gguf", "verified", "quantized", "measured", "scores")
# Clocks, machines and commits; names that contain a hash follow from the content.
CHANGING = re.compile(
    r"seconds|runtime|per_second|nanoseconds|speed|started|ended|timestamp|memory|commit|dirty|provenance|environment"
    r"|version|run_key|criteria|notes|load_duration|sha256|host|path|loads\b|phases|evaluated|target_modules"
)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a JSON value with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from flat(inner, f"{name}[{position}]")
    else:
        yield name, str(value) if isinstance(value, float) and not math.isfinite(value) else value


def digest(content: bytes) -> str:
    """The first digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def parsed(file: Path) -> Any:
    """The content of a JSON or JSON lines file."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def collect(folder: Path) -> dict[str, Any]:
    """File and field -> value; long files and weights as hashes."""
    values: dict[str, Any] = {}
    whole = ("data/*.jsonl", "models/base/*.safetensors", "texts/*.jsonl")
    for file in sorted(file for pattern in whole for file in folder.glob(pattern)):
        values[str(file.relative_to(folder))] = digest(file.read_bytes())
    for top in FOLDERS:
        for file in sorted((folder / top).rglob("*")):
            name = str(file.relative_to(folder))
            if file.suffix in (".safetensors", ".gguf"):
                values[name] = digest(file.read_bytes())
            elif file.suffix == ".json" and "tokenizer" not in file.name and file.name != "run.json":
                values |= {f"{name}:{key}": value for key, value in flat(parsed(file)) if not CHANGING.search(key)}
            elif file.name in ("samples.jsonl", "probe_ledger.jsonl", "grit_log.jsonl", "quantized_samples.jsonl"):
                lines = [{key: v for key, v in flat(row) if not CHANGING.search(key)} for row in parsed(file)]
                values |= {
                    f"{name}:{at}": digest(json.dumps(row, sort_keys=True).encode()) for at, row in enumerate(lines)
                }
    command = [sys.executable, "-m", "evaluation.compare_all", "--format", "json"]
    comparison = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
    return values | {f"compare:{key}": value for key, value in flat(comparison) if not CHANGING.search(key)}


def main() -> int:
    """Print the results of a run, or how they differ from another run's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    values = collect(options.folder)
    if options.against is None:
        print(json.dumps(values, indent=0, ensure_ascii=False))
        return 0
    before = json.loads(options.against.read_text(encoding="utf-8"))
    differing = [name for name in sorted(before.keys() | values.keys()) if before.get(name) != values.get(name)]
    for name in differing:
        print(f"{name}: {before.get(name, 'missing')!r} -> {values.get(name, 'missing')!r}")
    print(f"{len(differing)} of {len(before)} values differ", file=sys.stderr)
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
