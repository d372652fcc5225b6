"""Alpaca: 52,000 instructions with answers, written by a language model.

Taori et al. 2023, https://huggingface.co/datasets/tatsu-lab/alpaca, CC BY-NC 4.0. Fields: instruction, input (often
empty), output. It has no test split; test items are drawn from the one there is.
"""

from functools import partial

from evaluation.parsing import score_text, summarize_texts, text_metrics
from evaluation.tasks import Source, instruct

NAME = "alpaca"
TITLE = "Alpaca ROUGE-L"
PRIMARY = "alpaca_rouge_l"
METRICS = text_metrics(NAME)
SOURCE = Source("tatsu-lab/alpaca")
FIELDS = instruct.FIELDS
make_item = partial(instruct.make_item, name=NAME)
group = instruct.group
score = score_text
summarize = partial(summarize_texts, name=NAME)
