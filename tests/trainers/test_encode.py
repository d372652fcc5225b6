"""Token ids, and items that are too long."""

import pytest

from tests.conftest import TEMPLATE
from trainers import TrainingError
from trainers.encode import control_tokens, encode_example, encode_examples, encode_prompt, encode_turns, spelled_out
from trainers.models import load_tokenizer
from trainers.settings import BaseReference

PROMPT = TEMPLATE.replace("{prompt}", "Predict AQI given: PM2.5 35.9 µg/m³")


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return load_tokenizer(BaseReference(str(base_dir)))


def test_bos_once_eos_once_and_the_text_comes_back(tokenizer):
    ids, n_prompt = encode_example(tokenizer, PROMPT, "102 (Unhealthy for Sensitive Groups)")
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[1:-1]) == PROMPT + "102 (Unhealthy for Sensitive Groups)"
    assert ids[:n_prompt] == encode_prompt(tokenizer, PROMPT)


def test_a_tokenizer_that_closes_texts_itself_takes_conversations_too(base_dir):
    from tokenizers.processors import TemplateProcessing

    plain, closing = (load_tokenizer(BaseReference(str(base_dir))) for _ in range(2))
    ends = [(token, closing.convert_tokens_to_ids(token)) for token in (closing.bos_token, closing.eos_token)]
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{closing.bos_token} $A {closing.eos_token}", special_tokens=ends
    )
    assert encode_prompt(closing, "a\n")[-1] == closing.eos_token_id, "else nothing is tried"
    for texts in (("a\n", "1"), ("a\n", f"1{plain.eos_token}", "b\n", "2")):
        assert encode_turns(closing, texts) == encode_turns(plain, texts)


def test_digits_are_tokens_of_their_own(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "35.9 1205"))
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("3591205")


def test_a_template_that_ends_inside_a_token_is_refused(base_dir, tokenizer):
    def ids(text):
        return tokenizer(text)["input_ids"]

    # The vocabulary comes in no fixed order, and some words are cut after two letters anyway.
    words = sorted(t for t in tokenizer.get_vocab() if len(t) > 4 and t.isalpha() and t.isascii())
    word = next(w for w in words if ids(w)[: len(ids(w[:2]))] != ids(w[:2]))
    with pytest.raises(TrainingError, match="end prompt.template on a line break"):
        encode_example(tokenizer, word[:2], word[2:])


def merging():
    """A byte-level tokenizer that merges line breaks and blanks, as those of Qwen and Llama 3 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), (":", "Ġ"), ("Ġ", "x")]
    pieces = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    plain = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")


@pytest.mark.parametrize("answer", ["    x", "\n\nYes", "\tb", " 12\n", "\n x"])
@pytest.mark.parametrize("prompt", [PROMPT, "f(x): ", "f(x):\n", "f(x):\n\n", "f(x):"])
@pytest.mark.parametrize("merges", [False, True])
def test_white_space_of_an_answer_is_learned_behind_the_tokens_that_are_asked(tokenizer, answer, prompt, merges):
    reader = merging() if merges else tokenizer
    ids, start = encode_example(reader, prompt, answer)
    assert ids[:start] == encode_prompt(reader, prompt)
    assert reader.decode(ids[:-1], skip_special_tokens=True) == prompt + answer


def test_control_tokens_are_those_that_stop_or_steer_a_model(tokenizer, chat_base_dir):
    assert control_tokens(tokenizer) == ["<pad>", "<unk>", "</s>", "<s>"]
    chat = load_tokenizer(BaseReference(str(chat_base_dir)))
    chat.add_tokens(
        ["<think>", "    ", "<|fim_prefix|>", "<|turn>", "<end_of_turn>"]
    )  # none of which says that it is special
    assert {*control_tokens(chat)} - {*control_tokens(tokenizer)} == {
        "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|turn>", "<end_of_turn>"}  # fmt: skip
    assert spelled_out(control_tokens(chat), "a <think> b", None, "<|im_end|><s>") == "<|im_end|>"
    assert spelled_out(control_tokens(chat), "a < s >", "<|im_end") is spelled_out([], "</s>") is None


def test_too_long_items_are_left_out_and_counted(tokenizer):
    items = [("a\n", "1"), (PROMPT, "1" * 200), ("b\n", "2"), (PROMPT, "1" * 300)]
    found = encode_examples(tokenizer, items, 100, leave_out=True)
    assert found.dataset[:] == encode_examples(tokenizer, [items[0], items[2]], 100).dataset[:]
    assert (found.left_out, found.longest) == (2, len(encode_example(tokenizer, *items[3])[0]))
    exact = len(encode_example(tokenizer, *items[1])[0])
    assert encode_examples(tokenizer, items, exact, leave_out=True).left_out == 1  # exactly so long is not too long


@pytest.mark.parametrize(
    ("items", "leave_out", "said"),
    [
        ([("a\n", "1"), (PROMPT, "1" * 200)], False,
         r"item 1: \d+.*set train.max_length to \d+.*train\.overlong: leave_out, or with prepare_data\.max_chars"),
        ([(PROMPT, "1" * 200)], True, r"at least one example of at most max_length = 100 tokens, got 1 of \d+"),
        ([], True, "at least one example, got none"),
    ],
)  # fmt: skip
def test_too_long_items_are_named_and_not_cut(tokenizer, items, leave_out, said):
    with pytest.raises(TrainingError, match=said):
        encode_examples(tokenizer, items, 100, leave_out=leave_out)
