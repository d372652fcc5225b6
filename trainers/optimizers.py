"""Optimizers by their names in transformers or by a dotted path, with their own arguments."""

import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

from trainers.words import suggest

PLAIN = "adamw_torch"
"""Needs no lookup."""
ADAMW = (PLAIN, "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
_OURS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_OF_FUNCTIONS = {"r": "rank", "lora_alpha": "alpha"}


def arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for an optimizer class; YAML has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def is_path(name: str) -> bool:
    return "." in name


def _of_path(path: str, ours: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A torch optimizer class, or a function of a model, and those of our arguments that it accepts.

    Raises ValueError if there is no such object, or if it makes no optimizer.
    """
    import torch

    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no module {error.name}; install the package that provides it") from None
    parameters = inspect.signature(kind).parameters if callable(kind) else {}
    if not _is_class(kind) and "model" not in parameters:
        raise ValueError("expected a torch optimizer class, or a function of a model")
    if "lr" not in parameters and not _open(kind):
        raise ValueError("it accepts no learning rate `lr`")
    ours = {**ours, "optimizer_cls": torch.optim.AdamW}
    return kind, {name: value for name, value in ours.items() if name in parameters or (name in _OURS and _open(kind))}


def for_trainer(trainer: Any, settings: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer's `optimizer_cls_and_kwargs`; it calls what is no class once before it passes the model."""
    s, values = settings, arguments(settings.optim_args)
    if not is_path(s.optimizer):
        kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        return kind, {**options, **values}
    ours = {"lr": s.learning_rate, "weight_decay": s.weight_decay, "r": s.rank, "lora_alpha": s.alpha}
    kind, options = _of_path(s.optimizer, ours)
    return kind if _is_class(kind) else lambda: kind, {**options, **values}


def _is_class(kind: Any) -> bool:
    import torch

    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def _open(kind: Any) -> bool:
    """Whether it accepts arguments that it does not name."""
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(kind).parameters.values())


def problems(name: str, values: Mapping[str, Any]) -> list[str]:
    """Why an optimizer cannot be used with these arguments: we construct it and let it take one step."""
    return _problems(name, json.dumps(values, default=str)) if values or name != PLAIN else []


@cache
def _problems(name: str, text: str) -> list[str]:
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    names = [optimizer.value for optimizer in OptimizerNames]
    if name not in names and not is_path(name):
        return [f"optimizer: unknown name {name!r}{suggest(name, names)}, or a dotted path"]
    ours = dict(_OURS)
    try:
        if is_path(name):
            kind, options = _of_path(name, {"lr": 1e-3, "weight_decay": 0.0, **dict.fromkeys(_OF_FUNCTIONS, 2)})
            ours |= {} if _is_class(kind) else _OF_FUNCTIONS
        else:
            with TemporaryDirectory() as folder:
                args = TrainingArguments(folder, optim=name, use_cpu=True, report_to="none")
                kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return [f"optimizer: {name} cannot be used: {error}"]
    values = json.loads(text)
    wrong = [f"optim_args.{key}: set {ours[key]} in section train instead" for key in values if key in ours]
    parameters = [key for key in inspect.signature(kind).parameters if key not in ("params", "args", "model", *ours)]
    wrong += [
        f"optim_args.{key}: unknown key of {name}{suggest(key, parameters)}"
        for key in values
        if key not in (*parameters, *ours) and (_is_class(kind) or not _open(kind))
    ]
    if wrong:
        return wrong
    try:
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
        if not _is_class(kind):
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        model(torch.ones(1, 2)).sum().backward()
        optimizer = kind(model.parameters() if _is_class(kind) else model, **{**options, **arguments(values)})
        getattr(optimizer, "train", dict)()  # of schedule-free ones
        optimizer.step()
    except (AssertionError, AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"optim_args: {name} refuses {values}" if values else f"optimizer: {name} cannot be used"
        return [f"{what}: {error}"]
    return []
