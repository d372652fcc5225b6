"""Free text scored by its overlap with a reference: ROUGE-L and ROUGE-1 (Lin 2004) over words.

The numbers are torchmetrics'; it is given words of its own making here, since its default keeps a to z and 0 to 9
alone and would call every answer in Greek empty. For ASCII texts with letters or digits the words are the same. Stems
are not cut.
"""

import re
import unicodedata

from evaluation.tasks import Item, Score, mean_credit

# Chinese and Japanese put no spaces between words; each of their characters counts as one.
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_SPACE = re.compile(r"\s+")
HALF = 0.5


def words(text: str) -> list[str]:
    """Runs of letters, digits and their marks, in small letters.

    Punctuation separates: "don't" is two words, as in Google's ROUGE. A text without letters and digits, such as
    ":-)", is split at its white space instead, so that it equals itself.
    """
    small = unicodedata.normalize("NFC", text.casefold())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in small)
    return _UNSPACED.sub(r" \1 ", kept).split() or small.split()


def same(text: str, reference: str) -> bool:
    """Whether two texts are equal, small letters, white space and a final stop aside."""
    first, second = (_SPACE.sub(" ", unicodedata.normalize("NFC", t)).strip().casefold() for t in (text, reference))
    return first.removesuffix(".") == second.removesuffix(".")


def rouge(text: str, reference: str) -> tuple[float, float]:
    """F1 of ROUGE-L and of ROUGE-1, each from 0 to 1."""
    from torchmetrics.functional.text.rouge import rouge_score

    values = rouge_score(text, reference, normalizer=str, tokenizer=words, rouge_keys=("rougeL", "rouge1"))
    return float(values["rougeL_fmeasure"]), float(values["rouge1_fmeasure"])


def metrics(name: str) -> dict[str, dict[str, str]]:
    """The metrics of a task of that name; the first is the primary one."""
    return {
        f"{name}_rouge_l": {
            "unit": "F1",
            "direction": "higher",
            "description": "Mean F1 of the longest common subsequence of words with the reference (primary)",
        },
        f"{name}_rouge_1": {
            "unit": "F1",
            "direction": "higher",
            "description": "Mean F1 of the words shared with the reference, in any order",
        },
        f"{name}_exact": {
            "unit": "share",
            "direction": "higher",
            "description": "Share of answers equal to the reference, small letters, white space and a final stop aside",
        },
        f"{name}_empty": {
            "unit": "share",
            "direction": "lower",
            "description": "Share of items answered with nothing but white space",
        },
    }


def score(item: Item, answer: str) -> Score:
    """Credit is ROUGE-L's F1 with the reference in truth["answer"]; half of it and more counts as correct."""
    reference = str(item.truth["answer"])
    rouge_l, rouge_1 = rouge(answer, reference)
    predicted = answer.strip() or None
    return Score(
        correct=rouge_l >= HALF,
        predicted=predicted,
        exact=predicted is not None and same(predicted, reference),
        partial=rouge_l,
        extra={"rouge_1": rouge_1},
    )


def summarize(scores: list[Score], name: str) -> dict[str, float]:
    """The metrics of the task of that name; all NaN for an empty list."""
    n = len(scores)
    if not n:
        return dict.fromkeys(metrics(name), float("nan"))
    return {
        f"{name}_rouge_l": mean_credit(scores),
        f"{name}_rouge_1": sum(s.extra["rouge_1"] for s in scores) / n,
        f"{name}_exact": sum(s.exact for s in scores) / n,
        f"{name}_empty": sum(s.predicted is None for s in scores) / n,
    }
