"""Pure GRIT: PEFT and TRL's SFTTrainer as in the baseline, with GRIT inside the optimizer's step; no Unsloth."""

import shutil
import sys
from typing import Any

from trainers.common import Arm, TrainingJob, sft_trainer_class
from trainers.settings import TrainSettings


def grit_trainer(base: type, settings: TrainSettings, **kwargs: Any) -> Any:
    """A trainer of class `base` with GRIT as the settings ask for it."""
    from grit import GRITConfig, grit_trainer_class

    # The adapters of the model have their rank and α already; the configuration is told for completeness.
    own = {"lora_rank": settings.rank, "lora_alpha": float(settings.alpha), "lora_dropout": settings.dropout}
    return grit_trainer_class(base)(grit_config=GRITConfig.from_dict({**own, **(settings.grit or {})}), **kwargs)


def _trainer(settings: TrainSettings, **kwargs: Any) -> Any:
    return grit_trainer(sft_trainer_class(), settings, **kwargs)


def grit_report(trainer: Any, job: TrainingJob) -> dict[str, Any]:
    """GRIT's log and plots beside the adapter, and what run.json says of it."""
    from grit import plots

    manager = trainer.grit_manager
    log = job.output / manager.log_file.name
    shutil.copy2(manager.log_file, log)
    pictures = {"fisher_spectra.png": plots.plot_spectra, "ranks.png": plots.plot_ranks}
    if manager.config.log_eig_heatmaps:
        pictures["fisher_heatmaps.png"] = plots.plot_heatmaps
    for name, plot in pictures.items():
        try:
            plot(log, job.output / name)
        except ValueError as error:  # nothing to draw, e.g. a run too short for any factor; the adapter is there
            print(f"GRIT: no {name}: {error}", file=sys.stderr)
    final = manager.history[-1]
    ranks = [entry["r"] for entry in final["ranks"].values()]
    return {
        "grit": {
            "capture": final["capture"],
            "effective": final["effect"]["effective"],
            "effect": final["effect"],
            "skipped_steps": final["skipped_steps"],
            "inversions": final["inversions"],
            "failed_inversions": final["failed_inversions"],
            "mean_rank": sum(ranks) / len(ranks),
        },
    }


ARM = Arm(name="pure_grit", title="Pure GRIT", preconditions=True, make_trainer=_trainer, report=grit_report)
