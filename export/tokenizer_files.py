"""A tokenizer's files as llama.cpp's converter reads them."""

import json
import shutil
from pathlib import Path
from typing import Any


def copy_tokenizer(source: str, out: Path, load_kwargs: dict[str, Any]) -> None:
    """The tokenizer's files, its SentencePiece model among them where it has one.

    What the converter looks for in tokenizer_config.json, and transformers 5 does not always write, is put there:
    `add_bos_token` and `add_eos_token` as the tokenizer really does, and tokens beyond the SentencePiece model's (the
    marks of a chat template, mostly), which would have no name in the GGUF.

    Args:
        source: Folder or hub id.
        out: Written to.
        load_kwargs: Passed to `from_pretrained`.
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
