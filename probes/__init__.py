"""Probes that prove what an optimizer did: ledger, shadow, twin run, verdict. For any torch optimizer, GRIT or not.

A few lines in a training script of your own::

    from probes import Probe, judge

    with Probe(model, optimizer, preconditioner=(kfac, "precondition")) as probe:
        train()
    print(judge(probe).table())

With a Hugging Face or TRL Trainer: ``trainer.add_callback(ProbeCallback(...))`` after all other callbacks.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.evidence import Evidence, Thresholds
    from probes.ledger import Probe
    from probes.readings import LayerReading, grit_readings
    from probes.trainer import ProbeCallback
    from probes.twin import Twin, perturb
    from probes.verdict import Verdict, judge

__all__ = [
    "Evidence",
    "LayerReading",
    "Probe",
    "ProbeCallback",
    "Thresholds",
    "Twin",
    "Verdict",
    "grit_readings",
    "judge",
    "perturb",
]

_HOMES = {
    "Evidence": "probes.evidence",
    "LayerReading": "probes.readings",
    "Probe": "probes.ledger",
    "ProbeCallback": "probes.trainer",
    "Thresholds": "probes.evidence",
    "Twin": "probes.twin",
    "Verdict": "probes.verdict",
    "grit_readings": "probes.readings",
    "judge": "probes.verdict",
    "perturb": "probes.twin",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
