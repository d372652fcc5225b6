"""Builds result folders as the stages leave them, for the tests of db/ and of compare_all."""

import hashlib
import json

Q, V = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"
WRAPPED = "base_model.model.model."
"""What the logs have before a module's name."""
ITEMS = hashlib.sha256(b"test items").hexdigest()


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def head(arm, seed):
    return {"schema": 1, "arm": arm, "seed": seed}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_lines(path, lines):
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def edit(path, **changes):
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def run_json(stage, arm, seed, **changes):
    hour = {"prepare_base": 0, "train": 1, "evaluate": 3}.get(stage, 2)
    device = {
        "class": "cpu", "name": "Some CPU", "cores": 2, "threads": 2, "memory_bytes": 8_000_000_000,
        "platform": "Linux-6", "python": "3.11.7",
    }  # fmt: skip
    return {
        "schema": 1, "stage": stage, "arm": arm, "seed": seed, "status": "finished", "error": None,
        "started": f"2026-11-21T0{hour}:00:00.123456+00:00", "ended": f"2026-11-21T0{hour}:30:00+00:00",
        "params": {stage: {"learning_rate": 0.001, "steps": 100}}, "git": {"commit": "abc123", "dirty": False},
        "packages": {"torch": "2.13.0", "peft": "0.21.2"}, "device": device,
        "inputs": {"data/train.jsonl": sha("train")}, "artifacts": [], "prompt_template": "Q: {prompt} A:",
        "extra": {}, **changes,
    }  # fmt: skip


def verdict_json(arm, seed):
    """Plain AdamW for the baseline; any other arm's updates are 26° off."""
    plain = arm == "baseline_lora"
    word, why, angle = ("no_effect", "equals_shadow", 1e-5) if plain else ("effective", "none", 26.5)

    def reading(name, value, verdict="skipped", **more):
        row = {"name": name, "layer": "", "step": -1, "value": value, "unit": "", "threshold": None}
        return {**row, "verdict": verdict, "diagnosis": "", **more}

    readings = [
        reading("verdict", 0.0 if plain else 1.0, "pass", diagnosis=f"{word}: {why}: because"),
        reading("angle_to_shadow", angle, "pass", unit="degrees", threshold=1.0),
        reading("layer_angle", angle, layer="layers.0.q_proj", step=25, unit="degrees"),
    ]
    verdict = {"verdict": word, "diagnosis": why, "reason": "because", "as_claimed": True}
    return {**head(arm, seed), **verdict, "readings": readings}


def artifact(kind, path, content, parent=None):
    return {"kind": kind, "path": path, "sha256": sha(content), "bytes": len(content), "parent": parent}


def table(names, *rows):
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def make_arm(root, arm, seed=0, *, correct, retention=0.8, own=(600, 6_000_000_000), history=None):
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
    write(gguf / "run.json", run_json("export", arm, seed, artifacts=exported))
    used = {"data/test.jsonl": ITEMS, f"gguf/{tag}/model.gguf": exported[0]["sha256"]}
    write(scores / "run.json", run_json("evaluate", arm, seed, inputs=used))
    share = sum(correct) / len(correct)
    metrics = table(
        "name split value n",
        ("aqi_category_accuracy", "test", share, len(correct)), ("aqi_mae", "test", 4.5, len(correct)),
        ("retention_accuracy", "retention", retention, 50), ("retention/addition", "retention", retention, 25),
    )  # fmt: skip
    meanings = {
        "aqi_category_accuracy": {"unit": "share", "direction": "higher", "description": "right"},
        "aqi_mae": {"unit": "AQI points", "direction": "lower", "description": "distance"},
        "retention_accuracy": {"unit": "share", "direction": "higher", "description": "kept"},
    }
    # Two unequal halves: a mean of rates would differ from the rate of the sums.
    speed = [
        {"arm": who, "phase": "decode", "repetition": r, "tokens": part, "nanoseconds": ns // 2}
        for who, tokens, ns in [(arm, *own)] + ([] if arm == "base" else [("base", 600, 5_000_000_000)])
        for r, part in enumerate((tokens // 3, tokens - tokens // 3))
    ]
    load = {"arm": arm, "phase": "load", "repetition": 0, "tokens": None, "nanoseconds": 10**9}
    content = {
        "model_name": "base_model" if arm == "base" else f"{arm}_model",
        "backend": {"name": "llama_cpp", "version": "0.3.36", "device_class": "cpu"},
        "test_items_sha256": ITEMS,
        "metrics": metrics,
        "metric_defs": meanings,
        "speed": [*speed, load],
    }
    write(scores / "scores.json", head(arm, seed) | content)
    asked = {"task": "aqi", "split": "test", "prompt_tokens": 40, "answer_tokens": 9}
    write_lines(
        scores / "samples.jsonl",
        [
            {**asked, "item_id": f"aqi-{i:06d}", "prompt": f"PM2.5 is {i}", "truth": str(i), "correct": right,
             "answer": str(i + wrong), "predicted": float(i + wrong), "abs_error": float(wrong)}
            for i, right in enumerate(correct)
            for wrong in [0 if right else 60]
        ],
    )  # fmt: skip


def precision(kind, correct, same, **changes):
    bits = {"f16": 16.0, "q8_0": 8.5}.get(kind, 4.5)
    return {
        "type": kind, "bytes": int(bits * 1_000_000), "bits_per_weight": bits,
        "tensor_types": {kind.upper(): 15, "F32": 5}, "category_accuracy": sum(correct) / len(correct),
        "correct": sum(correct), "n": len(correct), "answers_equal_to_f16": same, "fallbacks": 0, **changes,
    }  # fmt: skip


def make_quantized(root, arm, seed=0, *, rows):
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
    write_lines(place / "quantized_samples.jsonl", lines)


def verification(backend, mode, **changes):
    adapter, ollama = mode == "adapter", backend == "ollama"
    return {
        "backend": backend, "backend_version": "0.32.0" if ollama else "0.3.36", "mode": mode,
        "form": "plain", "prompts": 20, "rendered": 1.0, "counted": 1.0, "answered": 0.95 if adapter else 1.0,
        "tied": 0.0,
        "equal_to_merged": 0.95 if adapter else None, "perturbed_noticed": True if adapter else None,
        "first_difference": "prompt 3: token 2 | differs\nLikely cause: scale" if adapter else None,
        "gguf_sha256": sha("gguf"), "adapter_sha256": sha("adapter") if adapter else None,
        "server_digest": "sha256:abc" if ollama else None, "stored_sha256": sha("stored") if ollama else None,
        **changes,
    }  # fmt: skip


def make_verified(root, arm, seed=0, *, rows):
    place = root / "verified" / arm / str(seed)
    write(place / "run.json", run_json("verify", arm, seed))
    write(place / "verify.json", {**head(arm, seed), "model_name": f"{arm}_model", "rows": rows})


def make_tree(root):
    """Base right on 40 of 100 items; baseline_lora on 70, with seeds 0 and 1."""
    make_arm(root, "base", correct=[i < 40 for i in range(100)], own=(500, 4_000_000_000))
    for seed in (0, 1):
        make_arm(root, "baseline_lora", seed, correct=[i < 70 for i in range(100)])
    return root


def make_measured(root, arm, seed=0, **changes):
    """Write what stage measure leaves; an arm's used its adapter and the base's measurements."""

    own = arm != "base"
    metrics = table(
        "name split value n",
        ("perplexity", "general", 7.5, 4000), ("alignment_index", "alignment", 0.25, 120),
        *([("update_norm", "weights", 3.5, None), ("drift_cosine", "hidden", 0.01, 4000)] if own else []),
    )  # fmt: skip
    layers = table(
        "name split layer value",
        ("alignment_index", "alignment", "layer 2", 0.2), ("xie_beni", "alignment", "layer 2", None),
        *([("update_norm", "weights", Q, 2.5), ("update_norm", "weights", V, 1.5)] if own else []),
    )  # fmt: skip
    meanings = {
        "perplexity": {"unit": "", "direction": "lower", "description": "exp of the mean loss"},
        "update_norm": {"unit": "", "direction": "none", "description": "‖ΔW‖_F"},
    }
    content = {**head(arm, seed), "metrics": metrics, "metric_defs": meanings, "layers": layers, **changes}
    place = root / "measured" / arm / str(seed)
    used = {}
    if own:
        used[f"adapters/{arm}/{seed}/adapter_model.safetensors"] = sha(f"adapter {arm}/{seed}")
        base = root / "measured/base/0/measured.json"
        used["measured/base/0/measured.json"] = sha(base.read_text(encoding="utf-8"))
    write(place / "run.json", run_json("measure", arm, seed, inputs=used))
    write(place / "measured.json", content)


def make_benchmark(root, arm, seed=0, *, right, task="own_sums"):
    """Write what stage harness leaves; `right` for each item, or the value of a metric that is no share of an item."""
    place, used = root / "measured/lm-eval" / task / arm / str(seed), {}
    if arm != "base":
        used[f"adapters/{arm}/{seed}/adapter_model.safetensors"] = sha(f"adapter {arm}/{seed}")
    listed = isinstance(right, list)
    name, value = ("acc", sum(right) / len(right)) if listed else ("word_perplexity", right)
    asked = {"version": "1.0", "shots": 0, "items": 3, "metric": "acc" if listed else None}
    meaning = {"unit": "share" if listed else "", "direction": "higher", "description": f"{name} as lm-eval has it"}
    metric = {"name": name, "split": f"harness/{task}", "value": value, "n": 3}
    content = {"benchmark": task, "lm_eval": "0.4.13", "tasks": {task: asked}, "metrics": [metric]}
    write(place / "run.json", run_json("harness", arm, seed, inputs=used))
    write(place / "harness.json", {**head(arm, seed), **content, "metric_defs": {name: meaning}})
    lines = [
        {"item_id": f"{task}/{i}-0a1b2c3d", "task": task, "split": f"harness/{task}", "prompt": f"{i} + 1 =",
         "truth": str(i + 1), "answer": str(i + yes), "correct": yes, "credit": float(yes), "metrics": {"acc": yes}}
        for i, yes in enumerate(right if listed else [])
    ]  # fmt: skip
    write_lines(place / "samples.jsonl", lines)


def ledger_line(step, **units):
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
                      "effective_rank_a": 3.5, "ready_g": False},
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
                               "eigenvalues_g": [0.5, 0.25, 0.0], "effective_rank_a": 2.5}}},
]  # fmt: skip


def make_full_tree(root):
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
