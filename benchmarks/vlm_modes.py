"""The probe's verdict on every mode of GRIT-VLM: type of optimizer × Fisher estimate × what is switched on.

Each mode trains LoRA (r = 4) on a tiny Idefics3 with random weights: pictures of three colors, whose questions are
answered by the color. The probe samples every other step and judges against plain AdamW with the same raw gradients.
A projection keeps half of the directions, counted as each estimate counts them: at the documents' budgets (32 to 96)
estimate kfac of rank 16 would keep everything, and diagonal 1 to 2 in a thousand.

`python -m benchmarks.vlm_modes` prints the table and writes benchmarks/results/vlm_modes.json.
"""

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks._harness import show, write
from grit_vlm import GRITLoRAConfig, VLMGRITAdapter, create_grit_optimizer
from grit_vlm.config.model_configs import ESTIMATES
from grit_vlm.optimizers.natural_gradient import MODES
from probes import Probe, Verdict, judge

RANK, HIDDEN, IMAGE, PATCH, IMAGE_TOKEN = 4, 32, 16, 8, 1
COLORS = 3
SWITCHES = {
    "natural gradient": (True, False),
    "projection": (False, True),
    "both": (True, True),
    "neither": (False, False),
}


class Mode(NamedTuple):
    """One way to train."""

    kind: str  # of optimizer
    estimate: str
    natural: bool  # whether gradients are preconditioned
    projection: bool  # whether updates are projected


def build_model() -> Any:
    """An Idefics3 with two blocks on either side."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    torch.manual_seed(0)
    shape = dict(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2, num_attention_heads=2)
    text = dict(num_key_value_heads=1, vocab_size=32, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    config = Idefics3Config(
        vision_config={**shape, "image_size": IMAGE, "patch_size": PATCH},
        text_config={**shape, **text, "model_type": "llama"},
        image_token_id=IMAGE_TOKEN,
        scale_factor=1,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config)


def batch(step: int, size: int = 8) -> dict[str, Any]:
    """Pictures, a question of four tokens, and the color as an answer."""
    generator = torch.Generator().manual_seed(step)
    color = torch.randint(COLORS, (size,), generator=generator)
    pixels = 0.3 * torch.randn(size, 1, 3, IMAGE, IMAGE, generator=generator)
    pixels[torch.arange(size), 0, color] += 1.0
    question = torch.randint(8, 32, (size, 4), generator=generator)
    pictures = torch.full((size, (IMAGE // PATCH) ** 2), IMAGE_TOKEN)
    ids = torch.cat([pictures, question, 4 + color[:, None]], 1)
    labels = torch.where(torch.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def budget(estimate: str) -> int:
    """Half of a layer's directions."""
    return RANK // 2 if estimate == "kfac" else RANK * 2 * HIDDEN // 2


def rate(mode: Mode) -> float:
    """Learning rate; natural gradients without Adam are as long as the Fisher information is small."""
    if MODES[mode.kind][0] != "sgd":
        return 3e-3
    return 1e-6 if mode.natural and mode.kind == "grit_sgd" else 1e-1


def judge_mode(mode: Mode, steps: int, start_b: float = 0.0) -> tuple[Verdict, dict[str, float]]:
    """Train for some steps, and judge.

    Args:
        mode: How.
        steps: Of the optimizer.
        start_b: Standard deviation of B at the start; LoRA's is 0.

    Returns:
        The verdict, and first and last loss (means over a fifth of the steps) and the share of A's directions among
        those that a projection kept at the end.
    """
    config = GRITLoRAConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        fisher_approximation=mode.estimate,
        fisher_min_samples=32,
        fisher_update_freq=5,
        enable_natural_gradient=mode.natural,
        enable_projection=mode.projection,
        projection_budget_start=budget(mode.estimate),
        projection_budget_end=budget(mode.estimate),
    )
    model = build_model()
    attention = {part: [f"model.{part}.*.self_attn.{p}_proj" for p in "qv"]
                 for part in ("vision_model.encoder.layers", "text_model.layers")}  # fmt: skip
    vision, text = attention.values()
    torch.manual_seed(0)
    adapter = VLMGRITAdapter(model, config, vision_layers=vision, text_layers=text, cross_modal_layers=[])
    for layer in adapter.grit_layers.values():
        torch.nn.init.normal_(layer.lora_B, std=start_b)
    optimizer = create_grit_optimizer(
        adapter.get_trainable_parameters(),
        mode.kind,
        adapter.get_grit_layers(),
        lr=rate(mode),
        total_steps=steps,
    )
    losses = []
    with Probe(adapter.model, optimizer, every=2, readings=adapter.manager.readings) as probe:
        for step in range(steps):
            loss = adapter.model(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    adapter.manager.close(check=False)
    part = max(1, steps // 5)
    facts = {"loss_first": sum(losses[:part]) / part, "loss_last": sum(losses[-part:]) / part}
    if mode.projection:
        kept = [layer.fisher_matrix.keeps(layer.projection_budget or 1) for layer in adapter.grit_layers.values()]
        of_a, of_all = sum(float(k["A"].sum()) for k in kept), sum(float(k[s].sum()) for k in kept for s in "AB")
        facts["kept_of_a"] = of_a / of_all
    return judge(probe), facts


COLUMNS = {
    "kind": "optimizer", "estimate": "estimate", "switched_on": "switched on", "verdict": "verdict",
    "diagnosis": "diagnosis", "angle_to_shadow": "° to AdamW", "lr_ratio": "length / AdamW's",
    "cos_raw_preconditioned": "cos(raw, preconditioned)", "loss_first": "loss from", "loss_last": "to",
    "kept_of_a": "kept of A",
}  # fmt: skip


def cell(key: str, row: dict[str, Any]) -> str:
    value = row.get(key)
    return f"{value:.3g}" if isinstance(value, float) else "-" if value is None else str(value)


def main() -> None:
    """Judge every mode, print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    rows = []
    modes = [(on, Mode(k, e, *pair)) for k in MODES for e in ESTIMATES for on, pair in SWITCHES.items()]
    for switched_on, mode in tqdm(modes, desc="modes"):
        verdict, facts = judge_mode(mode, steps)
        shown = ("angle_to_shadow", "lr_ratio", "cos_raw_preconditioned", "coverage", "anisotropy", "basis_rotation")
        rows.append(
            {
                "kind": mode.kind,
                "estimate": mode.estimate,
                "switched_on": switched_on,
                "verdict": verdict.verdict,
                "diagnosis": verdict.diagnosis,
                "reason": verdict.reason,
                "learning_rate": rate(mode),
                **{name: verdict.numbers[name] for name in shown},
                **facts,
            }
        )
    columns = {title: partial(cell, key) for key, title in COLUMNS.items()}
    show("GRIT-VLM", columns, rows, width=200)
    write("vlm_modes", "The probe's verdict on every mode of GRIT-VLM", rows=rows, steps=steps)


if __name__ == "__main__":
    main()
