"""GRIT in transformers' Trainer and in TRL's SFTTrainer: it reaches the weights, and rightly so; and what it logs."""

import functools
import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig

from grit import (
    GritCallback,
    GRITConfig,
    GRITError,
    GritFactory,
    GRITManager,
    GritOptimizer,
    GritTrainer,
    create_grit_optimizer,
    grit_trainer_class,
)
from probes import ProbeCallback, judge
from tests.grit.nets import covariances, hooks_on, llama, lora_on, lora_weights, of_kind, same, trainable
from trainers.run import sft_trainer_class

VOCABULARY, LENGTH = 64, 12


def tiny_model(rank=4, warm=False):
    """A Llama of two layers with LoRA on six modules; `warm`: B does not start at zero."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 32}
    model = lora_on(llama(VOCABULARY, **sizes, initializer_range=0.02, use_cache=True), rank)
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


def word_tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w63"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w62")


def arguments(folder, cls=TrainingArguments, **changes):
    values = {"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    values |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    values |= {"use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True, "seed": 3}
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
    values |= dict.fromkeys(("nesterov", "cautious", "orthogonal"), False)
    return GRITConfig(**{**values, "min_lora_rank": 2, "log_freq": 2, **changes})


class Recorder:
    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append({key: torch.tensor([row[key] for row in rows]) for key in rows[0]})
        return dict(self.batches[-1])


class Watch(TrainerCallback):
    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **kwargs: function(state=state, **kwargs))


def logged_by(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- What the Trainer mixin does on its own


def test_hooks_come_off_when_training_raises(tmp_path):
    def fail(state, **_):
        if state.global_step == 3:
            raise ZeroDivisionError("from a callback")

    trainer = grit_trainer(tmp_path, settings(), of_trainer={"callbacks": [Watch("on_step_end", fail)]})
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.grit_manager.step == 3
    assert hooks_on(trainer.model) == 0 and trainer.grit_manager.capture is None


def test_config_and_manager_that_contradict_each_other(tmp_path):
    model, args = tiny_model(), arguments(tmp_path)
    manager, stranger = GRITManager(model, settings()), GRITManager(tiny_model(), settings())
    with pytest.raises(ValueError, match="grit_config: expected that of grit_manager"):
        GritTrainer(model=model, args=args, grit_config=settings(log_freq=7), grit_manager=manager)
    with pytest.raises(ValueError, match="grit_manager: expected a manager of the model that is trained, got one of"):
        GritTrainer(model=model, args=args, grit_manager=stranger)
    optimizer = GritOptimizer(torch.optim.AdamW(trainable(model)), manager)
    for wrong in ({}, {"grit_config": settings()}, {"grit_manager": GRITManager(model, settings())}):
        with pytest.raises(ValueError, match="expected the manager of the GritOptimizer"):
            GritTrainer(model=model, args=args, optimizers=(optimizer, None), **wrong)
    good = GritTrainer(model=model, args=args, optimizers=(optimizer, None), grit_manager=manager)
    assert good.grit_manager is manager


@pytest.mark.parametrize(("mode", "clipped"), [("eigen_adamw", 0.3), ("sgd", 0.0)])
def test_training_goes_on_when_train_is_called_again(mode, clipped, tmp_path):
    """No second wrapper around the first one; weights that shrank are the ones that are trained.

    Mode sgd is not clipped, now as then: the trust region limits the step.
    """
    model = tiny_model(rank=8)
    config = settings(mode=mode, lr_ratio_b=2.0, reprojection="balanced", rank_adaptation_threshold=0.8)
    trainer = grit_trainer(tmp_path, config, model, max_grad_norm=0.3)
    trainer.train()
    between, optimizer = lora_weights(model), trainer.optimizer.optimizer
    assert optimizer.max_grad_norm == clipped
    assert max(pair.rank for pair in trainer.grit_manager.pairs()) < 8
    trained = []
    trainer.add_callback(Watch("on_step_end", lambda model, **_: trained.append(lora_weights(model))))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and not isinstance(optimizer.optimizer, GritOptimizer)
    assert optimizer.max_grad_norm == clipped
    assert trainer.grit_manager.step == trainer.grit_manager.applied_steps == 16
    assert all(not torch.equal(trained[0][name], w) for name, w in between.items())
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == [0.01, 0.02]


# --- In a Trainer that knows nothing of GRIT


@pytest.mark.parametrize("sft", [False, True])
def test_the_factory_makes_a_plain_trainer_step_as_a_grit_trainer_does(sft, tmp_path):
    """With accumulation and the Trainer's clipping; the end is the same too, with a callback."""
    form = functools.partial(SFTConfig, bf16=False, gradient_checkpointing=False) if sft else TrainingArguments
    plain = sft_trainer_class() if sft else Trainer

    def trained(folder, kind, callbacks, **ours):
        weights, data = [], Dataset.from_list(tiny_data())
        watch = Watch("on_step_end", lambda model, **_: weights.append(lora_weights(model)))
        limits = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}
        args = arguments(tmp_path / folder, form, **limits)
        trainer = kind(
            model=tiny_model(rank=8),
            args=args,
            train_dataset=data,
            processing_class=word_tokenizer(),
            data_collator=default_data_collator,
            callbacks=[watch, *callbacks],
            **ours,
        )
        trainer.train()
        assert min(logged_by(trainer, "grad_norm")) > 0.1
        return trainer, [*weights, lora_weights(trainer.model)]

    config = settings(reprojection="balanced", rank_adaptation_threshold=0.8, eigen_power=0.5)
    probe = ProbeCallback(claims=True, every=1)
    options = {"lr": 1e-2, "config": config, "weight_decay": 0.0}
    ours, got = trained("ours", plain, [GritCallback(), probe], optimizer_cls_and_kwargs=(GritFactory, options))
    theirs, wanted = trained("theirs", grit_trainer_class(plain), [], grit_config=config)
    assert isinstance(ours.optimizer.optimizer, GritOptimizer) and hooks_on(ours.model) == 0
    assert ours.optimizer.optimizer.manager.applied_steps == 8 == theirs.grit_manager.applied_steps
    assert got[0].keys() == wanted[0].keys()
    for step, (one, other) in enumerate(zip(got, wanted, strict=True)):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6, msg=f"{step} {name}")
    assert judge(probe.probe).verdict == "effective"


def test_an_optimizer_with_grit_is_neither_wrapped_again_nor_made_where_it_has_no_effect(tmp_path, monkeypatch):
    model, adam = tiny_model(), torch.optim.AdamW
    optimizer = create_grit_optimizer(model, adam, lr=1e-3, weight_decay=0.1, config=settings(mode="adamw"))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] and optimizer.manager.capture is not None
    with pytest.raises(ValueError, match="got a GritOptimizer"):
        GritOptimizer(optimizer, optimizer.manager)
    sgd = create_grit_optimizer(tiny_model(), torch.optim.SGD, lr=1e-3, config=settings(mode="sgd"))
    assert sgd.param_groups[0]["momentum"] == settings().sgd_momentum
    other, ready = GritCallback(GRITManager(model, settings())), type("Prepared", (), {"optimizer": optimizer})
    for callback, wrong, said in ((other, ready, "own manager"), (GritCallback(), adam(trainable(model)), "none")):
        with pytest.raises(GRITError, match=said):
            callback.on_train_begin(arguments(tmp_path), None, None, optimizer=wrong)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(GRITError, match="without FSDP"):
        GritFactory()(model, lr=1e-3)


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


@pytest.mark.parametrize(("accumulation", "capture"), [(1, "hooks"), (4, "hooks"), (4, "gradients")])
def test_a_trainer_run_equals_a_plain_loop_over_its_batches(accumulation, capture, tmp_path):
    """Statistics, bases and weights after six steps; the loop divides by the tokens of the whole step itself."""
    collator, config = Recorder(), settings(capture=capture)
    model, given = tiny_model(warm=True), {"data_collator": collator}
    changes = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.5}
    trainer = grit_trainer(tmp_path, config, model, tiny_data(128), given, **changes)
    trainer.train()

    twin = tiny_model(warm=True)
    with GRITManager(twin, settings(capture=capture)) as manager:
        inner = torch.optim.AdamW(trainable(twin), lr=1e-2, weight_decay=0.0)
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
    rows = [[token for token in row["input_ids"] if token] for row in tiny_data()]
    data = {"input_ids": rows, "completion_mask": [[0, 0] + [1] * (len(row) - 2) for row in rows]}
    values = {"max_length": None, "completion_only_loss": True, "bf16": False, "gradient_checkpointing": False}
    values |= {"max_steps": 1, "gradient_accumulation_steps": 2}
    trainer = grit_trainer_class(sft_trainer_class())(
        model=tiny_model(warm=True),
        args=arguments(tmp_path, SFTConfig, **values),
        train_dataset=Dataset.from_dict(data),
        processing_class=word_tokenizer(),
        grit_config=settings(),
    )
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask", "labels")} for batch in seen[:2]]
    assert all(0 < (batch["labels"] != -100).sum() < batch["attention_mask"].sum() for batch in batches)
    assert_close_covariances(covariances(trainer.grit_manager), loop_covariances(batches))


def test_a_custom_loss_function_is_normalized_too(tmp_path):
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


# --- Clipping, schedules, inner optimizers


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
    logged = logged_by(trainer, "grad_norm")
    assert logged == pytest.approx(norms, rel=1e-5)  # the raw norm, clipped by nobody before the optimizer
    assert min(logged) > limit > max(natural) if damping == 100.0 else min(natural) > limit
    assert moves == pytest.approx([0.1 * min(norm, limit) for norm in natural], rel=1e-3)


def test_the_trainers_limit_is_for_where_the_config_says_none(tmp_path):
    """And in mode sgd for where no trust region limits the step."""
    for mode, kappa, of_config, expected in (
        *(("adamw", 1e-3, None, 0.3), ("adamw", 1e-3, 0.7, 0.7), ("adamw", 1e-3, 0.0, 0.0)),
        *(("sgd", 1e-3, None, 0.0), ("sgd", 0.0, None, 0.3), ("sgd", 1e-3, 0.7, 0.7)),
    ):
        config = settings(mode=mode, kl_clip=kappa, max_grad_norm=of_config)
        trainer = grit_trainer(tmp_path, config, max_grad_norm=0.3)
        assert [trainer.create_optimizer().max_grad_norm for _ in range(2)] == [expected] * 2


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw"])
def test_schedules_work_on_both_learning_rates(mode, tmp_path):
    """Adam's first step is as long as the learning rate, B's four times A's."""
    rates, weights = [], [lora_weights(model := tiny_model(warm=True))]
    config = settings(mode=mode, lr_ratio_b=4.0, ng_warmup_steps=1000)
    changes = {"lr_scheduler_type": "linear", "warmup_steps": 2, "max_grad_norm": 0.0}
    trainer = grit_trainer(tmp_path, config, model, **changes)

    def look(optimizer, **_):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
        weights.append(lora_weights(model))

    trainer.add_callback(Watch("on_optimizer_step", look))
    trainer.train()
    expected = [1e-2 * factor for factor in (1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert rates == [[0.0], *(pytest.approx([rate, 4 * rate]) for rate in expected)]
    for name, start in weights[0].items():
        assert torch.equal(weights[1][name], start)  # rate 0
        step = float((weights[2][name] - start).abs().max())
        assert step == pytest.approx(2e-2 if "lora_B" in name else 5e-3, rel=0.5), name


def test_mode_sgd_brings_its_own_optimizer(tmp_path):
    config = settings(mode="sgd", sgd_momentum=0.8)
    changes = {"max_steps": 32, "learning_rate": 0.5, "weight_decay": 0.01, "max_grad_norm": 0.0}
    trainer = grit_trainer(tmp_path, config, data=tiny_data(16), **changes)
    trainer.train()
    inner = trainer.optimizer.optimizer.optimizer
    assert type(inner) is torch.optim.SGD
    assert all(g["momentum"] == 0.8 and g["weight_decay"] == 0.01 for g in inner.param_groups)
    losses = logged_by(trainer)
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.15  # an epoch has four steps
    assert 0 < trainer.grit_manager.metrics()["grit/trust_region_factor"] < 1  # so high a rate is held back


@pytest.mark.parametrize(
    ("name", "mode"), [("adamw_torch_fused", "adamw"), ("adamw_8bit", "adamw"), ("adamw_8bit", "eigen_adamw")]
)
def test_inner_optimizers_agree_with_torchs_adamw(name, mode, tmp_path):
    """Through reprojections, with which their moments go, and shrinking ranks. bitsandbytes keeps tensors below 4096
    numbers in float32, so the result is the same here."""
    changes = {"reprojection": "balanced", "reprojection_freq": 3, "rank_adaptation_threshold": 0.9}
    results = []
    for optim in ("adamw_torch", name):
        given = {"optim": optim, "max_steps": 12, "lr_scheduler_type": "linear"}
        trainer = grit_trainer(tmp_path, settings(mode=mode, **changes), tiny_model(rank=8), **given)
        trainer.train()
        assert len(of_kind(trainer.grit_manager.history, "reprojection")) >= 4
        assert max(pair.rank for pair in trainer.grit_manager.pairs()) < 8
        assert isinstance(trainer.optimizer.optimizer, GritOptimizer)
        results.append(lora_weights(trainer.model))
    inner = type(trainer.optimizer.optimizer.optimizer).__module__
    assert inner.startswith("bitsandbytes" if "8bit" in name else "torch.optim")
    for key, w in results[0].items():
        assert w.isfinite().all() and torch.allclose(results[1][key], w, atol=1e-4), key


def test_moments_in_8_bit_start_anew_at_a_reprojection(tmp_path, caplog):
    import bitsandbytes

    model = tiny_model(rank=8)
    inner = bitsandbytes.optim.AdamW8bit(trainable(model), lr=1e-2, min_8bit_size=1)
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


def test_the_best_checkpoint_comes_back_with_its_statistics(tmp_path):
    """Ranks shrink as if training had ended there."""
    changes = {"reprojection": "balanced", "reprojection_freq": 3, "rank_adaptation_threshold": 0.7}
    short = grit_trainer(tmp_path / "short", settings(**changes), tiny_model(rank=8), max_steps=2)
    saving = {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    saving |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    saving |= {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}  # so that the first is the best
    config, evaluation = settings(**changes), {"eval_dataset": tiny_data(8, seed=9)}
    with pytest.raises(ValueError, match="save_only_model: expected false"):
        grit_trainer(tmp_path, config, of_trainer=evaluation, **saving, save_only_model=True)
    trainer = grit_trainer(tmp_path / "long", config, tiny_model(rank=8), of_trainer=evaluation, **saving)
    trainer.train()
    short.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    history = trainer.grit_manager.history
    assert [r["step"] for r in of_kind(history, "reprojection")][:2] == [3, 6]
    assert {"step": 2, "kind": "best", "trained_to": 6} in history
    assert max(entry["r"] for entry in short.grit_manager.history[-1]["ranks"].values()) < 8
    assert same(lora_weights(trainer.model), lora_weights(short.model))


# --- What is written down


def test_the_trainers_log_gets_grits_numbers(tmp_path):
    logs = []
    watch = Watch("on_log", lambda logs_=logs, **kwargs: logs_.append(dict(kwargs["logs"])))
    trainer = grit_trainer(tmp_path, settings(mode="adamw"), of_trainer={"callbacks": [watch]})
    trainer.train()
    expected = """gradient_norm_raw gradient_norm_natural rank_mean ready_layers skipped_steps damping_share
    effective_rank_a effective_rank_g condition_a condition_g"""
    *steps, at_the_end = logs
    assert {f"grit/{name}" for name in expected.split()} <= steps[-1].keys()
    assert [log["grit/gradient_norm_raw"] for log in steps] == pytest.approx(logged_by(trainer, "grad_norm"), rel=1e-5)
    assert [log["grit/ready_layers"] for log in steps] == [6.0] * 8 and "grit/ready_layers" not in at_the_end
