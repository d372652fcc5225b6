"""Loading base models and tokenizers, and adding LoRA to them."""

import os
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers import TrainingError
from trainers.settings import BaseReference, TrainSettings
from trainers.words import nearest


def hub_reason(error: BaseException, source: str, key: str = "source") -> str | None:
    """One sentence on why the model hub did not deliver `source`, the value of prepare_base.`key`; None: another cause.

    Looks at the error and at everything that it was raised from.
    """
    import httpx
    from huggingface_hub import constants, errors

    here = f"download it elsewhere with `hf download {source} --local-dir FOLDER` and set prepare_base.{key} to FOLDER"
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        at = at.__cause__ or at.__context__
    for cause in seen:
        match cause:
            case errors.GatedRepoError():
                return (
                    f"{source} is gated: request access at https://huggingface.co/{source}, then log in with "
                    f"`hf auth login` or set HF_TOKEN; or {here}"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"the hub has no model {source}, or it is private: expected org/name as on its page; for a private "
                    "model log in with `hf auth login`, or set HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                return f"{source} has no such revision; set prepare_base.revision to a branch, a tag or a commit"
    for cause in seen:
        if isinstance(cause, httpx.TransportError | ConnectionError | errors.LocalEntryNotFoundError):
            offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            return f"the hub cannot be reached ({type(cause).__name__}{offline}), and no copy is in the cache; {here}"
        if isinstance(cause, errors.EntryNotFoundError):
            return f"{source} has no such file: {cause}"
    return None


def reason_of(error: Exception, base: BaseReference) -> str:
    """Why a base could not be loaded: one sentence if the hub is at fault, otherwise the text of the error."""
    return (None if Path(base.location).is_dir() else hub_reason(error, base.location)) or str(error)


def load_tokenizer(base: BaseReference) -> Any:
    """The base's tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base.location, **base.load_kwargs)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no tokenizer could be loaded from {base.location!r}: {reason_of(error, base)}") from error
    if tokenizer.pad_token is None:
        # A separate padding token where the vocabulary reserves one; labels are masked by position either way.
        reserved = ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<pad>", "<unk>")
        tokenizer.pad_token = next((t for t in reserved if t in tokenizer.get_vocab()), tokenizer.eos_token)
    tokenizer.padding_side = "right"
    return tokenizer


def faster_precision(hidden_size: int) -> tuple[str, float]:
    """fp32 or bf16 autocast, whichever trains faster on this machine, and fp32's time over that of bf16.

    Times forward and backward of a linear layer, from the base's width to four times that, over 512 tokens. A GPU that
    has bf16 uses it; elsewhere it has to gain a tenth, since around a ratio of 1 the choice would be noise.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = torch.nn.Linear(hidden_size, 4 * hidden_size, bias=False, device=device).requires_grad_(False)
    inputs = torch.randn(512, hidden_size, device=device, requires_grad=True)

    def seconds(bf16: bool) -> float:
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            outputs = layer(inputs)
        outputs.sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    ratio = float(statistics.median([seconds(bf16=False) / seconds(bf16=True) for _ in range(12)][2:]))  # 2 to warm up
    faster = torch.cuda.is_bf16_supported() if device == "cuda" else ratio > 1.1
    return "bf16" if faster else "fp32", ratio


def training_dtype(settings: TrainSettings) -> Any:
    """Dtype of the frozen base: bf16 on an accelerator, fp32 on a CPU (where bf16 is often slower)."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and settings.precision == "bf16" else torch.float32


def load_base_model(base: BaseReference, settings: TrainSettings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    kwargs: dict[str, Any] = {"dtype": training_dtype(settings), **base.load_kwargs}
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0))}
    if settings.quantize_base == "nf4":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=training_dtype(settings),
        )
    loader = AutoModelForCausalLM if settings.layers is None else AutoModelForImageTextToText
    try:
        model = loader.from_pretrained(base.location, use_safetensors=True, **kwargs)
    except (OSError, ValueError) as error:
        raise TrainingError(f"no model could be loaded from {base.location!r}: {reason_of(error, base)}") from error
    model.config.use_cache = False
    if settings.layers is not None:
        model.config.get_text_config().use_cache = False
    if settings.quantize_base == "nf4":
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=settings.gradient_checkpointing)
        keep_gradients(model)
    return model


def keep_gradients(model: Any) -> None:
    """Keep bitsandbytes (0.50) from repacking 4-bit weights at the first evaluation, on a CPU with AVX-512 BF16.

    Its kernel for repacked weights has no gradient, and training continued silently without one for the layers below.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_target_modules(model: Any, targets: Sequence[str]) -> None:
    """Refuse names that match no linear module, in full or as an ending (as PEFT matches them)."""
    import torch

    # Quantized linears (bitsandbytes) derive from torch.nn.Linear too.
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    problems: list[str] = []
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            meant = nearest(target, endings)
            problems.append(f"{target!r} matches nothing" + (f" (did you mean {meant!r}?)" if meant else ""))
    if problems:
        raise TrainingError(
            f"train.target_modules: {'; '.join(problems)}. Linear modules of this model: {', '.join(endings)}"
        )


def add_lora(model: Any, settings: TrainSettings) -> Any:
    """The model with LoRA, or another method of `peft`, on the chosen layers; plain LoRA starts with B at zero."""
    if settings.layers is not None:
        from grit_vlm.config.families import adapted_modules
        from grit_vlm.models.lora import add_lora as add_to

        layers = settings.layer_config()
        modules, of_modality = adapted_modules(model, layers)[0], layers.layer_settings()
        return add_to(model, {name: of_modality[modality] for modality, names in modules.items() for name in names})
    from peft import get_peft_model

    from trainers.adapters import pattern_problems, peft_config

    check_target_modules(model, settings.target_modules)
    config = peft_config(settings)
    if problems := pattern_problems(model, config):
        raise TrainingError("\n".join(f"train.{problem}" for problem in problems))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise TrainingError(
                f"train.peft: PEFT cannot put {settings.peft or 'LoRA'} on this model: {error}"
            ) from error


def scale_update(model: Any, factor: float) -> None:
    """Scale every ΔW = s·B·A: the line between base and tuned weights of WiSE-FT (Wortsman et al. 2022)."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_B." in name:
            parameter.data.mul_(factor)
