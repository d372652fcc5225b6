"""GRIT in transformers' Trainer and in TRL's SFTTrainer: it reaches the weights, and rightly so; and what it logs."""

import functools
import gc
import json
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from grit import (
    GritCallback,
    GRITConfig,
    GRITConfigError,
    GritLayerError,
    GRITManager,
    GritOptimizer,
    GritTrainer,
    grit_trainer_class,
)
from tests.grit.nets import covariances, hooks_on, llama_config, lora_weights
from tests.grit.nets import trainable as lora_parameters

VOCABULARY, LENGTH = 64, 12


@pytest.fixture(scope="module", autouse=True)
def libraries_are_no_garbage():
    """Every train() has accelerate collect garbage, half a second each over all that torch and the others brought."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tiny_model(rank=4, seed=0, warm=False, targets=("q_proj", "v_proj", "down_proj")):
    """A Llama of two layers with LoRA on six modules; `warm`: B does not start at zero."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
    config = llama_config(VOCABULARY, **sizes, pad_token_id=0, initializer_range=0.02, use_cache=True)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if warm and "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    return model


def tiny_data(count=64, seed=1):
    """Arithmetic sequences of 6 to 12 tokens, padded on the right."""
    generator, rows = random.Random(seed), []
    for _ in range(count):
        length, start, step = generator.randint(6, LENGTH), generator.randrange(60), generator.randrange(1, 9)
        ids, rest = [(start + step * i) % 60 + 1 for i in range(length)], LENGTH - length
        rows.append(
            {"input_ids": ids + [0] * rest, "attention_mask": [1] * length + [0] * rest, "labels": ids + [-100] * rest}
        )
    return rows


def arguments(folder, cls=TrainingArguments, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    return cls(**{**values, **changes})


def grit_trainer(folder, config, model=None, data=None, of_trainer=None, **changes):
    return GritTrainer(
        model=model if model is not None else tiny_model(),
        args=arguments(folder, **changes),
        train_dataset=data if data is not None else tiny_data(),
        grit_config=config,
        **(of_trainer or {}),
    )


def settings(**changes):
    """Statistics at every step, no reprojection unless it is asked for."""
    values = {"grit_cov_update_freq": 1, "kfac_update_freq": 2, "kfac_min_samples": 16, "reprojection": "none"}
    return GRITConfig(**{**values, "min_lora_rank": 2, "log_freq": 2, **changes})


class Recorder:
    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append({key: torch.tensor([row[key] for row in rows]) for key in rows[0]})
        return dict(self.batches[-1])


class Watch(TrainerCallback):
    def __init__(self, event, function):
        def call(args, state, control, **kwargs):
            function(state=state, **kwargs)

        setattr(self, event, call)


# --- Three ways to use it. Each trains a model with `config`, or with the optimizer alone where it is None.


def by_grit_trainer(config, folder):
    cls, given = (GritTrainer, {"grit_config": config}) if config is not None else (Trainer, {})
    trainer = cls(model=tiny_model(), args=arguments(folder, max_grad_norm=0.0), train_dataset=tiny_data(), **given)
    trainer.train()
    return trainer.model, getattr(trainer, "grit_manager", None)


def by_callback(config, folder):
    model, manager, callbacks = tiny_model(), None, []
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.0)
    if config is not None:
        manager = GRITManager(model, config)
        optimizer, callbacks = GritOptimizer(optimizer, manager), [GritCallback(manager)]
    given = {"optimizers": (optimizer, None), "callbacks": callbacks, "train_dataset": tiny_data()}
    Trainer(model=model, args=arguments(folder, max_grad_norm=0.0), **given).train()
    return model, manager


def sft_trainer(config, folder, model=None, **changes):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    from trainers.run import sft_trainer_class

    words = {f"w{i}": i for i in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w63"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w62")
    rows = [[token for token in row["input_ids"] if token] for row in tiny_data()]
    data = Dataset.from_dict({"input_ids": rows, "completion_mask": [[0, 0] + [1] * (len(row) - 2) for row in rows]})
    values = {"max_length": None, "completion_only_loss": True, "max_grad_norm": 0.0, "bf16": False}
    values |= {"gradient_checkpointing": False, **changes}
    cls, given = sft_trainer_class(), {}
    if config is not None:
        cls, given = grit_trainer_class(cls), {"grit_config": config}
    return cls(
        model=model if model is not None else tiny_model(),
        args=arguments(folder, SFTConfig, **values),
        train_dataset=data,
        processing_class=tokenizer,
        **given,
    )


def by_sft_trainer(config, folder):
    trainer = sft_trainer(config, folder)
    trainer.train()
    return trainer.model, getattr(trainer, "grit_manager", None)


@functools.cache
def without_grit(way, folder):
    return lora_weights(WAYS[way](None, folder)[0])


WAYS = {f.__name__: f for f in (by_grit_trainer, by_callback, by_sft_trainer)}


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_preconditioning_reaches_the_weights(way, mode, tmp_path, tmp_path_factory):
    """The same run without GRIT, with it, and with it in warm-up throughout, which has to be AdamW again."""
    adamw = without_grit(way, tmp_path_factory.getbasetemp() / "adamw")
    natural, manager = WAYS[way](settings(mode=mode), tmp_path / "grit")
    idle, waiting = WAYS[way](settings(mode=mode, ng_warmup_steps=1000), tmp_path / "idle")
    natural, idle = lora_weights(natural), lora_weights(idle)
    assert len(adamw) == 12 and adamw.keys() == natural.keys() == idle.keys()
    for name, w in adamw.items():
        assert torch.linalg.norm(natural[name] - w) > 0.02 * torch.linalg.norm(w), name
        assert torch.allclose(idle[name], w, atol=2e-6), name

    assert manager.step == manager.applied_steps == 8
    assert all(bool(state["ready_a"].all() & state["ready_g"].all()) for state in manager.curvature.states)
    assert set(manager.curvature.capture_kinds().values()) == {"hooks"} and not manager.curvature.unreported()
    effects = [r for r in manager.history if r["kind"] == "effect"]
    assert [r["step"] for r in effects] == [0, 2, 4, 6]
    assert all(r["effective"] for r in effects) and effects[-1]["ready_layers"] == 6
    assert manager.history[-1]["effect"]["effective"]
    assert not any(r["effective"] for r in waiting.history if r["kind"] == "effect")
    assert "warm-up" in waiting.history[-1]["effect"]["reason"]


# --- What the Trainer mixin does on its own


@pytest.mark.parametrize("base", ["trainer", "sft"])
def test_hooks_come_off_when_training_raises(base, tmp_path):
    def fail(state, **_):
        if state.global_step == 3:
            raise ZeroDivisionError("from a callback")

    trainer = (sft_trainer if base == "sft" else lambda *of: grit_trainer(*reversed(of)))(settings(), tmp_path)
    trainer.add_callback(Watch("on_step_end", fail))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.grit_manager.step == 3
    assert hooks_on(trainer.model) == 0 and trainer.grit_manager.capture is None


def test_config_and_manager_that_contradict_each_other(tmp_path):
    model, other = tiny_model(), tiny_model()
    args = arguments(tmp_path)
    manager, stranger = GRITManager(model, settings()), GRITManager(other, settings())
    with pytest.raises(ValueError, match="expected grit_config or grit_manager, got both"):
        GritTrainer(model=model, args=args, grit_config=settings(), grit_manager=manager)
    with pytest.raises(ValueError, match="grit_manager: expected a manager of the model that is trained, got one of"):
        GritTrainer(model=model, args=args, grit_manager=stranger)
    with pytest.raises(GritLayerError, match="expected a model with LoRA layers"):
        GritTrainer(model=LlamaForCausalLM(model.config), args=args, grit_config=settings())
    with pytest.raises(GRITConfigError, match="cov_decay"):
        GritTrainer(model=model, args=args, grit_config=settings(cov_decay=2.0))
    optimizer = GritOptimizer(torch.optim.AdamW(lora_parameters(model)), manager)
    for wrong in ({}, {"grit_config": settings()}, {"grit_manager": GRITManager(model, settings())}):
        with pytest.raises(ValueError, match="expected the manager of the GritOptimizer"):
            GritTrainer(model=model, args=args, optimizers=(optimizer, None), **wrong)
    good = GritTrainer(model=model, args=args, optimizers=(optimizer, None), grit_manager=manager)
    assert good.grit_manager is manager


@pytest.mark.parametrize(("mode", "shrink"), [("eigen_adamw", "end"), ("adamw", "never"), ("sgd", "end")])
def test_training_goes_on_when_train_is_called_again(mode, shrink, tmp_path):
    """No second wrapper around the first one; weights that shrank are the ones that are trained."""
    changes = {"reprojection": "none"}
    if shrink == "end":
        changes = {"reprojection": "balanced", "rank_shrink": "end", "rank_adaptation_threshold": 0.8}
    model = tiny_model(rank=8)
    config = settings(mode=mode, lr_ratio_b=2.0, **changes)
    trainer = grit_trainer(tmp_path, config, model, max_grad_norm=0.0)
    trainer.train()
    between, optimizer = lora_weights(model), trainer.optimizer.optimizer
    ranks = [pair.rank for pair in trainer.grit_manager.pairs()]
    assert max(ranks) < 8 if shrink == "end" else set(ranks) == {8}
    trained = []
    trainer.add_callback(Watch("on_step_end", lambda model, **_: trained.append(lora_weights(model))))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and not isinstance(optimizer.optimizer, GritOptimizer)
    assert trainer.grit_manager.step == trainer.grit_manager.applied_steps == 16
    assert all(not torch.equal(trained[0][name], w) for name, w in between.items())
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == [0.01, 0.02]


# --- Statistics


def assert_close_covariances(found, expected, relative=1e-4):
    assert found.keys() == expected.keys()
    for name in found:
        for side in (0, 1):
            got, want = found[name][side].double(), expected[name][side].double()
            assert want.norm() > 0
            assert (got - want).norm() < relative * want.norm(), (name, side)
        assert found[name][2] == expected[name][2], name


def backward(model, batches):
    """The mean loss over the tokens of all batches."""
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:
        model(**batch, num_items_in_batch=items).loss.backward()


def loop_covariances(batches):
    model = tiny_model(warm=True)
    with GRITManager(model, settings()) as manager:
        backward(model, batches)
        manager.update_statistics()
        manager.close(check=False)
    return covariances(manager)


@pytest.mark.parametrize("capture", ["hooks", "gradients"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trainer_run_equals_a_plain_loop_over_its_batches(accumulation, capture, tmp_path):
    """Statistics, bases and weights after six steps; the loop divides by the tokens of the whole step itself."""
    collator, config = Recorder(), settings(capture=capture)
    model, given = tiny_model(warm=True), {"data_collator": collator}
    changes = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    trainer = grit_trainer(tmp_path, config, model, tiny_data(128), given, **changes)
    trainer.train()

    twin = tiny_model(warm=True)
    with GRITManager(twin, settings(capture=capture)) as manager:
        inner = torch.optim.AdamW(lora_parameters(twin), lr=1e-2, weight_decay=0.0)
        optimizer = GritOptimizer(inner, manager, max_grad_norm=0.5)
        for step in range(6):
            backward(twin, collator.batches[step * accumulation : (step + 1) * accumulation])
            optimizer.step()
            optimizer.zero_grad()
    assert_close_covariances(covariances(trainer.grit_manager), covariances(manager), 1e-3)
    for name, w in lora_weights(twin).items():
        assert torch.allclose(lora_weights(model)[name], w, atol=1e-5), name


def test_sft_trainer_counts_the_answer_tokens_only_in_the_divisor(tmp_path):
    """TRL masks the prompt out of the loss; statistics are of one token's loss all the same."""
    trainer = sft_trainer(settings(), tmp_path, tiny_model(warm=True), max_steps=1, gradient_accumulation_steps=2)
    seen, collate = [], trainer.data_collator

    def recording(rows):
        seen.append(collate(rows))
        return seen[-1]

    trainer.data_collator = recording
    trainer.train()
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")} for batch in seen[:2]]
    assert all(0 < (batch["labels"] != -100).sum() < batch["attention_mask"].sum() for batch in batches)
    assert_close_covariances(covariances(trainer.grit_manager), loop_covariances(batches))


# --- Clipping


@pytest.mark.parametrize(("damping", "limit"), [(100.0, 0.05), (1e-3, 0.2)], ids=["shorter", "longer"])
def test_clipping_comes_once_and_after_preconditioning(damping, limit, tmp_path):
    """Mode sgd without momentum or trust region moves by lr times the clipped natural gradient, no more, no less.

    Shorter: damping of 100 makes natural gradients a hundred times shorter than the raw ones. Those are above the
    limit, the natural ones are not, so nothing may be clipped. Longer: it is the other way round.
    """
    changes = {"sgd_momentum": 0.0, "kl_clip": 0.0, "damping_mode": "absolute", "kfac_damping": damping, "log_freq": 1}
    config, model = settings(mode="sgd", **changes), tiny_model(warm=True)
    trainer = grit_trainer(tmp_path, config, model, max_grad_norm=limit, learning_rate=0.1)
    norms, moves, natural, before = [], [], [], {}

    def norm(tensors):
        return float(torch.nn.utils.get_total_norm(list(tensors)))

    def look(**_):
        norms.append(norm(p.grad for p in model.parameters() if p.grad is not None))
        before.update(lora_weights(model))

    def moved(**_):
        moves.append(norm(w - before[name] for name, w in lora_weights(model).items()))
        natural.append(trainer.grit_manager.metrics()["grit/gradient_norm_natural"])

    trainer.add_callback(Watch("on_pre_optimizer_step", look))
    trainer.add_callback(Watch("on_optimizer_step", moved))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)  # the raw norm, clipped by nobody before the optimizer
    if damping == 100.0:
        assert min(logged) > limit > max(natural)
    else:
        assert min(natural) > limit
    expected = [0.1 * min(norm, limit) for norm in natural]
    assert moves == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("kappa", "of_config", "expected"), [(1e-3, None, 0.0), (0.0, None, 0.3), (1e-3, 0.7, 0.7)])
def test_mode_sgd_is_clipped_only_where_no_trust_region_limits_it(kappa, of_config, expected, tmp_path):
    """At the second train() as at the first."""
    config = settings(mode="sgd", kl_clip=kappa, max_grad_norm=of_config)
    trainer = grit_trainer(tmp_path, config, max_grad_norm=0.3, max_steps=1)
    for _ in range(2):
        trainer.train()
        assert trainer.optimizer.optimizer.max_grad_norm == expected


# --- Precision, checkpointing, schedules, inner optimizers


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw", "sgd"])
def test_schedules_work_on_both_learning_rates(mode, tmp_path):
    rates, steps, before = [], [], {}
    config = settings(mode=mode, lr_ratio_b=4.0, ng_warmup_steps=1000, kl_clip=0.0)
    changes = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.0}
    trainer = grit_trainer(tmp_path, config, tiny_model(warm=True), **changes)

    def look(optimizer, model, **_):
        by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        names = dict(model.named_parameters())
        rates.append([{by_id[id(p)] for n, p in names.items() if part in n} for part in ("lora_A", "lora_B")])
        before.update(lora_weights(model))

    def moved(model, **_):
        steps.append({n: float((w - before[n]).abs().max()) for n, w in lora_weights(model).items()})

    trainer.add_callback(Watch("on_pre_optimizer_step", look))
    trainer.add_callback(Watch("on_optimizer_step", moved))
    trainer.train()
    expected = [1e-2 * factor for factor in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert all(len(a) == len(b) == 1 for a, b in rates)
    assert [a.pop() for a, _ in rates] == pytest.approx(expected)
    assert [b.pop() for _, b in rates] == pytest.approx([4 * rate for rate in expected])
    assert set(steps[0].values()) == {0.0}  # rate 0
    if mode != "sgd":  # Adam moves its most active coordinates by about the learning rate
        for name, size in steps[1].items():
            assert size == pytest.approx(2e-2 if "lora_B" in name else 5e-3, rel=0.5), name


def test_mode_sgd_brings_its_own_optimizer(tmp_path):
    config = settings(mode="sgd", sgd_momentum=0.8)
    changes = {"max_steps": 32, "learning_rate": 0.5, "weight_decay": 0.01, "max_grad_norm": 0.0}
    trainer = grit_trainer(tmp_path, config, data=tiny_data(16), **changes)
    trainer.train()
    inner = trainer.optimizer.optimizer.optimizer
    assert type(inner) is torch.optim.SGD
    assert all(g["momentum"] == 0.8 and g["weight_decay"] == 0.01 for g in inner.param_groups)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.15  # an epoch has four steps
    assert 0 < trainer.grit_manager.metrics()["grit/trust_region_factor"] < 1  # so high a rate is held back


def test_moments_in_8_bit_start_anew_at_a_reprojection(tmp_path, caplog):
    import bitsandbytes

    model = tiny_model(rank=8)
    inner = bitsandbytes.optim.AdamW8bit(lora_parameters(model), lr=1e-2, min_8bit_size=1)
    changes = {"reprojection": "balanced", "reprojection_freq": 4, "rank_adaptation_threshold": 0.9}
    trainer = grit_trainer(tmp_path, settings(mode="adamw", **changes), model, None, {"optimizers": (inner, None)})
    kinds = []
    trainer.add_callback(
        Watch("on_step_end", lambda **_: kinds.append({str(s["state1"].dtype) for s in inner.state.values() if s}))
    )
    trainer.train()
    assert kinds[2] == {"torch.uint8"} and kinds[3] == set() and kinds[4] == {"torch.uint8"}
    assert "cannot be transformed; reset" in caplog.text
    assert all(w.isfinite().all() for w in lora_weights(model).values())


@pytest.mark.parametrize("keep_optimizer", [True, False])
def test_the_best_checkpoint_comes_back_with_its_statistics(keep_optimizer, tmp_path):
    """The best one is from before the first reprojection; shrinking at the end is by the statistics of then."""
    from safetensors.torch import load_file

    model, seen = tiny_model(rank=8), {}
    changes = {"reprojection": "balanced", "reprojection_freq": 3, "rank_adaptation_threshold": 0.7}
    look = Watch("on_step_end", lambda state, **_: seen.update({state.global_step: statistics()}))
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": not keep_optimizer}
    saving |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    saving |= {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}  # the first wins
    given = {"eval_dataset": tiny_data(8, seed=9), "callbacks": [look]}
    trainer = grit_trainer(tmp_path, settings(**changes), model, of_trainer=given, **saving)

    def statistics():
        return {name: (cov_a.clone(), cov_g.clone()) for name, (cov_a, cov_g, _) in covariances(manager).items()}

    manager = trainer.grit_manager
    finish = manager.finish

    def watched(optimizer):
        best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
        assert all(torch.equal(w, best[name.replace(".default", "")]) for name, w in lora_weights(model).items())
        for name, found in statistics().items():
            expected = seen[2][name] if keep_optimizer else (torch.zeros(8, 8),) * 2
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        finish(optimizer)

    manager.finish = watched
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert [r["step"] for r in manager.history if r["kind"] == "reprojection"][:2] == [3, 6]
    assert {"step": 2 if keep_optimizer else 6, "kind": "best", "trained_to": 6} in manager.history
    ranks = {entry["r"] for entry in manager.history[-1]["ranks"].values()}
    assert max(ranks) < 8 if keep_optimizer else ranks == {8}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_adaptive_schedule_sees_one_mean_loss_a_step(accumulation, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GRITManager, "observe_loss", lambda self, loss: seen.append(loss))
    config = settings(adaptive_schedule=True)
    trainer = grit_trainer(tmp_path, config, gradient_accumulation_steps=accumulation, max_steps=4)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == pytest.approx(logged, rel=1e-5) and len(seen) == 4


def test_a_custom_loss_function_is_normalised_too(tmp_path):
    """compute_loss_func takes the labels away from the model; the Trainer's count of items is used."""

    def loss_function(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        return total / num_items_in_batch

    collator = Recorder()
    given = {"data_collator": collator, "compute_loss_func": loss_function}
    changes = {"max_steps": 1, "gradient_accumulation_steps": 2}
    trainer = grit_trainer(tmp_path, settings(), tiny_model(warm=True), None, given, **changes)
    trainer.train()
    assert_close_covariances(covariances(trainer.grit_manager), loop_covariances(collator.batches[:2]))


# --- What is written down


def test_the_log_goes_to_the_output_folder_unless_the_manager_has_a_file_of_its_own(tmp_path):
    def lines(file):
        return [json.loads(line) for line in file.read_text().splitlines()]

    for own in (None, tmp_path / "mine" / "log.jsonl"):
        model = tiny_model()
        manager = GRITManager(model, settings(), log_file=own)
        args = arguments(tmp_path / f"out{own is None}")
        GritTrainer(model=model, args=args, train_dataset=tiny_data(), grit_manager=manager).train()
        assert manager.log_file == (own or tmp_path / "outTrue" / "grit_log.jsonl")
        assert lines(manager.log_file) == manager.history
    assert not (tmp_path / "outFalse" / "grit_log.jsonl").exists()
    again = grit_trainer(tmp_path / "outTrue", settings())  # a new run into an old folder starts a new log
    again.train()
    assert lines(tmp_path / "outTrue" / "grit_log.jsonl") == again.grit_manager.history


def test_heat_maps_put_factors_into_the_last_record(tmp_path):
    last = {}
    wanted = ["1.mlp.down_proj", "v_proj"]
    for name, changes in (("first", {}), ("chosen", {"log_eig_heatmaps_modules": wanted})):
        trainer = grit_trainer(tmp_path / name, settings(log_eig_heatmaps=True, **changes))
        trainer.train()
        *before, last[name] = trainer.grit_manager.history
        assert not any("factors" in record for record in before)
        for layer, (cov_a, cov_g, _) in covariances(trainer.grit_manager).items():
            if layer in last[name]["factors"]:
                said = last[name]["factors"][layer]
                assert torch.equal(torch.tensor(said["cov_a"]), cov_a) and torch.equal(
                    torch.tensor(said["cov_g"]), cov_g
                )
                assert cov_a.shape == (4, 4) and cov_g.norm() > 0
    assert list(last["first"]["factors"]) == list(covariances(trainer.grit_manager))[:4]
    assert sorted(name.split("layers.")[1] for name in last["chosen"]["factors"]) == [
        "0.self_attn.v_proj",
        "1.mlp.down_proj",
        "1.self_attn.v_proj",
    ]


def test_the_trainers_reports_get_grits_numbers(tmp_path):
    """Whoever listens to the Trainer's log, read back from TensorBoard's own file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = []
    watch = Watch("on_log", lambda state, logs_=logs, **kwargs: logs_.append((state.global_step, dict(kwargs["logs"]))))
    of_trainer = {"callbacks": [watch]}
    trainer = grit_trainer(tmp_path, settings(mode="adamw"), of_trainer=of_trainer, report_to=["tensorboard"])
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    tags = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    expected = """gradient_norm_raw gradient_norm_natural rank_mean ready_layers skipped_steps damping_share
    effective_rank_a effective_rank_g condition_a condition_g cosine_raw_natural"""
    assert {f"grit/{name}" for name in expected.split()} | {"loss"} <= tags
    for name in ("grit/gradient_norm_raw", "grit/effective_rank_a", "grit/ready_layers"):
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == list(range(1, 9))
        assert [s.value for s in scalars] == pytest.approx([log[name] for _, log in logs if "loss" in log], rel=1e-6)
    raw = [s.value for s in events.Scalars("train/grit/gradient_norm_raw")]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert raw == pytest.approx(norms, rel=1e-5)
    assert {s.value for s in events.Scalars("train/grit/ready_layers")} == {6.0}
