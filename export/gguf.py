"""Adapter → merged 16-bit model → GGUF, and the adapter alone as GGUF."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export import converters
from export.errors import ExportError
from export.quantization import quantize as quantize
from export.tokenizer_files import copy_tokenizer


def adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises:
        ExportError: not there or no JSON.
    """
    file = adapter / "adapter_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: expected the configuration of a PEFT adapter: {error}") from error
    return dict(content)


def losses(adapter: Path) -> list[str]:
    """What a GGUF adapter would lose of a LoRA adapter; such an adapter can only be served merged.

    A GGUF adapter holds one alpha and the tensors A and B. Scales of single modules are no hindrance, see
    `scale_factors`.

    Raises:
        ExportError: no LoRA adapter: it can be neither merged here nor converted.
    """
    config = adapter_config(adapter)
    if config.get("peft_type") != "LORA":
        raise ExportError(f"{adapter}: expected an adapter of peft_type 'LORA', got {config.get('peft_type')!r}")
    lost = []
    if config.get("use_dora"):
        lost.append("use_dora (magnitudes have no GGUF form)")
    if config.get("modules_to_save"):
        lost.append(f"modules_to_save {config['modules_to_save']} (whole modules have no GGUF adapter form)")
    return lost


def check_adapter(adapter: Path) -> None:
    """Refuse adapters whose meaning a GGUF adapter cannot carry.

    Raises:
        ExportError: names each setting that would be lost.
    """
    if lost := losses(adapter):
        raise ExportError(f"{adapter}: a GGUF adapter would lose {'; '.join(lost)}")


def _alpha(config: Any) -> float:
    """The one alpha of the GGUF adapter; of 0 llama.cpp makes the scale 1."""
    return float(config.lora_alpha or 1)


def scale_factors(config: Any, weights: Mapping[str, Any]) -> dict[str, float]:
    """What each B has to be multiplied by so that llama.cpp's scale of B·A becomes PEFT's.

    llama.cpp scales by alpha/k with the file's one alpha and k, the rank of the tensor. PEFT scales by α/k, or by α/√k
    (rsLoRA), with α and k from `alpha_pattern` and `rank_pattern` where a key fits the module.

    Args:
        config: PEFT's LoraConfig.
        weights: The adapter's tensors by name, A [k, …].

    Returns:
        Name of B → factor, 1 where nothing is to be done.

    Raises:
        ExportError: a tensor has another rank than the configuration says.
    """
    from peft.utils.other import get_pattern_key

    alphas, ranks = config.alpha_pattern or {}, config.rank_pattern or {}
    factors = {}
    for name, a in weights.items():
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        if side not in ("A.weight", "embedding_A"):
            continue
        k = ranks.get(get_pattern_key(ranks.keys(), module), config.r)
        if a.shape[0] != k:
            raise ExportError(f"{name}: expected rank {k}, as adapter_config.json says, got {a.shape[0]}")
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
        # Not scale·k/α: division and multiplication by k would leave a rounding error where the factor is 1.
        factors[name.removesuffix(side) + side.replace("A", "B")] = (
            alpha * (k**0.5 if config.use_rslora else 1) / _alpha(config)
        )
    return factors


def fold_scales(adapter: Path, out: Path) -> bool:
    """Copy a PEFT adapter so that it means the same with one α and the scale α/k, unless that is how it is.

    Args:
        adapter: PEFT folder.
        out: Folder that the copy goes to; not made where there is nothing to fold.

    Returns:
        Whether there is a copy.

    Raises:
        ExportError: no tensors, or one of another rank than the configuration says.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.save_and_load import load_peft_weights
    from safetensors.torch import save_file

    if not any((adapter / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise ExportError(f"{adapter}: expected the tensors of a PEFT adapter, found no adapter_model.safetensors")
    config, weights = LoraConfig.from_pretrained(str(adapter)), load_peft_weights(str(adapter), device="cpu")
    factors = scale_factors(config, weights)
    if all(factor == 1 for factor in factors.values()):
        return False
    out.mkdir(parents=True)
    for name in ("README.md", "config.json", "generation_config.json"):  # the converter looks for names in these
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, out / name)
    # In float32, so that 16-bit tensors are not rounded again.
    folded = {name: tensor.to(torch.float32) * factors.get(name, 1.0) for name, tensor in weights.items()}
    save_file(folded, out / "adapter_model.safetensors")
    plain = {**adapter_config(adapter), "lora_alpha": _alpha(config), "use_rslora": False, "alpha_pattern": {}}
    (out / "adapter_config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    return True


def _load_16bit(source: str, load_kwargs: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, **load_kwargs)
        if getattr(config, "quantization_config", None):
            raise ExportError(
                f"{source}: expected 16-bit weights to merge into, got a quantized model; set "
                "prepare_base.merge_source to the 16-bit model"
            )
        dtype = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float16
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **load_kwargs)
    except (OSError, ValueError) as error:
        raise ExportError(f"no model could be loaded from {source!r}: {error}") from error


def save_merged(base: str, adapter: Path | None, out: Path, load_kwargs: dict[str, Any]) -> None:
    """A whole 16-bit Hugging Face model in `out`: the base with the adapter merged in.

    The product s·B·A is added in float32 and rounded once to the base's 16-bit type.

    Args:
        base: Folder or hub id of the 16-bit weights.
        adapter: PEFT folder; None writes the base as it is.
        out: Written to.
        load_kwargs: Passed to `from_pretrained` for the base.

    Raises:
        ExportError: quantized or missing base, or an adapter that does not fit.
    """
    model = _load_16bit(base, load_kwargs)
    if adapter is not None:
        from peft import PeftModel

        losses(adapter)  # another kind of adapter would be unloaded, not merged
        try:
            model = _merge(PeftModel.from_pretrained(model, str(adapter)))
        except (RuntimeError, ValueError) as error:
            raise ExportError(f"{adapter}: does not fit the base {base!r}: {error}") from error
    model.save_pretrained(out)
    copy_tokenizer(base, out, load_kwargs)


def _merge(model: Any) -> Any:
    """The base with the adapter in its weights; one module at a time in float32, so that memory stays small.

    (PEFT alone rounds s·B·A to 16 bit before it adds it.)
    """
    import torch
    from peft.tuners.lora import LoraLayer

    ends = model.get_base_model()
    first, last = ends.get_input_embeddings(), ends.get_output_embeddings()
    if last is not None and last.weight is first.weight and any(isinstance(m, LoraLayer) for m in (first, last)):
        layer = last.get_base_layer() if isinstance(last, LoraLayer) else last
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())  # else both ends would get the update of one
    for module in model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            dtype = base.weight.dtype
            base.to(torch.float32)
            module.merge(safe_merge=True)
            base.to(dtype)
    merged = model.unload()
    first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
    if last is not None and not torch.equal(first.weight, last.weight):
        merged.config.tie_word_embeddings = False  # else saving would keep one of them for both
    return merged


def _convert(script: str, arguments: list[str], made: Path) -> None:
    place = converters.require()
    done = subprocess.run(
        [sys.executable, str(place / script), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode or not made.is_file() or made.stat().st_size == 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ExportError(f"llama.cpp's {script} failed (exit {done.returncode}):\n{tail}")


def convert_model(model: Path, out: Path, name: str) -> None:
    """A Hugging Face model folder as f16 GGUF.

    Args:
        model: Folder.
        out: Written to.
        name: Written into the file as general.name; without it the converter takes the folder's name, and the same
            model would have another hash in another folder.

    Raises:
        ExportError: the converter refused, with its last words.
    """
    arguments = [str(model), "--outfile", str(out), "--outtype", "f16", "--model-name", name]
    _convert("convert_hf_to_gguf.py", arguments, out)


def convert_adapter(adapter: Path, base: Path, out: Path) -> None:
    """A PEFT LoRA folder as GGUF adapter, tensors in f32 (they are small; f16 would round what merging does not).

    Scales that a GGUF adapter has no place for (rsLoRA, alpha_pattern) are multiplied into B on the way.

    Args:
        adapter: PEFT folder.
        base: Hugging Face folder of the base (its configuration is read).
        out: Written to.

    Raises:
        ExportError: see `check_adapter` and `fold_scales`, or the converter refused.
    """
    check_adapter(adapter)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / adapter.absolute().name  # the converter writes the folder's name into the file
        source = copy if fold_scales(adapter, copy) else adapter
        arguments = ["--base", str(base), "--outfile", str(out), "--outtype", "f32", str(source)]
        _convert("convert_lora_to_gguf.py", arguments, out)
