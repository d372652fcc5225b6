"""The first losses of the baseline with the settings of an arm, which the probe holds the arm's own against."""

import gc
import inspect
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from db.files import exclusive, hash_inputs, key_of, package_versions, read_json, torch_device, write_json
from pipelines.base_model import load_reference
from pipelines.stage import BASE, DATA, TEXTS, split_files
from pipelines.train import Params, base_texts, examples, load_arm, training_code, training_items
from probes.twin import perturb
from trainers import BASELINE
from trainers.run import TrainingJob, first_losses

KEPT = Path("checkpoints/twins")  # curves by everything that decides them: they serve every arm with these settings


def curves(params: Params, arm: str, seed: int, steps: int, perturbed: Sequence[bool]) -> list[list[float]]:
    """The baseline's first losses with an arm's settings, once for each of `perturbed`: a start off by a rounding."""
    settings, template = params.train_for(arm).shared(), params.prompt.template
    reference, base_fingerprint = load_reference()
    files = [*split_files("train", "valid"), BASE / "base.json", TEXTS / "texts.jsonl"]
    inputs = hash_inputs(*files, *params.files_of(arm, seed))
    code = [training_code(params.code_of(BASELINE)), inspect.getsource(perturb)]
    machine = [torch_device()[name] for name in ("class", "name", "threads")]  # other threads, other roundings
    parts = [seed, steps, list(perturbed), settings.model_dump(), params.prompt.model_dump()]
    kept = KEPT / f"{key_of([*parts, inputs, base_fingerprint, package_versions(), code, machine])[:16]}.json"

    def train(off: bool) -> list[float]:
        with TemporaryDirectory() as folder:
            job = TrainingJob(
                base=reference,
                settings=settings,
                seed=seed,
                train=training_items(settings, template, seed),
                valid=examples("valid", template),  # not evaluated; the Trainer wants a data set
                output=Path(folder),
                checkpoints=Path(folder),
                texts=base_texts(),
                images=DATA,
            )
            losses = first_losses(load_arm(BASELINE, params), job, steps, off)
        gc.collect()  # cycles keep a Trainer alive, and two models need not fit a GPU
        torch.cuda.empty_cache()
        return losses

    with exclusive(kept.with_suffix(".lock")):  # the probe of another arm may need the same ones
        if not kept.is_file():
            write_json(kept, {"arm": arm, "seed": seed, "losses": [train(off) for off in perturbed]})
    return [[float(v) for v in curve] for curve in read_json(kept)["losses"]]
