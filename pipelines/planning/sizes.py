"""Bytes of what a run keeps, by arithmetic: 4-bit weights, optimizer states, key-value caches, GGUF files."""

from collections.abc import Iterable
from math import ceil

FP32, HALF = 4, 2
"""Bytes of one number: float32, and float16 or bfloat16."""

NF4_BLOCK, NF4_NESTED = 64, 256
"""Weights with one absmax, and absmax values with one of their own (bitsandbytes' block sizes)."""

# Bits a weight of whole files, measured by llama.cpp's authors on Llama-3.1 8B (tools/quantize/README.md); formats
# without a row there: bits of the block that the name stands for (ggml-common.h).
GGUF_BITS = {
    "f32": 32.0, "f16": 16.0005, "bf16": 16.0005, "q8_0": 8.5008, "q6_K": 6.5633, "q5_K_M": 5.7036, "q5_K_S": 5.5704,
    "q5_1": 6.0, "q5_0": 5.5, "q4_K_M": 4.8944, "q4_K_S": 4.6672, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.6818,
    "iq4_xs": 4.4597, "q3_K_L": 4.2979, "q3_K_M": 3.9960, "q3_K_S": 3.6429, "iq3_m": 3.7628, "iq3_s": 3.6606,
    "q2_K": 3.1593, "tq2_0": 2.0625, "tq1_0": 1.6875, "q1_0": 1.125,
}  # fmt: skip
_ROW = 256
"""Weights in a block of the K formats; matrices with other rows fall back to formats of up to 8.5 bits."""


def nf4_bytes(weights: int) -> int:
    """Bytes of one matrix in NF4 with double quantization.

    Dettmers et al. 2023, section 3: half a byte a weight; one 8-bit absmax for 64 weights; for 256 of those one absmax
    in float32; and the tables that bitsandbytes keeps with every matrix: 16 and 256 float32 codes, one offset.

    Args:
        weights: Numbers in the matrix.
    """
    blocks = ceil(weights / NF4_BLOCK)
    return ceil(weights / 2) + blocks + FP32 * (ceil(blocks / NF4_NESTED) + 16 + 256 + 1)


def adam_bytes(optimizer: str, sizes: Iterable[int]) -> int:
    """Bytes that an optimizer keeps beside the weights.

    AdamW (Loshchilov & Hutter 2019): two moments in float32. In 8 bit (Dettmers et al. 2022, as bitsandbytes does it):
    two moments of one byte with a float32 absmax for 256 of them, but float32 where a tensor has fewer than 4096
    numbers. SGD without momentum: nothing.

    Args:
        optimizer: As train.optimizer.
        sizes: Numbers in each trained tensor.
    """
    if optimizer == "sgd":
        return 0
    if optimizer != "adamw_8bit":
        return sum(2 * FP32 * n for n in sizes)
    return sum(2 * (n + FP32 * ceil(n / 256)) if n >= 4096 else 2 * FP32 * n for n in sizes)


def kv_cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, sequences: int = 1) -> int:
    """Bytes of keys and values in 16 bit: 2 tensors × layers × heads × size of a head × tokens × 2 bytes.

    Args:
        layers: Blocks of the model.
        kv_heads: Heads of keys and values (fewer than those of queries with grouped-query attention).
        head_dim: Numbers a head.
        tokens: Room of one sequence.
        sequences: At once.
    """
    return 2 * layers * kv_heads * head_dim * tokens * sequences * HALF


def gguf_bytes(precision: str, parameters: int, row: int) -> int:
    """Bytes of a whole model as GGUF.

    Args:
        precision: Name as in export.quantization.
        parameters: Of the model; a tied head counts once.
        row: Numbers in a row of its matrices (the hidden size); where it is no multiple of 256 most formats below
            8.5 bits fall back to larger ones, and 8.5 is what is said.
    """
    bits = GGUF_BITS[precision]
    return ceil(parameters * (max(bits, 8.5) if row % _ROW else bits) / 8)
