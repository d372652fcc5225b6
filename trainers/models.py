"""Loading base models and tokenizers, and finding the modules that LoRA goes on."""

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.settings import BaseReference, TrainSettings


class ModelError(ValueError):
    """A model that cannot be loaded or does not fit the settings."""


def hub_reason(error: BaseException, source: str, key: str = "source") -> str | None:
    """One sentence on why the model hub did not give something; None where the hub is not at fault.

    Args:
        error: What was raised; those that it came from are looked at too.
        source: The hub id that was asked for.
        key: The setting in section prepare_base that named it.
    """
    import httpx
    from huggingface_hub import constants, errors

    here = f"download it elsewhere with `hf download {source} --local-dir FOLDER` and set prepare_base.{key} to FOLDER"
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        at = at.__cause__ or at.__context__
    for found in seen:
        match found:
            case errors.GatedRepoError():
                return (
                    f"{source} is gated: ask for access on its page, https://huggingface.co/{source}, then log in with "
                    f"`hf auth login` or set HF_TOKEN; or {here}"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"the hub has no model {source}, or a private one: expected org/name as on its page; for one of "
                    "your own log in with `hf auth login`, or set HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                return f"{source} has no such revision; set prepare_base.revision to a branch, a tag or a commit"
    for found in seen:
        if isinstance(found, httpx.TransportError | ConnectionError | errors.LocalEntryNotFoundError):
            offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            return f"the hub cannot be reached ({type(found).__name__}{offline}), and no copy is in the cache; {here}"
        if isinstance(found, errors.EntryNotFoundError):
            return f"{source} has no such file: {found}"
    return None


def _not_loaded(what: str, base: BaseReference, error: Exception) -> ModelError:
    """The error of a tokenizer or a model; for hub ids with what to do."""
    reason = None if Path(base.location).is_dir() else hub_reason(error, base.location)
    return ModelError(f"no {what} could be loaded from {base.location!r}: {reason or error}")


def load_tokenizer(base: BaseReference) -> Any:
    """The base's own tokenizer, with a padding token.

    Raises:
        ModelError: nothing loadable there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.location, **base.load_kwargs)
    except (OSError, ValueError) as error:
        raise _not_loaded("tokenizer", base, error) from error
    if tokenizer.pad_token is None:
        # A padding token of its own where the vocabulary reserves one; labels are masked by position either way.
        reserved = [
            t
            for t in ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "<unk>")
            if t in tokenizer.get_vocab()
        ]
        tokenizer.pad_token = reserved[0] if reserved else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def training_dtype(settings: TrainSettings) -> Any:
    """Dtype that the frozen base is held in: bf16 on an accelerator, fp32 on a CPU (where bf16 is often slower)."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and settings.precision == "bf16" else torch.float32


def load_base_model(base: BaseReference, settings: TrainSettings, loader: str = "AutoModelForCausalLM") -> Any:
    """The frozen base, in 4 bit where the settings ask for it.

    Args:
        base: Where it is.
        settings: Precision and quantization.
        loader: Class of transformers that loads it.

    Raises:
        ModelError: nothing loadable there.
    """
    import torch
    import transformers
    from transformers import BitsAndBytesConfig

    kwargs: dict[str, Any] = {"dtype": training_dtype(settings), **base.load_kwargs}
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": 0}
    if settings.quantize_base == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=training_dtype(settings),
        )
    try:
        model = getattr(transformers, loader).from_pretrained(base.location, use_safetensors=True, **kwargs)
    except (OSError, ValueError) as error:
        raise _not_loaded("model", base, error) from error
    model.config.use_cache = False
    if settings.quantize_base == "nf4":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
    return model


def check_target_modules(model: Any, wanted: Sequence[str]) -> list[str]:
    """Names of all linear modules that LoRA will be put on.

    Args:
        model: The base model.
        wanted: Module names or endings of them, as PEFT takes them.

    Raises:
        ModelError: one of `wanted` matches no linear module; lists what is there.
    """
    import torch

    # Quantized linears (bitsandbytes) derive from torch.nn.Linear too.
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    matched: list[str] = []
    problems: list[str] = []
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for want in wanted:
        hits = [name for name in linear if name == want or name.endswith(f".{want}")]
        matched += hits
        if not hits:
            close = difflib.get_close_matches(want, endings, n=1)
            problems.append(f"{want!r} matches nothing" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if problems:
        raise ModelError(
            f"train.target_modules: {'; '.join(problems)}. Linear modules of this model: {', '.join(endings)}"
        )
    return sorted(set(matched))


def add_lora(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA on its target modules; A starts random from the global seed, B at zero."""
    from peft import LoraConfig, get_peft_model

    check_target_modules(model, settings.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=sorted(settings.target_modules),
        bias="none",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        return get_peft_model(model, config)
