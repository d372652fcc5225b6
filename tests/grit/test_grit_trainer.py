"""GRIT in a plain loop, in transformers' Trainer and in TRL's SFTTrainer: it reaches the weights, and rightly so."""

import functools
import gc
import inspect
import random
from types import SimpleNamespace

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
from tests.grit.nets import llama_config

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


def settings(**changes):
    """Statistics at every step, no reprojection unless it is asked for."""
    values = {
        "grit_cov_update_freq": 1,
        "kfac_update_freq": 2,
        "kfac_min_samples": 16,
        "reprojection": "none",
        "min_lora_rank": 2,
        "log_freq": 2,
    }
    return GRITConfig(**{**values, **changes})


def lora_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def lora_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append({key: torch.tensor([row[key] for row in rows]) for key in rows[0]})
        return dict(self.batches[-1])


class Watch(TrainerCallback):
    """Calls a function at one of the Trainer's events."""

    def __init__(self, event, function):
        def call(args, state, control, **kwargs):
            function(state=state, **kwargs)

        setattr(self, event, call)


# --- Four ways to use it. Each trains a model with `config`, or with the optimizer alone where it is None.


def plain_loop(model, config, batches):
    weights = [p for p in model.parameters() if p.requires_grad]
    with GRITManager(model, config) as manager:
        optimizer = GritOptimizer(torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0), manager)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return manager


def by_plain_loop(config, folder):
    model = tiny_model()
    rows = tiny_data()
    batches = [{k: torch.tensor([row[k] for row in rows[i : i + 4]]) for k in rows[0]} for i in range(0, 32, 4)]
    if config is not None:
        manager = plain_loop(model, config, batches)
        manager.finish()
        return model, manager
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.0)
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, None


def by_grit_trainer(config, folder, **changes):
    cls, given = (GritTrainer, {"grit_config": config}) if config is not None else (Trainer, {})
    args = arguments(folder, **{"max_grad_norm": 0.0, **changes})
    trainer = cls(model=tiny_model(), args=args, train_dataset=tiny_data(), **given)
    trainer.train()
    return trainer.model, getattr(trainer, "grit_manager", None)


def by_callback(config, folder):
    model, manager, callbacks = tiny_model(), None, []
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.0)
    if config is not None:
        manager = GRITManager(model, config)
        optimizer, callbacks = GritOptimizer(optimizer, manager), [GritCallback(manager)]
    args = arguments(folder, max_grad_norm=0.0)
    Trainer(
        model=model, args=args, train_dataset=tiny_data(), optimizers=(optimizer, None), callbacks=callbacks
    ).train()
    return model, manager


def sft_trainer(config, folder, model=None, **changes):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    from trainers.common import sft_trainer_class

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w63")), pad_token="w0", eos_token="w62"
    )
    lengths = [sum(row["attention_mask"]) for row in tiny_data()]
    data = Dataset.from_dict(
        {
            "input_ids": [row["input_ids"][:n] for row, n in zip(tiny_data(), lengths, strict=True)],
            "completion_mask": [[0, 0] + [1] * (n - 2) for n in lengths],
        }
    )
    values = {"max_length": None, "completion_only_loss": True, "max_grad_norm": 0.0, "bf16": False, **changes}
    values.setdefault("gradient_checkpointing", False)
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
    """The weights that AdamW alone arrives at."""
    return lora_weights(WAYS[way](None, folder)[0])


WAYS = {f.__name__: f for f in (by_plain_loop, by_grit_trainer, by_callback, by_sft_trainer)}


def test_the_plain_loop_has_under_ten_lines():
    assert len(inspect.getsource(plain_loop).splitlines()) - 1 < 10


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
    assert all(bool(state["ready_a"].all() & state["ready_g"].all()) for state in manager.states)
    assert set(manager.capture_kinds().values()) == {"hooks"} and not manager.unreported()
    effects = [r for r in manager.history if r["kind"] == "effect"]
    assert [r["step"] for r in effects] == [0, 2, 4, 6]
    assert all(r["effective"] for r in effects) and effects[-1]["ready_layers"] == 6
    assert manager.history[-1]["effect"]["effective"]
    assert not any(r["effective"] for r in waiting.history if r["kind"] == "effect")
    assert "warm-up" in waiting.history[-1]["effect"]["reason"]


# --- What the Trainer mixin does on its own


def test_it_registers_itself_and_its_hooks_come_off(tmp_path):
    model, seen = tiny_model(), []
    watch = Watch("on_step_end", lambda model, **_: seen.append(hooks_on(model)))
    args = arguments(tmp_path)
    trainer = GritTrainer(model=model, args=args, train_dataset=tiny_data(), grit_config=settings(), callbacks=[watch])
    registered = [c for c in trainer.callback_handler.callbacks if isinstance(c, GritCallback)]
    assert len(registered) == 1 and registered[0].manager is trainer.grit_manager
    trainer.train()
    assert seen == [7] * 8  # one a layer, and one on the model for its batches
    assert hooks_on(model) == 0 and trainer.grit_manager.capture is None


def test_a_callback_that_is_passed_as_well_changes_nothing(tmp_path):
    model = tiny_model()
    manager = GRITManager(model, settings())
    callbacks = [GritCallback(manager)]
    args = arguments(tmp_path)
    trainer = GritTrainer(model=model, args=args, train_dataset=tiny_data(), grit_manager=manager, callbacks=callbacks)
    trainer.train()
    assert [r["kind"] for r in manager.history].count("final") == 1


@pytest.mark.parametrize("base", ["trainer", "sft"])
def test_hooks_come_off_when_training_raises(base, tmp_path):
    def fail(state, **_):
        if state.global_step == 3:
            raise ZeroDivisionError("from a callback")

    if base == "sft":
        trainer = sft_trainer(settings(), tmp_path)
    else:
        args = arguments(tmp_path)
        trainer = GritTrainer(model=tiny_model(), args=args, train_dataset=tiny_data(), grit_config=settings())
    trainer.add_callback(Watch("on_step_end", fail))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.grit_manager.step == 3
    assert hooks_on(trainer.model) == 0 and trainer.grit_manager.capture is None


def test_the_callback_only_rings():
    """Every event is handed on as it is: a manager of stone shows all that the callback does."""
    rung = []

    class Stone:
        def __getattr__(self, name):
            return lambda *args, **kwargs: rung.append((name, args)) or {"grit/x": 1.0, "loss": 9.0}

    callback, optimizer = GritCallback(Stone()), object()
    own = [n for n, f in vars(GritCallback).items() if n.startswith("on_") and callable(f)]
    assert sorted(own) == ["on_log", "on_train_begin", "on_train_end"]
    callback.on_train_begin(None, None, None)
    assert rung == [("open", ())]
    logs, evaluation = {"loss": 2.0}, {"eval_loss": 2.0}
    callback.on_log(None, None, None, logs=logs)
    callback.on_log(None, None, None, logs=evaluation)
    assert logs == {"loss": 2.0, "grit/x": 1.0} and evaluation == {"eval_loss": 2.0}
    rung.clear()
    callback.on_train_end(None, None, None, optimizer=optimizer)
    assert rung == [("finish", (optimizer,)), ("close", ())]


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
    assert (
        GritTrainer(model=model, args=args, optimizers=(optimizer, None), grit_manager=manager).grit_manager is manager
    )


@pytest.mark.parametrize("shrink", ["never", "end"])
@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw", "sgd"])
def test_training_goes_on_when_train_is_called_again(mode, shrink, tmp_path):
    """No second wrapper around the first one; weights that shrank are the ones that are trained."""
    changes = {"reprojection": "none"}
    if shrink == "end":
        changes = {"reprojection": "balanced", "rank_shrink": "end", "rank_adaptation_threshold": 0.8}
    model = tiny_model(rank=8)
    config = settings(mode=mode, lr_ratio_b=2.0, **changes)
    args = arguments(tmp_path, max_grad_norm=0.0)
    trainer = GritTrainer(model=model, args=args, train_dataset=tiny_data(), grit_config=config)
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


def covariances(manager):
    """Layer → (Σ_a, Σ_g, tokens counted)."""
    return {
        pair.name: (*(c[i] for c in state.covariances()), float(state["samples"][i]))
        for state, i, pair in manager.layers()
    }


def token_covariances(model, batches):
    """Σ_a and Σ_g from their definition: h and ∂(sum of the token losses)/∂h of every token that is not padding."""
    found = {}

    def watch(name):
        def hook(module, args, h):
            h.retain_grad()
            found.setdefault(name, []).append(h)

        return hook

    handles = [
        module.register_forward_hook(watch(name.removesuffix(".lora_A.default")))
        for name, module in model.named_modules()
        if name.endswith("lora_A.default")
    ]
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]
        torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, VOCABULARY), targets.reshape(-1), ignore_index=-100, reduction="sum"
        ).backward()
    for handle in handles:
        handle.remove()
    keep = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    result = {}
    for name, outputs in found.items():
        h = torch.cat([o.detach() for o in outputs])[keep].double()
        delta = torch.cat([o.grad for o in outputs])[keep].double()
        result[name] = (h.T @ h / len(h), delta.T @ delta / len(h), float(len(h)))
    return result


def assert_close_covariances(found, expected, relative=1e-4):
    assert found.keys() == expected.keys()
    for name in found:
        for side in (0, 1):
            got, want = found[name][side].double(), expected[name][side].double()
            assert want.norm() > 0
            assert (got - want).norm() < relative * want.norm(), (name, side)
        assert found[name][2] == expected[name][2], name


def one_step_by_callback(model, args, collator):
    manager = GRITManager(model, settings())
    optimizer = GritOptimizer(torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.0), manager)
    Trainer(
        model=model,
        args=args,
        train_dataset=tiny_data(),
        data_collator=collator,
        optimizers=(optimizer, None),
        callbacks=[GritCallback(manager)],
    ).train()
    return manager


def one_step_by_grit_trainer(model, args, collator):
    trainer = GritTrainer(
        model=model, args=args, train_dataset=tiny_data(), data_collator=collator, grit_config=settings()
    )
    trainer.train()
    return trainer.grit_manager


@pytest.mark.parametrize("one_step", [one_step_by_grit_trainer, one_step_by_callback])
def test_accumulation_4_of_batch_4_counts_as_batch_16(one_step, tmp_path):
    """Both equal the definition, over batches whose numbers of loss tokens differ."""
    found, seen = {}, {}
    for accumulation in (1, 4):
        collator = Recorder()
        args = arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        found[accumulation] = covariances(one_step(tiny_model(warm=True), args, collator))
        seen[accumulation] = collator.batches[:accumulation]
    assert torch.equal(seen[1][0]["input_ids"], torch.cat([batch["input_ids"] for batch in seen[4]]))
    assert len({int((batch["labels"] != -100).sum()) for batch in seen[4]}) > 1
    truth = token_covariances(tiny_model(warm=True), seen[4])
    assert_close_covariances(found[1], truth)
    assert_close_covariances(found[4], truth)


@pytest.mark.parametrize("capture", ["hooks", "gradients"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_trainer_run_equals_a_plain_loop_over_its_batches(accumulation, capture, tmp_path):
    """Statistics, bases and weights after six steps; the loop divides by the tokens of the whole step itself."""
    collator, config = Recorder(), settings(capture=capture)
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=accumulation, max_grad_norm=0.5)
    model = tiny_model(warm=True)
    trainer = GritTrainer(
        model=model, args=args, train_dataset=tiny_data(128), data_collator=collator, grit_config=config
    )
    trainer.train()

    twin = tiny_model(warm=True)
    with GRITManager(twin, settings(capture=capture)) as manager:
        inner = torch.optim.AdamW(lora_parameters(twin), lr=1e-2, weight_decay=0.0)
        optimizer = GritOptimizer(inner, manager, max_grad_norm=0.5)
        for step in range(6):
            batches = collator.batches[step * accumulation : (step + 1) * accumulation]
            items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
            for batch in batches:
                twin(**batch, num_items_in_batch=items).loss.backward()
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
    batches = [{k: v.clone() for k, v in batch.items()} for batch in seen[:2]]
    width = max(batch["input_ids"].shape[1] for batch in batches)
    for batch in batches:  # to one width, so that they can be put together
        for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[key] = torch.nn.functional.pad(batch[key], (0, width - batch[key].shape[1]), value=fill)
    labels = torch.cat([batch["labels"] for batch in batches])
    mask = torch.cat([batch["attention_mask"] for batch in batches])
    assert 0 < (labels != -100).sum() < mask.sum()
    assert_close_covariances(covariances(trainer.grit_manager), token_covariances(tiny_model(warm=True), batches))


def test_evaluation_between_steps_leaves_no_trace(tmp_path):
    quiet, noisy = ({}, {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8})
    results = []
    for changes in (quiet, noisy):
        trainer = GritTrainer(
            model=tiny_model(),
            args=arguments(tmp_path, **changes),
            train_dataset=tiny_data(),
            eval_dataset=tiny_data(8, seed=9),
            grit_config=settings(),
        )
        trainer.train()
        results.append((lora_weights(trainer.model), covariances(trainer.grit_manager)))
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == 8
    for name, w in results[0][0].items():
        assert torch.equal(w, results[1][0][name])
    for name, (cov_a, cov_g, tokens) in results[0][1].items():
        other = results[1][1][name]
        assert torch.equal(cov_a, other[0]) and torch.equal(cov_g, other[1]) and tokens == other[2]


# --- Clipping


class Gradients(TrainerCallback):
    """Gradients as the optimizer gets them, and the weights' changes, step by step."""

    def __init__(self):
        self.norms, self.changes, self.before = [], [], None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        self.before = [p.detach().clone() for p in lora_parameters(model)]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        change = [p.detach() - b for p, b in zip(lora_parameters(model), self.before, strict=True)]
        self.changes.append(float(torch.nn.utils.get_total_norm(change)))


@pytest.mark.parametrize(("damping", "limit"), [(100.0, 0.05), (1e-3, 0.2)], ids=["shorter", "longer"])
def test_clipping_comes_once_and_after_preconditioning(damping, limit, tmp_path):
    """Mode sgd without momentum or trust region moves by lr times the clipped natural gradient, no more, no less.

    Shorter: damping of 100 makes natural gradients a hundred times shorter than the raw ones. Those are above the
    limit, the natural ones are not, so nothing may be clipped. Longer: it is the other way round.
    """
    config = settings(
        mode="sgd", sgd_momentum=0.0, kl_clip=0.0, damping_mode="absolute", kfac_damping=damping, log_freq=1
    )
    watch = Gradients()
    trainer = GritTrainer(
        model=tiny_model(warm=True),
        args=arguments(tmp_path, max_grad_norm=limit, learning_rate=0.1),
        train_dataset=tiny_data(),
        grit_config=config,
        callbacks=[watch],
    )
    natural = []
    trainer.add_callback(
        Watch(
            "on_optimizer_step",
            lambda **_: natural.append(trainer.grit_manager.metrics()["grit/gradient_norm_natural"]),
        )
    )
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(watch.norms, rel=1e-5)  # the raw norm, clipped by nobody before the optimizer
    if damping == 100.0:
        assert min(logged) > limit > max(natural)
    else:
        assert min(natural) > limit
    expected = [0.1 * min(norm, limit) for norm in natural]
    assert watch.changes == pytest.approx(expected, rel=1e-3)


def test_adamw_gets_the_clipped_natural_gradient(tmp_path, monkeypatch):
    """What reaches the inner optimizer has the norm of max_grad_norm; without a limit it has its own."""
    for limit, of_config in ((0.05, None), (0.0, None), (1e9, 0.05), (0.05, 0.0)):
        trainer = GritTrainer(
            model=tiny_model(warm=True),
            args=arguments(tmp_path, max_grad_norm=limit, max_steps=3),
            train_dataset=tiny_data(),
            grit_config=settings(mode="adamw", max_grad_norm=of_config),
        )
        norms, watch = [], Gradients()
        trainer.add_callback(watch)
        inner = trainer.create_optimizer().optimizer

        def recording(inner=inner, norms=norms, step=inner.step):
            gradients = [p.grad for group in inner.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            return step()

        monkeypatch.setattr(inner, "step", recording)
        trainer.train()
        assert len(norms) == 3 and min(watch.norms) > 0.1
        bound = limit if of_config is None else of_config
        expected = [0.05] * 3 if bound == 0.05 else watch.norms  # grafting keeps each tensor's norm
        assert norms == pytest.approx(expected, rel=1e-3)


def test_a_grit_optimizer_that_is_passed_gets_the_trainers_limit(tmp_path):
    for own, expected in ((None, 0.3), (0.7, 0.7)):
        model = tiny_model()
        manager = GRITManager(model, settings())
        optimizer = GritOptimizer(torch.optim.AdamW(lora_parameters(model)), manager, max_grad_norm=own)
        trainer = GritTrainer(
            model=model,
            args=arguments(tmp_path, max_grad_norm=0.3),
            optimizers=(optimizer, None),
            grit_manager=manager,
        )
        assert trainer.create_optimizer() is optimizer and optimizer.max_grad_norm == expected


@pytest.mark.parametrize(("kappa", "of_config", "expected"), [(1e-3, None, 0.0), (0.0, None, 0.3), (1e-3, 0.7, 0.7)])
def test_mode_sgd_is_clipped_only_where_no_trust_region_limits_it(kappa, of_config, expected, tmp_path):
    """At the second train() as at the first."""
    trainer = GritTrainer(
        model=tiny_model(),
        args=arguments(tmp_path, max_grad_norm=0.3, max_steps=1),
        train_dataset=tiny_data(),
        grit_config=settings(mode="sgd", kl_clip=kappa, max_grad_norm=of_config),
    )
    for _ in range(2):
        trainer.train()
        assert trainer.optimizer.optimizer.max_grad_norm == expected


# --- Precision, checkpointing, schedules, inner optimizers


def test_bf16_autocast(tmp_path):
    """Same statistics up to bf16's three digits, kept in float32."""
    found = {}
    for bf16 in (False, True):
        trainer = GritTrainer(
            model=tiny_model(warm=True),
            args=arguments(tmp_path, bf16=bf16, max_steps=2, learning_rate=1e-4),
            train_dataset=tiny_data(),
            grit_config=settings(),
        )
        types = []
        handle = trainer.grit_manager.pairs()[0].module_a.register_forward_hook(
            lambda module, args, h, types=types: types.append(h.dtype)
        )
        trainer.train()
        handle.remove()
        assert set(types) == {torch.bfloat16 if bf16 else torch.float32}
        assert trainer.grit_manager.history[-1]["effect"]["effective"]
        assert all(w.dtype == torch.float32 and w.isfinite().all() for w in lora_weights(trainer.model).values())
        found[bf16] = covariances(trainer.grit_manager)
        assert all(cov.dtype == torch.float32 for entry in found[bf16].values() for cov in entry[:2])
    assert_close_covariances(found[True], found[False], 0.05)


@pytest.mark.parametrize(("mode", "reentrant"), [("eigen_adamw", False), ("eigen_adamw", True), ("adamw", False)])
def test_gradient_checkpointing_changes_nothing(mode, reentrant, tmp_path):
    results, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(warm=True)
        model.enable_input_require_grads()  # reentrant checkpointing needs it
        trainer = GritTrainer(
            model=model,
            args=arguments(
                tmp_path,
                gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
            ),
            train_dataset=tiny_data(),
            grit_config=settings(mode=mode),
        )
        calls.append(0)
        trainer.grit_manager.pairs()[0].module_a.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        trainer.train()
        results.append((lora_weights(model), covariances(trainer.grit_manager)))
    assert calls == [8, 16]  # the forward pass does run twice
    for name, w in results[0][0].items():
        assert torch.allclose(results[1][0][name], w, atol=1e-5), name
    assert_close_covariances(results[1][1], results[0][1], 1e-3)


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw", "sgd"])
def test_schedules_work_on_both_learning_rates(mode, tmp_path):
    rates, steps = [], []
    model = tiny_model(warm=True)
    trainer = GritTrainer(
        model=model,
        args=arguments(tmp_path, lr_scheduler_type="linear", warmup_steps=2, max_grad_norm=0.0),
        train_dataset=tiny_data(),
        grit_config=settings(mode=mode, lr_ratio_b=4.0, ng_warmup_steps=1000, kl_clip=0.0),
    )

    def look(optimizer, model, **_):
        by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        names = dict(model.named_parameters())
        rates.append([{by_id[id(p)] for n, p in names.items() if part in n} for part in ("lora_A", "lora_B")])

    before = {}
    trainer.add_callback(Watch("on_pre_optimizer_step", look))
    trainer.add_callback(Watch("on_pre_optimizer_step", lambda model, **_: before.update(lora_weights(model))))
    trainer.add_callback(
        Watch(
            "on_optimizer_step",
            lambda model, **_: steps.append({n: (w - before[n]).abs().max() for n, w in lora_weights(model).items()}),
        )
    )
    trainer.train()
    expected = [1e-2 * factor for factor in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert all(len(a) == len(b) == 1 for a, b in rates)
    assert [a.pop() for a, _ in rates] == pytest.approx(expected)
    assert [b.pop() for _, b in rates] == pytest.approx([4 * rate for rate in expected])
    assert all(float(s) == 0 for s in steps[0].values())  # rate 0
    if mode != "sgd":  # Adam moves its most active coordinates by about the learning rate
        for name, size in steps[1].items():
            assert float(size) == pytest.approx(2e-2 if "lora_B" in name else 5e-3, rel=0.5), name


def test_mode_sgd_brings_its_own_optimizer(tmp_path):
    trainer = GritTrainer(
        model=tiny_model(),
        args=arguments(tmp_path, max_steps=32, learning_rate=0.5, weight_decay=0.01, max_grad_norm=0.0),
        train_dataset=tiny_data(16),
        grit_config=settings(mode="sgd", sgd_momentum=0.8),
    )
    trainer.train()
    inner = trainer.optimizer.optimizer.optimizer
    assert type(inner) is torch.optim.SGD
    assert all(g["momentum"] == 0.8 and g["weight_decay"] == 0.01 for g in inner.param_groups)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.15  # an epoch has four steps
    assert 0 < trainer.grit_manager.metrics()["grit/trust_region_factor"] < 1  # so high a rate is held back
    with pytest.raises(ValueError, match="mode 'sgd': expected torch.optim.SGD, got AdamW"):
        model = tiny_model()
        GritTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=tiny_data(),
            optimizers=(torch.optim.AdamW(lora_parameters(model)), None),
            grit_config=settings(mode="sgd"),
        ).train()


@pytest.mark.parametrize(
    ("name", "mode"), [("adamw_torch_fused", "adamw"), ("adamw_8bit", "adamw"), ("adamw_8bit", "eigen_adamw")]
)
def test_inner_optimizers_agree_with_torchs_adamw(name, mode, tmp_path):
    """Reprojections with shrinking ranks included: their moments have to go along. (bitsandbytes keeps tensors below
    4096 numbers in float32, so the result is the same here.)"""
    changes = {"reprojection": "balanced", "reprojection_freq": 3, "rank_adaptation_threshold": 0.9}
    results = []
    for optim in ("adamw_torch", name):
        model = tiny_model(rank=8)
        trainer = GritTrainer(
            model=model,
            args=arguments(tmp_path, optim=optim, max_steps=12, lr_scheduler_type="linear"),
            train_dataset=tiny_data(),
            grit_config=settings(mode=mode, rank_shrink="events", **changes),
        )
        trainer.train()
        events = [r for r in trainer.grit_manager.history if r["kind"] == "reprojection"]
        assert len(events) >= 4 and max(layer["r"] for layer in events[-1]["layers"].values()) < 8
        results.append(lora_weights(model))
        assert isinstance(trainer.optimizer.optimizer, GritOptimizer)
    if "adamw_torch" not in name:
        assert type(trainer.optimizer.optimizer.optimizer).__module__.startswith("bitsandbytes")
    for key, w in results[0].items():
        assert w.isfinite().all() and torch.allclose(results[1][key], w, atol=1e-4), key


def test_moments_in_8_bit_start_anew_at_a_reprojection(tmp_path, caplog):
    import bitsandbytes

    model = tiny_model(rank=8)
    inner = bitsandbytes.optim.AdamW8bit(lora_parameters(model), lr=1e-2, min_8bit_size=1)
    changes = {"reprojection": "balanced", "reprojection_freq": 4, "rank_adaptation_threshold": 0.9}
    trainer = GritTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=tiny_data(),
        optimizers=(inner, None),
        grit_config=settings(mode="adamw", rank_shrink="events", **changes),
    )
    kinds = []
    trainer.add_callback(
        Watch("on_step_end", lambda **_: kinds.append({str(s["state1"].dtype) for s in inner.state.values() if s}))
    )
    trainer.train()
    assert kinds[2] == {"torch.uint8"} and kinds[3] == set() and kinds[4] == {"torch.uint8"}
    assert "cannot be transformed; reset" in caplog.text
    assert all(w.isfinite().all() for w in lora_weights(model).values())


def test_the_best_checkpoint_comes_back_with_its_ranks(tmp_path):
    """The best one is from before the first reprojection; ranks shrink afterwards."""
    from safetensors.torch import load_file

    model = tiny_model(rank=8)
    changes = {"reprojection": "balanced", "reprojection_freq": 3, "rank_adaptation_threshold": 0.7}
    trainer = GritTrainer(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the first one wins
        ),
        train_dataset=tiny_data(),
        eval_dataset=tiny_data(8, seed=9),
        grit_config=settings(rank_shrink="events", **changes),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    events = [r for r in trainer.grit_manager.history if r["kind"] == "reprojection"]
    assert max(layer["r"] for layer in events[-1]["layers"].values()) < 8
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    for name, w in lora_weights(model).items():
        assert torch.equal(w, best[name.replace(".default", "")])
    final = trainer.grit_manager.history[-1]
    assert final["kind"] == "final" and {entry["r"] for entry in final["ranks"].values()} == {8}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_adaptive_schedule_sees_one_mean_loss_a_step(accumulation, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(GRITManager, "observe_loss", lambda self, loss: seen.append(loss))
    trainer = GritTrainer(
        model=tiny_model(),
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=4),
        train_dataset=tiny_data(),
        grit_config=settings(adaptive_schedule=True),
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen == pytest.approx(logged, rel=1e-5) and len(seen) == 4


def test_statistics_throttled_in_a_trainer_count_those_steps_alone(tmp_path):
    collator = Recorder()
    args = arguments(tmp_path, max_steps=7, gradient_accumulation_steps=2)
    trainer = GritTrainer(
        model=tiny_model(warm=True),
        args=args,
        train_dataset=tiny_data(),
        data_collator=collator,
        grit_config=settings(grit_cov_update_freq=3),
    )
    trainer.train()
    counted = [collator.batches[2 * step + i] for step in (0, 3, 6) for i in (0, 1)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in counted)
    assert {entry[2] for entry in covariances(trainer.grit_manager).values()} == {float(tokens)}


def test_a_custom_loss_function_is_normalised_too(tmp_path):
    """compute_loss_func takes the labels away from the model; the Trainer's count of items is used."""

    def loss_function(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum")
        return total / num_items_in_batch

    collator = Recorder()
    trainer = GritTrainer(
        model=tiny_model(warm=True),
        args=arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2),
        train_dataset=tiny_data(),
        data_collator=collator,
        compute_loss_func=loss_function,
        grit_config=settings(),
    )
    trainer.train()
    assert_close_covariances(
        covariances(trainer.grit_manager), token_covariances(tiny_model(warm=True), collator.batches[:2])
    )


def test_grit_trainer_classes_are_made_once():
    assert grit_trainer_class(Trainer) is grit_trainer_class(Trainer)
    assert issubclass(grit_trainer_class(), Trainer) and issubclass(GritTrainer, Trainer)
    made = grit_trainer_class(SimpleNamespace)
    assert made.__name__ == "GritSimpleNamespace" and made.__doc__ == "SimpleNamespace with GRIT."


def delta_w(manager):
    return {pair.name: (pair.b @ pair.a).detach() for pair in manager.pairs()}


def test_sgd_momentum_goes_with_the_weights_when_ranks_shrink():
    """Runs from A and B, and from S·A and B·S⁻¹ with any S, stay the same in ΔW through two reprojections.

    Momentum is made of natural gradients, which turn as the weights do; turned as raw gradients do, it goes astray here
    by orders of magnitude.
    """
    rows, ends = tiny_data(128), []
    config = settings(
        mode="sgd",
        kfac_damping=0.0,
        kl_clip=0.0,
        reprojection="balanced",
        reprojection_freq=3,
        rank_shrink="events",
        enable_rank_adaptation=False,
        reprojection_k=4,
    )
    for other_basis in (False, True):
        model = tiny_model(rank=6, warm=True).double()
        generator = torch.Generator().manual_seed(5)
        with GRITManager(model, config) as manager:
            for pair in manager.pairs():
                s = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
                s = s * torch.logspace(-1, 1, 6, dtype=torch.float64)
                if other_basis:
                    pair.a.data, pair.b.data = s @ pair.a.data, pair.b.data @ torch.linalg.inv(s)
            start = delta_w(manager)
            optimizer = GritOptimizer(torch.optim.SGD(lora_parameters(model), lr=1e-3, momentum=0.9), manager)
            for i in range(0, 128, 16):
                batch = {k: torch.tensor([row[k] for row in rows[i : i + 16]]) for k in rows[0]}
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert [r["step"] for r in manager.history if r["kind"] == "reprojection"] == [3, 6]
        assert {pair.rank for pair in manager.pairs()} == {4}
        ends.append(delta_w(manager))
    for name, end in ends[0].items():
        assert torch.linalg.norm(end - start[name]) > 0.01 * torch.linalg.norm(start[name])
        assert torch.linalg.norm(ends[1][name] - end) < 1e-6 * torch.linalg.norm(end)
