"""The Makefile's own decisions, its tools replaced by ones that say how they were called."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(folder):
    """Names of the benchmarks that `make bench` runs, and what it says."""
    done = subprocess.run(
        ["make", "bench"], cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True
    )
    words = [line.split() for line in done.stdout.splitlines()]
    return [line[1].removeprefix("benchmarks.") for line in words if line[:1] == ["-m"]], done.stdout


def test_benchmarks_of_the_vision_pipeline_need_its_results(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "requirements.lock", "requirements-unsloth.lock"):
        (tmp_path / name).touch()
    (tmp_path / "benchmarks").mkdir()
    names = sorted(file.stem for file in (ROOT / "benchmarks").glob("[a-z]*.py"))
    for name in names:
        (tmp_path / f"benchmarks/{name}.py").touch()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv/.installed").touch()
    ran, said = bench(tmp_path)
    assert ran == [name for name in names if name not in ("vlm_claims", "vlm_tuning")]
    assert said.count("skipped, it needs what `make repro-vlm` makes") == 2
    (tmp_path / "vlm/adapters").mkdir(parents=True)
    assert bench(tmp_path)[0] == names
