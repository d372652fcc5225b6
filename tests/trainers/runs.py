"""Trainings in processes of their own, which can be killed or patched: python -m tests.trainers.runs KIND …

lasting FILE: FILE holds (arm, job, step → evaluation loss to report, event, step); at that event of that step the
process gets a SIGKILL. hybrid FILE: FILE holds [(name, job, whether Unsloth's get_peft_model fuses MLPs as on a GPU,
losses as above)]; FILE.seen gets what was seen. base FOLDER CHECKPOINTS: an embedded base that sees.
"""

import logging
import os
import pickle
import signal
import sys
import types
from dataclasses import replace
from pathlib import Path

import torch

from trainers import arms
from trainers.base import EmbeddedSettings, train_base
from trainers.run import run

LIGHT = not {"unsloth", "trl", "transformers"} & set(sys.modules)

VISION_BASE = EmbeddedSettings(
    seed=0, vocab_size=320, hidden_size=16, intermediate_size=32, layers=1, heads=2, context=128,
    vision={"image_size": 16, "patch_size": 4, "scale_factor": 2, "hidden_size": 16, "layers": 1, "heads": 2},
    examples=320, batch_size=2, learning_rate=3e-3, precision="fp32",
)  # fmt: skip


def train_vision_base(folder, checkpoints):
    from evaluation.vision import training_examples

    root, output = folder / "pictures", folder / "base"
    for made in (folder, root, output):
        made.mkdir(exist_ok=True)
    examples = training_examples(VISION_BASE.examples, VISION_BASE.seed, VISION_BASE.vision.image_size, root)
    return train_base(VISION_BASE, [(f"{prompt}\n", answer) for prompt, answer in examples], output, checkpoints, root)


def tell(trainer, losses):
    """As long as it trains, the trainer's evaluations report `losses` (step → evaluation loss), where any are given."""
    loop = trainer.evaluation_loop

    def told(*a, **k):
        output = loop(*a, **k)
        if trainer.is_in_train and losses:
            output.metrics["eval_loss"] = losses[trainer.state.global_step]
        return output

    trainer.evaluation_loop = told


def scripted(name, losses, event=None, step=None):
    """The arm, with `losses` (step → evaluation loss, as long as it trains) and a death at (`event`, `step`)."""
    arm = arms.load(name)

    def make_trainer(settings, **kwargs):
        from transformers import TrainerCallback

        trainer = arm.make_trainer(settings, **kwargs)
        tell(trainer, losses)

        def die(self, args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        if event is not None:
            trainer.add_callback(type("Dies", (TrainerCallback,), {event: die})())
        return trainer

    return replace(arm, make_trainer=make_trainer)


# A stand-in for what Unsloth does to a model on a GPU: methods replaced by kernels that call no LoRA module


def _mlp(x, *weights):
    """SwiGLU with LoRA on all three projections; weights: (base, A, B, scale) of gate, up, down."""
    gate, up, down = (
        lambda x, w=w: x @ w[0].T + w[3] * (x @ w[1].T @ w[2].T) for w in (weights[:4], weights[4:8], weights[8:])
    )
    return down(torch.nn.functional.silu(gate(x)) * up(x))


class FusedMLP(torch.autograd.Function):
    """Reads the weights and fills their .grad itself, as unsloth.kernels.fast_lora.LoRA_MLP does."""

    @staticmethod
    def forward(ctx, x, *weights):
        ctx.kept = (x, weights)
        return _mlp(x, *weights)

    @staticmethod
    def backward(ctx, delta):
        kept = [v.detach() if isinstance(v, torch.Tensor) else v for v in (ctx.kept[0], *ctx.kept[1])]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for i in wanted:
                kept[i].requires_grad_()
            out = _mlp(*kept)
            grads = torch.autograd.grad(out, [kept[i] for i in wanted], delta)
        found = dict(zip(wanted, grads, strict=True))
        return tuple(found.get(i) for i in range(len(kept)))


def parts(projection):
    name = projection.active_adapters[0]
    a, b = projection.lora_A[name], projection.lora_B[name]
    return projection.base_layer.weight, a.weight, b.weight, projection.scaling[name]


def apply_lora_mlp(self, x):
    return FusedMLP.apply(x, *parts(self.gate_proj), *parts(self.up_proj), *parts(self.down_proj))


def apply_lora_qkv(self, x, inplace=True):
    raise AssertionError("the fused path was taken")


def apply_lora_o(self, x):
    raise AssertionError("the fused path was taken")


for kernel in (apply_lora_mlp, apply_lora_qkv, apply_lora_o):
    kernel.__module__ = "unsloth.kernels.fast_lora"


def fuse_mlps(model):
    """As patch_peft_model: a bound method in the instance's own dictionary."""
    for module in model.modules():
        if hasattr(module, "gate_proj") and hasattr(module.gate_proj, "lora_A"):
            module.forward = types.MethodType(apply_lora_mlp, module)
    return model


def watched(seen, fused, losses):
    arm = arms.load("hybrid_grit")

    def add_adapter(model, settings):
        from unsloth import FastLanguageModel

        plain = FastLanguageModel.get_peft_model
        if fused:
            FastLanguageModel.get_peft_model = staticmethod(lambda *a, **k: fuse_mlps(plain(*a, **k)))
        try:
            model = arm.add_adapter(model, settings)
        finally:
            FastLanguageModel.get_peft_model = plain
        seen["start"] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        seen["forward"] = 0
        first = next(m for n, m in model.named_modules() if n.endswith("q_proj.lora_A.default"))
        first.register_forward_hook(lambda *_: seen.update(forward=seen["forward"] + model.training))
        return model

    def make_trainer(settings, **kwargs):
        trainer = arm.make_trainer(settings, **kwargs)
        curvature = trainer.grit_manager.curvature
        gather, seen["tokens"] = curvature.gather, []  # of each step, as GRIT's hooks on the first layer counted them

        def looked_at(step):
            if curvature.capture is not None:
                seen["tokens"].append(float(curvature.capture.sums[0].tokens[0]))
            return gather(step)

        curvature.gather = looked_at
        tell(trainer, losses)
        seen["classes"] = [f"{c.__module__}.{c.__qualname__}" for c in type(trainer).__mro__]
        seen["optimizer"] = str(trainer.args.optim.value)
        return trainer

    return replace(arm, add_adapter=add_adapter, make_trainer=make_trainer)


def run_hybrid(file):
    results, log, network = {}, [], []
    asked = ("socket.connect", "socket.getaddrinfo")
    sys.addaudithook(lambda event, args: network.append(str(args[1:])) if event in asked else None)
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("grit").addHandler(handler)
    for name, job, fused, losses in pickle.loads(file.read_bytes()):
        log.clear()
        seen = {"light": LIGHT, "network": network}
        result = run(watched(seen, fused, losses), job)
        results[name] = {**seen, "summary": result.summary, "history": result.history, "log": list(log)}
    file.with_suffix(".seen").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    kind, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if kind == "base":
        train_vision_base(*paths)
    elif kind == "hybrid":
        run_hybrid(*paths)
    else:
        name, job, *told = pickle.loads(paths[0].read_bytes())
        run(scripted(name, *told), job)
