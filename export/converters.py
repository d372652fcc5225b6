"""llama.cpp's converters, from the very source distribution that the installed runtime was built from.

`python -m export.converters` fetches them (`make setup` does). So converter and runtime are the same llama.cpp.
"""

import hashlib
import json
import logging
import multiprocessing
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from db.files import staged
from export import ExportError, MergedOnlyError

PACKAGE = "llama-cpp-python"
# sha256 of the source distributions whose converters were tried out.
KNOWN = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
# Imports take most of a converter's time, and on Linux a fork has those of its parent.
_PROCESSES: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_WANTED = (MODEL, ADAPTER, "conversion/", "gguf-py/", "LICENSE")


def folder() -> Path:
    version = metadata.version(PACKAGE)
    return Path(sys.prefix) / "share" / "llama.cpp-converters" / version


def require() -> Path:
    """The folder with the converters, fetched if they are not there. Raises ExportError: they cannot be fetched."""
    place = folder()
    if not (place / "complete").is_file():
        fetch(place)
    return place


def run(script: str, arguments: list[str], out: Path) -> None:
    """Run a converter that writes the file `out`.

    Raises ExportError: it refused, with the reason, or its last lines where the reason is new. MergedOnlyError: it can
    convert only a part of an adapter.
    """
    log = out.with_name(f"{out.name}.log")
    child = _PROCESSES.Process(target=_run, args=(require() / script, arguments, log))
    child.start()
    child.join()
    log_text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else "it left no log"
    log.unlink(missing_ok=True)
    if child.exitcode or not out.is_file() or out.stat().st_size == 0:
        if script == ADAPTER and (reason := _reason(_UNMAPPED, log_text)):
            raise MergedOnlyError(f"llama.cpp's converter {reason}, so that the adapter can only be served merged")
        if reason := _reason(_REASONS, log_text):
            family = re.search(r"[Mm]odel architecture: (\w+)", log_text)
            raise ExportError(
                f"llama.cpp's converter cannot take {family[1] if family else 'this model'}: {reason}; choose a base "
                "of a family that docs/serving.md names, with its own tokenizer"
            )
        last = "\n".join(log_text.splitlines()[-8:])
        raise ExportError(f"llama.cpp's {script} failed (exit {child.exitcode}):\n{last}")


# What a converter says → the reason in a sentence.
_REASONS = {
    r"Model \S+ is not supported": "it knows no such architecture",
    r"in set_gguf_parameters\n(?s:.*)^KeyError: '(\w+)'": "it looks for {0} in the configuration, where transformers "
    "{transformers} writes none",
    r"BPE pre-tokenizer was not recognized": "it knows neither the BPE tokenizer nor the way it splits text, so that "
    "llama.cpp would read other tokens than were trained on",
    r"^ +assert max\(tokenizer": "the tokenizer has ids beyond the model's vocab_size",
    r"in (?:_?set|_?create|get)_vocab\w*\n(?s:.*)^([\w.]+(?:Error|Exception)\b.*)": "its vocabulary cannot be loaded "
    "({0})",
    r"^ValueError: Can not map tensor '(\S+)'": "it has no place for {0}",
}
_UNMAPPED = {
    r"^ValueError: Can not map tensor '(\S+)'": "has no place for {0}",
    r"Unexpected name '(\S+)'": "takes LoRA's A and B alone, and found {0}",
    r"^NotImplementedError": "cannot take the A and B of a fused module apart",
}


def _reason(reasons: dict[str, str], log_text: str) -> str | None:
    for pattern, reason in reasons.items():
        if match := re.search(pattern, log_text, re.MULTILINE):
            return reason.format(*match.groups(), transformers=metadata.version("transformers"))
    return None


def _run(script: Path, arguments: list[str], log: Path) -> None:
    sys.stdout = sys.stderr = log.open("w", encoding="utf-8", buffering=1)  # multiprocessing writes why it ended, too
    sys.argv = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]  # llama.cpp's own gguf, newer than the package
    for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
        del sys.modules[name]
    logging.root.handlers.clear()  # the parent's; the converter opens its own
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork lacks the threads of its parent
    _name_splits()
    runpy.run_path(str(script), run_name="__main__")


def _name_splits() -> None:
    """Let the converter recognize a tokenizer by how it splits text where it does not know the vocabulary.

    It recognizes byte-level BPE tokenizers by a hash of one encoded text, so a new vocabulary is unknown even if it
    splits text as a known one does.
    """
    model_class = import_module("conversion.base").TextModel
    by_hash = model_class.get_vocab_base_pre

    def named(model: Any, tokenizer: Any) -> str:
        try:
            return str(by_hash(model, tokenizer))
        except NotImplementedError:
            if (name := split_name(json.loads(tokenizer.backend_tokenizer.to_str()))) is None:
                raise
            return name

    model_class.get_vocab_base_pre = named


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + _REST % r"\p{N}{1,3}", "bytes"): "llama-bpe",
    (_CONTRACTIONS + _REST % r"\p{N}", "bytes"): "qwen2",
}
"""How a tokenizer.json splits text → llama.cpp's name for it. `bytes`: ByteLevel that does not split any further."""


def split_steps(name: str) -> tuple[str, ...] | None:
    """How a tokenizer splits text by llama.cpp's name for it: regular expressions, ByteLevel, Digits; None: unknown."""
    return next((steps for steps, known in _SPLITS.items() if known == ("llama-bpe" if name == "dbrx" else name)), None)


def split_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text, or None where it is not certain."""
    splitter = tokenizer.get("pre_tokenizer") or {}
    steps = []
    for step in splitter.get("pretokenizers", [splitter]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
                steps.append("ByteLevel" if rest.get("use_regex", True) else "bytes")
            case {"type": "Digits", "individual_digits": True}:
                steps.append("Digits")
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(regex)
            case _:
                return None
    name = _SPLITS.get(tuple(steps))
    if name == "llama-bpe" and not (tokenizer.get("model") or {}).get("ignore_merges"):
        return "dbrx"  # which splits alike, and does not take a whole word before its merges
    return name


def fetch(place: Path) -> None:
    """Download the pinned source distribution with pip, check its hash, unpack the converters to `place`.

    Raises ExportError: unknown version, download failed or hash wrong.
    """
    version = metadata.version(PACKAGE)
    if version not in KNOWN:
        raise ExportError(
            f"expected {PACKAGE} in a version whose converters are known ({', '.join(KNOWN)}), got {version}; "
            "run `make setup`"
        )
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        done = subprocess.run(
            [*command, f"{PACKAGE}=={version}", "--dest", name], capture_output=True, text=True, check=False
        )
        archives = list(temporary.glob("*.tar.gz"))
        if done.returncode or not archives:
            raise ExportError(
                f"could not download the source of {PACKAGE} {version}: {done.stderr.strip()[-500:]}; check the "
                "network and run `python -m export.converters`"
            )
        got = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if got != KNOWN[version]:
            raise ExportError(f"{archives[0].name}: expected sha256 {KNOWN[version]}, got {got}; not unpacked")
        with staged(place) as partial, tarfile.open(archives[0]) as tar:
            for member in tar:
                head, marker, tail = member.name.partition("/vendor/llama.cpp/")
                if marker and "/" not in head and tail.startswith(_WANTED) and member.isfile():
                    (partial / tail).parent.mkdir(parents=True, exist_ok=True)
                    (partial / tail).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]  # a file
            (partial / "complete").write_text("", encoding="utf-8")


if __name__ == "__main__":
    print(require())
