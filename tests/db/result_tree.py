"""Builds result folders as the stages leave them, for the tests of db/ and of compare_all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

Q, V = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"
WRAPPED = "base_model.model.model."
"""What the logs have before a module's name."""
ITEMS = hashlib.sha256(b"test items").hexdigest()


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def head(arm: str, seed: int) -> dict[str, Any]:
    return {"schema": 1, "arm": arm, "seed": seed}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def edit(path: Path, **changes: Any) -> None:
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def run_json(stage: str, arm: str | None, seed: int | None, **changes: Any) -> dict[str, Any]:
    hours = {"prepare_base": 0, "train": 1, "probe": 2, "export": 2, "quantize": 2, "verify": 2, "measure": 2}
    hour = hours.get(stage, 3)
    return {
        "schema": 1,
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "status": "finished",
        "error": None,
        "started": f"2026-11-21T0{hour}:00:00.123456+00:00",
        "ended": f"2026-11-21T0{hour}:30:00+00:00",
        "params": {stage: {"learning_rate": 0.001, "steps": 100}},
        "git": {"commit": "abc123", "dirty": False},
        "packages": {"torch": "2.13.0", "peft": "0.21.2"},
        "device": {
            "class": "cpu",
            "name": "Some CPU",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 8_000_000_000,
            "platform": "Linux-6",
            "python": "3.11.7",
        },
        "inputs": {"data/train.jsonl": sha("train")},
        "artifacts": [],
        "prompt_template": "Q: {prompt} A:",
        "extra": {},
        **changes,
    }


def verdict_json(arm: str, seed: int) -> dict[str, Any]:
    """Plain AdamW for the baseline; any other arm's updates are 26° off."""
    plain = arm == "baseline_lora"
    word, why, angle = ("no_effect", "equals_shadow", 1e-5) if plain else ("effective", "none", 26.5)

    def reading(name: str, value: Any, verdict: str = "skipped", **more: Any) -> dict[str, Any]:
        row = {"name": name, "layer": "", "step": -1, "value": value, "unit": "", "threshold": None}
        return {**row, "verdict": verdict, "diagnosis": "", **more}

    return {
        **head(arm, seed),
        "verdict": word,
        "diagnosis": why,
        "reason": "because",
        "as_claimed": True,
        "readings": [
            reading("verdict", 0.0 if plain else 1.0, "pass", diagnosis=f"{word}: {why}: because"),
            reading("angle_to_shadow", angle, "pass", unit="degrees", threshold=1.0),
            reading("twin_divergence", 0.0 if plain else "inf", "pass", unit="A/A floors", threshold=10.0),
            reading("layer_angle", angle, layer="layers.0.q_proj", step=25, unit="degrees"),
        ],
    }


def artifact(kind: str, path: str, content: str, parent: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "path": path, "sha256": sha(content), "bytes": len(content), "parent": parent}


def make_arm(
    root: Path,
    arm: str,
    seed: int = 0,
    *,
    correct: list[bool],
    retention: float = 0.8,
    own: tuple[int, int] = (600, 6_000_000_000),
    history: Any = None,
) -> None:
    """Write one arm: `correct` per test item; `own` is decode (tokens, nanoseconds)."""
    tag = f"{arm}/{seed}"
    gguf, scores = root / "gguf" / tag, root / "scores" / tag
    if arm == "base":
        made = artifact("base_model", "models/base/model.safetensors", "base weights")
        write(root / "models/base/run.json", run_json("prepare_base", None, None, artifacts=[made]))
        exported = [artifact("base_gguf", "gguf/base/0/model.gguf", "base gguf", sha("base weights"))]
    else:
        name = f"adapters/{tag}/adapter_model.safetensors"
        made = artifact("adapter", name, f"adapter {tag}")
        write(root / "adapters" / tag / "run.json", run_json("train", arm, seed, artifacts=[made]))
        curve = [{"step": 10, "loss": 1.5, "epoch": 0.1}, {"step": 10, "eval_loss": 1.2, "epoch": 0.1}]
        write(root / "adapters" / tag / "loss_history.json", curve if history is None else history)
        write(root / "verdicts" / tag / "run.json", run_json("probe", arm, seed, inputs={name: made["sha256"]}))
        write(root / "verdicts" / tag / "verdict.json", verdict_json(arm, seed))
        exported = [artifact("merged_gguf", f"gguf/{tag}/model.gguf", f"gguf {tag}", made["sha256"])]
        write(
            gguf / "parity.json",
            {
                **head(arm, seed),
                "prompts": 100,
                "token_ids_equal": 1.0,
                "greedy_equal": 0.99,
                "pairs": {"hf/merged_gguf": 1.0, "hf/base+adapter_gguf": 0.99},
                "first_difference": {"prompt": "p", "hf": "a", "merged_gguf": "b"},
            },
        )
    write(gguf / "run.json", run_json("export", arm, seed, artifacts=exported))
    used = {"data/test.jsonl": ITEMS, f"gguf/{tag}/model.gguf": exported[0]["sha256"]}
    write(scores / "run.json", run_json("evaluate", arm, seed, inputs=used))
    phases = [(arm, *own)] + ([] if arm == "base" else [("base", 600, 5_000_000_000)])
    share = sum(correct) / len(correct)
    write(
        scores / "scores.json",
        {
            **head(arm, seed),
            "model_name": "base_model" if arm == "base" else f"{arm}_model",
            "backend": {"name": "llama_cpp", "version": "0.3.36", "device_class": "cpu"},
            "test_items_sha256": ITEMS,
            "metrics": [
                {"name": "aqi_category_accuracy", "split": "test", "value": share, "n": len(correct)},
                {"name": "aqi_mae", "split": "test", "value": 4.5, "n": len(correct)},
                {"name": "retention_accuracy", "split": "retention", "value": retention, "n": 50},
                {"name": "retention/addition", "split": "retention", "value": retention, "n": 25},
            ],
            "metric_defs": {
                "aqi_category_accuracy": {"unit": "share", "direction": "higher", "description": "right"},
                "aqi_mae": {"unit": "AQI points", "direction": "lower", "description": "distance"},
                "retention_accuracy": {"unit": "share", "direction": "higher", "description": "kept"},
            },
            # Two unequal halves: a mean of rates would differ from the rate of the sums.
            "speed": [
                {"arm": who, "phase": "decode", "repetition": r, "tokens": part, "nanoseconds": ns // 2}
                for who, tokens, ns in phases
                for r, part in enumerate((tokens // 3, tokens - tokens // 3))
            ]
            + [{"arm": arm, "phase": "load", "repetition": 0, "tokens": None, "nanoseconds": 10**9}],
        },
    )
    lines = [
        {
            "item_id": f"aqi-{i:06d}",
            "task": "aqi",
            "split": "test",
            "prompt": f"PM2.5 is {i}",
            "truth": str(i),
            "answer": str(i if right else i + 60),
            "predicted": float(i if right else i + 60),
            "correct": right,
            "abs_error": 0.0 if right else 60.0,
            "prompt_tokens": 40,
            "answer_tokens": 9,
        }
        for i, right in enumerate(correct)
    ]
    write(scores / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def precision(kind: str, correct: list[bool], same: float, **changes: Any) -> dict[str, Any]:
    bits = {"f16": 16.0, "q8_0": 8.5}.get(kind, 4.5)
    return {
        "type": kind,
        "bytes": int(bits * 1_000_000),
        "bits_per_weight": bits,
        "tensor_types": {kind.upper(): 15, "F32": 5},
        "category_accuracy": sum(correct) / len(correct),
        "correct": sum(correct),
        "n": len(correct),
        "answers_equal_to_f16": same,
        "fallbacks": 0,
        **changes,
    }


def make_quantized(root: Path, arm: str, seed: int = 0, *, rows: dict[str, tuple[list[bool], float]]) -> None:
    """Rows: type -> (correct for each test item, share of answers equal to f16)."""
    tag = f"{arm}/{seed}"
    place = root / "quantized" / tag
    made = json.loads((root / "gguf" / tag / "run.json").read_text(encoding="utf-8"))["artifacts"][0]
    used = {"data/test.jsonl": ITEMS, made["path"]: made["sha256"]}
    write(place / "run.json", run_json("quantize", arm, seed, inputs=used))
    content = [precision(kind, correct, same) for kind, (correct, same) in rows.items()]
    write(place / "quantized.json", {**head(arm, seed), "rows": content})
    lines = [
        {"type": kind, "item_id": f"aqi-{i:06d}", "answer": f"{kind} {right}", "correct": right}
        for kind, (correct, _) in rows.items()
        for i, right in enumerate(correct)
    ]
    write(place / "quantized_samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def verification(backend: str, mode: str, **changes: Any) -> dict[str, Any]:
    adapter = mode == "adapter"
    return {
        "backend": backend,
        "backend_version": "0.32.0" if backend == "ollama" else "0.3.36",
        "mode": mode,
        "prompts": 20,
        "rendered": 1.0,
        "counted": 1.0,
        "answered": 0.95 if adapter else 1.0,
        "equal_to_merged": 0.95 if adapter else None,
        "perturbed_noticed": True if adapter else None,
        "first_difference": "prompt 3: token 2 | differs\nLikely cause: scale" if adapter else None,
        "gguf_sha256": sha("gguf"),
        "adapter_sha256": sha("adapter") if adapter else None,
        "server_digest": "sha256:abc" if backend == "ollama" else None,
        "stored_sha256": sha("stored") if backend == "ollama" else None,
        **changes,
    }


def make_verified(root: Path, arm: str, seed: int = 0, *, rows: list[dict[str, Any]]) -> None:
    place = root / "verified" / arm / str(seed)
    write(place / "run.json", run_json("verify", arm, seed))
    write(place / "verify.json", {**head(arm, seed), "model_name": f"{arm}_model", "rows": rows})


def make_tree(root: Path) -> Path:
    """Base right on 40 of 100 items; baseline_lora on 70, with seeds 0 and 1."""
    make_arm(root, "base", correct=[i < 40 for i in range(100)], own=(500, 4_000_000_000))
    for seed in (0, 1):
        make_arm(root, "baseline_lora", seed, correct=[i < 70 for i in range(100)])
    return root


def make_measured(root: Path, arm: str, seed: int = 0, **changes: Any) -> None:
    """Write what stage measure leaves; an arm's used its adapter and the base's measurements."""

    def number(name: str, split: str, value: float | None, n: int | None = None) -> dict[str, Any]:
        return {"name": name, "split": split, "value": value, "n": n}

    def layer(name: str, split: str, where: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "split": split, "layer": where, "value": value}

    metrics = [number("perplexity", "general", 7.5, 4000), number("alignment_index", "alignment", 0.25, 120)]
    layers = [layer("alignment_index", "alignment", "layer 2", 0.2), layer("xie_beni", "alignment", "layer 2", None)]
    if arm != "base":
        metrics += [number("update_norm", "weights", 3.5), number("drift_cosine", "hidden", 0.01, 4000)]
        layers += [layer("update_norm", "weights", Q, 2.5), layer("update_norm", "weights", V, 1.5)]
    content = {
        **head(arm, seed),
        "metrics": metrics,
        "metric_defs": {
            "perplexity": {"unit": "", "direction": "lower", "description": "exp of the mean loss"},
            "update_norm": {"unit": "", "direction": "none", "description": "‖ΔW‖_F"},
        },
        "layers": layers,
        **changes,
    }
    place = root / "measured" / arm / str(seed)
    used = {}
    if arm != "base":
        used[f"adapters/{arm}/{seed}/adapter_model.safetensors"] = sha(f"adapter {arm}/{seed}")
        base = root / "measured/base/0/measured.json"
        used["measured/base/0/measured.json"] = sha(base.read_text(encoding="utf-8"))
    write(place / "run.json", run_json("measure", arm, seed, inputs=used))
    write(place / "measured.json", content)


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


def make_full_tree(root: Path) -> Path:
    """`make_tree` with everything: precisions, verifications, measurements and logs."""
    make_tree(root)
    correct = [i < 70 for i in range(100)]
    make_quantized(root, "baseline_lora", rows={"f16": (correct, 1.0), "q8_0": (correct, 0.9)})
    make_verified(root, "baseline_lora", rows=[verification("llama_cpp", "merged"), verification("ollama", "merged")])
    make_measured(root, "base")
    for seed in (0, 1):
        make_measured(root, "baseline_lora", seed)
        write_lines(root / f"adapters/baseline_lora/{seed}/probe_ledger.jsonl", LEDGER)
    write_lines(root / "adapters/baseline_lora/0/grit_log.jsonl", GRIT_LOG)
    return root
