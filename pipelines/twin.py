"""The first losses of an arm, trained in a process of its own (Unsloth changes TRL for a whole process)."""

import inspect
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from db.files import hash_inputs, key_of, package_versions, read_json, torch_device, write_json
from pipelines.base_model import load_reference
from pipelines.stage import BASE, DATA, split_files
from pipelines.train import Params, examples, load_arm, training_code
from probes.twin import perturb
from trainers.run import TrainingJob, first_losses
from trainers.settings import TrainSettings

KEPT = Path("checkpoints/twins")  # curves by everything that decides them: the baseline's serve every arm


class TwinError(RuntimeError):
    """A twin that did not come to its end."""


def settings_for(params: Params, arm: str, like: str) -> TrainSettings:
    """The settings of `like`; for another arm beside it, the baseline, without what belongs to its method."""
    settings = params.train_for(like)
    return settings if arm == like else settings.shared()


def _train(params: Params, arm: str, settings: TrainSettings, seed: int, steps: int, perturbed: bool) -> list[float]:
    with TemporaryDirectory() as folder:
        job = TrainingJob(
            base=load_reference()[0],
            settings=settings,
            seed=seed,
            train=examples("train", params.prompt.template),
            valid=examples("valid", params.prompt.template),  # not evaluated; the Trainer wants a data set
            output=Path(folder),
            checkpoints=Path(folder),
            images=DATA,
        )
        return first_losses(load_arm(arm, params), job, steps, perturbed)


def curve(
    params: Params, arm: str, seed: int, steps: int, name: str, *, like: str = "", perturbed: bool = False
) -> list[float]:
    """Losses of an arm's first optimizer steps; a curve that is known already is not trained again.

    `name` tells apart runs that are the same in everything else (A and A'); `like` is the arm whose settings are used,
    by default its own; `perturbed`: start off by one rounding.
    """
    settings = settings_for(params, arm, like or arm)
    inputs = hash_inputs(*split_files("train", "valid"), BASE / "base.json")
    code = [training_code(params.code_of(arm)), inspect.getsource(perturb)]
    parts = [arm, seed, steps, name, perturbed, settings.model_dump(), params.prompt.model_dump()]
    machine = [torch_device()[name] for name in ("class", "name", "threads")]  # other threads, other roundings
    key = key_of([*parts, inputs, load_reference()[1], package_versions(), code, machine])
    kept = KEPT / f"{key[:16]}.json"
    if not kept.is_file():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                losses = process.submit(_train, params, arm, settings, seed, steps, perturbed).result()
            except Exception as error:
                raise TwinError(f"the twin run of {arm} seed {seed} failed: {error}") from error
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"arm": arm, "seed": seed, "losses": losses})
    return [float(v) for v in read_json(kept)["losses"]]
