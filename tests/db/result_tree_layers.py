"""Builds what stage measure, the logs of training and the starts of stages leave, beside `result_tree`'s folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.db.result_tree import run_json, sha, write

Q, V = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"
WRAPPED = "base_model.model.model."
"""What the logs have before a module's name."""


def measured_json(arm: str, seed: int, **changes: Any) -> dict[str, Any]:
    def number(name: str, split: str, value: float | None, n: int | None = None) -> dict[str, Any]:
        return {"name": name, "split": split, "value": value, "n": n}

    def layer(name: str, split: str, where: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "split": split, "layer": where, "value": value}

    metrics = [number("perplexity", "general", 7.5, 4000), number("alignment_index", "alignment", 0.25, 120)]
    layers = [layer("alignment_index", "alignment", "layer 2", 0.2), layer("xie_beni", "alignment", "layer 2", None)]
    if arm != "base":
        metrics += [number("update_norm", "weights", 3.5), number("drift_cosine", "hidden", 0.01, 4000)]
        layers += [layer("update_norm", "weights", Q, 2.5), layer("update_norm", "weights", V, 1.5)]
    return {
        "schema": 1,
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        "metric_defs": {
            "perplexity": {"unit": "", "direction": "lower", "description": "exp of the mean loss"},
            "update_norm": {"unit": "", "direction": "none", "description": "‖ΔW‖_F"},
        },
        "layers": layers,
        **changes,
    }


def make_measured(root: Path, arm: str, seed: int = 0, **changes: Any) -> None:
    """Write what stage measure leaves; an arm's used its adapter and the base's measurements."""
    place = root / "measured" / arm / str(seed)
    used = {}
    if arm != "base":
        used[f"adapters/{arm}/{seed}/adapter_model.safetensors"] = sha(f"adapter {arm}/{seed}")
        base = root / "measured/base/0/measured.json"
        used["measured/base/0/measured.json"] = sha(base.read_text(encoding="utf-8"))
    write(place / "run.json", run_json("measure", arm, seed, inputs=used))
    write(place / "measured.json", measured_json(arm, seed, **changes))


def ledger_line(step: int, **units: dict[str, Any]) -> dict[str, Any]:
    """A sampled step: module -> numbers; q and v stand for the two modules."""
    names = {"q": WRAPPED + Q, "v": WRAPPED + V}
    entries = {names[key]: {"norm_raw": 0.3, "hash_raw_a": "00", "claimed": True, **u} for key, u in units.items()}
    return {"step": step, "loss": 2.0, "tokens": {"all": 456.0}, "units": entries}


LEDGER = [
    ledger_line(0, q={"angle": None, "cos_raw_step": None, "lr_ratio": None, "cos_raw_inner": 1.0}),
    ledger_line(
        25,
        q={"angle": 26.5, "cos_raw_step": 0.5, "lr_ratio": 1.25, "cos_raw_inner": 0.75},
        v={"angle": 13.25, "cos_raw_step": 0.25, "lr_ratio": 0.5, "cos_raw_inner": 0.5},
    ),
    {"events": {"steps": 50, "calls": 50}, "claims": True, "watched": True},
]

GRIT_LOG = [
    {"step": 0, "kind": "effect", "ready_layers": 1, "layers": 2, "effective": True},
    {"step": 0, "kind": "spectra", "layers": {
        WRAPPED + Q: {"r": 4, "k": 4, "samples": 412.0, "ready_a": True, "eigenvalues_a": [0.75, 0.5, 0.25, 0.125],
                      "effective_rank_a": 3.5, "condition_a": 6.0, "ready_g": False},
        WRAPPED + V: {"r": 4, "k": 4, "samples": 0.0, "ready_a": False, "ready_g": False},
    }},
    {"step": 20, "kind": "unreported", "layers": [WRAPPED + V]},
    {"step": 20, "kind": "reprojection", "mode": "balanced", "shrink": False, "layers": {
        WRAPPED + Q: {"r": 4, "k_a": 4, "k_b": 3, "relative_change": 0.5}}},
    {"step": 20, "kind": "reprojection", "mode": "balanced", "shrink": True, "layers": {
        WRAPPED + Q: {"r": 4, "k_a": 3, "k_b": 3, "relative_change": "nan"}}},
    {"step": 20, "kind": "final", "capture": {}, "skipped_steps": 0,
     "ranks": {WRAPPED + Q: {"base_r": 4, "r": 3, "final_k_a": 3, "final_k_b": 2}},
     "spectra": {WRAPPED + Q: {"r": 3, "k": 3, "samples": 2030.0, "eigenvalues_a": [1.5, 0.5, "inf"],
                               "eigenvalues_g": [0.5, 0.25, 0.0], "effective_rank_a": 2.5,
                               "condition_a": 3.0, "condition_g": 5e37}}},
]  # fmt: skip


def write_lines(path: Path, lines: list[Any]) -> None:
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def make_logs(root: Path, arm: str, seed: int = 0, *, grit: bool = True) -> None:
    """Write what training leaves step by step: the probe's ledger, and GRIT's log where the arm has it."""
    folder = root / "adapters" / arm / str(seed)
    write_lines(folder / "probe_ledger.jsonl", LEDGER)
    if grit:
        write_lines(folder / "grit_log.jsonl", GRIT_LOG)


def make_attempt(root: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Write the record of one start, by default of a training that ended well."""
    content = {
        "schema": 1,
        "id": name,
        "stage": "train",
        "arm": "baseline_lora",
        "seed": 0,
        "status": "finished",
        "error": None,
        "started": "2026-11-21T01:00:00+00:00",
        "ended": "2026-11-21T01:30:00+00:00",
        "host": "somewhere",
        "pid": 4242,
        "git_commit": "abc123",
        **changes,
    }
    write(root / "attempts" / f"{name}.json", content)
    return content


def make_full_tree(root: Path) -> Path:
    """`make_tree` with everything: precisions, verifications, measurements, logs and starts."""
    from tests.db.result_tree import make_quantized, make_tree, make_verified, verification

    make_tree(root)
    correct = [i < 70 for i in range(100)]
    make_quantized(root, "baseline_lora", rows={"f16": (correct, 1.0), "q8_0": (correct, 0.9)})
    make_verified(root, "baseline_lora", rows=[verification("llama_cpp", "merged"), verification("ollama", "merged")])
    make_measured(root, "base")
    for seed in (0, 1):
        make_measured(root, "baseline_lora", seed)
        make_logs(root, "baseline_lora", seed, grit=seed == 0)
    make_attempt(root, "one")
    make_attempt(root, "two", stage="prepare_data", arm=None, seed=None, status="crashed", ended=None)
    return root
