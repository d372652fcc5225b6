"""One twin: the first losses of an arm, in a process of its own (Unsloth changes TRL for a whole process)."""

import inspect
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
import yaml

from pipelines.base_model import load_reference
from pipelines.config import PARAMS_FILE, arm_code, load_params
from pipelines.runinfo import hash_inputs, key_of, package_versions, read_json, torch_device, write_json
from pipelines.schema_common import CommonParams
from pipelines.stage import BASE, DATA, TRAINERS_CODE, clear_errors, cli, quiet_libraries, split_files
from pipelines.train import examples, load_arm
from probes.twin import perturb
from trainers.settings import TrainSettings

KEPT = Path("checkpoints/twins")
"""Curves by everything that decides them: the baseline's serve every arm."""


class TwinError(RuntimeError):
    """A twin that did not come to its end."""


def settings_for(params: CommonParams, arm: str, like: str) -> TrainSettings:
    """The settings of `like` for `arm`: a baseline beside an arm has its learning rate, but nothing of its method."""
    settings = params.train_for(like)
    return settings if arm == like else settings.with_method_of(params.train_for(arm))


def curve(
    params: CommonParams, arm: str, seed: int, steps: int, name: str, *, like: str = "", perturbed: bool = False
) -> list[float]:
    """Losses of an arm's first steps; a curve that is known already is not trained again.

    Args:
        params: The whole of params.yaml.
        arm: What is trained.
        seed: As in the real run.
        steps: Optimizer steps.
        name: Tells runs apart that are the same in everything else (A and A').
        like: Arm whose settings are used; default: its own.
        perturbed: Start off by one rounding.

    Raises:
        TwinError: the process failed; holds the end of its output.
    """
    settings = settings_for(params, arm, like or arm)
    inputs = hash_inputs(*split_files("train", "valid"), BASE / "base.json")
    code = [hash_inputs(TRAINERS_CODE), arm_code(params.code_of(arm), params.registry), inspect.getsource(perturb)]
    parts = [arm, seed, steps, name, perturbed, settings.model_dump(), params.prompt.model_dump()]
    machine = [torch_device()[name] for name in ("class", "name", "threads")]  # other threads, other roundings
    key = key_of([*parts, inputs, load_reference()[1], package_versions(), code, machine])
    kept = KEPT / f"{key[:16]}.json"
    if kept.is_file():
        found = read_json(kept)
        return [float(v) for v in found["losses"]]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent) as folder:
        out, given = Path(folder) / "losses.json", Path(folder) / "params.yaml"
        # params.yaml itself may have changed by now. Not as JSON, whose 2e-05 is a text in YAML.
        given.write_text(yaml.safe_dump(params.model_dump()), encoding="utf-8")
        command = [sys.executable, "-m", "pipelines.twin", "--arm", arm, "--seed", str(seed), "--steps", str(steps)]
        command += [
            "--params",
            str(given),
            "--like",
            like or arm,
            "--out",
            str(out),
            *(["--perturbed"] if perturbed else []),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise TwinError(f"the twin run of {arm} seed {seed} failed with exit code {done.returncode}:\n{tail}")
        out.replace(kept)
    return [float(v) for v in read_json(kept)["losses"]]


def run(params: CommonParams, arm: str, like: str, seed: int, steps: int, out: Path, perturbed: bool) -> None:
    """Train the first steps of one arm and write their losses."""
    from trainers.common import TrainingJob
    from trainers.twin import losses

    template = params.prompt.template
    with TemporaryDirectory() as folder:
        job = TrainingJob(
            base=load_reference()[0],
            settings=settings_for(params, arm, like),
            seed=seed,
            train=examples("train", template),
            valid=examples("valid", template),  # not evaluated; the Trainer wants a data set
            output=Path(folder),
            checkpoints=Path(folder),
            images=DATA,
        )
        write_json(out, {"arm": arm, "seed": seed, "losses": losses(load_arm(arm, params), job, steps, perturbed)})


def main(
    arm: Annotated[str, typer.Option(help="baseline_lora, …")],
    seed: Annotated[int, typer.Option(help="as in the real run")],
    steps: Annotated[int, typer.Option(help="optimizer steps")],
    out: Annotated[Path, typer.Option(help="JSON file for the losses")],
    like: Annotated[str, typer.Option(help="arm whose settings are used; empty: its own")] = "",
    params: Annotated[Path, typer.Option(help="parameters")] = PARAMS_FILE,
    perturbed: Annotated[bool, typer.Option(help="start off by one rounding")] = False,
) -> None:
    """Train the first steps of one arm and write their losses."""
    quiet_libraries()
    with clear_errors(f"twin {arm}-{seed}"):
        run(load_params(params), arm, like or arm, seed, steps, out, perturbed)


if __name__ == "__main__":
    cli(main)
