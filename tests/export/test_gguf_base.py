"""A GGUF file becomes a base that answers and reads as the file does in llama.cpp; what cannot is refused."""

import json
import shutil
from itertools import combinations, islice

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from export import ExportError, gguf, gguf_base
from export.engines.hf import HfEngine
from export.engines.llama_cpp import LlamaCppEngine
from tests.conftest import TEMPLATE
from tests.export.test_model_families import TOLERANCE, Built, byte_pairs, in_process, prompts
from tests.export.verify_runs import logits_apart
from tests.ollama_double import Model, OllamaDouble
from trainers import TrainingError, gguf_file

CHAT = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


@pytest.fixture
def smollm(base_dir, tmp_path):
    return Built("SmolLM2", base_dir, tmp_path).export("base")


def with_texts(file, out, **texts):
    """A copy of a GGUF file with other values of text fields; a name's dots are written as two underscores."""
    changes = {name.replace("__", "."): MetadataDetails(GGUFValueType.STRING, text) for name, text in texts.items()}
    copy_with_new_metadata(GGUFReader(file), GGUFWriter(out, "llama"), changes, [])
    return out


def unpacked(file, folder, texts=()):
    folder.mkdir()
    return gguf_base.unpack(file, folder, texts)


@pytest.mark.parametrize(
    "family",
    [
        "Llama 2", "Llama 3", "SmolLM2", "Gemma 2",
        *(pytest.param(f, marks=pytest.mark.full) for f in ("Mistral", "Qwen2", "Qwen3", "Gemma 3")),
    ],
)  # fmt: skip
def test_a_file_becomes_a_base_with_its_weights_and_its_tokens(family, base_dir, tmp_path):
    built = Built(family, base_dir, tmp_path)
    file, folder = built.export("base"), tmp_path / "unpacked"
    facts = unpacked(file, folder, prompts())
    assert facts["source_precision"] == "F16" and facts["texts_with_equal_ids"] > 6000
    engine = HfEngine(str(folder), TEMPLATE)
    assert logits_apart(engine, in_process(file), prompts()) < TOLERANCE
    again = tmp_path / "again.gguf"  # and the folder can be exported like any other
    gguf.save_merged(str(folder), None, tmp_path / "merged/model", {})
    gguf.convert_model(tmp_path / "merged/model", again, "again")
    assert gguf_base.prove_ids(again, AutoTokenizer.from_pretrained(folder), prompts()) == len(prompts())


def test_quantized_weights_are_those_that_llama_cpp_computes_with(smollm, tmp_path):
    gguf.quantize(smollm, tmp_path / "small.gguf", "q8_0")
    assert unpacked(tmp_path / "small.gguf", tmp_path / "unpacked")["source_precision"] == "Q8_0"
    engine = HfEngine(str(tmp_path / "unpacked"), TEMPLATE)
    served = LlamaCppEngine(tmp_path / "small.gguf", TEMPLATE, num_ctx=256, threads=1)
    assert logits_apart(engine, served, prompts()) < 10 * TOLERANCE, "llama.cpp rounds what it multiplies with"


def test_special_tokens_template_and_license_are_the_files(smollm, tmp_path):
    file = with_texts(smollm, tmp_path / "chat.gguf", tokenizer__chat_template=CHAT, general__license="mit")
    unpacked(file, tmp_path / "unpacked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    assert (tokenizer.chat_template, tokenizer.eos_token, tokenizer.pad_token) == (CHAT, "<|endoftext|>", "<|pad|>")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((tmp_path / "unpacked/README.md").read_text().split("---")[1]) == {"license": "mit"}


def cut(file):
    file.write_bytes(file.read_bytes()[:5000])


def cut_weights(file):
    file.write_bytes(file.read_bytes()[:-1000])


def text_file(file):
    file.write_text("no GGUF")


def field(name, old, new):
    def change(file):
        assert len(old) == len(new) and file.read_bytes().count(old) >= 1, name
        file.write_bytes(file.read_bytes().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "cannot be read"),
        (cut_weights, "cannot be read"),
        (text_file, "cannot be read"),
        (field("general.architecture", b"llama", b"lambs"), "family that transformers can read .*, got lambs"),
        (field("tokenizer.ggml.pre", b"smollm", b"smelly"), "splits text as smelly"),
        (field("tokenizer.ggml.model", b"gpt2", b"bert"), "expected a tokenizer of kind gpt2 or llama, got bert"),
    ],
)
def test_what_cannot_become_a_base_is_refused(spoil, reason, smollm, tmp_path):
    spoil(smollm)
    with pytest.raises(ExportError, match=reason):
        unpacked(smollm, tmp_path / "unpacked")


def test_a_text_that_is_read_differently_is_shown(smollm, tmp_path):
    unpacked(smollm, tmp_path / "unpacked")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "unpacked")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ExportError, match="read 'What' as different tokens, from the 1. on: .*ĠW"):
        gguf_base.prove_ids(smollm, tokenizer, ["", "What"])


def test_an_abort_in_llama_cpp_names_the_text(smollm, tmp_path):
    """Byte-level BPE called SentencePiece, as an export once did: it takes its own process down, not this one."""
    file = with_texts(smollm, tmp_path / "called.gguf", tokenizer__ggml__model="llama")
    with pytest.raises(ExportError, match="breaks down on the text 'bad': .*unordered_map::at.*of another kind"):
        gguf_base.llama_cpp_ids(file, ["", "bad", "better"])


def test_a_byte_that_no_token_has_is_read_alike_or_refused_by_name(tmp_path):
    """Hugging Face merges across the byte that it leaves out, llama.cpp does not."""
    built = Built("SmolLM2", None, tmp_path)
    for file in built.base.glob("tokenizer*"):
        text = file.read_text()
        file.write_text(text.replace('"\u0104"', '"\u0104\u0104\u0104"'))  # ByteLevel's spelling of byte 4
    gguf_file, tokenizer = built.export("base"), AutoTokenizer.from_pretrained(built.base)
    assert gguf_base.prove_ids(gguf_file, tokenizer, ["\x04", "a\x04b", "##"]) == 3
    with pytest.raises(ExportError, match=r"read '#\\x04#' as different tokens, from the 1. on: \['##'\] and"):
        gguf_base.prove_ids(gguf_file, tokenizer, ["#\x04#"])


def test_probe_texts_tell_splits_apart(tmp_path):
    """With one vocabulary, which has numbers of several digits, so that only the split differs."""
    built = Built("SmolLM2", None, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(byte_pairs("gpt-2", built.base))
    texts, file = [*islice(gguf_base.probe_texts(tokenizer), 12)], built.export("base")
    kinds = ("gpt-2", "llama-bpe", "qwen2")
    files = [with_texts(file, tmp_path / f"{kind}.gguf", tokenizer__ggml__pre=kind) for kind in kinds]
    ids = [gguf_base.llama_cpp_ids(file, texts) for file in files]
    assert all(one != other for one, other in combinations(ids, 2))


def test_where_a_source_is(tmp_path, monkeypatch, smollm):
    store = tmp_path / "store"
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    digest = "sha256:" + "a" * 64
    for place in ("registry.ollama.ai/library/small/latest", "registry.ollama.ai/me/small/v1", "hf.co/me/small/Q8_0"):
        manifest = store / "manifests" / place
        manifest.parent.mkdir(parents=True)
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
        manifest.write_text(json.dumps({"layers": [{"mediaType": "x", "digest": "y"}, layer]}))
    (store / "blobs").mkdir()
    blob = shutil.copyfile(smollm, store / "blobs" / digest.replace(":", "-"))
    for name in ("small", "small:latest", "me/small:v1", "hf.co/me/small:Q8_0"):
        assert gguf_file.is_gguf(f"ollama:{name}") and gguf_file.locate(f"ollama:{name}") == blob
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package/__init__.py").touch()
    shutil.copyfile(smollm, tmp_path / "a_package/model.gguf")
    assert gguf_file.locate("package:a_package/model.gguf") == tmp_path / "a_package/model.gguf"
    for source, reason in {
        "ollama:other": "no such model in .*store, and no Ollama that has it",
        "package:no_such_package/model.gguf": "run `pip install no-such-package`",
        "package:a_package/other.gguf": "no such file",
        str(tmp_path / "other.gguf"): "no such file",
    }.items():
        with pytest.raises(TrainingError, match=reason):
            gguf_file.locate(source)
    with OllamaDouble() as double, pytest.raises(TrainingError, match="its weights, .*, are not on this machine"):
        monkeypatch.setenv("OLLAMA_HOST", double.url)
        double.models["remote:latest"] = Model(smollm, None, "b" * 64, "c" * 64, "", "", {})
        gguf_file.locate("ollama:remote")
    assert gguf_file.weights_bytes(smollm) == 2 * sum(int(np.prod(t.shape)) for t in GGUFReader(smollm).tensors)


def test_weights_that_compute_something_else_are_refused(base_dir, tmp_path):
    """A limit of Gemma 2's attention that transformers does not read from the file."""
    file = Built("Gemma 2", base_dir, tmp_path, attn_logit_softcapping=0.1).export("base")
    with pytest.raises(ExportError, match="expected transformers to compute what llama.cpp does"):
        unpacked(file, tmp_path / "unpacked")


def test_probe_texts_hold_every_byte_that_is_a_token(base_dir):
    texts = [*gguf_base.probe_texts(AutoTokenizer.from_pretrained(base_dir), 500)]
    never = {0xC0, 0xC1, *range(0xF5, 256)}  # in no UTF-8 text
    assert never == {*range(256)} - {*"".join(texts).encode()}
