"""Optimizers by the names that transformers has for them, with arguments of their own."""

import inspect
import json
from collections.abc import Mapping
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

from trainers.words import suggest

PLAIN = "adamw_torch"
"""Needs no looking up."""
ADAMW = (PLAIN, "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
_OURS = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of an optimizer's class; YAML has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def problems(name: str, given: Mapping[str, Any]) -> list[str]:
    """Why an optimizer cannot be had, or not with these arguments: it is made here, and takes one step."""
    return _problems(name, json.dumps(given, default=str)) if given or name != PLAIN else []


@cache
def _problems(name: str, given: str) -> list[str]:
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [known.value for known in OptimizerNames]
    if name not in known:
        return [f"optimizer: unknown name {name!r}{suggest(name, known)}"]
    with TemporaryDirectory() as folder:
        try:
            args = TrainingArguments(folder, optim=name, use_cpu=True, report_to="none")
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ImportError, ValueError) as error:
            return [f"optimizer: {name} cannot be used: {error}"]
    own = json.loads(given)
    found = [f"optim_args.{key}: expected {_OURS[key]} of section train in its place" for key in own if key in _OURS]
    taken = [key for key in inspect.signature(kind).parameters if key not in ("params", "args", *_OURS)]
    found += [
        f"optim_args.{key}: unknown key of {name}{suggest(key, taken)}" for key in own if key not in (*taken, *_OURS)
    ]
    if found:
        return found
    try:
        weight = torch.nn.Parameter(torch.ones(2, 2))
        weight.grad = torch.ones(2, 2)
        kind([weight], **{**options, **arguments(own)}).step()
    except (AssertionError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
        return [f"optim_args: {name} refuses {own}: {error}" if own else f"optimizer: {name} cannot be used: {error}"]
    return []
