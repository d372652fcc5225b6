"""All arms with five seeds through the whole pipeline: which way of training is better, and how sure that is.

Runs in a clone of the last commit. What `make repro` has left here is taken over, so that only the further seeds are
trained; from nothing it takes about an hour. Run as `python -m benchmarks.arms`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ruamel.yaml import YAML

from benchmarks._harness import write
from pipelines.runinfo import git_state

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5
MADE = (
    "data models adapters verdicts gguf verified quantized measured scores checkpoints attempts outputs dvc.lock"
).split()


def prepare(project: Path) -> None:
    """Clone the last commit, with the results that stand here and with five seeds in params.yaml."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
    for name in MADE:
        made = ROOT / name
        if made.is_dir():
            shutil.copytree(made, project / name)
        elif made.is_file():
            shutil.copy2(made, project / name)
    cache = ROOT / ".dvc" / "cache"
    subprocess.run(["dvc", "cache", "dir", "--local", str(cache)], cwd=project, check=True)
    yaml = YAML()
    file = project / "params.yaml"
    params = yaml.load(file)
    params["matrix"]["seeds"] = list(range(SEEDS))
    yaml.dump(params, file)
    # Committed, so that what runs does not count as run on changed files.
    author = ["-c", "user.name=benchmark", "-c", "user.email=benchmark@localhost"]
    message = f"{SEEDS} seeds"
    subprocess.run(["git", *author, "commit", "--quiet", "-m", message, "params.yaml"], cwd=project, check=True)


def main() -> None:
    """Run, compare, and write the result."""
    if git_state()["dirty"]:
        raise SystemExit("expected committed files, since the last commit is what runs; commit or stash first")
    with TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        taken_over = sorted(place.relative_to(ROOT).as_posix() for place in (ROOT / "scores").glob("*/*"))
        prepare(project)
        environment = {**os.environ, "PYTHONPATH": str(project)}
        started = time.perf_counter()
        subprocess.run(["dvc", "repro"], cwd=project, env=environment, check=True)
        seconds = time.perf_counter() - started
        command = [sys.executable, "-m", "evaluation.compare_all"]
        subprocess.run(command, cwd=project, env=environment, check=True)
        told = subprocess.run(
            [*command, "--format", "json"], cwd=project, env=environment, check=True, capture_output=True, text=True
        )
        comparison = json.loads(told.stdout)
        (ROOT / "outputs").mkdir(exist_ok=True)
        shutil.copy2(project / "outputs" / "report.html", ROOT / "outputs" / f"report_{SEEDS}_seeds.html")
    kept = ("rows", "verdicts", "criteria", "power")
    write(
        "arms",
        f"all arms with {SEEDS} seeds on the profile of params.yaml",
        seeds=SEEDS,
        taken_over=taken_over,
        seconds_of_the_rest=seconds,
        **{name: comparison[name] for name in kept},
    )


if __name__ == "__main__":
    main()
