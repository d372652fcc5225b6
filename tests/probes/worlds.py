"""A tiny Llama with LoRA, trained under the probe in a plain loop or in transformers' Trainer."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from probes import Probe, ProbeCallback, Verdict, judge

TARGETS = ["q_proj", "v_proj", "up_proj"]
BATCH, LENGTH, VOCABULARY = 4, 12, 32
STEPS, SAMPLES = 24, 6


def tiny_llama(seed: int, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A random Llama of two layers, hidden size 32, with LoRA of rank 4; `lora`: further settings of LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    lora_config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **lora})
    base = LlamaForCausalLM(config)
    torch.nn.init.normal_(base.lm_head.weight, std=0.3)  # else logits are too small to learn, or to diverge
    return get_peft_model(base, lora_config).to(dtype).train()


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
    return [p for p in model.parameters() if p.requires_grad]


def fuse(model: Any) -> None:
    """LoRA reads the weights themselves, as fused kernels do: no module's hook fires."""

    def fused(module: Any, x: Tensor) -> Tensor:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        out: Tensor = x @ module.base_layer.weight.mT + (x @ a.mT) @ b.mT * module.scaling["default"]
        return out

    for module in model.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            module.forward = partial(fused, module)


@dataclass(frozen=True)
class Setting:
    """What every run of the catalogue is repeated with; other optimizers than Adam scale the learning rate."""

    seed: int = 0
    lr: float = 1e-2


@dataclass
class Setup:
    """What is put round a model."""

    optimizer: Any
    probe: dict[str, Any] = field(default_factory=dict)  # keyword arguments of `Probe` and `ProbeCallback`
    watched: Any = None  # the optimizer that the probe is given, if it is another one (plain loop)
    after_backward: Callable[[], Any] = lambda: None  # of every micro-batch
    before_step: Callable[[], Any] = lambda: None
    after_step: Callable[[], Any] = lambda: None  # before `zero_grad()`
    callbacks: list[Any] = field(default_factory=list)
    trainer: Callable[..., Any] | None = None
    close: Callable[[], Any] = lambda: None


Arrange = Callable[[Any, Setting], Setup]
"""From a model and a setting to what is put round the model."""


def plain_loop(
    arrange: Arrange,
    setting: Setting = Setting(),
    *,
    steps: int = STEPS,
    accumulation: int = 1,
    clip: float = 0.0,
    schedule: Callable[[int], float] | None = None,
    checkpointing: bool = False,
    loss_factor: Callable[[int], float] = lambda step: 1.0,
    closure: Literal["", "too", "alone"] = "",
    create_graph: bool = False,
    **model_options: Any,
) -> Verdict:
    """Train in a loop of one's own and judge; with accumulation, half of the steps are enough.

    `clip` limits raw gradients, before preconditioning; `schedule` and `loss_factor` go from a step to a factor;
    `closure`: the step gets one for the last batch's gradients, which are computed before it too, or in it alone.
    """
    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed, **model_options)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    setup, stream = arrange(model, setting), batches(setting.seed)
    scheduler = LambdaLR(setup.optimizer, schedule) if schedule is not None else None
    watched = setup.optimizer if setup.watched is None else setup.watched

    def backward(batch: dict[str, Tensor], factor: float) -> Tensor:
        loss: Tensor = model(**batch).loss * factor
        loss.backward(create_graph=create_graph)
        return loss

    def again(batch: dict[str, Tensor], factor: float) -> Tensor:
        setup.optimizer.zero_grad()
        return backward(batch, factor)

    try:
        with Probe(model, watched, every=steps // SAMPLES, max_grad_norm=clip, **setup.probe) as probe:
            for step in range(steps):
                factor = loss_factor(step) / accumulation
                for _ in range(accumulation):
                    batch = next(stream)
                    if closure != "alone":
                        backward(batch, factor)
                        setup.after_backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(weights_of(model), clip)
                setup.before_step()
                setup.optimizer.step(*[partial(again, batch, factor)] if closure else [])
                if scheduler is not None:
                    scheduler.step()
                setup.after_step()
                setup.optimizer.zero_grad()
    finally:
        setup.close()
    return judge(probe)


def hf_trainer(
    arrange: Arrange,
    setting: Setting = Setting(),
    *,
    steps: int = STEPS,
    accumulation: int = 1,
    clip: float = 1.0,
    **training: Any,
) -> Verdict:
    """Train with transformers' Trainer and judge; `training`: further TrainingArguments."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    steps = steps if accumulation == 1 else steps // 2
    model = tiny_llama(setting.seed)
    setup = arrange(model, setting)
    generator = torch.Generator().manual_seed(1000 + setting.seed)
    items = [example(generator, padded=i % 2 == 0) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        values: dict[str, Any] = dict(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=setting.lr,
            gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", max_grad_norm=clip,
            seed=setting.seed, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=True,
        )  # fmt: skip
        arguments = TrainingArguments(**{**values, **training})
        optimizers = (setup.optimizer, None)  # the user's own; with (None, None) the Trainer makes AdamW itself
        trainer = (setup.trainer or Trainer)(
            model=model, args=arguments, train_dataset=items, callbacks=setup.callbacks, optimizers=optimizers
        )
        trainer.remove_callback(PrinterCallback)
        callback = ProbeCallback(every=steps // SAMPLES, **setup.probe)
        trainer.add_callback(callback)
        try:
            trainer.train()
        finally:
            setup.close()
    return judge(callback.probe)


def at(event: str, do: Callable[[], Any]) -> Any:
    """A Trainer's callback that does one thing at one event."""
    from transformers import TrainerCallback

    def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        do()

    return type("At", (TrainerCallback,), {event: call})()
