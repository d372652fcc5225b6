"""A tiny LoRA model and a preconditioner as people write them in notebooks: what the fault catalogue trains.

`NotebookKFAC` is right as it stands; each fault of `benchmarks._faults` is one thing done differently.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from probes import LayerReading, Probe, ProbeCallback, Verdict, judge

TARGETS = ["q_proj", "v_proj", "up_proj"]
STEPS, SAMPLES, BATCH, LENGTH, VOCABULARY = 24, 6, 4, 12, 32
MIN_TOKENS = 64


@dataclass(frozen=True)
class Setting:
    """What every run of the catalogue is repeated with.

    Attributes:
        seed: Of the weights and the batches.
        lr: Learning rate of the Adam family; others scale it.
    """

    seed: int = 0
    lr: float = 1e-2


def tiny_llama(seed: int, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A random Llama of two layers, hidden size 32, with LoRA of rank 4 on three of its projections.

    Args:
        seed: Of all weights.
        dtype: Of all weights.
        lora: Further settings of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        use_cache=False,
    )
    lora_config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora})
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=0.3)  # else logits are too small to learn, or to diverge
    model = get_peft_model(base, lora_config).to(dtype)
    model.train()
    return model


def example(generator: torch.Generator, padded: bool) -> dict[str, Tensor]:
    """Counting in steps of one or two over eight tokens; `padded`: the last third is padding."""
    start, stride = (int(torch.randint(1, high, (), generator=generator)) for high in (9, 3))
    ids = (start + stride * torch.arange(LENGTH)) % 8 + 1
    mask = torch.ones_like(ids)
    if padded:
        mask[LENGTH * 2 // 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def batches(seed: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches [BATCH, LENGTH]; half of the items are padded."""
    generator = torch.Generator().manual_seed(1000 + seed)
    while True:
        items = [example(generator, padded=i % 2 == 0) for i in range(BATCH)]
        yield {key: torch.stack([item[key] for item in items]) for key in items[0]}


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """What is trained."""
    return [p for p in model.parameters() if p.requires_grad]


# Fused kernels


class FusedLora(torch.autograd.Function):
    """y = W x + s·B A x, reading the weights themselves, as fused kernels do: no module's hook fires."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """X [items, tokens, d_in] → [items, tokens, d_out]."""
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        return x @ w.mT + (x @ a.mT) @ b.mT * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """Gradients of x, A and B."""
        x, w, a, b = ctx.saved_tensors
        rows, out = x.flatten(0, 1), g.flatten(0, 1) * ctx.scale
        return g @ w + (g @ b) @ a * ctx.scale, None, (out @ b).mT @ rows, out.mT @ (rows @ a.mT), None


def fuse(model: Any) -> None:
    """Let every LoRA layer compute by `FusedLora`."""
    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            module.forward = partial(_fused, module)


def _fused(module: Any, x: Tensor) -> Any:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return FusedLora.apply(x, module.base_layer.weight, a, b, module.scaling["default"])


# The preconditioner


@dataclass
class Layer:
    """One LoRA layer: moving averages Σ_a, Σ_g [r, r] and their inverses.

    Attributes:
        a: A [r, d_in].
        b: B [d_out, r].
        samples: Tokens counted.
        sigma: "a": E[h hᵀ], "g": E[δ δᵀ].
        inverse: Of both, damped; empty until there is one.
        damping: λ of both.
    """

    a: nn.Parameter
    b: nn.Parameter
    samples: float = 0.0
    sigma: dict[str, Tensor] = field(default_factory=dict)
    inverse: dict[str, Tensor | None] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether gradients are multiplied."""
        return bool(self.inverse)


class NotebookKFAC:
    """K-FAC in rank space: ∇A ← Σ_g⁻¹ ∇A, ∇B ← ∇B Σ_a⁻¹, with hooks on the lora_A modules.

    Attributes:
        layers: Name of the LoRA module → its state.
        accumulation: Micro-batches of a step.
    """

    refresh_every = 5
    decay = 0.8
    relative_damping = 1e-2

    def __init__(self, model: nn.Module, accumulation: int = 1):
        """Attach the hooks."""
        self.accumulation = accumulation
        self.layers: dict[str, Layer] = {}
        self.calls = 0
        self._mask: Tensor | None = None
        self._labelled = 1
        model.register_forward_pre_hook(self._see_batch, with_kwargs=True)
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A and self.wanted(name):
                a, b = module.lora_A["default"], module.lora_B["default"]
                self.layers[name] = Layer(a.weight, b.weight)
                a.register_forward_hook(self._hook(name))

    def wanted(self, name: str) -> bool:
        """Whether this layer is preconditioned."""
        return True

    def _see_batch(self, module: nn.Module, args: Any, batch: dict[str, Any]) -> None:
        self._mask, self._labelled = batch["attention_mask"], int((batch["labels"][:, 1:] != -100).sum())

    def _hook(self, name: str) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, h: Tensor) -> None:
            if h.requires_grad:  # counted in the backward pass, once, however often the forward pass runs
                h.register_hook(lambda delta: self.collect(self.layers[name], h.detach(), delta))

        return forward

    def attended(self) -> Tensor:
        """Positions that count [items, tokens]."""
        if self._mask is None:
            raise RuntimeError("no batch has been seen")
        return self._mask.bool()

    def scaled(self, delta: Tensor) -> Tensor:
        """δ with the loss's mean undone."""
        return delta * (self._labelled * self.accumulation)

    def collect(self, layer: Layer, h: Tensor, delta: Tensor) -> None:
        """One micro-batch's statistics."""
        rows = self.attended()
        self.add(layer, "a", h[rows])
        self.add(layer, "g", self.scaled(delta)[rows])
        layer.samples += float(rows.sum())

    def add(self, layer: Layer, side: str, rows: Tensor) -> None:
        """Into the moving average; rows [tokens, r]."""
        new = rows.float().mT @ rows.float() / len(rows)
        old = layer.sigma.get(side)
        layer.sigma[side] = new if old is None else self.decay * old + (1 - self.decay) * new

    def damping(self, sigma: Tensor) -> float:
        """λ."""
        return self.relative_damping * float(sigma.diagonal().mean())

    def inverse(self, sigma: Tensor, damping: float) -> Tensor | None:
        """(Σ + λI)⁻¹."""
        return torch.linalg.inv(sigma + damping * torch.eye(len(sigma)))

    def trusted(self, layer: Layer) -> bool:
        """Whether there is enough to invert: B starts at zero, and δ with it."""
        return layer.samples >= MIN_TOKENS and all(bool(sigma.any()) for sigma in layer.sigma.values())

    def update_inverses(self) -> None:
        """Of every layer that has seen enough."""
        for layer in self.layers.values():
            if self.trusted(layer):
                for side, sigma in layer.sigma.items():
                    layer.damping[side] = self.damping(sigma)
                    layer.inverse[side] = self.inverse(sigma, layer.damping[side])

    @torch.no_grad()
    def precondition(self) -> None:
        """Multiply every gradient, in place."""
        for layer in self.layers.values():
            for parameter, side in ((layer.a, "g"), (layer.b, "a")):
                inverse = layer.inverse.get(side)
                if parameter.grad is not None and inverse is not None:
                    parameter.grad.copy_(self.product(parameter.grad, inverse, side))

    def product(self, gradient: Tensor, inverse: Tensor, side: str) -> Tensor:
        """Gradient of A [r, d_in] times Σ_g⁻¹, or of B [d_out, r] times Σ_a⁻¹."""
        matrix = inverse.to(gradient.dtype)
        return matrix @ gradient if side == "g" else gradient @ matrix

    def apply(self) -> None:
        """What is done before each step."""
        if self.calls % self.refresh_every == 0:
            self.update_inverses()
        self.calls += 1
        self.precondition()

    def readings(self) -> list[LayerReading]:
        """For the probe."""
        return [
            LayerReading(
                layer=name,
                ready=layer.ready,
                samples=layer.samples,
                factors=dict(layer.sigma),
                preconditioners=dict(layer.inverse),
                damping=dict(layer.damping),
                refresh_every=self.refresh_every,
                source="hooks",
            )
            for name, layer in self.layers.items()
        ]

    def watch(self) -> dict[str, Any]:
        """What the probe is told."""
        return {"preconditioner": (self, "precondition"), "readings": self.readings}


class Wrapper(torch.optim.Optimizer):
    """An optimizer that preconditions inside its step; shares groups and state with the one it wraps."""

    def __init__(self, optimizer: torch.optim.Optimizer, kfac: NotebookKFAC):
        self.optimizer, self.kfac = optimizer, kfac
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Precondition, then step."""
        self.kfac.apply()
        self.optimizer.step()


# Two ways of training


@dataclass
class Setup:
    """What is put round a model.

    Attributes:
        optimizer: Steps.
        probe: What the probe is told (keyword arguments of `Probe`, `ProbeCallback`).
        watched: The optimizer that the probe is given, if it is another one (plain loop).
        after_backward: Called after every micro-batch.
        before_step: Called before `optimizer.step()`, with the last micro-batch.
        after_step: Called between `optimizer.step()` and `zero_grad()`.
        callbacks: Of the Trainer.
        trainer: Its class, and its further arguments.
        close: Called at the end.
    """

    optimizer: Any
    probe: dict[str, Any] = field(default_factory=dict)
    watched: Any = None
    after_backward: Callable[[], Any] = lambda: None
    before_step: Callable[[dict[str, Tensor]], Any] = lambda batch: None
    after_step: Callable[[], Any] = lambda: None
    callbacks: list[Any] = field(default_factory=list)
    trainer: Callable[..., Any] | None = None
    close: Callable[[], Any] = lambda: None


Arrange = Callable[[Any, Setting], Setup]
"""From a model and a setting to what is put round the model."""


def plain_loop(
    arrange: Arrange,
    setting: Setting,
    *,
    steps: int = STEPS,
    accumulation: int = 1,
    clip: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    checkpointing: bool = False,
    loss_factor: Callable[[int], float] = lambda step: 1.0,
    **model_options: Any,
) -> Verdict:
    """Train in a loop of one's own and judge.

    Args:
        arrange: What is put round the model.
        setting: Seed and learning rate.
        steps: Optimizer steps.
        accumulation: Micro-batches of a step; with more than one, half of the steps are enough.
        clip: Total norm to which raw gradients are clipped, before preconditioning; 0 = not.
        schedule: Step → factor of the learning rate.
        checkpointing: Whether activations are computed again in the backward pass.
        loss_factor: Step → what the loss is multiplied by.
        model_options: Of `tiny_llama`.
    """
    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed, **model_options)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    setup, stream = arrange(model, setting), batches(setting.seed)
    scheduler = LambdaLR(setup.optimizer, schedule) if schedule is not None else None
    watched = setup.optimizer if setup.watched is None else setup.watched
    try:
        with Probe(model, watched, every=steps // SAMPLES, max_grad_norm=clip, **setup.probe) as probe:
            for step in range(steps):
                for _ in range(accumulation):
                    batch = next(stream)
                    (model(**batch).loss * loss_factor(step) / accumulation).backward()
                    setup.after_backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(weights_of(model), clip)
                setup.before_step(batch)
                setup.optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                setup.after_step()
                setup.optimizer.zero_grad()
    finally:
        setup.close()
    return judge(probe)


def hf_trainer(
    arrange: Arrange, setting: Setting, *, steps: int = STEPS, accumulation: int = 1, clip: float = 1.0, **training: Any
) -> Verdict:
    """Train with transformers' Trainer and judge.

    Args:
        arrange: What is put round the model.
        setting: Seed and learning rate.
        steps: Optimizer steps.
        accumulation: Micro-batches of a step.
        clip: max_grad_norm of the Trainer.
        training: Further TrainingArguments.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed)
    setup = arrange(model, setting)
    generator = torch.Generator().manual_seed(1000 + setting.seed)
    items = [example(generator, padded=i % 2 == 0) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": setting.lr,
            "lr_scheduler_type": "constant",
            "max_grad_norm": clip,
            "seed": setting.seed,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **training,
        }
        # An optimizer given by the user: with optimizers=(None, None) the Trainer makes AdamW itself.
        trainer = (setup.trainer or Trainer)(
            model=model,
            args=TrainingArguments(**values),
            train_dataset=items,
            callbacks=list(setup.callbacks),
            optimizers=(setup.optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        callback = ProbeCallback(every=steps // SAMPLES, **setup.probe)
        trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            setup.close()
    if callback.probe is None:
        raise RuntimeError("the Trainer did not start")
    return judge(callback.probe)


def at(event: str, do: Callable[[], Any]) -> Any:
    """A Trainer's callback that does one thing at one event."""
    from transformers import TrainerCallback

    def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        do()

    return type("At", (TrainerCallback,), {event: call})()
