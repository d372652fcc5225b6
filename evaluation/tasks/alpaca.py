"""Alpaca: 52,000 instructions with answers, written by a language model.

Taori et al. 2023, https://huggingface.co/datasets/tatsu-lab/alpaca, CC BY-NC 4.0. Fields: instruction, input (often
empty), output. It has no test split; test items are drawn from its only split.
"""

from functools import partial

from evaluation.tasks import Source, instruct

NAME = "alpaca"
TITLE = "Alpaca ROUGE-L"
PRIMARY = "alpaca_rouge_l"
METRICS = instruct.text_metrics(NAME)
SOURCE = Source("tatsu-lab/alpaca")
FIELDS = instruct.FIELDS
make_item = partial(instruct.make_item, name=NAME)
group = instruct.group
score = instruct.score_text
summarize = partial(instruct.summarize_texts, name=NAME)
