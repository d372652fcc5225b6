"""The embedded base: a Llama of about 1M parameters with a SentencePiece tokenizer, trained from nothing.

SentencePiece (BPE, byte fallback, digits split) because llama.cpp's converter takes such a tokenizer as it is; a
byte-pair tokenizer that it does not know is refused.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from trainers.base_training import base_arguments, save_base, train_base
from trainers.data import encode_example
from trainers.settings import Section

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
# Weight of a prompt token's loss beside an answer token's 1. Questions are mostly random numbers, but learning to
# read them speeds up learning to answer; LOG.md has the figures for this and for INITIALIZER_RANGE.
PROMPT_WEIGHT = 0.1
# Standard deviation of the first weights. transformers' default of 0.02 is made for wide models; at width 128 it
# starts close to zero and costs a third of the training time.
INITIALIZER_RANGE = 0.08
# Questions whose texts train the tokenizer, the first of all.
TOKENIZER_EXAMPLES = 20_000


class EmbeddedSettings(Section):
    """Shape and training of the embedded base."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    vocab_size: Annotated[int, Field(ge=400, le=32000, description="pieces, byte fallback included")]
    hidden_size: Annotated[int, Field(ge=32)]
    intermediate_size: Annotated[int, Field(ge=32)]
    layers: Annotated[int, Field(ge=1)]
    heads: Annotated[int, Field(ge=1)]
    context: Annotated[int, Field(ge=64, description="tokens")]
    examples: Annotated[int, Field(ge=1, description="general questions seen, each once")]
    batch_size: Annotated[int, Field(ge=1, description="questions")]
    learning_rate: Annotated[float, Field(gt=0, description="AdamW's peak")]
    precision: Literal["fp32", "bf16"]


@dataclass(frozen=True)
class _Collator:
    """Pads; padding carries no loss."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        width = max(len(r["input_ids"]) for r in rows)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*r[name], *[fill] * (width - len(r[name]))] for r in rows])

        ids = padded("input_ids", self.pad_id)
        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        weights = torch.tensor(
            [
                [PROMPT_WEIGHT] * r["prompt_length"]
                + [1.0] * (len(r["input_ids"]) - r["prompt_length"])
                + [0.0] * (width - len(r["input_ids"]))
                for r in rows
            ]
        )
        return {"input_ids": ids, "attention_mask": mask, "weights": weights}


def weighted_loss(logits: Any, input_ids: Any, weights: Any) -> Any:
    """Mean next-token cross-entropy, each token counted with its weight.

    Args:
        logits: [batch, tokens, vocabulary].
        input_ids: [batch, tokens].
        weights: [batch, tokens], weight of predicting each token.
    """
    from torch.nn.functional import cross_entropy

    vocabulary = logits.size(-1)
    losses = cross_entropy(
        logits[:, :-1].float().reshape(-1, vocabulary), input_ids[:, 1:].reshape(-1), reduction="none"
    )
    w = weights[:, 1:].reshape(-1)
    return (losses * w).sum() / w.sum()


def tokenizer_texts(examples: Sequence[tuple[str, str]]) -> list[str]:
    """What `train_tokenizer` gets: the texts of the first (rendered prompt, answer) pairs, in their order."""
    return [text for pair in examples[:TOKENIZER_EXAMPLES] for text in pair]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Any:
    """Train a SentencePiece tokenizer and save it in the form that transformers and llama.cpp read.

    Args:
        texts: Prompts and answers as separate texts, so that no piece spans the end of a prompt.
        vocab_size: Pieces.
        folder: Gets tokenizer.model and the Hugging Face files.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    # A BOS at the start of every text: the converter copies the choice into the GGUF, llama.cpp and Ollama obey it.
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def configuration(settings: EmbeddedSettings, vocab_size: int, **more: Any) -> Any:
    """The base's shape, a LlamaConfig.

    Args:
        settings: Of the base.
        vocab_size: Pieces that the tokenizer has, which may be fewer than the settings ask for.
        **more: Further settings of LlamaConfig.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        **more,
    )


def build_model(settings: EmbeddedSettings, tokenizer: Any) -> Any:
    """A Llama with random weights from settings.seed."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(settings.seed)
    return LlamaForCausalLM(
        configuration(
            settings,
            len(tokenizer),
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batched_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of examples in which consecutive batches hold examples of like length.

    Batches are formed within random chunks of 50 batches and then shuffled. (transformers' `group_by_length` leaves
    them sorted from long to short within each chunk; lengths go with tasks, and training on the tasks in waves left
    2 of 14 tasks above 80% where this order reached 9. LOG.md, 2026-11-21.)

    Args:
        lengths: Tokens of each example.
        batch_size: Examples a batch.
        seed: Of both shuffles.

    Returns:
        Indices, each once; only the last batch may be short.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    full = len(order) // batch_size * batch_size
    rest = order[full:]
    batches: list[list[int]] = []
    for start in range(0, full, 50 * batch_size):
        chunk = sorted(order[start : min(start + 50 * batch_size, full)], key=lambda i: lengths[i])
        cut = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(cut)
        batches += cut
    return [i for batch in batches for i in batch] + rest


def train_embedded_base(
    settings: EmbeddedSettings,
    examples: Sequence[tuple[str, str]],
    output: Path,
    checkpoints: Path,
) -> dict[str, Any]:
    """Train tokenizer and model on (rendered prompt, answer) pairs; write a Hugging Face model folder in fp16.

    Args:
        settings: Shape and training.
        examples: Each is seen once.
        output: Folder for the model; exists and is empty.
        checkpoints: Outlives a kill; training goes on from a complete checkpoint found there.

    Returns:
        Numbers for run.json.
    """
    from datasets import Dataset
    from transformers import Trainer

    class WeightedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            weights = inputs.pop("weights")
            outputs = model(**inputs)
            loss = weighted_loss(outputs.logits, inputs["input_ids"], weights)
            return (loss, outputs) if return_outputs else loss

    tokenizer = train_tokenizer(tokenizer_texts(examples), settings.vocab_size, output)
    model = build_model(settings, tokenizer)
    encoded = [encode_example(tokenizer, prompt, answer) for prompt, answer in examples]
    order = batched_order([len(tokens) for tokens, _ in encoded], settings.batch_size, settings.seed)
    dataset = Dataset.from_dict(
        {
            "input_ids": [encoded[i][0] for i in order],
            "prompt_length": [encoded[i][1] for i in order],
        }
    )
    arguments = base_arguments(settings, len(examples), checkpoints, save_steps=500, logging_steps=100)
    trainer = WeightedTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=_Collator(tokenizer.pad_token_id)
    )
    facts = train_base(trainer, checkpoints)
    save_base(model, output, checkpoints)
    return {
        **facts,
        "vocabulary": len(tokenizer),
        "tokens": sum(len(tokens) for tokens, _ in encoded),
    }
