"""Trainings with scripted losses that end early, in separate processes: python -m tests.trainers.runs KIND …

lasting FILE: FILE holds (arm, job, step → evaluation loss to report, event, step); at that event of that step the
process gets a SIGKILL. hybrid FILE: FILE holds [(name, job, whether Unsloth's get_peft_model fuses MLPs as on a GPU,
losses, event, step as above)]; FILE.seen gets what was seen.
"""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainers import arms
from trainers.embedded_base import EmbeddedSettings, train_base
from trainers.run import run

ROOT = Path(__file__).resolve().parents[2]

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
    """While it trains, the trainer's evaluations report `losses` (step → evaluation loss) if any are given."""
    loop = trainer.evaluation_loop

    def told(*a, **k):
        output = loop(*a, **k)
        if trainer.is_in_train and losses:
            output.metrics["eval_loss"] = losses[trainer.state.global_step]
        return output

    trainer.evaluation_loop = told


def interrupt(*_):
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def scripted(arm, losses, event=None, step=None, die=interrupt):
    """The arm, with `losses` (step → evaluation loss) while it trains, which ends at (`event`, `step`)."""
    arm = arms.load(arm) if isinstance(arm, str) else arm

    def make_trainer(settings, **kwargs):
        from transformers import TrainerCallback

        trainer = arm.make_trainer(settings, **kwargs)
        tell(trainer, losses)

        def end(self, args, state, control, **kwargs):
            if state.global_step == step:
                die()

        if event is not None:
            trainer.add_callback(type("Ends", (TrainerCallback,), {event: end})())
        return trainer

    return replace(arm, make_trainer=make_trainer)


def interrupted(arm, job, losses, event, step):
    with pytest.raises(KeyboardInterrupt):
        run(scripted(arm, losses, event, step), job)


def killed(arm, job, losses, event, step):
    """Train in a separate process, which dies at (`event`, `step`)."""
    file = job.checkpoints.with_name("run")
    file.write_bytes(pickle.dumps((arm, job, losses, event, step)))
    command = [sys.executable, "-m", "tests.trainers.runs", "lasting", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def history(job):
    return json.loads((job.output / "loss_history.json").read_text())


def curves(folder):
    """Tag → (step, value) of what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# A stand-in for what Unsloth does to a model on a GPU: methods replaced by kernels that call no LoRA module


def apply_lora_mlp(self, x):
    """SwiGLU with LoRA on its three projections, by their weights."""

    def lora(projection, x):
        name = projection.active_adapters[0]
        a, b = projection.lora_A[name].weight, projection.lora_B[name].weight
        return x @ projection.base_layer.weight.T + projection.scaling[name] * (x @ a.T @ b.T)

    return lora(self.down_proj, torch.nn.functional.silu(lora(self.gate_proj, x)) * lora(self.up_proj, x))


apply_lora_mlp.__module__ = "unsloth.kernels.fast_lora"


def fuse_mlps(model):
    """As patch_peft_model: a bound method in the instance's own dictionary."""
    for module in model.modules():
        if hasattr(module, "gate_proj") and hasattr(module.gate_proj, "lora_A"):
            module.forward = types.MethodType(apply_lora_mlp, module)
    return model


def watched(seen, fused, name):
    arm = arms.load(name)

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
        if name == "hybrid_grit":
            curvature = trainer.grit_manager.curvature
            gather, seen["tokens"] = curvature.gather, []  # per step, as GRIT's hooks on the first layer counted them

            def looked_at(step):
                if curvature.capture is not None:
                    seen["tokens"].append(float(curvature.capture.sums[0].tokens[0]))
                return gather(step)

            curvature.gather = looked_at
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
    for name, job, fused, *told in pickle.loads(file.read_bytes()):
        log.clear()
        seen = {"network": network}
        arm = "hybrid_grit" if hasattr(job.settings, "grit") else "unsloth_lora"
        result = run(scripted(watched(seen, fused, arm), *told, die=kill), job)
        results[name] = {**seen, "summary": result, "history": history(job), "log": list(log)}
    file.with_suffix(".seen").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    kind, *paths = sys.argv[1], *map(Path, sys.argv[2:])
    if kind == "hybrid":
        run_hybrid(*paths)
    else:
        name, job, *told = pickle.loads(paths[0].read_bytes())
        run(scripted(name, *told, die=kill), job)
