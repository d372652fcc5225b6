"""A SentencePiece tokenizer that puts no blank in front of a text, as Gemma's and newer Llama-like ones."""

import json
import shutil


def without_prefix(source, out, **config):
    """A copy of a tokenizer's (or model's) folder without that blank, with changes to tokenizer_config.json."""
    shutil.copytree(source, out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["prepend_scheme"] = "never"
    tokenizer["decoder"]["decoders"] = tokenizer["decoder"]["decoders"][:-1]  # which strips that blank
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    old = json.loads((out / "tokenizer_config.json").read_text())
    # LlamaTokenizer would build the blank anew.
    new = {**old, "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, **config}
    (out / "tokenizer_config.json").write_text(json.dumps(new))
    return out
