"""Token ids: the same for training, scoring and serving."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from trainers import TrainingError

_PREFIX = "▁"  # as which SentencePiece writes a blank


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, with BOS where the tokenizer's configuration adds it.

    After an end-of-sequence token, as between the turns of a conversation, the text starts afresh, as in llama.cpp: a
    tokenizer that prefixes texts with a blank does so there too, also where they begin with one. (Hugging Face's does
    neither.)
    """
    first, *more = prompt.split(tokenizer.eos_token) if tokenizer.eos_token else [prompt]
    ids, end = _ids(tokenizer, first), tokenizer.eos_token_id
    if first and more and ids[-1] == end:  # some tokenizers append EOS to every text
        ids.pop()
    for text in more:
        ids += [end, *(_ids(tokenizer, text, add_special_tokens=False) if text else ())]
    return ids


def _ids(tokenizer: Any, text: str, **settings: Any) -> list[int]:
    if text[:1] in (" ", _PREFIX) and tokenizer.eos_token:
        plain, blank = (tokenizer(start, **settings)["input_ids"] for start in ("a", " a"))
        if plain == blank and _PREFIX in "".join(tokenizer.convert_ids_to_tokens(plain)):
            text = f" {text}"  # the prefix, of which Metaspace takes the text's own blank for one
    return list(tokenizer(text, **settings)["input_ids"])


# Tokens that are not said to be special, and that llama.cpp's converter makes control tokens all the same.
_CONTROL = re.compile(r"<\|.*>|<.*\|>|<｜.*｜>|<(?:start|end)_of_\w+>|<unused[0-9]+>|<pad>|<mask>|<2mass>|\[@BOS@\]")


def control_tokens(tokenizer: Any) -> list[str]:
    """The texts that tokenizer and llama.cpp read as control tokens wherever they stand, longest first.

    Added tokens that stand for a piece of text, such as <think> or a run of blanks, are none.
    """
    added = tokenizer.added_tokens_decoder.values()
    control = {token.content for token in added if token.special or _CONTROL.fullmatch(token.content)}
    return longest_first(control.union(map(str, tokenizer.all_special_tokens)))


def longest_first(words: Iterable[str]) -> list[str]:
    return sorted(words, key=lambda word: (-len(word), word))


def spelled_out(control: Sequence[str], *texts: str | None) -> str | None:
    """The first control token that some text spells out. A server would read it as one, whoever wrote it."""
    matches = (_any_of(tuple(control)).search(text) for text in texts if text)
    return next((match[0] for match in matches if match), None)


@cache
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def encode_example(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], int]:
    """Ids of prompt, completion and EOS, and how many of them are the prompt's; see `encode_turns`."""
    ids, (start, _) = encode_turns(tokenizer, (prompt, completion))
    return ids, start


def encode_turns(tokenizer: Any, texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Ids of alternating prompts and answers plus EOS, and the position at which each text ends.

    The texts are tokenized together, and everything before an answer has to give the same tokens as it does alone;
    otherwise the model would be asked with other tokens than it was trained on. A last answer that begins with white
    space is tokenized by itself where that would change the prompt's tokens.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise TrainingError("expected a tokenizer with an end-of-sequence token, got one without")

    def read(text: str) -> list[int]:
        ids = encode_prompt(tokenizer, text)
        # Some tokenizers append EOS to every text.
        return ids[:-1] if ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token) else ids

    *heads, ids = [
        read("".join(texts[:n])) for n in range(1, len(texts) + 1)
    ]  # everything last, see `trainers.pictures`
    if ids[: len(heads[-1])] != heads[-1] and texts[-1][:1].isspace():
        for anchor in "\nx.":  # behind a character SentencePiece puts no blank of its own in front of a text
            front, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (anchor, anchor + texts[-1]))
            if whole[: len(front)] == front:
                ids = heads[-1] + whole[len(front) :]
                break
    ends = []
    for n, head in enumerate(heads, start=1):
        if ids[: len(head)] != head:
            first = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(ids))
            what = (
                "prompt's tokens change when the completion" if n % 2 else "answer's tokens change when the next turn"
            )
            raise TrainingError(
                f"the {what} follows (from token {first} of {len(head)} on): {texts[n - 1][-20:]!r} + "
                f"{texts[n][:20]!r}; end prompt.template on a line break or another token boundary"
            )
        ends.append(len(head))
    return [*ids, eos], [*ends, len(ids) + 1]


def learnt(ends: Sequence[int]) -> list[int]:
    """1 for each token of an answer, 0 for tokens of prompts and for the first token, which nothing predicts."""
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    mask = [n % 2 for n, (start, end) in enumerate(bounds) for _ in range(start, end)]
    return [0, *mask[1:]]


def encode_texts(tokenizer: Any, texts: Iterable[tuple[str, bool]], max_length: int) -> list[list[int]]:
    """Ids of whole texts, cut at `max_length` tokens; with EOS where `ended` of (text, ended) is true."""
    rows = []
    for text, ended in texts:
        ids = encode_prompt(tokenizer, text)
        needs_end = ended and ids[-1:] != [tokenizer.eos_token_id]
        rows.append([*ids, *[tokenizer.eos_token_id] * needs_end][:max_length])
    return [ids for ids in rows if len(ids) > 1]


@dataclass(frozen=True)
class Encoded:
    dataset: Any  # for a Trainer; of text, columns input_ids and completion_mask (1 = the token carries loss)
    left_out: int  # examples that were too long
    longest: int  # tokens, over all examples


def encode_examples(
    tokenizer: Any, examples: Iterable[Sequence[str]], max_length: int, *, leave_out: bool = False
) -> Encoded:
    """Tokenize alternating prompts and answers, with the loss on the answers only.

    Nothing is truncated: items longer than `max_length` tokens are refused, or left out.
    """
    from datasets import Dataset

    encoded = [encode_turns(tokenizer, texts) for texts in examples]
    places, left_out, longest = short_enough([len(ids) for ids, _ in encoded], max_length, leave_out=leave_out)
    ids, ends = zip(*(encoded[place] for place in places), strict=True)
    mask = [learnt(positions) for positions in ends]
    return Encoded(Dataset.from_dict({"input_ids": ids, "completion_mask": mask}), left_out, longest)


# Packing: several items in a row, each with positions from 0 on. For a batch with such positions and no attention mask,
# transformers keeps items apart (`find_packed_sequence_indices`); padding becomes items of one token at a row's end.


def pack(dataset: Any, max_length: int) -> Any:
    """The items of `encode_examples` in rows of at most `max_length` tokens; column seq_lengths has their lengths."""
    from trl import pack_dataset

    return pack_dataset(dataset, max_length, "bfd")


def collate_packed(pad: int) -> Callable[[Any], dict[str, Any]]:
    """A collator for packed rows and for single items: input_ids, position_ids, labels [rows, tokens]."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    plain = DataCollatorForLanguageModeling(pad, return_position_ids=True)

    def collate(rows: Any) -> dict[str, Any]:
        batch = dict(plain(rows))
        del batch["attention_mask"]
        batch["labels"][batch["position_ids"] == 0] = -100  # otherwise predicted from the previous item
        return batch

    return collate


def check_packing(model: Any, rows: Any) -> None:
    """Refuse a model that lets items of one row attend to each other, tested on the first row with two items.

    Raises TrainingError if an item's logits change with the item before it, by more than 1% of the change when both
    form a single item.
    """
    import torch

    row = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if row is None:
        return
    first, second = row["seq_lengths"][:2]
    # Two rows, since some attention implementations look for items only in batches of one.
    ids = torch.tensor([row["input_ids"][: first + second]] * 2, device=model.device)
    other = torch.cat([ids[:, :first].flip(1), ids[:, first:]], 1)

    def change(positions: list[int]) -> float:
        position_ids = torch.tensor([positions] * 2, device=model.device)
        one, two = (model(input_ids=i, position_ids=position_ids).logits[0, first:].float() for i in (ids, other))
        return float((one - two).abs().max())

    training = model.training
    model.eval()
    with torch.no_grad():
        apart, as_one = change([*range(first), *range(second)]), change([*range(first + second)])
    model.train(training)
    if apart > 0.01 * as_one:
        kind = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise TrainingError(f"train.packing: expected false, since {kind} lets items of one row attend to each other")


def short_enough(
    lengths: Sequence[int], max_length: int, *, leave_out: bool, kind: str = "items"
) -> tuple[list[int], int, int]:
    """Indices of the examples of at most `max_length` tokens, the number of longer ones, and the longest length.

    Raises TrainingError if an example is too long and may not be left out, or if none remains.
    """
    short = [place for place, n in enumerate(lengths) if n <= max_length]
    too_long = [(place, n) for place, n in enumerate(lengths) if n > max_length]
    longest = max(lengths, default=0)
    if too_long and not leave_out:
        named = ", ".join(f"item {place}: {n}" for place, n in too_long[:3])
        raise TrainingError(
            f"expected at most max_length = {max_length} tokens, got more in {len(too_long)} {kind} ({named}…); "
            f"set train.max_length to {longest}, or shorten the items, or leave them out with train.overlong: "
            "leave_out, or with prepare_data.max_chars where items are chosen"
        )
    if not short:
        if not lengths:
            raise TrainingError("expected at least one example, got none")
        raise TrainingError(
            f"expected at least one example of at most max_length = {max_length} tokens, got {len(too_long)} of "
            f"{min(lengths)} to {longest}; raise train.max_length"
        )
    return short, len(too_long), longest


def batched_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of examples whose consecutive batches hold examples of similar length; only the last may be short.

    Batches are formed within random chunks of 50 batches and then shuffled. (transformers' `group_by_length` leaves
    them sorted from long to short within each chunk; length correlates with the task, and training on tasks in waves
    left 2 of 14 tasks above 80% where this order reached 9: docs/log/2026-11-21.md.)
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
