"""Models without data: what a base and its adapter weigh, found by building them on torch's meta device."""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.planning.sizes import nf4_bytes
from trainers.models import ModelError, add_lora
from trainers.settings import TrainSettings


@dataclass(frozen=True)
class Weights:
    """Bytes and numbers of a model with its adapter.

    Attributes:
        parameters: Of the base; a tied head counts once.
        base: Bytes of the frozen base, buffers included.
        trained: Numbers in each trained tensor.
    """

    parameters: int
    base: int
    trained: tuple[int, ...]

    @property
    def lora(self) -> int:
        """Numbers in the adapter."""
        return sum(self.trained)


class _Dequantized(torch.autograd.Function):
    """Product with a 4-bit matrix: the whole matrix exists for the moment of either pass (bitsandbytes, MatMul4Bit)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, columns: int) -> Tensor:
        ctx.shape = (rows, columns)
        return x @ x.new_empty(rows, columns).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ gradients[0].new_empty(ctx.shape), None, None


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' Linear4bit: as many bytes, and the same passes."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., d_in] → [.., d_out]."""
        return _Dequantized.apply(x, self.out_features, self.in_features)


def blank_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a configuration on the meta device.

    Raises:
        ModelError: transformers has no causal language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A copy, since the dtype is written into it.
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelError(
            f"expected the configuration of a causal language model, transformers says: {error}"
        ) from error


def with_adapter(config: Any, settings: TrainSettings, dtype: torch.dtype, prepared: bool = True) -> Any:
    """A blank model as it is trained: 4-bit matrices where the settings ask for them, adapters in float32.

    Args:
        config: transformers' configuration of the base.
        settings: Of the arm.
        dtype: That the frozen base is held in.
        prepared: Whether PEFT puts what stays of a 4-bit base into float32, as `prepare_model_for_kbit_training` does
            (Unsloth does not).
    """
    model = blank_model(config, dtype)
    model.config.use_cache = False
    if settings.quantize_base == "nf4":
        # Heads and embeddings stay as they are, as in transformers' own conversion.
        head = model.get_output_embeddings()
        for module in model.modules():
            if type(module) is nn.Linear and module is not head:
                module.__class__ = Linear4bit
        if prepared:
            for module in model.modules():
                if not isinstance(module, Linear4bit):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.float()
    model = add_lora(model, settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def weigh(model: nn.Module) -> Weights:
    """Bytes and numbers of a blank model, tensors that are used twice counted once."""
    held = bytes_of(buffer for buffer in model.buffers())
    parameters, trained = 0, []
    in_4_bit = {id(m.weight) for m in model.modules() if isinstance(m, Linear4bit)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            trained.append(parameter.numel())
        else:
            parameters += parameter.numel()
            held += nf4_bytes(parameter.numel()) if id(parameter) in in_4_bit else parameter.nbytes
    return Weights(parameters, held, tuple(trained))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())
