"""f16 GGUF → any other precision that llama.cpp's quantizer offers, and what such a file really holds."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from export.errors import ExportError

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


def unusable(quantization: str) -> str | None:
    """Why a precision cannot be had, or None where it can."""
    if quantization in QUANTIZATIONS:
        return None
    expected = f"expected one of {', '.join(map(repr, QUANTIZATIONS))}, got {quantization!r}"
    if quantization in REFUSED:
        return f"{quantization!r} cannot be used: {REFUSED[quantization]}; {expected}"
    meant = next((name for name in QUANTIZATIONS if name.lower() == quantization.lower()), None)
    return f"{expected}; did you mean {meant!r}?" if meant else expected


def quantize(source: Path, out: Path, quantization: str) -> int:
    """An f16 GGUF in another precision.

    Tensors whose rows are no multiple of a format's block get llama.cpp's fallback format.

    Returns:
        Number of those tensors.

    Raises:
        ExportError: a precision that cannot be had, llama.cpp refused (with its reason), or it wrote another one.
    """
    import llama_cpp

    if reason := unusable(quantization):
        raise ExportError(f"precision of a GGUF: {reason}")
    said: list[str] = []
    quiet = llama_cpp._logger.llama_log_callback  # what llama_cpp sets when it is imported
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode("utf-8", "replace")))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTIZATIONS[quantization]
    llama_cpp.llama_log_set(listen, None)
    try:
        code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params)
    finally:
        llama_cpp.llama_log_set(quiet, None)
    if code or not out.is_file():
        last = said[-1].strip() if said else f"code {code}"
        raise ExportError(f"llama.cpp could not quantize {source} to {quantization}: {last}")
    _check_plain(out, quantization)
    return sum("falling back to" in text for text in said)


def _check_plain(file: Path, quantization: str) -> None:
    """The precisions without blocks know no fallback: every matrix must be as asked, vectors stay f32."""
    if quantization in ("f32", "f16", "bf16"):
        found, wanted = contents(file).tensor_types, quantization.upper()
        if wanted not in found or found.keys() - {wanted, "F32"}:
            raise ExportError(f"{file}: expected tensors of type {wanted} from llama.cpp, found {found}")


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds.

    Attributes:
        size: Of the file, bytes.
        bits_per_weight: Of the tensors alone, bits for each number in them.
        tensor_types: Name of a tensor type → number of tensors, the most frequent first.
    """

    size: int
    bits_per_weight: float
    tensor_types: dict[str, int]


def contents(file: Path) -> Contents:
    """Read back what a GGUF file holds.

    Raises:
        ExportError: no GGUF file, or a damaged one.
    """
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(file).tensors
    except (OSError, ValueError, IndexError) as error:
        raise ExportError(f"{file}: expected a GGUF file, it cannot be read: {error}; export again") from error
    weights = sum(int(tensor.n_elements) for tensor in tensors)
    if not weights:
        raise ExportError(f"{file}: expected a GGUF file with tensors, found none; export again")
    return Contents(
        size=file.stat().st_size,
        bits_per_weight=8 * sum(int(tensor.n_bytes) for tensor in tensors) / weights,
        tensor_types=dict(Counter(tensor.tensor_type.name for tensor in tensors).most_common()),
    )
