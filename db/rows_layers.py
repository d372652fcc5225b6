"""From measured.json and the logs of training to rows about layers, spectra and starts; no database here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from db.columns import FINAL_STEP
from db.reader import Bundle
from db.records_logs import AttemptRecord, GritLayer, GritRecord
from db.values import clean_text, plain, split_value

Row = dict[str, Any]

PROBE_NUMBERS = ("angle", "cos_raw_step", "cos_raw_inner", "lr_ratio")
"""What of the ledger's numbers is kept for each layer and sampled step."""

GRIT_NUMBERS = {
    "r": "rank",
    "base_r": "base_rank",
    "k": "kept_rank",
    "k_a": "kept_rank_a",
    "k_b": "kept_rank_b",
    "final_k_a": "kept_rank_a",
    "final_k_b": "kept_rank_b",
    "samples": "samples",
    "relative_change": "relative_change",
    "effective_rank_a": "effective_rank_a",
    "effective_rank_g": "effective_rank_g",
    "condition_a": "condition_a",
    "condition_g": "condition_g",
    "damping_share_a": "damping_share_a",
    "damping_share_g": "damping_share_g",
}
"""Key in GRIT's log -> name in table layer_metric. Those of kind final, field `ranks`, have step -1."""

_FACTOR = {"a": "of the covariance of A's outputs", "g": "of the covariance of the gradients there"}

MEANINGS: dict[str, tuple[str, str, str]] = {
    "angle": ("degrees", "none", "between the step made and the step of plain AdamW, 0: the same direction"),
    "cos_raw_step": ("cosine", "none", "of the raw gradient and the step made, sign turned"),
    "cos_raw_inner": ("cosine", "none", "of the raw gradient and the one that the optimizer got"),
    "lr_ratio": ("ratio", "none", "length of the step made over that of plain AdamW's step"),
    "rank": ("directions", "none", "rank of the adapter's tensors"),
    "base_rank": ("directions", "none", "rank that the adapter started with"),
    "kept_rank": ("directions", "none", "directions that the last reprojection kept"),
    "kept_rank_a": ("directions", "none", "directions kept on A's side"),
    "kept_rank_b": ("directions", "none", "directions kept on B's side"),
    "samples": ("tokens", "none", "tokens that a layer's statistics have seen"),
    "relative_change": ("ratio", "lower", "by a reprojection: ‖ΔW' − ΔW‖ over ‖ΔW‖"),
    **{
        f"{name}_{side}": (unit, "none", words.format(where))
        for side, where in _FACTOR.items()
        for name, (unit, words) in {
            "effective_rank": ("directions", "exp of the entropy of the normalised eigenvalues {}"),
            "condition": ("ratio", "largest over smallest eigenvalue {}"),
            "damping_share": ("ratio", "damping over the mean eigenvalue {}"),
        }.items()
    },
}
"""Name -> unit, direction, description of the numbers of both logs, for table metric_def."""

_SINGULAR = 1e20
"""Condition numbers from here on are infinite: the log divides by 1e-38 where the smallest eigenvalue is zero, and in
float64 none that can be told from zero gives more than 1e17."""

_WRAPPERS = re.compile(r"^base_model\.model\.(model\.)?")


def layer_name(name: str) -> str:
    """A layer's name without what PEFT and transformers wrap round it: layers.0.self_attn.q_proj.

    Logs have the wrapped model's names, measurements the model's own; a reader wants to join both.
    """
    return clean_text(_WRAPPERS.sub("", name, count=1).removeprefix("model."))


def layer_metric_rows(bundle: Bundle) -> list[Row]:
    """Measurements after training, and what the probe and GRIT logged; of two records of one step the later stays."""
    rows: dict[tuple[str, str, str, int], Row] = {}

    def add(name: str, split: str, layer: str, step: int, number: float | None) -> None:
        value, kind = split_value(number)
        name, split, layer = clean_text(name), clean_text(split), layer_name(layer)
        rows[name, split, layer, step] = {
            "name": name, "split": split, "layer": layer, "step": step, "value": value, "value_kind": kind,
        }  # fmt: skip

    for row in bundle.measured.layers if bundle.measured else []:
        add(row.name, row.split, row.layer, FINAL_STEP, row.value)
    for sampled in bundle.logs.ledger:
        for layer, unit in sampled.units.items():
            for name in PROBE_NUMBERS:
                if (number := getattr(unit, name)) is not None:
                    add(name, "probe", layer, sampled.step or 0, number)
    for record in bundle.logs.grit:
        for step, layer, entry in _grit_layers(record):
            for key, name in GRIT_NUMBERS.items():
                if (number := getattr(entry, key)) is not None:
                    singular = key.startswith("condition") and number > _SINGULAR
                    add(name, "grit", layer, step, math.inf if singular else number)
    return list(rows.values())


def spectrum_rows(bundle: Bundle) -> list[Row]:
    """Eigenvalues of the Fisher factors, largest first; of two records of one step the later stays."""
    rows: dict[tuple[str, str, int], Row] = {}
    for record in bundle.logs.grit:
        for step, layer, entry in _grit_layers(record):
            for factor, values in (("a", entry.eigenvalues_a), ("g", entry.eigenvalues_g)):
                if values:
                    name = layer_name(layer)
                    ordered = sorted(values, key=lambda v: (math.isnan(v), -v))
                    rows[name, factor, step] = {
                        "layer": name, "factor": factor, "step": step, "eigenvalues": plain(ordered),
                    }  # fmt: skip
    return list(rows.values())


def log_meanings(bundles: Iterable[Bundle]) -> dict[str, Row]:
    """What the numbers in the logs of these runs mean, by name."""
    names: set[str] = set()
    for bundle in bundles:
        names.update(PROBE_NUMBERS if bundle.logs.ledger else ())
        names.update(GRIT_NUMBERS.values() if bundle.logs.grit else ())
    return {
        name: {"name": name, "unit": unit, "direction": direction, "description": words}
        for name, (unit, direction, words) in MEANINGS.items()
        if name in names
    }


def attempt_row(record: AttemptRecord) -> Row:
    """The columns of `attempt`."""
    return {
        "id": clean_text(record.id),
        "stage": clean_text(record.stage),
        "arm": plain(record.arm),
        "seed": record.seed,
        "status": record.status,
        "error": plain(record.error),
        "started": record.started,
        "ended": record.ended,
        "host": clean_text(record.host),
        "pid": record.pid,
        "git_commit": plain(record.git_commit),
    }


def _grit_layers(record: GritRecord) -> Iterator[tuple[int, str, GritLayer]]:
    """(step, layer, numbers): those of `ranks` belong to the finished run, those of the rest to the record's step."""
    for step, layers in ((record.step, record.layers), (record.step, record.spectra), (FINAL_STEP, record.ranks)):
        for layer, entry in (layers or {}).items():
            yield step, layer, entry
