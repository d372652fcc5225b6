"""Builds results with everything that the page can show, and with texts that try to break out of it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from tests.db.result_tree import (
    WRAPPED,
    edit,
    make_arm,
    make_measured,
    make_quantized,
    make_verified,
    verification,
    write,
    write_lines,
)

ITEMS, KEPT_ITEMS = 120, 40
SEEDS = (0, 1)
RIGHT = {"base": 40, "baseline_lora": 70, "hybrid_grit": 74, "pure_grit": 100}
"""Of `ITEMS`, with seed 0."""
LAYERS = tuple(f"layers.{block}.{name}" for block in range(3) for name in ("self_attn.q_proj", "mlp.down_proj"))
EVIL_ARM = "x<img src=y onerror=pwned=1>\"'&"
EVIL = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=1</script>",
    "<img src=y onerror='window.pwned=1'>",
    "\"><b onmouseover=window.pwned=1>'quoted'",
    "line\u2028separator\u2029 &lt;b&gt; &amp; <!-- comment",
    "{{ 7 * 7 }} {% raw %} ${pwned=1} \\u003cscript\\u003e",
    "\u0000zero \ud7ff \x1b[31mred 🌡️ ü",
)


def make_page_tree(root: Path) -> Path:
    """Base and three arms with two seeds each, measured in every way."""
    add_arm(root, "base", 0, RIGHT["base"])
    for arm in ("baseline_lora", "hybrid_grit", "pure_grit"):
        for seed in SEEDS:
            add_arm(root, arm, seed, RIGHT[arm] - 3 * seed)
            add_logs(root, arm, seed)
            add_measured(root, arm, seed)
    own, fewer = ([least <= i < RIGHT["pure_grit"] for i in range(ITEMS)] for least in (0, 6))
    make_quantized(root, "pure_grit", rows={"f16": (own, 1.0), "q4_K_M": (fewer, 0.9)})
    make_verified(root, "pure_grit", rows=[verification("llama_cpp", m) for m in ("merged", "adapter")])
    return root


ODD_SEEDS = {"baseline_lora": (3, 5, 7), "hybrid_grit": (2,), "pure_grit": (3, 5, 7)}
"""Seeds that are not positions; the second arm shares none with the others."""


def make_odd_tree(root: Path) -> Path:
    """Arms that are worse than the base; one has no partner, one diverged and did not train as it claims."""
    add_arm(root, "base", 0, 110)
    for arm, right in (("baseline_lora", 20), ("hybrid_grit", 60), ("pure_grit", 70)):
        for seed in ODD_SEEDS[arm]:
            add_arm(root, arm, seed, right)
            add_logs(root, arm, seed)
            add_measured(root, arm, seed)
    for seed in ODD_SEEDS["pure_grit"]:
        curve = [{"step": step, "loss": 3.0 if step < 4 else math.nan} for step in range(1, 200)]
        curve.append({"step": 9, "eval_loss": math.inf})
        write(root / f"adapters/pure_grit/{seed}/loss_history.json", curve)
        place = root / f"verdicts/pure_grit/{seed}/verdict.json"
        verdict = json.loads(place.read_text(encoding="utf-8"))
        verdict["readings"][0] |= {"verdict": "fail", "diagnosis": "unstable: the losses are not finite"}
        write(place, verdict | {"verdict": "unstable", "as_claimed": False})
        measured = [metric | {"value": None} for metric in _metrics("pure_grit", seed)]
        edit(root / f"measured/pure_grit/{seed}/measured.json", metrics=measured)
    return root


def add_arm(root: Path, arm: str, seed: int, right: int, answer: str = "") -> None:
    """One arm with test and retention items; which ones it gets right follows from its name."""
    order = random.Random(arm).sample(range(ITEMS), ITEMS)
    correct = [order[i] < right for i in range(ITEMS)]
    curve = [{"step": s, "loss": 3 * math.exp(-s / 200) + 0.05 * ((s * 7 + seed) % 5)} for s in range(1, 1001)]
    curve += [{"step": s, "eval_loss": 3 * math.exp(-s / 200) + 0.1} for s in range(100, 1001, 100)]
    make_arm(root, arm, seed, correct=correct, history=curve)
    place = root / "scores" / arm / str(seed) / "samples.jsonl"
    lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    for line, text in zip(lines, EVIL, strict=False):
        line["answer"] = text
    lines[len(EVIL)]["prompt"] = f"prompt {EVIL[1]}"
    for line in lines[len(EVIL) + 1 :]:
        line["answer"] = answer or line["answer"]
    for i in range(KEPT_ITEMS):
        kept = i < KEPT_ITEMS * 0.8
        lines.append({**lines[-1], "item_id": f"kept-{i:03d}", "task": ("addition", "sorting")[i % 2],
                      "split": "retention", "prompt": f"{i} + {i} =", "truth": str(2 * i),
                      "answer": str(2 * i if kept else 0), "correct": kept, "predicted": None,
                      "abs_error": None})  # fmt: skip
    for line in [one for at, one in enumerate(lines) if at % 2 == 0]:  # asked again: a newline makes it wrong
        for form in ("newline", "blank"):
            right = line["correct"] and (form == "blank" or line["split"] == "retention")
            lines.append({**line, "item_id": f"{line['item_id']}/{form}", "split": "paraphrased", "correct": right})
    write_lines(place, lines)


def add_logs(root: Path, arm: str, seed: int) -> None:
    """The probe's ledger and GRIT's log, over several steps."""
    folder = root / "adapters" / arm / str(seed)
    grit = arm != "baseline_lora"

    def unit(layer: int, step: int) -> dict[str, Any]:
        angle = (40 + 5 * layer + step / 100 + seed) if grit else 1e-5
        return {"angle": angle, "cos_raw_step": math.cos(math.radians(angle)), "cos_raw_inner": 0.9, "lr_ratio": 1.2}

    ledger: list[Any] = [
        {"step": step, "loss": 2.0, "units": {WRAPPED + name: unit(i, step) for i, name in enumerate(LAYERS)}}
        for step in range(0, 1000, 100)
    ]
    write_lines(folder / "probe_ledger.jsonl", [*ledger, {"events": {"steps": 1000}}])
    if not grit:
        return
    log: list[Any] = [
        {"step": step, "kind": "spectra", "layers": {WRAPPED + name: {
            "r": 8, "k": 8 - i, "samples": 900.0, "effective_rank_a": 5.0 - i / 3, "effective_rank_g": 3.0,
            "eigenvalues_a": [2.0 * (0.4 + i / 20) ** n for n in range(8)],
            "eigenvalues_g": [1e-3 * 0.1 ** (n + step / 500) for n in range(8)] + [0.0, "inf"],
        } for i, name in enumerate(LAYERS)}}
        for step in (0, 500, 1000)
    ]  # fmt: skip
    ranks = {
        WRAPPED + name: {"base_r": 8, "r": 8 - i, "final_k_a": 8 - i, "final_k_b": 8 - i}
        for i, name in enumerate(LAYERS)
    }
    write_lines(folder / "grit_log.jsonl", [*log, {"step": 1000, "kind": "final", "ranks": ranks}])


def add_measured(root: Path, arm: str, seed: int) -> None:
    if not (root / "measured/base/0").exists():
        make_measured(root, "base", metrics=_metrics("base", 0), layers=[])
    layers = [{"name": "rank", "split": "weights", "layer": name, "value": 8.0 - i} for i, name in enumerate(LAYERS)]
    make_measured(root, arm, seed, metrics=_metrics(arm, seed), layers=layers)


def _metrics(arm: str, seed: int) -> list[dict[str, Any]]:
    number = list(RIGHT).index(arm) + seed / 10
    index = {"": 0.8 + number / 10, "_low": 0.7 + number / 10, "_high": 0.9 + number / 10}
    found = {("general", "perplexity"): 5 + number, ("general", "loss"): 1.6 + number / 10}
    found |= {("alignment", f"alignment_index{end}"): value for end, value in index.items()}
    found |= {("alignment", f"alignment_null_{name}"): v for name, v in (("mean", 0.1), ("low", 0.05), ("high", 0.2))}
    found |= {
        ("alignment", "alignment_p_value"): 0.001,
        ("alignment", "calinski_harabasz"): 0.3,
        ("alignment", "xie_beni"): 0.5,
    }
    if arm != "base":
        found |= {("weights", "update_norm"): 3 + number, ("weights", "effective_rank"): 6 - number / 2,
                  ("hidden", "drift_relative"): 0.1 * number}  # fmt: skip
        found |= {("alignment", f"delta_alignment_index{end}"): value - 0.8 for end, value in index.items()}
    return [{"name": name, "split": split, "value": value, "n": 100} for (split, name), value in found.items()]


def make_evil_tree(root: Path) -> Path:
    """Two arms whose names, answers and errors are markup."""
    add_arm(root, "base", 0, 40, answer=EVIL[2])
    add_arm(root, EVIL_ARM, 0, 90, answer=EVIL[3])
    edit(root / "scores" / EVIL_ARM / "0" / "scores.json", model_name=EVIL[1])
    verdict = root / "verdicts" / EVIL_ARM / "0" / "verdict.json"
    content = json.loads(verdict.read_text(encoding="utf-8"))
    content["readings"][0]["diagnosis"] = f"effective: {EVIL[2]}"
    write(verdict, content)
    make_verified(root, EVIL_ARM, rows=[verification("llama_cpp", "merged", first_difference=EVIL[3], answered=0.5)])
    return root


PLAIN = {
    "rank": 16,
    "warmup_steps": 20,
    "optimizer": "adamw_torch",
    "preserve": {"method": "none", "strength": 1.0, "kl": None},
}
DISTILL = {"preserve": {"method": "distill", "strength": 1.0, "kl": None}}
FOUR = {
    "baseline_lora": (70, 2, 0.43, 3.0, {}),
    "baseline_lora_preserved": (66, 30, 0.435, 0.04, {"preserve": {"method": "distill", "strength": 1.0, "kl": 0.05}}),
    "hybrid_grit": (75, 27, 0.41, 0.06, {**DISTILL, "grit": {"mode": "eigen_adamw"}}),
    "pure_grit": (74, 26, 0.415, 0.07, {**DISTILL, "grit": {"mode": "eigen_adamw"}}),
}
"""Arm → right of `ITEMS`, right of `KEPT_ITEMS`, evaluation loss, KL to the base, and what it sets differently."""


def make_preserved_tree(root: Path, arms: dict[str, Any] = FOUR) -> Path:
    """Three seeds of arms of which some are preserved; the base has 32 of its retention items right."""
    for arm, (right, kept, loss, kl, own) in {"base": (40, 32, 0, 0, {}), **arms}.items():
        for seed in (0,) if arm == "base" else (0, 1, 2):
            add_arm(root, arm, seed, right + 2 * seed)
            place = root / "scores" / arm / str(seed) / "samples.jsonl"
            lines = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
            for i, line in enumerate(line for line in lines if line["split"] == "retention"):
                line["correct"] = i < kept - seed
            write_lines(place, lines)
            if arm != "base":
                curve = [{"step": s, "loss": loss + math.exp(-s / 100)} for s in range(10, 501, 10)]
                for step in (125, 250, 375, 500):
                    curve.append({"step": step, "eval_loss": loss + math.exp(-step / 90) + seed * len(arm) % 3 * 0.003})
                    curve.append({"step": step, "eval_kl": kl * (step / 500) ** 0.3, "preserve_strength": 1.0})
                folder = root / "adapters" / arm / str(seed)
                write(folder / "loss_history.json", curve)
                last = {name: next(e[name] for e in reversed(curve) if name in e) for name in ("eval_loss", "eval_kl")}
                said = {"final_eval_loss": last["eval_loss"], "final_kl": last["eval_kl"], "steps": 500,
                        "train_seconds": 65 if "grit" in own else 50}  # fmt: skip
                tuned = {} if arm == "baseline_lora_preserved" else {"tuned": tuning(arm)}
                edit(folder / "run.json", params={"train": PLAIN | own, **tuned}, extra=said)
    return root


def tuning(arm: str) -> dict[str, Any]:
    """What stage tune found: the lowest loss at the middle rate, for hybrid_grit at the highest; one try diverged."""
    best = 4e-3 if arm == "hybrid_grit" else 2e-3
    grid = {"learning_rate": [1e-3, 2e-3, 4e-3], "alpha": [16, 32]}
    runs = [
        {"settings": {"learning_rate": rate, "alpha": alpha}, "seconds": 10.0,
         "evaluation_loss": None if (rate, alpha) == (1e-3, 16) else 0.4 + 10 * abs(rate - best) + alpha / 1e4}
        for rate in grid["learning_rate"] for alpha in grid["alpha"]
    ]  # fmt: skip
    chosen = {"learning_rate": best, "alpha": 16}
    borders = ["alpha"] if arm != "hybrid_grit" else ["learning_rate", "alpha"]
    return {"arm": arm, "grid": grid, "seed": 100, "steps": 75, "runs": runs, "chosen": chosen, "at_border": borders}
