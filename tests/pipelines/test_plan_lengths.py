"""Tokens of the longest items, as the plan finds them."""

import json

import pytest

from pipelines.planning import lengths
from tests.pipelines.plan_cases import ROOT, params_of


def test_the_plan_trains_the_tokenizer_on_the_texts_that_the_base_does(monkeypatch, tmp_path):
    from pipelines import prepare_base
    from trainers import embedded_base

    class EnoughError(Exception):
        pass

    seen = []

    def record(texts, size, folder):
        seen.append(list(texts))
        raise EnoughError

    monkeypatch.setattr(embedded_base, "train_tokenizer", record)
    monkeypatch.setattr(lengths, "train_tokenizer", record)
    monkeypatch.chdir(ROOT)
    for examples, count in ((20_100, 20_000), (300, 300)):
        params = params_of("tiny", prepare_base={"examples": examples})
        for way in (
            lambda p: prepare_base._embedded(p.prepare_base, p.prompt.template, tmp_path),
            lengths._generated,
        ):
            with pytest.raises(EnoughError):
                way(params)
        of_base, of_plan = seen[-2:]
        assert of_base == of_plan and len(of_base) == 2 * count


def test_lengths_are_those_of_the_data_made_with_the_same_settings(tmp_path, monkeypatch, base_dir):
    from pipelines import prepare_base, prepare_data
    from trainers.data import encode_example
    from trainers.models import load_tokenizer

    monkeypatch.chdir(tmp_path)
    params = params_of("smoke", prepare_base={"source": str(base_dir)})
    bound = lengths.lengths_of(params)
    assert (bound.train, bound.valid) == (params.train.max_length,) * 2 and "at most" in bound.origin
    prepare_data.run(params)
    prepare_base.run(params)
    found = lengths.lengths_of(params)
    tokenizer = load_tokenizer(prepare_base.load_reference()[0])
    template = params.prompt.template
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines()]
        encoded = [encode_example(tokenizer, template.replace("{prompt}", r["prompt"]), r["completion"]) for r in rows]
        assert getattr(found, split) == max(len(ids) for ids, _ in encoded)
    other = params_of("smoke", prepare_base={"source": str(base_dir)}, prepare_data={"seed": 7})
    assert "at most" in lengths.lengths_of(other).origin
