"""What a reprojection costs: the three modes at equal k on trained adapters, and rank adaptation.

Adapters are trained with GRIT and without any reprojection (3 seeds), then truncated to k directions in each mode.
Reported: relative change of ΔW in the Frobenius norm, of the adapters' outputs ΔW·x on held-out items, and of the
held-out loss. Needs what `make repro` leaves. Run as `python -m benchmarks.grit_reprojection`.
"""

import copy
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import write
from benchmarks._lora_task import Recipe, batches, collate, eval_loss, examples, lora_model
from grit import GRITConfig, GRITManager, GritOptimizer
from grit.rank_events import reproject

STEPS, SEEDS, KS = 300, (0, 1, 2), (12, 8, 4)
RECIPE = Recipe(lr=2e-3, alpha=128.0)
MODES: dict[str, dict[str, Any]] = {
    "balanced": {"reprojection": "balanced"},
    "paper, two-sided": {"reprojection": "paper", "use_two_sided_reprojection": True},
    "paper, one-sided": {"reprojection": "paper", "use_two_sided_reprojection": False},
}


def trained(seed: int, rows: Any) -> tuple[Any, GRITManager]:
    """A model trained with the default GRIT, nothing reprojected, and the manager with its statistics."""
    model = lora_model(RECIPE, seed).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    manager = GRITManager(model, GRITConfig(reprojection="none", rank_shrink="never"))
    inner = torch.optim.AdamW(weights, lr=RECIPE.lr, weight_decay=0.0)
    optimizer = GritOptimizer(inner, manager, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 20, (STEPS - s) / (STEPS - 20)))
    stream = batches(rows, 16, seed)
    for _ in range(STEPS):
        model(**next(stream)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    manager.close()
    return model, manager


def outputs(manager: GRITManager, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """s·B·A·x of every layer on the batch's tokens."""
    seen: list[torch.Tensor] = []

    def keep(pair: Any) -> Any:
        mask = batch["attention_mask"].bool()

        def hook(module: Any, args: Any, h: torch.Tensor) -> None:
            seen.append((pair.scale * (h @ pair.b.T))[mask].double())

        return hook

    handles = [pair.module_a.register_forward_hook(keep(pair)) for pair in manager.pairs()]
    with torch.no_grad():
        manager.model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return seen


def damage(manager: GRITManager, settings: dict[str, Any], valid: Any, loss: float) -> dict[str, float]:
    """Reproject a copy; what changed."""
    twin = copy.deepcopy(manager)
    twin.config = GRITConfig.from_dict({**settings, "rank_shrink": "never"})
    batch = collate(valid[:64])
    before = outputs(manager, batch)
    with torch.no_grad():
        event = reproject(twin, None, shrink=False)
    after = outputs(twin, batch)
    layers = event["layers"].values()
    return {
        "delta_w": statistics.mean(entry["relative_change"] for entry in layers),
        "outputs": statistics.mean(float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)),
        "loss_change": eval_loss(twin.model, valid) - loss,
        "mean_k": statistics.mean(min(entry["k_a"], entry["k_b"]) for entry in layers),
    }


def saved_bytes(model: Any) -> int:
    """Size of the adapter file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def adaptation(manager: GRITManager, valid: Any, loss: float, threshold: float) -> dict[str, float]:
    """Rank adaptation with real shrinking, on a copy."""
    twin = copy.deepcopy(manager)
    twin.config = GRITConfig(rank_adaptation_threshold=threshold, rank_shrink="end")
    count = sum(p.numel() for p in twin.model.parameters() if p.requires_grad)
    size = saved_bytes(twin.model)
    with torch.no_grad():
        twin.finish()
    left = sum(p.numel() for p in twin.model.parameters() if p.requires_grad)
    return {
        "parameters_before": count,
        "parameters_after": left,
        "bytes_before": size,
        "bytes_after": saved_bytes(twin.model),
        "loss_before": loss,
        "loss_after": eval_loss(twin.model, valid),
        "mean_rank": statistics.mean(p.rank for p in twin.pairs()),
    }


def main() -> None:
    """Measure and write the result."""
    torch.set_num_threads(1)
    rows, valid = examples("train"), examples("valid")
    results: list[dict[str, Any]] = []
    adaptations = []
    for seed in SEEDS:
        model, manager = trained(seed, rows)
        loss = eval_loss(model, valid)
        for threshold in (0.99, 0.999):
            adaptations.append({"seed": seed, "threshold": threshold, **adaptation(manager, valid, loss, threshold)})
        for k in KS:
            for mode, settings in MODES.items():
                fixed = {**settings, "enable_rank_adaptation": False, "reprojection_k": k, "min_lora_rank": 1}
                results.append(
                    {"seed": seed, "mode": mode, "k": k, "loss": loss, **damage(manager, fixed, valid, loss)}
                )
    table = Table("k", "mode", "Δ of ΔW", "Δ of outputs", "Δ of held-out loss", title="Mean [min, max] over the seeds")
    for k in KS:
        for mode in MODES:
            chosen = [r for r in results if r["k"] == k and r["mode"] == mode]
            cells = []
            for name in ("delta_w", "outputs", "loss_change"):
                values = [r[name] for r in chosen]
                cells.append(f"{statistics.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
            table.add_row(str(k), mode, *cells)
    Console().print(table)
    for entry in adaptations:
        print({name: round(value, 4) for name, value in entry.items()})
    write("grit_reprojection", "Reprojection at equal k; rank adaptation", results=results, adaptation=adaptations)


if __name__ == "__main__":
    main()
