"""Probes that prove what an optimizer did: ledger, shadow, verdict. For any torch optimizer, GRIT or not.

A few lines in a training script of your own::

    from probes import Probe, judge

    with Probe(model, optimizer, preconditioner=(kfac, "precondition")) as probe:
        train()
    print(judge(probe).table())

With a Hugging Face or TRL Trainer: ``trainer.add_callback(ProbeCallback(...))`` after all other callbacks.
"""

from typing import Any

from probes.evidence import Evidence, Thresholds
from probes.geometry import LayerReading
from probes.probe import Probe
from probes.verdict import Verdict, judge

__all__ = ["Evidence", "LayerReading", "Probe", "ProbeCallback", "Thresholds", "Verdict", "judge"]


def __getattr__(name: str) -> Any:
    if name == "ProbeCallback":  # loads transformers
        from probes.callback import ProbeCallback

        return ProbeCallback
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
