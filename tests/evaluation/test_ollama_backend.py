"""What the Ollama backend sends, what it makes of the answer, and what it refuses to score."""

from pathlib import Path

import pytest

from evaluation.backends import Backend, BackendError, Generation
from evaluation.backends.ollama import OllamaBackend
from evaluation.backends.retry import Retry
from export.modelfile import ModelfileSpec
from export.ollama import register
from tests.ollama_double import LOAD_COLD_NS, LOAD_WARM_NS, OllamaDouble

TEMPLATE = "Q: {{ .Prompt }}\nA: "


def ids(item: str) -> list[int]:
    """What a Hugging Face tokenizer with BOS and one token per byte gives."""
    return [1, *TEMPLATE.replace("{{ .Prompt }}", item).encode()]


@pytest.fixture
def double(tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    spec = ModelfileSpec("./model.gguf", TEMPLATE, ["###"], 128, 0.7)
    with OllamaDouble(reply=lambda rendered: f"{len(rendered)} ### more") as server:
        register(server.url, "m", gguf, spec, records=tmp_path)
        yield server


def make(double: OllamaDouble, **options: object) -> OllamaBackend:
    options = {"retry": Retry(patience_s=0), **options}  # what happens when patience ends: test_ollama_failures.py
    return OllamaBackend(double.url, "m", 128, expected=ids, **options)  # type: ignore[arg-type]


def test_generation_carries_counts_and_times(double):
    with make(double) as backend:
        as_protocol: Backend = backend  # isinstance would read device_class, which loads the model
        assert (as_protocol.name, as_protocol.version) == ("ollama", "0.32.0")
        first = backend.generate("pm25 9", 16, ["###"])
        n = len(ids("pm25 9"))
        assert first == Generation(f"{n - 1} ", n, 3, LOAD_COLD_NS, 1000 * n, 5000 * 3, "stop")
        assert backend.generate("pm25 9", 16, ["###"]).load_ns == LOAD_WARM_NS


def test_request_is_greedy_and_leaves_templating_to_the_server(double):
    with make(double, num_threads=3) as backend:
        backend.generate("x", 16, ["END", "\n"])
    (body,) = [b for _, path, b in double.requests if path == "/api/generate"]
    assert body["prompt"] == "x" and not body.get("raw") and not body["stream"]
    want = {"temperature": 0.0, "top_k": 1, "seed": 0, "num_predict": 16, "num_ctx": 128, "num_thread": 3}
    assert want.items() <= body["options"].items()
    assert body["options"]["stop"] == ["END", "\n"] and body["options"]["repeat_penalty"] == 1.0


def test_without_stop_words_those_of_the_model_count(double):
    with make(double) as backend:
        assert "###" not in backend.generate("x", 16, []).text
        assert "###" in backend.generate("x", 16, ["never"]).text


def test_token_limit_is_told_from_a_stop(double):
    with make(double) as backend:
        got = backend.generate("x", 1, ["###"])
    assert (got.text, got.answer_tokens, got.finish_reason) == ("8", 1, "length")


def test_fields_left_out_are_zero(double):
    double.reply = lambda rendered: ""
    with make(double) as backend:
        got = backend.generate("x", 4, ["###"])
    assert (got.text, got.answer_tokens, got.decode_ns, got.finish_reason) == ("", 0, 0, "stop")


def test_wrong_template_is_found_by_the_token_count(double):
    double.misbehave = "wrong_template"
    with make(double) as backend, pytest.raises(BackendError, match="BOS") as caught:
        backend.generate("x", 4, ["###"])
    n = len(ids("x"))
    assert f"read {n + 3} prompt tokens" in str(caught.value) and f"expected {n}" in str(caught.value)


@pytest.mark.parametrize(("shift", "said"), [(1, "BOS comes twice"), (-1, "does not add"), (-5, "cached tokens")])
def test_the_difference_hints_at_the_cause(double, shift, said):
    double.tokenize = lambda text: [1, *text.encode(), 9][: len(text.encode()) + 1 + shift]
    with make(double) as backend, pytest.raises(BackendError, match=said):
        backend.generate("x", 4, ["###"])


def test_prompts_that_do_not_fit_are_refused_before_they_are_cut(double):
    with make(double) as backend:
        with pytest.raises(BackendError, match="num_ctx 128"):
            backend.generate("x" * 120, 4, ["###"])
        for item, limit in (("", 4), ("x", 0)):
            with pytest.raises(BackendError, match="max_tokens ≥ 1"):
                backend.generate(item, limit, ["###"])
    assert not [b for _, path, b in double.requests if path == "/api/generate"]


@pytest.mark.parametrize("how", ["die", "drop"])
def test_connection_lost_midway(double, how):
    with make(double) as backend:
        backend.generate("x", 4, ["###"])
        double.misbehave = how
        with pytest.raises(BackendError, match="ollama serve") as caught:
            backend.generate("y", 4, ["###"])
        assert double.url in str(caught.value)
        if how == "die":
            with pytest.raises(BackendError, match=double.url):
                backend.generate("z", 4, ["###"])


def test_a_server_that_hangs_is_left(double):
    double.misbehave = "hang"
    with (
        make(double, timeout_s=0.3) as backend,
        pytest.raises(BackendError, match=r"said nothing for 0\.3 s"),
    ):
        backend.generate("x", 4, ["###"])


def test_refusals_of_the_server_are_passed_on(double):
    with make(double) as backend:
        double.models["m:latest"].parameters["top_p"] = "many"
        double.models["m:latest"].parameters["num_gpu"] = 0
        assert backend.generate("x", 4, ["###"])  # the request's options win
        double.models.clear()
        with pytest.raises(BackendError, match="404: model 'm' not found"):
            backend.generate("x", 4, ["###"])


def test_no_server_and_no_model_are_told_at_once(double):
    with pytest.raises(BackendError, match=r"has no model 'other' \(it has: m:latest\)"):
        OllamaBackend(double.url, "other", 128)
    double.die()
    with pytest.raises(BackendError, match=f"no Ollama answers at {double.url}"):
        OllamaBackend(double.url, "m", 128)


@pytest.mark.parametrize(("vram", "device"), [(0, "cpu"), (2, "cpu+gpu"), (4, "gpu")])
def test_device_class_is_where_the_server_holds_the_weights(double, vram, device):
    double.size_vram = vram  # of 4 bytes
    with make(double) as backend:
        assert backend.device_class == device
        assert backend.device_class == device
    loads = [b for _, path, b in double.requests if path == "/api/generate"]
    assert len(loads) == 1 and not loads[0]["prompt"]


# --- with llama.cpp behind the double -----------------------------------------------------------------------


def tiny_gguf(path: Path, add_bos: bool, adapter: Path) -> None:
    """A random one-layer Llama with a byte vocabulary, and a random LoRA adapter on its output layer."""
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    rng = np.random.default_rng(0)
    dim, ff, vocab, rank = 32, 64, 3 + 256, 4
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(dim)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim // 2)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_add_space_prefix(False)
    shapes = {"token_embd": (vocab, dim), "output": (vocab, dim), "blk.0.ffn_down": (dim, ff)}
    shapes |= {f"blk.0.{n}": (dim, dim) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{n}": (ff, dim) for n in ("ffn_gate", "ffn_up")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(dim, np.float32))
    lora = gguf.GGUFWriter(adapter, "llama")
    lora.add_type("adapter")
    lora.add_string("adapter.type", "lora")
    lora.add_float32("adapter.lora.alpha", 8.0)
    lora.add_tensor("output.weight.lora_a", rng.normal(size=(rank, dim)).astype(np.float32))
    lora.add_tensor("output.weight.lora_b", rng.normal(size=(vocab, rank)).astype(np.float32))
    for one in (writer, lora):
        one.write_header_to_file()
        one.write_kv_data_to_file()
        one.write_tensors_to_file()
        one.close()


@pytest.mark.parametrize("add_bos", [True, False])
def test_llama_cpp_answers_on_the_uploaded_weights(tmp_path, add_bos):
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf, adapter = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    tiny_gguf(gguf, add_bos, adapter)
    spec = ModelfileSpec("./model.gguf", TEMPLATE, ["never"], 128, 0.0)

    def prompt_ids(item: str) -> list[int]:
        text = TEMPLATE.replace("{{ .Prompt }}", item).replace(" ", "▁").encode()  # as SentencePiece does
        return [1] * add_bos + [byte + 3 for byte in text]

    def reference(item: str, lora: Path | None) -> list[int]:
        """Greedy ids by hand: evaluate, take the largest logit, again."""
        llm = llama_cpp.Llama(str(gguf), n_ctx=128, lora_path=lora and str(lora), logits_all=True, verbose=False)
        tokens = prompt_ids(item)
        answer: list[int] = []
        while len(answer) < 12:
            llm.reset()
            llm.eval([*tokens, *answer])
            answer.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.close()
        return answer

    with OllamaDouble() as double:
        register(double.url, "m", gguf, spec, records=tmp_path)
        register(double.url, "with", gguf, spec, adapter, records=tmp_path)
        answers = []
        for name, lora in (("m", None), ("with", adapter)):
            with OllamaBackend(double.url, name, 128, num_threads=1, expected=prompt_ids) as backend:
                got = backend.generate("pm25 9", 12, [])
            want = reference("pm25 9", lora)
            if 2 in want:
                want = want[: want.index(2)]
            assert got.text == bytes(i - 3 for i in want if i > 2).decode(errors="ignore")
            assert got.prompt_tokens == len(prompt_ids("pm25 9")) and got.prefill_ns > 0 and got.decode_ns > 0
            answers.append(want)
        assert answers[0] != answers[1]  # the adapter counts
        bos_twice = OllamaBackend(double.url, "m", 128, expected=lambda item: [1, *prompt_ids(item)])
        with bos_twice as backend, pytest.raises(BackendError, match="BOS"):
            backend.generate("pm25 9", 4, [])
