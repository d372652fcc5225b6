"""A GGUF file as a base: its weights and tokenizer as a Hugging Face folder, proved against llama.cpp.

The weights are dequantized by transformers and stored in float16. `trainers.gguf_file` finds the file. The
tokenizer is rebuilt from the file, because transformers 5.17 builds some wrongly (for SmolLM2: another EOS, and digits
are not split); it has to give llama.cpp's ids for thousands of texts.
"""

import faulthandler
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export import ExportError
from export.converters import split_steps
from export.gguf import open_gguf
from trainers.encode import encode_prompt

_CONTROL, _USER, _BYTE = 3, 4, 6  # kinds of tokens (llama.h, enum llama_token_type)
_VARIANTS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "default": "gpt-2"}  # other names of the same splits
_FORK: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


# --- the folder -------------------------------------------------------------------------------------------------------


def check(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file. Raises ExportError: damaged, or of an unknown family."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    reader = open_gguf(file)
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    family = str(fields.get("general.architecture"))
    if family not in GGUF_SUPPORTED_ARCHITECTURES:
        known = ", ".join(sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}))
        raise ExportError(f"{file}: expected a model of a family that transformers can read ({known}), got {family}")
    return fields


def unpack(file: Path, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Write the model in a GGUF file to a Hugging Face folder; returns facts about it.

    Args:
        file: of a family that transformers can dequantize.
        folder: exists and is empty.
        texts: what the model will be asked; they and several thousand others have to give llama.cpp's ids.

    Raises:
        ExportError: a damaged file, an unknown family, or a tokenizer that cannot be rebuilt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    fields = check(file)
    family = str(fields["general.architecture"])
    tokenizer = _write_tokenizer(fields, folder, file)
    proved = prove_ids(file, tokenizer, [*texts, *probe_texts(tokenizer)])
    try:
        config = _config(fields, file)
        where = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, **where)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ExportError(f"{file}: transformers cannot dequantize its weights: {error}") from error
    kl = prove_logits(file, tokenizer, model)
    config = model.config
    config.__dict__.pop("quantization_config", None)  # with it, transformers refuses to save
    for special in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for settings in (config, model.generation_config):
            setattr(settings, special, getattr(tokenizer, special))
    with torch.device("meta"):
        plain = type(model)(config)
    weights = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    missing, unknown = plain.load_state_dict(weights, strict=False, assign=True)
    if missing or unknown:
        raise ExportError(f"{file}: expected the tensors of {family}, missing {missing[:3]}, unknown {unknown[:3]}")
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.config.dtype = torch.float16
    plain.save_pretrained(folder)
    kinds = {str(tensor.tensor_type.name) for tensor in open_gguf(file).tensors if len(tensor.shape) > 1}
    front = {"license": license} if (license := fields.get("general.license")) else {}
    about = f"{fields.get('general.name', file.stem)}, dequantized from {file.name} ({', '.join(sorted(kinds))})."
    (folder / "README.md").write_text(f"---\n{json.dumps(front)}\n---\n{about}\n", encoding="utf-8")
    return {
        "file": file.name,
        "family": family,
        "source_precision": ", ".join(sorted(kinds)),
        "texts_with_equal_ids": proved,
        "kl_to_llama_cpp": kl,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
    }


def _config(fields: dict[str, Any], file: Path) -> Any:
    """The model's configuration, with what transformers 5.17 leaves out: widths of heads, biases, RoPE scaling."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    family, tensors = fields["general.architecture"], {tensor.name: tensor for tensor in open_gguf(file).tensors}
    if head_dim := fields.get(f"{family}.attention.key_length"):
        config.head_dim = head_dim
        if family in ("gemma2", "gemma3"):  # as in llama.cpp; of the 27B models alone it is another number
            whole = config.num_hidden_layers in (46, 62)
            config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if whole else head_dim
    if family == "llama":
        config.attention_bias = "blk.0.attn_q.bias" in tensors
        config.mlp_bias = "blk.0.ffn_down.bias" in tensors
    rope = dict(config.rope_parameters or {})
    kind = fields.get(f"{family}.rope.scaling.type")
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": fields.get(f"{family}.rope.scaling.factor")}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = fields.get(f"{family}.rope.scaling.original_context_length")
        full = rope.get("full_attention")  # Gemma 3 does not scale the others
        config.rope_parameters = {**rope, "full_attention": {**full, **scaling}} if full else {**rope, **scaling}
    elif "rope_freqs.weight" in tensors:
        config.rope_parameters = _llama3_rope(rope, tensors["rope_freqs.weight"].data, config.max_position_embeddings)
    return config


def _llama3_rope(rope: dict[str, Any], divisors: Any, context: int) -> dict[str, Any]:
    """Llama 3's RoPE scaling (low_freq_factor 1, high_freq_factor 4), from what llama.cpp divides each frequency by."""
    import numpy as np

    factor, theta, pairs = float(divisors.max()), float(rope["rope_theta"]), len(divisors)
    lengths = 2 * np.pi * theta ** (np.arange(pairs) / pairs)  # of the waves, in tokens
    for original in (8192, round(context / factor)):
        smooth = np.clip((original / lengths - 1) / 3, 0, 1)
        if np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            settings = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            return {**rope, "rope_type": "llama3", **settings, "original_max_position_embeddings": original}
    return rope  # the proof of the logits decides


def _write_tokenizer(fields: dict[str, Any], folder: Path, file: Path) -> Any:
    """The tokenizer of a GGUF file, saved to `folder`."""
    kind = str(fields.get("tokenizer.ggml.model"))
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise ExportError(
            f"{file}: expected a tokenizer of kind {' or '.join(makers)}, got {kind}; use the model's own folder"
        )
    tokenizer = makers[kind](fields, folder, file)
    if template := fields.get("tokenizer.chat_template"):
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _special(fields: dict[str, Any]) -> dict[str, str]:
    """BOS, EOS, padding and unknown token as transformers names them, as far as the file has them."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {
        "bos_token": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token": fields.get("tokenizer.ggml.eos_token_id"),
        "unk_token": fields.get("tokenizer.ggml.unknown_token_id"),
        "pad_token": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}


def _byte_level(fields: dict[str, Any], folder: Path, file: Path) -> Any:
    """A byte-level BPE tokenizer; texts are not normalized, as llama.cpp does not."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    steps = split_steps(_VARIANTS.get(pre, pre))
    if steps is None:
        raise ExportError(
            f"{file}: its tokenizer splits text as {pre}, which is not known here; use the model's folder"
        )
    parts: dict[str, Any] = {
        "ByteLevel": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Digits": pre_tokenizers.Digits(individual_digits=True),
    }
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=_VARIANTS.get(pre, pre) == "llama-bpe"))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [parts.get(step) or pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    )
    fast.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER):
            fast.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    special = _special(fields)
    if fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        fast.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **special)


def _sentencepiece(fields: dict[str, Any], folder: Path, file: Path) -> Any:
    """A SentencePiece model (BPE with byte fallback), written as tokenizer.model, which export converts again."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import GemmaTokenizer, LlamaTokenizer

    proto: Any = sentencepiece_model_pb2.ModelProto()
    scores = fields.get("tokenizer.ggml.scores")
    if scores is None:
        raise ExportError(
            f"{file}: expected scores of its SentencePiece tokens, found none; use the model's own folder"
        )
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    spec, special = proto.trainer_spec, _special(fields)
    spec.model_type, spec.byte_fallback, spec.vocab_size = 2, _BYTE in kinds, len(tokens)
    for name, attribute in (("unk", "unk_token"), ("bos", "bos_token"), ("eos", "eos_token"), ("pad", "pad_token")):
        token = special.get(attribute)
        setattr(spec, f"{name}_id", tokens.index(token) if token else -1)
        if token:
            setattr(spec, f"{name}_piece", token)
    normalizer = proto.normalizer_spec
    normalizer.name, normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = "identity", False, True
    normalizer.add_dummy_prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    gemma = str(fields.get("general.architecture")).startswith("gemma")
    config = {
        "tokenizer_class": "GemmaTokenizer" if gemma else "LlamaTokenizer",
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", True)),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        "add_prefix_space": normalizer.add_dummy_prefix,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (GemmaTokenizer if gemma else LlamaTokenizer).from_pretrained(folder)


# --- the proof --------------------------------------------------------------------------------------------------------


def probe_texts(tokenizer: Any, count: int = 3000, seed: int = 0) -> Iterator[str]:
    """Texts that tell tokenizers apart: every byte that is a token, code, digits, random Unicode, pieces put together.

    None begins with a blank, which a SentencePiece tokenizer reads differently in Hugging Face and llama.cpp; a prompt
    that does is refused at export.
    """
    from tokenizers import pre_tokenizers

    rng, vocabulary = random.Random(seed), tokenizer.get_vocab()
    yield from ("a  b", "a\n\n\nb", "a\t x", "trailing  ", "a\r\nb", "é e\u0301 µ μ ﬁ", "汉字かな한글", "👩‍👩‍👧 🏳️‍🌈")
    yield from ("“a”—b…", "1234567 3.14159 1e-05 0x1F", "I'll you've IT'S don't", "def f(x):\n    return x  # ¹²³\n")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in (*range(0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 4096)):
        (spelling, _), *_ = splitter.pre_tokenize_str(chr(code))
        if "<0x00>" in vocabulary or all(letter in vocabulary for letter in spelling):
            yield f"a{chr(code)}b"
    pieces = [tokenizer.decode([i]) for i in rng.sample(range(len(tokenizer)), min(len(tokenizer), 4 * count))]
    plain = [piece for piece in pieces if piece and "\ufffd" not in piece and piece not in tokenizer.all_special_tokens]
    blocks = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x6FF), (0x900, 0xE00), (0x3040, 0x3100),
              (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x2000, 0x2C00), (0x1F300, 0x1FAFF)]  # fmt: skip
    for _ in range(count):
        yield "x" + "".join(rng.choices(plain, k=rng.randint(1, 6)))
        first, last = rng.choice(blocks)
        letters = [chr(rng.randint(first, last - 1)) for _ in range(rng.randint(1, 8))]
        yield "x" + "".join(rng.choice((letter, letter, " ", "\n", str(rng.randint(0, 999)))) for letter in letters)


def prove_ids(gguf: Path, tokenizer: Any, texts: Sequence[str]) -> int:
    """The number of texts, all of which give the same ids in Hugging Face and llama.cpp.

    Raises ExportError: shows the first text that does not, or on which llama.cpp broke down.
    """
    theirs = llama_cpp_ids(gguf, texts)
    for text, ids in zip(texts, theirs, strict=True):
        ours = encode_prompt(tokenizer, text)
        if ours != ids:
            place = next(
                (i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids))
            )
            raise ExportError(
                f"{gguf}: Hugging Face and llama.cpp read {text[:80]!r} as different tokens, from the {place + 1}. on: "
                f"{tokenizer.convert_ids_to_tokens(ours[place : place + 4])} and "
                f"{tokenizer.convert_ids_to_tokens(ids[place : place + 4])}; take this text out of the data, or use "
                "another base"
            )
    return len(texts)


KL_LIMIT = 0.05
"""Nats per token between llama.cpp, which rounds what it multiplies quantized weights with, and transformers."""


def prove_logits(gguf: Path, tokenizer: Any, model: Any) -> float:
    """Mean KL(llama.cpp ‖ transformers) over the tokens of some texts, in nats.

    Raises ExportError: it is above KL_LIMIT, since transformers read a setting of the file in another way.
    """
    import numpy as np
    import torch

    texts = ["The quick brown fox jumps over the lazy dog, and 12 + 7 is 19.\n", "def f(x):\n    return 2 * x\n" * 12]
    rows = [list(tokenizer(text)["input_ids"])[:250] for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "logits.npz", Path(folder) / "log"
        child = _FORK.Process(target=_compute_logits, args=(gguf, rows, out, log))
        child.start()
        child.join()
        if child.exitcode:
            raise ExportError(f"{gguf}: llama.cpp cannot run it: {_reason(log, child.exitcode)}")
        theirs = [torch.from_numpy(row).double() for row in np.load(out).values()]
    divergences = []
    for ids, row in zip(rows, theirs, strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        them = row.log_softmax(-1)
        divergences.append((them.exp() * (them - ours)).sum(-1))
    kl = float(torch.cat(divergences).mean())
    if not kl <= KL_LIMIT:
        raise ExportError(
            f"{gguf}: expected transformers to compute what llama.cpp does, got a mean KL of {kl:.3f} nats per token, "
            f"where {KL_LIMIT} is the limit; transformers does not read all settings of this family; use the model's "
            "own folder"
        )
    return kl


def _compute_logits(gguf: Path, rows: list[list[int]], out: Path, log: Path) -> None:
    import llama_cpp
    import numpy as np

    _quiet(log)
    model = llama_cpp.Llama(str(gguf), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    logits = []
    for ids in rows:
        model.reset()
        model.eval(ids)
        logits.append(np.array(model.scores[: len(ids)]))
    np.savez(out, *logits)


def _quiet(log: Path) -> None:
    """Have llama.cpp's last words go to a file, without a debugger."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    faulthandler.disable()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)


def _reason(log: Path, code: int) -> str:
    words = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    cause = re.search(r"what\(\):.*|.*(?:GGML_ASSERT|[Ee]rror|failed).*", words)
    return cause[0].strip() if cause else f"exit code {code}"


def llama_cpp_ids(gguf: Path, texts: Sequence[str]) -> list[list[int]]:
    """llama.cpp's ids of texts, BOS as the file says; in a process of its own, since llama.cpp aborts where it fails.

    Raises ExportError: names the text at which it aborted, or the file if it could not be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers, log = Path(folder) / "ids.jsonl", Path(folder) / "log"
        child = _FORK.Process(target=_tokenize, args=(gguf, list(texts), answers, log))
        child.start()
        child.join()
        loaded = answers.is_file()
        lines = answers.read_text(encoding="utf-8").splitlines() if loaded else []
        if child.exitcode == 0:
            return [json.loads(line) for line in lines]
        reason = _reason(log, child.exitcode)
    if not loaded:
        raise ExportError(f"{gguf}: llama.cpp cannot load its tokenizer: {reason}")
    raise ExportError(
        f"{gguf}: llama.cpp breaks down on the text {texts[len(lines)][:80]!r}: {reason}; the tokenizer in the file is "
        "damaged, or of another kind than it says"
    )


def _tokenize(gguf: Path, texts: Sequence[str], answers: Path, log: Path) -> None:
    """Write the ids of each text as a line; `answers` exists as soon as the file is loaded."""
    import llama_cpp

    _quiet(log)
    vocabulary = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    with answers.open("w", encoding="utf-8") as file:
        for text in texts:
            ids = vocabulary.tokenize(text.encode(), add_bos=True, special=True)
            file.write(json.dumps(ids) + "\n")
            file.flush()
