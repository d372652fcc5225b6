"""Plain LoRA and AdamW on Unsloth's model, LoRA and SFTTrainer: what hybrid_grit is without GRIT.

Unsloth patches TRL, transformers and PEFT for the whole process, so it is imported when this arm runs and not before;
each arm runs in its own process. On a CPU Unsloth fuses nothing and its LoRA layers are PEFT's.
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from trainers import TrainingError
from trainers.models import check_target_modules, keep_gradients, reason_of, training_dtype
from trainers.run import Arm, TrainingJob
from trainers.settings import BaseReference, TrainSettings

_KERNELS = "unsloth.kernels.fast_lora"
_KNOWN = ("apply_qkv", "apply_o", "forward", "_unsloth_forward")


class UnslothSettings(TrainSettings):
    plain_lora, text_only = "Unsloth makes the adapter itself", True

    library: Literal["unsloth"] = "unsloth"  # recorded, so that the report can tell this cause of a difference

    @model_validator(mode="after")
    def _check_unsloth(self) -> Self:
        if self.packing:
            raise ValueError(
                "packing: expected false on Unsloth, which looks for packed items in batches of a single row only"
            )
        return self


def _prepare(job: TrainingJob) -> None:
    """Import Unsloth, before transformers and TRL where possible, and keep it off the network and out of the way."""
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Python that Unsloth generates; goes with the checkpoints. By default it lands in the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(job.checkpoints.absolute() / "unsloth"))
    # From torch 2.11 on Unsloth compiles every decoder layer; GRIT's hooks add up in Python, inside of that region.
    os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")
    if Path(job.base.location).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        importlib.import_module("unsloth")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise TrainingError(
            f"this arm needs Unsloth, which cannot be imported ({error}); run `make setup`, or "
            "`python -m pip install --no-deps -r requirements-unsloth.lock`"
        ) from error


def _checkpointing(settings: TrainSettings) -> str | bool:
    return "unsloth" if settings.gradient_checkpointing else False  # the first moves activations to host memory


def _load_model(base: BaseReference, settings: TrainSettings) -> Any:
    from unsloth import FastLanguageModel

    in_4_bit = settings.quantize_base == "nf4"
    try:
        model, _ = FastLanguageModel.from_pretrained(
            base.location,
            max_seq_length=settings.max_length,
            dtype=training_dtype(settings),
            load_in_4bit=in_4_bit,
            use_gradient_checkpointing=_checkpointing(settings),
            use_exact_model_name=True,  # else other weights than those asked for may be downloaded
            **base.load_kwargs,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError(
            f"Unsloth could not load a model from {base.location!r}: {reason_of(error, base)}"
        ) from error
    # Where 4 bit does not work, and for names with -bnb-4bit, Unsloth may load something else and go on.
    loaded = (model.config.name_or_path, any(type(m).__name__ == "Linear4bit" for m in model.modules()))
    expected = (base.location, in_4_bit)
    if loaded[0] != expected[0] or loaded[1] < expected[1]:
        words = [f"{name!r} in {'4' if quantized else '16 or 32'} bit" for name, quantized in (expected, loaded)]
        raise TrainingError(
            f"train.quantize_base: expected Unsloth to load {words[0]}, it loaded {words[1]}; set quantize_base to "
            "what this machine and these weights can do"
        )
    keep_gradients(model)
    return model


def _add_adapter(model: Any, settings: TrainSettings) -> Any:
    import torch
    from unsloth import FastLanguageModel

    check_target_modules(model, settings.target_modules)
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.target_modules),
        bias="none",
        **(settings.peft if isinstance(settings.peft, dict) else {}),
        use_gradient_checkpointing=_checkpointing(settings),
        # It seeds anew before A is drawn: with the seed that `build` has just set, A starts as in the other arms.
        random_state=torch.initial_seed(),
    )
    if not settings.unsloth_fused_lora:
        unfuse_lora(model)
    return model


def _is_fused(value: Any) -> bool:
    function = getattr(value, "__func__", value)
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__module__", None) == _KERNELS


def fused_lora(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(module's name, module, attribute) wherever Unsloth has put one of its LoRA kernels in place of a method."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if _is_fused(value):
                yield name, module, attribute


def unfuse_lora(model: Any) -> int:
    """Have every LoRA module called again, as PEFT does; norms, rotary embeddings and the loss stay Unsloth's.

    Unsloth (models/llama.py, patch_peft_model) puts `apply_qkv` and `apply_o` on attention modules and `forward` on
    MLPs, or `_unsloth_forward` where the MLP is tiled. What it had there before, or falls back to, comes back. Returns
    how many methods were put back; 0 on a CPU, where Unsloth fuses nothing.
    """
    places = list(fused_lora(model))
    strange = [f"{name}.{attribute}" for name, _, attribute in places if attribute not in _KNOWN]
    for name, module in model.named_modules():  # fused for all modules of a class, by unsloth_zoo's compiler
        forward = type(module).forward
        if _is_fused(forward) or (hasattr(module, "lora_A") and forward.__name__ == "unsloth_forward"):
            strange.append(f"{name} ({type(module).__name__}.forward)")
    if strange:
        raise TrainingError(
            "train.unsloth_fused_lora: false: expected Unsloth's kernels in apply_qkv, apply_o and an MLP's forward, "
            f"found them in {len(strange)} other places: {', '.join(strange[:4])}; set unsloth_fused_lora to true and "
            "GRIT's capture to auto or gradients"
        )
    _swap(places)
    return len(places)


def _swap(places: Iterable[tuple[str, Any, str]]) -> None:
    """Put back what Unsloth had there before it fused."""
    for _, module, attribute in places:
        if attribute == "forward":
            del module.forward  # the class's own comes back
        elif attribute == "_unsloth_forward":
            module._unsloth_forward = type(module).forward  # unbound: tiling binds it
        else:
            llama = importlib.import_module("unsloth.models.llama")
            setattr(module, attribute, getattr(llama, f"original_{attribute}"))


@contextmanager
def _unfused(model: Any) -> Iterator[None]:
    places = [place for place in fused_lora(model) if place[2] in _KNOWN]
    kernels = [vars(module)[attribute] for _, module, attribute in places]
    _swap(places)
    try:
        yield
    finally:
        for (_, module, attribute), kernel in zip(places, kernels, strict=True):
            setattr(module, attribute, kernel)


def make_trainer(settings: TrainSettings, construct: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Unsloth's trainer; `construct` makes it from the class, the settings and SFTTrainer's keyword arguments."""
    from trl import SFTTrainer  # Unsloth's: it has replaced TRL's by now, on a CPU too

    args = kwargs["args"]
    if settings.optimizer in ("adamw_torch", "adamw_torch_fused"):
        args.optim = type(args.optim)(settings.optimizer)  # on a CPU Unsloth chooses the fused one
    if args.bf16 != (settings.precision == "bf16"):
        print("Unsloth trains in fp32, since this CPU has no native bf16", flush=True)
    trainer = construct(SFTTrainer, settings, **kwargs) if construct else SFTTrainer(**kwargs)
    example = kwargs["train_dataset"][0]
    expected = sum(example["completion_mask"])
    labels = trainer.data_collator([trainer.train_dataset[0]]).get("labels")
    counted = None if labels is None else int((labels != -100).sum())
    if counted != expected:
        raise TrainingError(
            f"expected Unsloth's trainer to put the loss on the completion's {expected} tokens of the first example, "
            f"got it on {counted}; use the versions in requirements-unsloth.lock and requirements.lock"
        )
    return trainer


def report(trainer: Any, job: TrainingJob) -> dict[str, Any]:
    import unsloth

    fused = sum(1 for _ in fused_lora(trainer.model))
    device = getattr(unsloth, "DEVICE_TYPE", None)
    return {"unsloth": {"version": unsloth.__version__, "device": device, "fused_methods": fused}}


ARM = Arm(
    name="unsloth_lora",
    title="Unsloth LoRA",
    settings=UnslothSettings,
    prepare=_prepare,
    load_model=_load_model,
    add_adapter=_add_adapter,
    make_trainer=make_trainer,
    unfused=_unfused,
    report=report,
)
