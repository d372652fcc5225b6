"""The embedded bases, trained from scratch on general questions.

Text: a Llama of about 1M parameters. Pictures: an Idefics3 of about 0.5M, which is a SigLIP-style vision tower, a
linear connector and a Llama, as in SmolVLM at another size. The tokenizer is a SentencePiece model (BPE, byte fallback,
digits split), which llama.cpp's converter accepts; it refuses byte-pair tokenizers that it does not know.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainers import TrainingError
from trainers.encode import batched_order, encode_example
from trainers.pictures import IMAGE_TOKEN, EmbeddedProcessor, VisionProcessor, text_tensors, without_references
from trainers.run import latest_complete
from trainers.settings import Positive, Section, Seed

SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}  # in the order of their ids
# Weight of a prompt token's loss, where an answer token has 1. Questions are mostly random numbers, but learning to
# read them speeds up learning to answer; docs/log/ has the figures for this and for INITIALIZER_RANGE.
PROMPT_WEIGHT = 0.1
# Standard deviation of the initial weights. transformers' default of 0.02 is meant for wide models; at width 128 the
# model starts close to zero, which costs a third of the training time.
INITIALIZER_RANGE = 0.08
# The first questions, which train the tokenizer.
TOKENIZER_EXAMPLES = 20_000


def _require(section: Section, *rules: tuple[str, str, bool]) -> None:
    """Rules: field, expectation, whether it holds."""
    problems = [f"{name}: expected {want}, got {getattr(section, name)}" for name, want, holds in rules if not holds]
    if problems:
        raise ValueError("\n".join(problems))


class VisionTower(Section):
    image_size: Annotated[int, Field(ge=16, le=512, description="pixels a side")]
    patch_size: Annotated[int, Field(ge=2, description="pixels a side")]
    scale_factor: Annotated[int, Field(ge=1, description="patches a side that the connector puts into one token")]
    hidden_size: Annotated[int, Field(ge=16)]
    layers: Positive
    heads: Positive

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        patches, rest = divmod(self.image_size, self.patch_size)
        divisor = f"a divisor of image_size / patch_size = {patches}"
        _require(
            self,
            ("image_size", f"a multiple of patch_size {self.patch_size}", rest == 0),
            ("scale_factor", divisor, rest != 0 or patches % self.scale_factor == 0),
            ("hidden_size", f"a multiple of heads {self.heads}", self.hidden_size % self.heads == 0),
        )
        return self

    @property
    def image_seq_len(self) -> int:
        """Tokens per picture."""
        return (self.image_size // self.patch_size) ** 2 // self.scale_factor**2


class EmbeddedSettings(Section):
    """Shape and training of the embedded base; without `vision` it reads text only."""

    seed: Seed
    vocab_size: Annotated[int, Field(ge=300, le=32000, description="pieces, byte fallback included, <image> not")]
    hidden_size: Annotated[int, Field(ge=16)]
    intermediate_size: Annotated[int, Field(ge=16)]
    layers: Positive
    heads: Positive
    context: Annotated[int, Field(ge=32, description="tokens, those of pictures included")]
    vision: VisionTower | None = None
    examples: Annotated[int, Field(ge=1, description="general questions seen, each once")]
    batch_size: Annotated[int, Field(ge=1, description="questions")]
    learning_rate: Annotated[float, Field(gt=0, description="AdamW's peak")]
    precision: Literal["fp32", "bf16"]

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.vision is None:
            block = "a multiple of 32 (GGUF's quantization block)"
            rules = [
                ("hidden_size", f"a multiple of 2·heads = {2 * self.heads}", self.hidden_size % (2 * self.heads) == 0),
                ("hidden_size", block, self.hidden_size % 32 == 0),
                ("intermediate_size", block, self.intermediate_size % 32 == 0),
                ("vocab_size", "at least 400", self.vocab_size >= 400),
                ("context", "at least 64", self.context >= 64),
            ]
        else:
            rules = [("hidden_size", f"a multiple of heads {self.heads}", self.hidden_size % self.heads == 0)]
        _require(self, *rules)
        return self


# The tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path, pictures: bool = False) -> Any:
    """Train a SentencePiece tokenizer and save tokenizer.model and the Hugging Face files in `folder`.

    Prompts and answers are separate texts, so that no piece crosses the end of a prompt. With `pictures`, `<image>` is
    an extra token after the pieces, and references to pictures are removed from the texts.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    special: dict[str, Any] = {f"{name}_piece": piece for name, piece in SPECIAL.items()}
    special |= {f"{name}_id": number for number, name in enumerate(SPECIAL)}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=map(without_references, texts) if pictures else iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        **special,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    # BOS at the start of every text: the converter copies the choice into the GGUF, and llama.cpp and Ollama obey it.
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": piece for name, piece in SPECIAL.items()},
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    if pictures:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.save_pretrained(folder)
    return tokenizer


# The model


def build_model(settings: EmbeddedSettings, tokenizer: Any) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(settings.seed)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": settings.context,
        "tie_word_embeddings": True,
        "initializer_range": INITIALIZER_RANGE,
        **special,
    }
    tower = settings.vision
    if tower is None:
        return LlamaForCausalLM(LlamaConfig(**text))
    return Idefics3ForConditionalGeneration(
        Idefics3Config(
            vision_config={
                "hidden_size": tower.hidden_size,
                "intermediate_size": 4 * tower.hidden_size,
                "num_hidden_layers": tower.layers,
                "num_attention_heads": tower.heads,
                "image_size": tower.image_size,
                "patch_size": tower.patch_size,
                "initializer_range": INITIALIZER_RANGE,
            },
            text_config={"model_type": "llama", **text},
            scale_factor=tower.scale_factor,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            tie_word_embeddings=True,
            initializer_range=INITIALIZER_RANGE,
            **special,
        )
    )


# Training


def weighted_loss(logits: Any, input_ids: Any, weights: Any) -> Any:
    """Mean next-token cross-entropy of logits [batch, tokens, vocabulary]; weights of targets."""
    from torch.nn.functional import cross_entropy

    scores = logits[:, :-1].float().reshape(-1, logits.size(-1))
    losses = cross_entropy(scores, input_ids[:, 1:].reshape(-1), reduction="none")
    w = weights[:, 1:].reshape(-1)
    return (losses * w).sum() / w.sum()


def train_base(
    settings: EmbeddedSettings, examples: Sequence[tuple[str, str]], output: Path, checkpoints: Path, images: Path
) -> dict[str, Any]:
    """Train tokenizer and model on (rendered prompt, answer) pairs, each seen once; write a model folder in fp16.

    Prompts show pictures as ![](path), with paths that start from `images`. `checkpoints` outlives a kill; training
    goes on from a complete checkpoint found there. Returns numbers for run.json.
    """
    import torch
    from transformers import Trainer, TrainingArguments

    class WeightedTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            weights = inputs.pop("weights")
            outputs = model(**inputs)
            loss = weighted_loss(outputs.logits, inputs["input_ids"], weights)
            return (loss, outputs) if return_outputs else loss

    def weighted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = [(row["prompt_length"], len(row["input_ids"])) for row in rows]
        weights = [[PROMPT_WEIGHT] * prompt + [1.0] * (whole - prompt) for prompt, whole in lengths]
        batch = text_tensors(rows, tokenizer, {"weights": weights})
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    texts = [text for pair in examples[:TOKENIZER_EXAMPLES] for text in pair]
    tokenizer = train_tokenizer(texts, settings.vocab_size, output, pictures=settings.vision is not None)
    model = build_model(settings, tokenizer)
    if settings.vision is None:
        encoded = [encode_example(tokenizer, prompt, answer) for prompt, answer in examples]
        rows: list[dict[str, Any]] = [{"input_ids": ids, "prompt_length": prompt} for ids, prompt in encoded]
        kind, collate, save_steps = WeightedTrainer, weighted, 500
    else:
        processor = VisionProcessor(EmbeddedProcessor(tokenizer, model.config.to_dict()), images)
        rows = [processor.encode(prompt, answer) for prompt, answer in examples]
        kind, collate, save_steps = Trainer, processor.collate, 100
    lengths = [len(row["input_ids"]) for row in rows]
    if max(lengths) > settings.context:
        raise TrainingError(f"prepare_base.context: expected at least {max(lengths)} tokens, got {settings.context}")
    order = batched_order(lengths, settings.batch_size, settings.seed)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(100, len(examples) // settings.batch_size // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=settings.precision == "bf16",
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=save_steps // 5 if settings.vision is None else save_steps // 2,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=False,
    )
    trainer = kind(model=model, args=arguments, train_dataset=[rows[i] for i in order], data_collator=collate)
    checkpoint = latest_complete(checkpoints)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "final_loss": losses[-1] if losses else None,
        "vocabulary": len(tokenizer),
        "tokens": sum(lengths),
    }
    if settings.vision is not None:
        facts["image_tokens"] = settings.vision.image_seq_len
        model.config.use_cache = True  # the Trainer disabled it
    model.generation_config.do_sample = False
    model.to(torch.float16).save_pretrained(output)
    return facts
