"""Precisions of a GGUF: what llama.cpp's quantizer makes, what it cannot, and what the files really hold."""

import ctypes

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from evaluation.backends.llama_cpp import LlamaCppBackend
from export.errors import ExportError
from export.quantization import QUANTIZATIONS, REFUSED, contents, quantize, unusable
from tests.conftest import TEMPLATE

LAYERS, VOCABULARY = 2, 64
MATRICES = 2 + 7 * LAYERS  # embedding, output, and seven in each layer
VECTORS = 1 + 2 * LAYERS


def write_model(file, width):
    """A random Llama with rows of `width`, in f16."""
    writer, random = GGUFWriter(file, "llama"), np.random.default_rng(0)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([1] * VOCABULARY)

    def add(name, *shape, kind=np.float16):
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(kind))

    add("token_embd", VOCABULARY, width)
    add("output", VOCABULARY, width)
    add("output_norm", width, kind=np.float32)
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}", width, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{name}", 2 * width, width)
        add(f"blk.{i}.ffn_down", width, 2 * width)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}", width, kind=np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256: every format's block fits."""
    return write_model(tmp_path_factory.mktemp("wide") / "f16.gguf", 256)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Rows of 64 and 128: no K format's block fits."""
    return write_model(tmp_path_factory.mktemp("narrow") / "f16.gguf", 64)


def test_the_list_is_the_library_s():
    theirs = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("ALL_").removeprefix("MOSTLY_"): getattr(llama_cpp, name)
        for name in dir(llama_cpp)
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    assert {name.upper(): number for name, number in QUANTIZATIONS.items()} == {
        name: number for name, number in theirs.items() if name in {q.upper() for q in QUANTIZATIONS}
    }
    assert {q.upper() for q in (*QUANTIZATIONS, *REFUSED)} == theirs.keys()
    assert not QUANTIZATIONS.keys() & REFUSED.keys()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_each_precision_is_made_and_read_back(wide, tmp_path, name):
    assert quantize(wide, tmp_path / "q.gguf", name) == 0, "rows of 256 need no fallback"
    made = contents(tmp_path / "q.gguf")
    assert int(GGUFReader(tmp_path / "q.gguf").fields["general.file_type"].contents()) == QUANTIZATIONS[name]
    assert made.size == (tmp_path / "q.gguf").stat().st_size
    assert sum(made.tensor_types.values()) == MATRICES + VECTORS and made.tensor_types["F32"] >= VECTORS
    # The format itself, or for a mixture its main one: q4_K_M holds Q4_K, iq3_m IQ3_S.
    main = {"iq3_m": "IQ3_S"}.get(name, name.upper().removesuffix("_S").removesuffix("_M").removesuffix("_L"))
    main = "IQ3_S" if name == "iq3_s" else main
    assert made.tensor_types[main] >= MATRICES / 2
    bits = {"f32": (32, 32), "f16": (16, 16.2), "bf16": (16, 16.2), "q8_0": (8.5, 8.7)}
    low, high = bits.get(name, (1, 8))
    assert low <= made.bits_per_weight <= high


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_plain_precisions_hold_nothing_else(wide, tmp_path, name):
    quantize(wide, tmp_path / "q.gguf", name)
    wanted = {"F32": MATRICES + VECTORS} if name == "f32" else {name.upper(): MATRICES, "F32": VECTORS}
    assert contents(tmp_path / "q.gguf").tensor_types == wanted


def test_bf16_has_the_weights_rounded_to_bf16(wide, tmp_path):
    quantize(wide, tmp_path / "q.gguf", "bf16")
    source, made = ({t.name: t for t in GGUFReader(f).tensors} for f in (wide, tmp_path / "q.gguf"))
    name = "blk.1.ffn_down.weight"
    exact = np.asarray(source[name].data, dtype=np.float32).ravel()
    bits = np.asarray(made[name].data).view(np.uint16).ravel().astype(np.uint32) << 16
    got = bits.view(np.float32)
    assert np.abs(got - exact).max() > 0, "f16 has three bits more"
    assert (np.abs(got - exact) <= np.abs(exact) * 2.0**-8).all()


def test_fallbacks_are_counted(narrow, tmp_path):
    assert quantize(narrow, tmp_path / "q8.gguf", "q8_0") == 0
    assert contents(tmp_path / "q8.gguf").tensor_types == {"Q8_0": MATRICES, "F32": VECTORS}
    fallbacks = quantize(narrow, tmp_path / "q4.gguf", "q4_K_M")
    made = contents(tmp_path / "q4.gguf").tensor_types
    assert "Q4_K" not in made and made["Q5_0"] > 0
    # All matrices but the output, for which llama.cpp chooses the larger format by itself where Q6_K does not fit.
    assert fallbacks == MATRICES - 1


def test_formats_that_need_an_importance_matrix_do(wide, tmp_path):
    """The reason that is given for a refusal is llama.cpp's own."""
    said = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode()))
    quiet = llama_cpp._logger.llama_log_callback
    params = llama_cpp.llama_model_quantize_default_params()
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        for name, reason in REFUSED.items():
            if "importance matrix" not in reason:
                continue
            said.clear()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
            assert llama_cpp.llama_model_quantize(str(wide).encode(), str(tmp_path / "q.gguf").encode(), params)
            assert "requires an imatrix" in said[-1], name
    finally:
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("iq2_xs", "'iq2_xs' cannot be used: .*importance matrix.*expected one of 'f32', 'f16'"),
        ("q2_K_S", "importance matrix"),
        ("mxfp4_moe", "mixtures of experts"),
        ("q5", "expected one of 'f32', .*got 'q5'"),
        ("Q4_K_M", "did you mean 'q4_K_M'"),
        ("", "got ''"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_reason(wide, tmp_path, name, words):
    with pytest.raises(ExportError, match=words):
        quantize(wide, tmp_path / "q.gguf", name)
    assert not (tmp_path / "q.gguf").exists()
    assert unusable("q8_0") is None


def test_llama_cpp_s_own_reason_reaches_the_user(narrow, tmp_path):
    with pytest.raises(ExportError, match=r"to q1_0: .*no tensor type fallback is defined"):
        quantize(narrow, tmp_path / "q.gguf", "q1_0")
    with pytest.raises(ExportError, match=r"none\.gguf to q8_0: .*failed to load model"):
        quantize(tmp_path / "none.gguf", tmp_path / "q.gguf", "q8_0")


@pytest.mark.parametrize("size", [0, 4, 3000, -3000])
def test_a_damaged_file_is_refused(wide, tmp_path, size):
    (tmp_path / "cut.gguf").write_bytes(wide.read_bytes()[:size])
    with pytest.raises(ExportError, match=r"cut\.gguf: expected a GGUF file"):
        contents(tmp_path / "cut.gguf")
    with pytest.raises(ExportError, match=r"could not quantize .*cut\.gguf"):
        quantize(tmp_path / "cut.gguf", tmp_path / "q.gguf", "q8_0")


def test_another_type_than_asked_for_is_noticed(wide, tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTIZATIONS, "bf16", QUANTIZATIONS["q8_0"])
    with pytest.raises(ExportError, match="expected tensors of type BF16 from llama.cpp, found {'Q8_0'"):
        quantize(wide, tmp_path / "q.gguf", "bf16")


def test_the_log_is_as_quiet_as_before(wide, tmp_path, capfd):
    quantize(wide, tmp_path / "q.gguf", "q4_0")
    LlamaCppBackend(tmp_path / "q.gguf", TEMPLATE, num_ctx=64).close()
    assert "llama_model" not in capfd.readouterr().err
