"""Optimizers that others wrote, on the tiny Llama: what the probe says of them must be true.

Those of torch, transformers and bitsandbytes are there anyway, the others come with the extra `foreign`.
"""

from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from tests.probes.catalogue import Clean, adamw
from tests.probes.worlds import Setting, Setup, plain_loop, weights_of

MODULES = {
    "torch": "torch.optim",
    "transformers": "transformers.optimization",
    "bitsandbytes": "bitsandbytes.optim",
    "pytorch-optimizer": "pytorch_optimizer",
    "schedulefree": "schedulefree",
    "torch-optimi": "optimi",
}
"""Package, as it is installed → where its optimizers are."""

HESSIAN = ("AdaHessian", "SophiaH")
"""They differentiate twice."""


def package(run: Clean) -> str:
    return run.name.partition(":")[0]


def module(run: Clean) -> str:
    return MODULES[package(run)].partition(".")[0]


def installed(run: Clean) -> bool:
    return find_spec(module(run)) is not None


def version(run: Clean) -> str:
    return metadata.version(package(run))


def _of(
    name: str, note: str = "", expected: str = "effective", *, around: bool = False, group: Any = None,
    loop: Any = None, **options: Any,
) -> Clean:  # fmt: skip
    """`name`: package and class; `around`: it wraps AdamW; `group`, `loop`: options of the parameters, of the loop."""
    where, _, kind = name.partition(": ")

    def arrange(model: Any, setting: Setting) -> Setup:
        if kind in HESSIAN:
            model.set_attn_implementation("eager")  # the fused ones have no second derivative
        given = adamw(model, setting) if around else [{"params": weights_of(model), **(group or {})}]
        optimizer = getattr(import_module(MODULES[where]), kind)(given, **options)
        if hasattr(optimizer, "train"):  # schedule-free ones keep two sets of weights
            optimizer.train()
        return Setup(optimizer)

    run = partial(plain_loop, arrange, create_graph=kind in HESSIAN, **(loop or {}))
    return Clean(f"{name}, {note}" if note else name, run, expected)


SAME, TOO, ALONE = "no_effect", {"closure": "too"}, {"closure": "alone"}

FOREIGN = [
    _of("torch: Adafactor", lr=1.0),
    _of("torch: Muon", lr=1e-2),
    _of("torch: NAdam", lr=1e-2),
    _of("torch: RAdam", lr=2e-2),
    _of("torch: Adamax", lr=1e-2),
    _of("torch: Adadelta", lr=10.0),
    _of("torch: RMSprop", lr=3e-3),
    _of("torch: Rprop", lr=3e-3),
    _of("torch: ASGD", lr=0.1),
    _of("torch: LBFGS", lr=0.1, max_iter=4, loop=ALONE),
    _of("torch: LBFGS", "line search", max_iter=2, line_search_fn="strong_wolfe", loop=ALONE),
    _of("torch: AdamW", "amsgrad", lr=1e-2, betas=(0.9, 0.8), amsgrad=True),
    _of("torch: AdamW", "closure", SAME, lr=1e-2, loop=TOO),
    _of("torch: AdamW", "closure alone", SAME, lr=1e-2, loop=ALONE),
    _of("torch: Adam", "", SAME, lr=1e-2),
    _of("torch: Adam", "weight decay in the gradient", lr=1e-2, weight_decay=0.1),
    _of("torch: SGD", "momentum and weight decay", lr=0.1, momentum=0.9, weight_decay=0.1),
    _of("transformers: Adafactor", "relative step", lr=None, scale_parameter=False),
    _of("transformers: Adafactor", "fixed rate", lr=1e-2, relative_step=False, scale_parameter=False),
    _of("bitsandbytes: AdamW", "", SAME, lr=1e-2),
    _of("bitsandbytes: AdamW8bit", "small tensors, so in 32 bit", SAME, lr=1e-2),
    _of("bitsandbytes: AdamW8bit", lr=1e-2, min_8bit_size=1),
    _of("bitsandbytes: AdEMAMix", lr=1e-2, betas=(0.9, 0.999, 0.99)),
    _of("bitsandbytes: Lion8bit", lr=3e-3, min_8bit_size=1),
    # With B zero it never moves B, and the probe says so.
    _of("bitsandbytes: LAMB", lr=0.1, loop={"init_lora_weights": False}),
    _of("pytorch-optimizer: SOAP", lr=1e-2),
    _of("pytorch-optimizer: Shampoo", lr=1e-1),
    _of("pytorch-optimizer: ScalableShampoo", lr=1e-2),
    _of("pytorch-optimizer: Kron", lr=1e-2),
    _of("pytorch-optimizer: Muon", lr=1e-2, group={"use_muon": True}),
    _of("pytorch-optimizer: LoRARite", lr=1e-2),
    _of(
        "pytorch-optimizer: GaLore",
        lr=1e-2,
        group={"rank": 2, "update_proj_gap": 10, "scale": 1.0, "projection_type": "std"},
    ),
    _of("pytorch-optimizer: CAME", lr=1e-2),
    _of("pytorch-optimizer: Adan", lr=1e-2),
    _of("pytorch-optimizer: AdaBelief", lr=1e-2),
    _of("pytorch-optimizer: Lamb", lr=1e-2),
    _of("pytorch-optimizer: LARS", lr=1.0, trust_coefficient=0.1),
    _of("pytorch-optimizer: SophiaH", lr=1.0),
    _of("pytorch-optimizer: AdaHessian", lr=3e-2),
    _of("pytorch-optimizer: Prodigy", lr=1.0),
    _of("pytorch-optimizer: DAdaptAdam", lr=1.0),
    _of("pytorch-optimizer: StableAdamW", lr=1e-2),
    _of("pytorch-optimizer: Lookahead", around=True),
    _of("pytorch-optimizer: OrthoGrad", around=True),
    _of("pytorch-optimizer: TRAC", around=True, s_prev=1e-2),
    _of("pytorch-optimizer: ScheduleFreeWrapper", around=True),
    _of("pytorch-optimizer: SAM", base_optimizer=torch.optim.AdamW, lr=1e-2, loop=TOO),
    _of("schedulefree: AdamWScheduleFree", lr=1e-2),
    _of("schedulefree: AdamWScheduleFreeClosure", lr=1e-2, loop=ALONE),
    _of("schedulefree: SGDScheduleFree", lr=1.0),
    _of("schedulefree: RAdamScheduleFree", lr=5e-2),
    _of("torch-optimi: AdamW", "", SAME, lr=1e-2),
    _of("torch-optimi: Adam", "", SAME, lr=1e-2, betas=(0.9, 0.999)),
    _of("torch-optimi: Lion", lr=3e-3),
    _of("torch-optimi: StableAdamW", lr=1e-2),
    _of("torch-optimi: Ranger", lr=3e-2),
]
