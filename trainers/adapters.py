"""PEFT's methods by name: `train.peft` as a configuration, and initializations from part of W or from data."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers import TrainingError
from trainers.words import suggest

MERGED = frozenset(
    "ADALORA ADAMSS BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING LOHA LOKR LORA MISS OFT "
    "OSF PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA UNILORA VBLORA VERA WAVEFT".split()
)
"""Methods that PEFT 0.21 can merge into the base's weights; no other form can be served."""
_REFUSED = {
    "ADALORA": "PEFT adds its penalty to every loss, the evaluation loss included, and checkpoints lack the scores by "
    "which it prunes ranks, so a resumed training would end elsewhere",
    "LN_TUNING": "it trains norms, but target_modules are linear layers here",
}
"""Mergeable methods that are not trained here, and why."""
TRAINED = sorted(MERGED - _REFUSED.keys())
NO_FIELD = {
    "alora_invocation_tokens": "it acts on some of the tokens only, so it cannot be merged",
    "arrow_config": "it picks an adapter for every token, so it cannot be merged",
    "lora_bias": "PEFT cannot merge it into layers without a bias",
    "kasa_config": "it truncates the base's weights, and no adapter can restore them",
    "layer_replication": "it changes the architecture of the base",
    "monteclora_config": "it needs a penalty in the loss, which the Trainer does not add",
    "trainable_token_indices": "PEFT does not merge the trained tokens",
    "use_bdlora": "its A and B are block-diagonal, which only its own kernels support",
    "use_qalora": "it needs a GPTQ base",
}
"""Fields of LoraConfig that are refused, and why."""
_OF_DATA = {"eva": "EvaConfig", "corda": "CordaConfig", "lora_ga": "LoraGAConfig"}
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "mica", *_OF_DATA)
"""Values of `init_lora_weights` beside true and false."""
START_ITEMS = 64
"""Training items that an initialization is computed from."""
_FROM_ELSEWHERE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def read_config(file: Path) -> dict[str, Any]:
    """An adapter_config.json."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(
            f"peft: expected the path of an adapter_config.json, {file} cannot be read: {error}"
        ) from None


def is_plain(given: Any) -> bool:
    """Whether this is plain LoRA: an update s·B·A that starts at zero."""
    return isinstance(given, Mapping) and (
        given.keys() <= {"use_rslora", "init_lora_weights"}
        and given.get("init_lora_weights", True) in (True, "gaussian")
    )


def takes_part_of_w(start: Any) -> bool:
    """Whether PEFT subtracts this initialization (a value of `init_lora_weights`) from the base's weights."""
    return isinstance(start, str) and (start.startswith("pissa") or start in ("olora", "corda", "lora_ga"))


def peft_config(settings: Any) -> Any:
    """The PEFT configuration of `settings.peft`; rank, α, dropout and target modules come from section train.

    Raises TrainingError for an unknown method, field or start, for a value that contradicts section train, and for what
    could not be exported.
    """
    from peft import tuners
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if isinstance(settings.peft, str):
        entries = {k: v for k, v in read_config(Path(settings.peft)).items() if k not in _FROM_ELSEWHERE}
    else:
        entries = dict(settings.peft)
    method = str(entries.pop("peft_type", "LORA")).upper()
    kinds = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in kinds:
        raise TrainingError(f"peft.peft_type: unknown method {method!r}{suggest(method, TRAINED)}")
    if method not in TRAINED:
        why = _REFUSED.get(method, "PEFT cannot merge it into the base, and no other form of it can be served")
        raise TrainingError(f"peft.peft_type: {method} cannot be used: {why}. Available: {', '.join(TRAINED)}")
    fields = {field.name for field in dataclasses.fields(kinds[method]) if field.init}
    modules = sorted(settings.target_modules)
    shape = {
        "r": ("rank", settings.rank),
        "lora_alpha": ("alpha", settings.alpha),
        "alpha": ("alpha", settings.alpha),
        "lora_dropout": ("dropout", settings.dropout),
        f"{method.lower()}_dropout": ("dropout", settings.dropout),
        "target_modules": ("target_modules", modules),
    }
    shape = {name: value for name, value in shape.items() if name in fields and (name, method) != ("r", "OFT")}
    problems = [
        f"peft.{key}: unknown key of {method}{suggest(key, sorted(fields))}" for key in entries if key not in fields
    ]
    for key, (ours, value) in shape.items():
        entry = entries.get(key, value)
        entry = sorted(entry) if key == "target_modules" and isinstance(entry, list) else entry
        if entry != value:
            problems.append(f"peft.{key}: expected {value!r}, the value of {ours}, got {entry!r}; set {ours} instead")
    if settings.dropout and not any(ours == "dropout" for ours, _ in shape.values()):
        problems.append(f"dropout: expected 0.0, got {settings.dropout}; {method} has no dropout")
    start = entries.get("init_lora_weights", True) if method == "LORA" else True
    if method == "LORA":
        problems += [f"peft.{key}: cannot be used: {why}" for key, why in NO_FIELD.items() if entries.get(key)]
        if isinstance(start, str) and start not in STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
            problems.append(f"peft.init_lora_weights: unknown start {start!r}{suggest(start, STARTS)}")
        if takes_part_of_w(start) and entries.get("use_dora"):
            problems.append(
                f"peft.use_dora: expected false with {start}, which is subtracted from the adapter at the end"
            )
        if settings.quantize_base != "none" and takes_part_of_w(start):
            problems.append(
                f"peft.init_lora_weights: {start} is subtracted from the base's weights, which 4-bit weights cannot "
                "represent; expected quantize_base: none"
            )
    if not problems:
        try:
            for name, kind in _OF_DATA.items():
                if start == name or entries.get(f"{name}_config"):
                    values = entries.get(f"{name}_config") or {}
                    entries[f"{name}_config"] = getattr(tuners.lora.config, kind)(**values)
            filled = {key: value for key, (_, value) in shape.items()}
            return kinds[method](**{"task_type": "CAUSAL_LM", **filled, **entries})
        except (TypeError, ValueError) as error:
            problems.append(f"peft: {method} refuses it: {error}")
    raise TrainingError("\n".join(problems))


def pattern_problems(model: Any, config: Any) -> list[str]:
    """Names in a PEFT configuration that fit no module of the base, which PEFT would ignore without a word."""
    modules = [name for name, _ in model.named_modules() if name]
    endings = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()})
    linear = [name for name in modules if _is_adapted(name, config.target_modules)]
    problems = []
    for key in ("modules_to_save", "exclude_modules"):
        names = getattr(config, key, None) or ()
        for name in [names] if isinstance(names, str) else names:
            if not any(_is_adapted(module, names if isinstance(names, str) else [name]) for module in modules):
                problems.append(f"peft.{key}: {name!r} fits no module{suggest(name, endings)}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in (getattr(config, key, None) or {}).items():
            if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in linear):
                adapted = sorted({name.rpartition(".")[2] for name in linear})
                problems.append(f"peft.{key}: {pattern!r} fits no module with an adapter{suggest(pattern, adapted)}")
            if value <= 0:
                problems.append(f"peft.{key}.{pattern}: expected more than 0, got {value}")
    layers = getattr(config, "layers_to_transform", None)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for layer in [layers] if isinstance(layers, int) else layers or ():
        if not 0 <= layer < count:
            problems.append(f"peft.layers_to_transform: expected numbers from 0 to {count - 1}, got {layer}")
    if getattr(config, "bias", "none") != "none" and any(
        name.endswith(".bias") for name, _ in model.named_parameters()
    ):
        problems.append(
            f"peft.bias: expected none, since this base has biases, got {config.bias!r}; PEFT leaves trained biases in "
            "place while the adapter is off, so that nothing could be compared with the base"
        )
    return problems


def _is_adapted(module: str, targets: Any) -> bool:
    """Whether PEFT's names, or one regular expression, take a module."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


# Starts


def learn_start(model: Any, settings: Any, items: Any, pad: int) -> list[dict[str, Any]]:
    """Batches of the first training items for an initialization from data; CorDA and LoRA-GA read them at once."""
    config = peft_config(settings)
    start = getattr(config, "init_lora_weights", True)
    if start not in _OF_DATA:
        return []
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    size = settings.batch_size if start == "eva" else 1  # CorDA reads one text at a time
    rows = []
    for i in range(min(START_ITEMS, len(items))):
        ids, mask = items[i]["input_ids"], items[i]["completion_mask"]
        rows.append({"input_ids": ids, "labels": [t if counts else -100 for t, counts in zip(ids, mask, strict=True)]})
    collate = DataCollatorForLanguageModeling(pad)
    cut = (collate(rows[i : i + size]) for i in range(0, len(rows), size))
    batches = [{key: value.to(model.device) for key, value in batch.items()} for batch in cut]

    def read() -> None:
        for batch in batches:
            loss = model(**batch).loss
            if start == "lora_ga":
                loss.backward()

    if start == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, read)
    elif start == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(model, config, read)
    return batches


def finish_start(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """Initialize EVA, and keep the base available where PEFT has replaced W by W − s·B₀·A₀."""
    from peft import initialize_lora_eva_weights

    from grit.layers import find_pairs

    config = trainer.model.peft_config["default"]
    start = getattr(config, "init_lora_weights", True)
    if start == "eva":
        initialize_lora_eva_weights(trainer.model, batches, show_progress_bar=False)
    if takes_part_of_w(start):
        fold_in_start(trainer, find_pairs(trainer.model), off_w=True)
    if hasattr(config, "init_lora_weights"):  # what is saved is loaded as it is
        config.init_lora_weights = True
        vars(config).update(dict.fromkeys((f"{name}_config" for name in _OF_DATA), None))


def fold_in_start(trainer: Any, pairs: Sequence[Any], off_w: bool = False) -> None:
    """Make the model the base while the adapter is off, and at the end of training the adapter fit the untouched base.

    A₀ and B₀ are the LoRA pairs' weights as they are now. At the end the adapter becomes [B, −B₀] [A; A₀].

    Args:
        off_w: Whether s·B₀·A₀ was subtracted from W. A hook then adds it while the adapter is off, and W gets it back
            at the end; otherwise the hook subtracts it while the adapter is on.
    """
    import torch
    from torch.nn.functional import linear
    from transformers import TrainerCallback

    from grit.layers import resize, write_patterns

    starts = []
    for pair in pairs:
        a, b, scale = pair.a.detach().clone(), pair.b.detach().clone(), pair.scale

        def correct(layer: Any, args: Any, y: Any, a: Any = a, b: Any = b, scale: float = scale) -> Any:
            if layer.disable_adapters != off_w:
                return y
            start = (scale * linear(linear(args[0].to(a.dtype), a), b)).to(y.dtype)
            return y + start if off_w else y - start

        starts.append((pair, a, b, pair.layer.register_forward_hook(correct)))

    class FoldInStart(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            for pair, a, b, hook in starts:
                hook.remove()
                if off_w:
                    weight = pair.layer.get_base_layer().weight
                    weight.data += (pair.scale * (b.double() @ a.double())).to(weight.dtype)
                resize(pair, torch.cat([pair.a.detach(), a]), torch.cat([pair.b.detach(), -b], dim=1))
            write_patterns(trainer.model, list(pairs))

    trainer.add_callback(FoldInStart())
