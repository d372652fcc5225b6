"""GGUF files: from an adapter to a merged 16-bit model, its GGUF and the adapter's own, in other precisions too."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from export import ExportError, MergedOnlyError, converters
from trainers.adapters import MERGED, takes_part_of_w


def adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder. Raises ExportError: not there or no JSON."""
    file = adapter / "adapter_config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{file}: expected the configuration of a PEFT adapter: {error}") from error
    return dict(content)


def losses(adapter: Path) -> list[str]:
    """What a GGUF adapter would lose of an adapter; such an adapter can only be served merged.

    A GGUF adapter holds one alpha and the tensors A and B. Scales of single modules are no hindrance, see
    `scale_factors`. Raises ExportError: PEFT has no way to merge it, so that there is no form to serve.
    """
    config = adapter_config(adapter)
    method = config.get("peft_type")
    if method not in MERGED:
        raise ExportError(f"{adapter}: expected an adapter that PEFT can merge into the base, got peft_type {method!r}")
    if method != "LORA":
        return [f"peft_type {method} (a GGUF adapter holds LoRA's A and B alone)"]
    lost = []
    if config.get("use_dora"):
        lost.append("use_dora (magnitudes have no GGUF form)")
    if config.get("modules_to_save"):
        lost.append(f"modules_to_save {config['modules_to_save']} (whole modules have no GGUF adapter form)")
    if config.get("bias", "none") != "none":
        lost.append(f"bias {config['bias']} (biases have no GGUF adapter form)")
    if experts := config.get("target_parameters"):
        lost.append(f"target_parameters {experts} (experts in one tensor have no GGUF adapter form)")
    if takes_part_of_w(start := config.get("init_lora_weights")):
        lost.append(f"init_lora_weights {start} (it is for a base without the adapter's start)")
    return lost


def _alpha(config: Any) -> float:
    """The one alpha of the GGUF adapter; of 0 llama.cpp makes the scale 1."""
    return float(config.lora_alpha or 1)


def scale_factors(config: Any, weights: Mapping[str, Any]) -> dict[str, float]:
    """Name of B → what it has to be multiplied by so that llama.cpp's scale of B·A becomes PEFT's; mostly 1.

    llama.cpp scales by alpha/k with the file's one alpha and k, the rank of the tensor. PEFT scales by α/k, or by α/√k
    (rsLoRA), with α and k from `alpha_pattern` and `rank_pattern` where a key fits the module. `config` is PEFT's
    LoraConfig, `weights` the adapter's tensors by name, A [k, …]. Raises ExportError: a tensor has another rank than
    the configuration says.
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
    """Copy a PEFT adapter so that it means the same with one α and the scale α/k; False where that is how it is.

    Raises ExportError: no tensors, or one of another rank than the configuration says.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.save_and_load import load_peft_weights
    from safetensors.torch import save_file

    if not (adapter / "adapter_model.safetensors").is_file():
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
    """A whole 16-bit Hugging Face model in `out`: the base (folder or hub id) with the adapter, if any, merged in.

    The product s·B·A is added in float32 and rounded once to the base's 16-bit type. `load_kwargs` are those of
    `from_pretrained`. Raises ExportError: quantized or missing base, or an adapter that does not fit.
    """
    model = _load_16bit(base, load_kwargs)
    if adapter is not None:
        from peft import PeftModel

        losses(adapter)  # refuses what would be unloaded, not merged
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
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_base_model()
    first, last = ends.get_input_embeddings(), ends.get_output_embeddings()
    if last is not None and last.weight is first.weight and any(isinstance(m, BaseTunerLayer) for m in (first, last)):
        layer = last.get_base_layer() if isinstance(last, BaseTunerLayer) else last
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())  # else both ends would get the update of one
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            dtype = next(base.parameters()).dtype
            base.to(torch.float32)
            module.merge(safe_merge=True)
            base.to(dtype)
    merged = model.unload()
    first, last = merged.get_input_embeddings(), merged.get_output_embeddings()
    if last is not None and not torch.equal(first.weight, last.weight):
        merged.config.tie_word_embeddings = False  # else saving would keep one of them for both
    return merged


def convert_model(model: Path, out: Path, name: str) -> None:
    """A Hugging Face model folder as f16 GGUF.

    `name` becomes general.name; without it the converter takes the folder's name, and the same model would have another
    hash in another folder. Raises ExportError: the converter refused, with its last words.
    """
    arguments = [str(model), "--outfile", str(out), "--outtype", "f16", "--model-name", name]
    converters.run(converters.MODEL, arguments, out)


def check_base(base: str, load_kwargs: dict[str, Any]) -> None:
    """Refuse a base whose configuration or vocabulary llama.cpp's converter cannot take; no weights are read.

    Raises ExportError: why, and what to do.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "model", Path(temporary) / "vocabulary.gguf"
        AutoConfig.from_pretrained(base, **load_kwargs).save_pretrained(folder)
        copy_tokenizer(base, folder, load_kwargs)
        converters.run(converters.MODEL, [str(folder), "--vocab-only", "--outfile", str(out)], out)


# Whose sliding window llama.cpp does not keep to (tests/export/test_model_families.py).
_NO_WINDOW = ("mistral", "mixtral", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")


def check_context(base: str, load_kwargs: dict[str, Any], num_ctx: int) -> None:
    """Refuse a context in which llama.cpp computes something else than Hugging Face.

    Raises ExportError: the longest that is the same, and why.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **load_kwargs).to_dict()
    family, limits = config["model_type"], {}
    if family in _NO_WINDOW and "sliding_attention" in (config.get("layer_types") or ["sliding_attention"]):
        limits["looks at all tokens, not at a sliding window"] = config.get("sliding_window")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        limits["takes longrope's long factors for short texts, too"] = rope["original_max_position_embeddings"]
    if rope.get("rope_type") == "dynamic":
        limits["does not scale RoPE with a text's length"] = config["max_position_embeddings"]
    for why, limit in limits.items():
        if limit is not None and num_ctx > limit:
            raise ExportError(
                f"export.num_ctx: expected at most {limit} for {family}, since llama.cpp {why} in a longer context; "
                f"got {num_ctx}"
            )


def convert_adapter(adapter: Path, base: str | Path, out: Path, load_kwargs: Mapping[str, Any] | None = None) -> None:
    """A PEFT LoRA folder as GGUF adapter, tensors in f32 (they are small; f16 would round what merging does not).

    Scales that a GGUF adapter has no place for (rsLoRA, alpha_pattern) are multiplied into B on the way. Of the base
    (folder or hub id) the configuration is read. Raises MergedOnlyError: names each setting that would be lost, or the
    module that the converter does not map. ExportError: see `fold_scales`; or the converter refused.
    """
    from safetensors import safe_open
    from transformers import AutoConfig

    if lost := losses(adapter):
        raise MergedOnlyError(f"{adapter}: a GGUF adapter would lose {'; '.join(lost)}")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "adapter" / adapter.absolute().name  # the converter writes the folder's name down
        if not fold_scales(adapter, copy):
            shutil.copytree(adapter, copy)
        of_base = AutoConfig.from_pretrained(base, **(load_kwargs or {}))
        with safe_open(copy / "adapter_model.safetensors", "pt") as weights:
            names = list(weights.keys())
        ends = [end for end in ("lm_head", "embed_tokens") if any(f".{end}." in name for name in names)]
        if ends and of_base.get_text_config().tie_word_embeddings:
            raise MergedOnlyError(
                f"{adapter}: a GGUF adapter would lose {ends[0]} (the base has one tensor at both ends)"
            )
        of_base.save_pretrained(Path(temporary) / "base")
        if Path(str(adapter_config(adapter).get("base_model_name_or_path"))).is_dir():
            (copy / "README.md").unlink(missing_ok=True)  # which names it; the file would call it a place on the hub
        arguments = ["--base", f"{temporary}/base", "--outfile", str(out), "--outtype", "f32", str(copy)]
        converters.run(converters.ADAPTER, arguments, out)


# --- the tokenizer's files --------------------------------------------------------------------------------------------


def copy_tokenizer(source: str, out: Path, load_kwargs: dict[str, Any]) -> None:
    """The tokenizer's files, its SentencePiece model among them where it has one.

    What the converter looks for in tokenizer_config.json, and transformers 5 does not always write, is put there:
    `add_bos_token` and `add_eos_token` as the tokenizer really does, and tokens beyond the SentencePiece model's (the
    marks of a chat template, mostly), which would have no name in the GGUF.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    tokenizer = AutoTokenizer.from_pretrained(source, **load_kwargs)
    tokenizer.save_pretrained(out)
    config_file = out / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    sentencepiece = cached_file(
        source,
        "tokenizer.model",
        revision=load_kwargs.get("revision"),
        _raise_exceptions_for_missing_entries=False,
    )
    if sentencepiece is not None:
        shutil.copy2(sentencepiece, out / "tokenizer.model")
        if added := _added_tokens(tokenizer, sentencepiece):
            config["added_tokens_decoder"] = added
    ids = tokenizer("x")["input_ids"]
    config["add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    config["add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _added_tokens(tokenizer: Any, sentencepiece: str) -> dict[str, dict[str, Any]]:
    """Id → token, for tokens that the SentencePiece model has not, or has under another name."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=sentencepiece)
    return {
        str(i): {"content": token.content, "special": token.special}
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if i >= pieces.vocab_size() or pieces.id_to_piece(i) != token.content
    }


# --- precisions -------------------------------------------------------------------------------------------------------

# What llama.cpp's quantizer makes of any f16 model, with its numbers (include/llama.h, enum llama_ftype).
QUANTIZATIONS = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_K": 18, "q5_K_M": 17, "q5_K_S": 16, "q5_1": 9, "q5_0": 8,
    "q4_K_M": 15, "q4_K_S": 14, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_K_L": 13, "q3_K_M": 12,
    "q3_K_S": 11, "iq3_m": 27, "iq3_s": 26, "q2_K": 10, "tq2_0": 37, "tq1_0": 36, "q1_0": 40,
}  # fmt: skip

# What the same enum has besides, and why it is refused (each tried with llama-cpp-python 0.3.36, on rows of 256).
_IMATRIX = "llama.cpp makes it only with an importance matrix, which this project does not measure"
REFUSED = {
    **dict.fromkeys(("q2_K_S", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"), _IMATRIX),
    "mxfp4_moe": "it is for mixtures of experts; of any other model llama.cpp makes q8_0 under this name",
    "nvfp4": "llama.cpp's quantizer does not write it",
    "q2_0": "the gguf package of this version cannot read it back",
}


def _usable(quantization: str) -> str:
    if quantization in QUANTIZATIONS:
        return quantization
    expected = f"expected one of {', '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}"
    if quantization in REFUSED:
        raise ValueError(f"{quantization!r} cannot be used: {REFUSED[quantization]}; {expected}")
    meant = next((name for name in QUANTIZATIONS if name.lower() == quantization.lower()), None)
    raise ValueError(f"{expected}; did you mean {meant!r}?" if meant else expected)


Precision = Annotated[str, AfterValidator(_usable)]
"""Of the weights in a GGUF, by llama.cpp's name, as a setting."""


def quantize(source: Path, out: Path, quantization: str) -> int:
    """An f16 GGUF in another precision; the number of tensors that got llama.cpp's fallback format.

    These are the ones whose rows are no multiple of the format's block. Raises ExportError: llama.cpp refused (with its
    reason).
    """
    import llama_cpp

    lines: list[str] = []
    quiet = llama_cpp._logger.llama_log_callback  # what llama_cpp sets when it is imported
    listen = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTIZATIONS[quantization]
    llama_cpp.llama_log_set(listen, None)
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    finally:
        llama_cpp.llama_log_set(quiet, None)
    if code or not out.is_file():
        last = lines[-1].strip() if lines else f"code {code}"
        raise ExportError(f"llama.cpp could not quantize {source} to {quantization}: {last}")
    return sum("falling back to" in text for text in lines)


@dataclass(frozen=True)
class Contents:
    """What a GGUF file of `size` bytes holds: bits a weight (tensors alone), tensor type → count, largest first."""

    size: int
    bits_per_weight: float
    tensor_types: dict[str, int]


def contents(file: Path) -> Contents:
    """Read back what a GGUF file holds. Raises ExportError: no GGUF file, or a damaged one."""
    tensors = open_gguf(file).tensors
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    if not weights:
        raise ExportError(f"{file}: expected a GGUF file with tensors, found none; export again")
    return Contents(
        size=file.stat().st_size,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in tensors) / weights,
        tensor_types=dict(Counter(tensor.tensor_type.name for tensor in tensors).most_common()),
    )


# --- adapter files ----------------------------------------------------------------------------------------------------

ALPHA = "adapter.lora.alpha"


def open_gguf(file: Path, mode: str = "r") -> Any:
    """A reader of a GGUF file. Raises ExportError: it is none, or damaged."""
    from gguf import GGUFReader

    try:
        return GGUFReader(file, mode)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ExportError(
            f"{file}: expected a GGUF file, it cannot be read: {error}; export or download it again"
        ) from error


def _alpha_field(reader: Any, adapter: Path) -> Any:
    """The one float32 of the field, as a view into the file."""
    field = reader.get_field(ALPHA)
    if field is None:
        raise ExportError(f"{adapter}: expected {ALPHA}, found none; is this a GGUF adapter? Export again")
    return field.parts[field.data[0]]


def scale_of(adapter: Path) -> tuple[float, int]:
    """α and the largest rank r; llama.cpp scales B·A by α/r of each tensor. Raises ExportError: no GGUF adapter."""
    reader = open_gguf(adapter)
    ranks = [int(min(t.shape)) for t in reader.tensors if t.name.endswith(".lora_a")]
    if not ranks:
        raise ExportError(f"{adapter}: expected tensors *.lora_a, found none; export again")
    return float(_alpha_field(reader, adapter)[0]), max(ranks)


def scaled_copy(adapter: Path, out: Path, factor: float) -> None:
    """A copy whose B·A counts `factor` times as much: α is multiplied, the tensors stay.

    Raises ExportError: no GGUF adapter, or a factor of 0.
    """
    if factor == 0:
        raise ExportError("expected a factor other than 0, got 0: llama.cpp reads alpha 0 as scale 1")
    shutil.copyfile(adapter, out)
    alpha = _alpha_field(open_gguf(out, "r+"), out)
    alpha[0] *= factor
    alpha.flush()
