"""The first losses of an arm, trained in a process of its own (Unsloth changes TRL for a whole process)."""

import inspect
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from db.files import exclusive, hash_inputs, key_of, package_versions, read_json, torch_device, write_json
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


def curves(
    params: Params, arm: str, seed: int, steps: int, *, like: str = "", perturbed: Sequence[bool] = (False,)
) -> list[list[float]]:
    """Losses of an arm's first optimizer steps, once for each of `perturbed`: whether to start off by one rounding.

    `like` is the arm whose settings are used, by default its own. A curve that is known already is not trained again.
    """
    settings = settings_for(params, arm, like or arm)
    inputs = hash_inputs(*split_files("train", "valid"), BASE / "base.json")
    code = [training_code(params.code_of(arm)), inspect.getsource(perturb)]
    machine = [torch_device()[name] for name in ("class", "name", "threads")]  # other threads, other roundings
    parts = [arm, seed, steps, list(perturbed), settings.model_dump(), params.prompt.model_dump()]
    key = key_of([*parts, inputs, load_reference()[1], package_versions(), code, machine])
    kept = KEPT / f"{key[:16]}.json"
    with exclusive(kept.with_suffix(".lock")):  # the probe of another arm may need the same ones
        if not kept.is_file():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                jobs = [process.submit(_train, params, arm, settings, seed, steps, off) for off in perturbed]
                try:
                    losses = [job.result() for job in jobs]
                except Exception as error:
                    raise TwinError(f"the twin run of {arm} seed {seed} failed: {error}") from error
            write_json(kept, {"arm": arm, "seed": seed, "losses": losses})
    return [[float(v) for v in curve] for curve in read_json(kept)["losses"]]
