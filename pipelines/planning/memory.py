"""Bytes in tensors while an arm trains: base, adapter, optimizer, GRIT, probe, passes."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.planning.blank import Weights, bytes_of, weigh, with_adapter
from pipelines.planning.passes import passes_of
from pipelines.planning.sizes import FP32, adam_bytes
from trainers.settings import TrainSettings

# Numbers a trained one that the probe keeps (two moments and the raw gradient), and that it may need at a sampled step;
# see `probes.Probe`.
_PROBE_KEEPS, _PROBE_SAMPLES = 3, 8


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes in tensors while an arm trains.

    Attributes:
        weights: Of the model.
        kept: What is there all the time beside the base: name → bytes.
        passes: Most of a forward and backward pass, beyond what is kept.
        kinds: `passes` by kind (logits, attention, activations).
        evaluation: Most of a forward pass over an evaluation batch.
        step: Most of an optimizer step, gradients included.
    """

    weights: Weights
    kept: dict[str, int]
    passes: int
    kinds: dict[str, int]
    evaluation: int
    step: int

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return self.weights.base + sum(self.kept.values()) + max(self.passes, self.evaluation, self.step)


def grit_bytes(model: nn.Module, settings: TrainSettings) -> int:
    """Bytes of GRIT's factors, bases and moments, and of what its hooks add up, on a blank model."""
    from grit import GRITConfig
    from grit.capture import HookCapture
    from grit.layers import find_pairs, group_pairs
    from grit.state import GroupState

    config = GRITConfig.from_dict({"lora_rank": settings.rank, **(settings.grit or {})})
    groups = group_pairs(find_pairs(model))
    held = [t for group in groups for t in GroupState.fresh(group, config).t.values()]
    if config.capture != "gradients":
        capture = HookCapture(model, groups, config.normalize_delta)
        held += [t for sums in capture.sums for t in vars(sums).values() if isinstance(t, Tensor)]
        capture.close()
    return bytes_of(held)


def training_memory(
    config: Any,
    settings: TrainSettings,
    *,
    tokens: int,
    valid_tokens: int,
    on_gpu: bool,
    grit: bool,
    unsloth: bool = False,
) -> TrainingMemory:
    """What an arm needs while it trains.

    Args:
        config: transformers' configuration of the base.
        settings: Of the arm.
        tokens: Of the longest item to learn from.
        valid_tokens: Of the longest item of the evaluation loss.
        on_gpu: Whether it trains on one: bf16 weights, no whole logits.
        grit: Whether GRIT steps.
        unsloth: Whether Unsloth loads the base.
    """
    dtype = torch.bfloat16 if on_gpu and settings.precision == "bf16" else torch.float32

    def blank(of: Any) -> Any:
        return with_adapter(of, settings, dtype, prepared=not unsloth)

    model = blank(config)
    weights = weigh(model)
    lora = FP32 * weights.lora
    mode = (settings.grit or {}).get("mode", "eigen_adamw") if grit else None
    optimizer = adam_bytes(settings.optimizer, weights.trained)
    if mode == "eigen_adamw":  # its moments are among GRIT's state
        optimizer = 0
    elif mode == "sgd":
        optimizer = lora  # momentum
    kept = {
        "adapter": lora,
        "optimizer state": optimizer,
        "GRIT": grit_bytes(model, settings) if grit else 0,
        "probe": _PROBE_KEEPS * lora,
    }
    run = functools.partial(passes_of, config, blank, settings, batch=settings.batch_size, fused_head=on_gpu)
    trained, asked = run(tokens=tokens, train=True), run(tokens=valid_tokens, train=False)
    # Gradients; what AdamW or GRIT's rotation makes on the way (three stacks); a sampled step of the probe.
    step = (1 + 3 + _PROBE_SAMPLES) * lora
    return TrainingMemory(weights, kept, trained.peak, trained.kinds, asked.peak, step)
