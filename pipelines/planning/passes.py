"""What a forward and backward pass needs, found by doing it on tensors without data.

A blank model (see `blank`) runs on fake tensors (torch's FakeTensorMode: shapes and dtypes are those of the real pass,
bytes are not there), and a meter adds up what is alive at any moment. So nothing has to be known of an architecture,
and an 8B model takes seconds and no memory. Kernels' own scratch space is not seen.

Deep models are run with few layers, twice: layers are alike, so that bytes grow by the same with each.
"""

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pipelines.planning.sizes import FP32
from trainers.models import ModelError
from trainers.settings import TrainSettings

LOGITS, ATTENTION, REST = "logits", "attention", "activations"
# What TRL's fused head on a GPU has at once of the logits: 4096 tokens by 32768 pieces, and their gradient (trl 1.15,
# kernels/chunked_logprob.py).
_HEAD_TOKENS, _HEAD_PIECES = 4096, 32768
# Layers of the two runs that stand for a deeper model.
_FEW, _MORE = 4, 7


class Meter(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations make, as long as they live. Use in a `with` block.

    Attributes:
        now, peak: Bytes alive, and the most there were.
        at_peak: Bytes by kind at that moment: logits (a dimension as long as the vocabulary), attention (scores and
            masks [.., tokens, tokens]), activations (all else).
    """

    def __init__(self, vocabulary: int = 0, tokens: int = 0) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._vocabulary, self._tokens = vocabulary, tokens
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def know(self, model: nn.Module) -> None:
        """Leave a model's own tensors out."""
        for tensor in [*model.parameters(), *model.buffers()]:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size, shape = storage.nbytes(), tuple(tensor.shape)
        square = len(shape) >= 3 and shape[-2:] == (self._tokens, self._tokens)
        kind = LOGITS if len(shape) >= 2 and self._vocabulary in shape[-2:] else ATTENTION if square else REST
        self._seen[storage] = size
        weakref.finalize(storage, self._gone, size, kind)
        self.now += size
        self._kinds[kind] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, Counter(self._kinds)

    def _gone(self, size: int, kind: str) -> None:
        self.now -= size
        self._kinds[kind] -= size


@dataclass(frozen=True)
class Passes:
    """Most bytes of a pass, and by kind at that moment; see `Meter`."""

    peak: int
    kinds: dict[str, int]

    @classmethod
    def of(cls, meter: Meter) -> "Passes":
        """What a meter saw."""
        return cls(meter.peak, {kind: meter.at_peak[kind] for kind in (LOGITS, ATTENTION, REST)})

    def grown(self, more: "Passes", steps: float) -> "Passes":
        """On the line through this and `more`, `steps` times as far from this."""

        def line(a: int, b: int) -> int:
            return round(a + steps * (b - a))

        return Passes(line(self.peak, more.peak), {k: line(v, more.kinds[k]) for k, v in self.kinds.items()})


def _to_fake(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of blank ones, in a FakeTensorMode; ties stay ties."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                like = made.setdefault(
                    id(parameter),
                    nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu"), parameter.requires_grad
                    ),
                )
                module._parameters[name] = like
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def passes(model: Any, settings: TrainSettings, batch: int, tokens: int, *, train: bool, fused_head: bool) -> Passes:
    """Run a blank model forward, and backward where it trains, on a batch without data.

    The loss is the model's own cross-entropy over all logits, which is what a CPU computes. With gradient accumulation
    the second pass counts, beside the gradients of the first.

    Args:
        model: From `with_adapter`; holds fake tensors afterwards.
        settings: Of the arm.
        batch: Items.
        tokens: Each.
        train: False: a forward pass without gradients.
        fused_head: Logits never exist as a whole, as in TRL's and Unsloth's heads on a GPU.

    Raises:
        ModelError: the model does what tensors without data cannot do, e.g. choose experts by their values; or its
            passes fail, e.g. since sizes of its configuration do not fit together.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    kind = model.config.get_text_config().model_type
    try:
        meter = _metered(model, settings, batch, tokens, train, fused_head)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"a model of type {kind!r} cannot be planned: its passes depend on values ({error})"
        ) from error
    except RuntimeError as error:
        raise ModelError(
            f"a model of type {kind!r} cannot be planned: transformers' forward or backward pass failed on tensors "
            f"without data: {error}"
        ) from error
    found = Passes.of(meter)
    if not fused_head:
        return found
    vocabulary = model.config.get_text_config().vocab_size
    head = 2 * FP32 * min(batch * tokens, _HEAD_TOKENS) * min(vocabulary, _HEAD_PIECES)
    return Passes(found.peak + head, {**found.kinds, LOGITS: found.kinds[LOGITS] + head})


def _metered(model: Any, settings: TrainSettings, batch: int, tokens: int, train: bool, fused_head: bool) -> Meter:
    from torch._subclasses.fake_tensor import FakeTensorMode

    vocabulary = model.config.get_text_config().vocab_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(model)
        model.train(train)
        if settings.gradient_checkpointing and train:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        meter = Meter(vocabulary, tokens)
        meter.know(model)
        mixed = torch.autocast("cpu", torch.bfloat16) if settings.precision == "bf16" else contextlib.nullcontext()
        with meter, contextlib.nullcontext() if train else torch.no_grad():
            for _ in range(1 if settings.gradient_accumulation == 1 or not train else 2):
                names = ("input_ids", "attention_mask", "labels")
                inputs = {name: torch.ones(batch, tokens, dtype=torch.long) for name in names}
                with mixed:
                    loss = _headless_loss(model, inputs) if fused_head else _loss(model, inputs)
                if train:
                    loss.backward()
                del loss
    return meter


def passes_of(config: Any, make: Callable[[Any], Any], settings: TrainSettings, **options: Any) -> Passes:
    """`passes` of a whole model; of a deep one by two shallow ones.

    Args:
        config: transformers' configuration.
        make: Configuration → blank model.
        settings: Of the arm.
        options: Of `passes`.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MORE + 1 or len(set(getattr(config, "layer_types", None) or [0])) > 1:
        return passes(make(config), settings, **options)
    few, more = (passes(make(_shallow(config, n)), settings, **options) for n in (_FEW, _MORE))
    return few.grown(more, (layers - _FEW) / (_MORE - _FEW))


def _shallow(config: Any, layers: int) -> Any:
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = layers
    if getattr(smaller, "layer_types", None):
        smaller.layer_types = smaller.layer_types[:layers]
    return smaller


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    if outputs.logits.dtype != torch.float32:  # accelerate hands all outputs on in float32
        outputs.logits = outputs.logits.float()
    return outputs.loss


def _headless_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    inputs.pop("labels")
    hidden = model.get_base_model().base_model(**inputs).last_hidden_state
    return hidden.float().square().mean()
