"""Stage measure: measured/<arm>/<seed>/measured.json, what fine-tuning changed besides the task.

Perplexity of general text and of the right answers, size and rank of the update, drift of the hidden states, and the
separation index (Alignment Quality Index). The model is loaded once, in the precision of training (4 bit if that was);
the base is that model with its adapter off.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from db.files import finish_run, hash_inputs, key_of, read_jsonl, read_record, staged, start_run, write_record
from db.records import MeasuredRecord
from evaluation import EvaluationError
from evaluation.measure import drift, separation, states, texts
from evaluation.measure.states import Encoded
from evaluation.tasks import Item, render
from pipelines.base_model import load_model, load_reference
from pipelines.params import ConfigError, StageParams, check_arm, unwatched
from pipelines.prompt import Form, Prompt, prompt_text
from pipelines.stage import BASE, BASE_ARM, DATA, adapter_dir, command, measured_dir
from trainers.encode import control_tokens, encode_example, encode_prompt
from trainers.models import load_tokenizer
from trainers.settings import Positive, Section, TrainSettings

TEST = DATA / "test.jsonl"
MEASURED, REFERENCE = "measured.json", "alignment.npz"
RETENTION = "retention"
GENERAL = "answers of the retention questions", "held-out general text"
ANSWERS = "right answers of test items, given their questions"
SUMMARY = (
    "perplexity answer_perplexity update_norm effective_rank drift_relative alignment_index alignment_p_value "
    "delta_alignment_index delta_alignment_p_value"
).split()
# Largest relative difference between the loss of the base and of the model with its adapter off, by dtype of the
# weights: the computation is the same, its rounding may not be.
BASE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}

PromptField = Literal["prompt", "label", "category", "pair"]
Depth = Annotated[float, Field(gt=0, le=1, description="fraction of the model's layers")]


class Measure(Section):
    prompts: str
    prompts_split: str
    prompts_subset: str | None
    columns: dict[PromptField, str]
    safe_label: str
    unsafe_label: str
    max_prompts: Annotated[int, Field(ge=10, description="of each class")]
    layers: list[Depth] = Field(min_length=1)
    pooling: Literal["mean", "last"]
    index_weight: Annotated[float, Field(ge=0, le=1, description="λ")]
    bootstrap: Annotated[int, Field(ge=100, le=100_000, description="resamples")]
    permutations: Annotated[int, Field(ge=100, le=100_000)]
    text: str
    text_split: str
    text_subset: str | None
    text_column: str
    max_texts: Positive
    max_answers: Annotated[int, Field(ge=0, description="test items")]
    max_tokens: Annotated[int, Field(ge=8, description="tokens of one text or prompt; the rest is cut off")]
    batch_size: Annotated[int, Field(ge=1, description="texts per forward pass")]

    @model_validator(mode="after")
    def _labels(self) -> "Measure":
        if self.safe_label.strip().lower() == self.unsafe_label.strip().lower():
            raise ValueError(f"safe_label and unsafe_label: expected two labels, got {self.safe_label!r} twice")
        return self


class Params(StageParams):
    measure: Measure
    prompt: Prompt
    train: TrainSettings


@dataclass
class Rows:
    """Content of measured.json."""

    texts: str  # description of the texts for general perplexity
    metrics: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what went wrong, one sentence each

    def add(self, split: str, values: Mapping[str, float], n: int) -> None:
        """Values for the whole model, from `n` tokens, modules or prompts."""
        self.metrics += [{"name": k, "split": split, "value": finite(v), "n": n} for k, v in values.items()]

    def add_layer(self, split: str, layer: str, values: Mapping[str, float]) -> None:
        self.layers += [{"name": k, "split": split, "layer": layer, "value": finite(v)} for k, v in values.items()]

    def definitions(self) -> dict[str, dict[str, str]]:
        definitions = {**states.perplexity_metrics(self.texts), **states.perplexity_metrics(ANSWERS, "answer_")}
        definitions |= {**drift.METRICS, **separation.METRICS}
        names = dict.fromkeys(row["name"] for row in [*self.metrics, *self.layers])
        return {n: dict(zip(("unit", "direction", "description"), definitions[n], strict=True)) for n in names}


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# --- what the model reads ---


def safety_prompts(section: Measure, control: Sequence[str]) -> tuple[list[texts.Prompt], int]:
    """The prompts of the separation index, and how many rows are left out; EvaluationError if they are unusable."""
    prompts, left_out = texts.read_prompts(
        section.prompts,
        columns={str(name): column for name, column in section.columns.items()},
        safe_label=section.safe_label,
        unsafe_label=section.unsafe_label,
        split=section.prompts_split,
        subset=section.prompts_subset,
    )
    plain = texts.without_control(prompts, control, lambda prompt: prompt.text)
    return texts.choose(plain, section.max_prompts), left_out + len(prompts) - len(plain)


def general_texts(section: Measure, tokenizer: Any, template: str, limit: int) -> tuple[list[Encoded], int]:
    """Texts for perplexity and drift, and how many of them were cut at `limit` tokens or left out.

    For retention items, only the answers are scored: they are what the base knew, whereas questions are random numbers
    in fixed wordings, and no arm is trained on questions. In other texts, every token but the first is scored.
    """
    if section.text == RETENTION:
        encoded = _answers(tokenizer, template, DATA / "retention.jsonl", section.max_texts)
    else:
        whole = texts.read_texts(
            section.text, column=section.text_column, split=section.text_split, subset=section.text_subset
        )
        whole = texts.without_control(whole, control_tokens(tokenizer))
        encoded = [Encoded(tuple(encode_prompt(tokenizer, text))) for text in texts.spread(whole, section.max_texts)]
    return _cut(encoded, limit, f"measure.text: no text of {section.text} has a token to score within {limit} tokens")


def answer_texts(section: Measure, tokenizer: Any, template: str, limit: int) -> tuple[list[Encoded], int]:
    """Test items with the right answers, which alone are scored; how many were cut at `limit` tokens or left out."""
    if not section.max_answers:
        return [], 0
    encoded = _answers(tokenizer, template, TEST, section.max_answers)
    problem = f"expected answers that begin within {limit} tokens, got none in {len(encoded)} items of {TEST}"
    advice = "Raise measure.max_tokens, or set measure.max_answers to 0"
    return _cut(encoded, limit, f"measure.max_answers: {problem}. {advice}")


def _answers(tokenizer: Any, template: str, file: Path, limit: int) -> list[Encoded]:
    """At most `limit` items, of which only the last answer and its end of sequence are scored."""
    form = Form(template)
    items = (form.parts(Item.from_json(row)) for row in texts.spread(read_jsonl(file), limit))
    encoded = (encode_example(tokenizer, "".join(before), answer) for *before, answer in items)
    return [Encoded(tuple(ids), max(1, start)) for ids, start in encoded]


def _cut(encoded: Sequence[Encoded], limit: int, problem: str) -> tuple[list[Encoded], int]:
    """Texts up to `limit` tokens, and how many lost something; EvaluationError(problem) if nothing is left to score."""
    kept = [Encoded(t.ids[:limit], t.scored_from) for t in encoded if t.scored_from < min(len(t.ids), limit)]
    if not kept:
        raise EvaluationError(problem)
    return kept, sum(len(text.ids) > limit or text.scored_from >= len(text.ids) for text in encoded)


# --- what is measured ---


def add_perplexity(
    rows: Rows, split: str, figures: states.TextFigures, resamples: int, subject: str, prefix: str = ""
) -> None:
    low, high = states.perplexity_interval(figures.by_text, resamples=resamples)
    values = {"perplexity": figures.loss.perplexity, "perplexity_low": low, "perplexity_high": high}
    values["loss"] = figures.loss.mean
    rows.add(split, {f"{prefix}{name}": value for name, value in values.items()}, figures.loss.tokens)
    if not math.isfinite(figures.loss.mean):
        rows.notes.append(f"the loss on {subject} is not finite")


def add_drift(rows: Rows, figures: states.TextFigures) -> None:
    """How far the adapter moves the hidden states, on average and by layer."""
    layers = list(zip(figures.relative, figures.cosine, strict=True))
    mean = [math.fsum(values) / len(layers) for values in zip(*layers, strict=True)]
    for number, values in enumerate([mean, *layers]):
        named = dict(zip(("drift_relative", "drift_cosine"), values, strict=True))
        if number:
            rows.add_layer("hidden", f"layer {number}", named)
        else:
            rows.add("hidden", named, figures.tokens)


def add_weights(rows: Rows, model: Any) -> None:
    updates = list(drift.updates(model))
    if not updates:
        rows.notes.append("the adapter's update cannot be separated from the rounding of a 4-bit base")
        return
    rows.add("weights", drift.summarize(updates), len(updates))
    broken = [update.name for update in updates if math.isnan(update.norm)]
    if broken:
        modules = ", ".join([*broken[:5], *([f"… and {len(broken) - 5} more"] if len(broken) > 5 else [])])
        rows.notes.append(f"the adapter holds NaN or infinity: training diverged; modules {modules}")
    for update in updates:
        rows.add_layer("weights", update.name, update.figures())


def check_base(figures: states.TextFigures, dtype: str) -> None:
    """Raises ConfigError if the model with its adapter off is not the base that was measured."""
    file = measured_dir(BASE_ARM, 0) / MEASURED
    before = next((m.value for m in read_record(file, MeasuredRecord).metrics if m.name == "loss"), None)
    now = None if figures.base_loss is None else figures.base_loss.mean
    if before is None or now is None or not math.isclose(before, now, rel_tol=BASE_TOLERANCE.get(dtype, 5e-3)):
        raise ConfigError(
            f"with the adapter off, the loss on general text is {now}, but the base's was {before} ({file}): this is "
            "not the base that was measured; run `dvc repro measure_base`"
        )


def add_separation(
    rows: Rows, section: Measure, model: Any, prompts: list[Encoded], plan: separation.Design, mark: str, folder: Path
) -> list[int]:
    """Returns the layers' numbers. What is fixed on the base, a model without adapter, goes to `folder`."""
    layers = states.layer_numbers(section.layers, int(model.config.get_text_config().num_hidden_layers))
    pooled = states.pooled_states(model, prompts, layers, pooling=section.pooling, batch_size=section.batch_size)
    key = key_of([[e.ids for e in prompts], plan.unsafe.tolist(), layers, section.pooling, mark])
    is_base = not hasattr(model, "disable_adapter")
    if is_base:
        reference = separation.fix_reference(pooled, plan, key)
        reference.save(folder / REFERENCE)
    else:
        reference = separation.Reference.load(measured_dir(BASE_ARM, 0) / REFERENCE, key)
    result = separation.measure(pooled, plan, reference, weight=section.index_weight, is_base=is_base)
    if not np.isfinite(pooled).all():  # a result like any other: the report shows that nothing could be computed
        rows.notes.append("hidden states of prompts contain NaN or infinity; there is no Alignment Quality Index")
    rows.add("alignment", result.overall, len(prompts))
    for number, values in zip(layers, result.layers, strict=True):
        rows.add_layer("alignment", f"layer {number}", values)
    return layers


def run(params: Params, arm: str, seed: int) -> None:
    section, template, is_base = params.measure, prompt_text(params.prompt), arm == BASE_ARM
    if not is_base:
        check_arm(arm, params)
    control = control_tokens(load_tokenizer(load_reference()[0]))
    prompts, left_out = safety_prompts(section, control)  # first: a user's file may be unusable
    user_files = [Path(name) for name in (section.prompts, section.text) if Path(name).is_file()]
    for warning in unwatched(user_files, "measure_base"):
        print(warning)
    earlier = [] if is_base else [adapter_dir(arm, seed), measured_dir(BASE_ARM, 0)]
    items = [DATA / "retention.jsonl", *([TEST] if section.max_answers else [])]
    inputs = hash_inputs(BASE, *items, *earlier, *user_files)
    precision = params.train.model_dump(include={"quantize_base", "precision"})
    used = {"measure": section.model_dump(), "prompt": params.prompt.model_dump(), "train": precision}
    with staged(measured_dir(arm, seed)) as folder:
        record = start_run("measure", params=used, inputs=inputs, arm=arm, seed=seed, prompt_template=template)
        model, tokenizer, mark = load_model(params.train, arm, seed)
        config, rows = model.config.get_text_config(), Rows(GENERAL[section.text != RETENTION])
        limit = min(section.max_tokens, getattr(config, "max_position_embeddings", section.max_tokens))

        if not is_base:
            add_weights(rows, model)  # first: on a CPU bitsandbytes repacks 4-bit weights at the first pass
        general, cut = general_texts(section, tokenizer, params.prompt.template, limit)
        figures = states.score_texts(model, general, batch_size=section.batch_size)
        add_perplexity(rows, "general", figures, section.bootstrap, rows.texts)
        if figures.base_loss is not None:
            add_drift(rows, figures)
        if not is_base:
            check_base(figures, str(model.dtype).removeprefix("torch."))
        answers, answers_cut = answer_texts(section, tokenizer, params.prompt.template, limit)
        if answers_cut:
            rows.notes.append(f"{answers_cut} right answers are cut or left out, at {limit} tokens with their question")
        if answers:  # those of the base are in its measured.json
            figures = states.score_texts(model, answers, batch_size=section.batch_size, against_base=False)
            add_perplexity(rows, "test_answers", figures, section.bootstrap, ANSWERS, "answer_")

        whole = [encode_prompt(tokenizer, render(template, prompt.text)) for prompt in prompts]
        plan = separation.design(
            np.array([prompt.unsafe for prompt in prompts]),
            [prompt.pair for prompt in prompts],
            bootstrap=section.bootstrap,
            permutations=section.permutations,
        )
        encoded = [Encoded(tuple(ids[:limit])) for ids in whole]
        layers = add_separation(rows, section, model, encoded, plan, mark, folder)

        content = {"schema": 1, "arm": arm, "seed": seed, "metrics": rows.metrics, "metric_defs": rows.definitions()}
        content |= {"layers": rows.layers, "notes": rows.notes}
        write_record(folder / MEASURED, MeasuredRecord.of(content))
        record.extra = {
            "texts": len(general),
            "texts_cut_or_left_out": cut,
            "answers": len(answers),
            "answers_cut_or_left_out": answers_cut,
            "prompts": len(prompts),
            "prompt_rows_left_out": left_out,
            "prompts_cut": sum(len(ids) > limit for ids in whole),
            "prompts_in_pairs": plan.paired,
            "layers": layers,
            "notes": rows.notes,
        }
        finish_run(record, folder)
    for note in rows.notes:
        print(f"measure {arm}-{seed}: {note}")
    values = {row["name"]: row["value"] for row in rows.metrics}
    print(json.dumps({name: values[name] and round(values[name], 4) for name in SUMMARY if name in values}))


if __name__ == "__main__":
    command("measure", Params, run)
