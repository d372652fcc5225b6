"""What answers in `tests.ollama_double`: a callable, or llama.cpp on the uploaded GGUF."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTS = {"num_ctx", "num_predict", "num_thread", "num_keep", "num_batch", "top_k", "seed", "repeat_last_n"}
FLOATS = {"temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
DEFAULTS = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "num_predict": -1,
    "num_ctx": 4096,
    "repeat_penalty": 1.1,
}


class Refusal(Exception):  # noqa: N818
    """An error answer: HTTP status and message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def cut(text: str, stop: list[str], otherwise: str = "stop") -> tuple[str, str]:
    """Text before the earliest stop word, and "stop" if there was one, else `otherwise`."""
    found = [at for word in stop if (at := text.find(word)) >= 0]
    return (text[: min(found)], "stop") if found else (text, otherwise)


def check_types(options: dict[str, Any]) -> None:
    for key, value in options.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        for kinds, word in ((INTS, "integer"), (FLOATS, "float32")):
            if key in kinds and not is_number:
                raise Refusal(500, f'option "{key}" must be of type {word}')
        if key in INTS:
            options[key] = int(value)
        if key == "stop" and not (isinstance(value, list) and all(isinstance(w, str) for w in value)):
            raise Refusal(500, 'option "stop" must be of an array of strings')


def by_reply(
    reply: Callable[[str], str], tokenize: Callable[[str], list[int]], rendered: str, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Text and final message from a callable; a byte of the answer counts as one token."""
    prompt = tokenize(rendered)[-options["num_ctx"] :]  # the real one cuts, too, and says nothing
    text, reason = cut(reply(rendered), options.get("stop") or [])
    data = text.encode()
    if 0 <= options["num_predict"] < len(data):
        data, reason = data[: options["num_predict"]], "length"
    return data.decode(errors="ignore"), {
        "done_reason": reason,
        "prompt_eval_count": len(prompt),
        "prompt_eval_duration": 1000 * len(prompt),
        "eval_count": len(data),
        "eval_duration": 5000 * len(data),
    }


def load(gguf: Path, adapter: Path | None, options: dict[str, Any]) -> Any:
    """A llama.cpp engine on the uploaded files."""
    import llama_cpp

    threads = options.get("num_thread") or 2
    return llama_cpp.Llama(
        str(gguf),
        n_ctx=options["num_ctx"],
        n_threads=threads,
        n_threads_batch=threads,
        lora_path=str(adapter) if adapter else None,
        verbose=False,
    )


def by_llama(engine: Any, rendered: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Text and final message from llama.cpp."""
    import llama_cpp

    vocab = engine._model.vocab
    # add_bos asks for what the GGUF says: llama.cpp adds a BOS only where its metadata do.
    prompt = engine.tokenize(rendered.encode(), add_bos=True, special=True)[-options["num_ctx"] :]
    limit = options["num_predict"] if options["num_predict"] >= 0 else options["num_ctx"]
    limit = min(limit, options["num_ctx"] - len(prompt))
    tokens: list[int] = []
    text, reason, count = "", "length", 0
    began = first = time.perf_counter_ns()
    sampler = {k: options[k] for k in ("top_k", "top_p", "min_p", "repeat_penalty") if k in options}
    for token in engine.generate(prompt, temp=options["temperature"], **sampler) if limit > 0 else ():
        count += 1  # the end token counts, as in the real one
        if count == 1:
            first = time.perf_counter_ns()
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            reason = "stop"
            break
        tokens.append(token)
        whole = engine.detokenize(tokens, prev_tokens=prompt).decode(errors="ignore")
        text, stopped = cut(whole, options.get("stop") or [], "")
        if stopped:
            reason = "stop"
            break
        if count >= limit:
            break
    return text, {
        "done_reason": reason,
        "prompt_eval_count": len(prompt),
        "prompt_eval_duration": first - began,
        "eval_count": count,
        "eval_duration": time.perf_counter_ns() - first,
    }
