"""Several items a row: none sees another, the loss is that of the items alone, and GRIT counts what it counts then."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from trainers import TrainingError
from trainers.arms import baseline_lora, pure_grit
from trainers.encode import check_packing, collate_packed, encode_examples, pack
from trainers.models import load_tokenizer
from trainers.run import build, run
from trainers.settings import BaseReference

ROOM = 128  # tokens of a row
GRIT = dict(min_lora_rank=1, kfac_min_samples=1, grit_cov_update_freq=1, kfac_update_freq=2)


@pytest.fixture(scope="module")
def rows(base_dir, aqi_examples):
    """Items, some of several turns and one a whole text, and the rows that they are packed into."""
    turns = [(prompt, answer + "</s>", "Q: And now?\n", "none") for prompt, answer in aqi_examples[:3]]
    examples = [*turns, *aqi_examples[3:12], ("", "A text that is learnt from its first token on.")]
    items = encode_examples(load_tokenizer(BaseReference(str(base_dir))), examples, ROOM).dataset
    return items, pack(items, ROOM)


def labelled(rows):
    """As TRL's trainer prepares them."""
    kept = [{key: row[key] for key in ("input_ids", "seq_lengths") if key in row} for row in rows]
    masks = [row["completion_mask"] for row in rows]
    return [
        row | {"labels": [t if own else -100 for t, own in zip(row["input_ids"], mask, strict=True)]}
        for row, mask in zip(kept, masks, strict=True)
    ]


def losses(model, batch):
    """Loss of each token that carries one, by row."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
    wanted = batch["labels"][:, 1:]
    found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    return found[wanted != -100]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_item_is_learnt_as_if_it_were_alone(base_dir, rows, attention):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32, attn_implementation=attention).eval()
    model.config.use_cache = False  # as `load_base_model`
    items, packed = rows
    lengths = [length for row in packed["seq_lengths"] for length in row]
    assert len(packed) < len(items) / 2 and sorted(map(len, items["input_ids"])) == sorted(lengths)
    assert all(len(row) <= ROOM for row in packed["input_ids"]) and max(map(len, packed["seq_lengths"])) > 2
    collate = collate_packed(0)
    alone = torch.cat([losses(model, collate([row])) for row in labelled(items)])
    together = losses(model, collate(labelled(packed)))  # all rows in one batch, with padding
    torch.testing.assert_close(together.sort()[0], alone.sort()[0], atol=1e-5, rtol=0)
    row = next(row for row in labelled(packed) if len(row["seq_lengths"]) > 1)
    first, batch = row["seq_lengths"][0], collate([row])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :first] = 7
    with torch.no_grad():
        one, two = (model(input_ids=b["input_ids"], position_ids=b["position_ids"]).logits[0] for b in (batch, other))
    assert torch.equal(one[first:], two[first:]) and not torch.equal(one[:first], two[:first])
    check_packing(model, packed)


def test_a_model_that_sees_across_items_is_refused(rows):
    model = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(TrainingError, match="packing: expected false, since MambaForCausalLM"):
        check_packing(model, rows[1])


def test_grit_has_the_same_statistics_of_packed_items(make_job):
    def sums(packing):
        trainer, train, _ = build(pure_grit.ARM, make_job(grit=GRIT, packing=packing, max_length=256, batch_size=64))
        assert len(train.dataset) == 64
        (batch,) = trainer.get_train_dataloader()
        assert ("attention_mask" in batch) is not packing and len(batch["input_ids"]) < (64 if packing else 65)
        trainer.model.train()
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():  # B starts at zero, where no gradient reaches A
            if parameter.requires_grad:
                parameter.data.normal_(std=0.05)
        with trainer.grit_manager.open() as manager:
            trainer.model(**batch).loss.backward()
            found = manager.capture.sums
            manager.close(check=False)  # no step is taken
        return found

    for one, two in zip(sums(True), sums(False), strict=True):
        assert torch.equal(one.tokens, two.tokens)
        torch.testing.assert_close(one.gram, two.gram, rtol=1e-3, atol=1e-4 * float(two.gram.abs().max()))


def test_a_packed_run_trains_and_evaluates_like_any_other(make_job):
    summary = run(baseline_lora.ARM, make_job(packing=True, max_length=256, batch_size=2))
    assert (summary["train_items"], summary["steps"]) == (64, 12)
    assert math.isfinite(summary["final_eval_loss"]) and summary["final_eval_loss"] < summary["final_loss"] * 2
