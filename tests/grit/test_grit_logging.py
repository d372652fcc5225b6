"""What GRIT writes down: grit_log.jsonl, the Trainer's log, TensorBoard."""

import json
import math

import pytest
import torch
from test_grit_trainer import (
    Watch,
    arguments,
    libraries_are_no_garbage,  # noqa: F401
    lora_parameters,
    lora_weights,
    settings,
    sft_trainer,
    tiny_data,
    tiny_model,
)

from grit import GRITManager, GritOptimizer, GritTrainer

SHRINKING = {"reprojection": "balanced", "reprojection_freq": 4, "rank_adaptation_threshold": 0.9}


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def read(folder):
    """Every line, as strict JSON."""
    lines = (folder / "grit_log.jsonl").read_text().splitlines()
    assert lines
    return [json.loads(line, parse_constant=refuse) for line in lines]


def train(folder, rank=8, of_arguments=None, callbacks=(), **changes):
    trainer = GritTrainer(
        model=tiny_model(rank=rank),
        args=arguments(folder, **(of_arguments or {})),
        train_dataset=tiny_data(),
        grit_config=settings(**changes),
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


def of_kind(records, kind):
    return [r for r in records if r["kind"] == kind]


@pytest.mark.parametrize("base", ["trainer", "sft", "manager"])
def test_the_log_is_always_written_to_the_output_folder(base, tmp_path):
    if base == "sft":
        trainer = sft_trainer(settings(), tmp_path)
    elif base == "manager":
        model = tiny_model()
        manager = GRITManager(model, settings())
        trainer = GritTrainer(model=model, args=arguments(tmp_path), train_dataset=tiny_data(), grit_manager=manager)
    else:
        trainer = GritTrainer(
            model=tiny_model(), args=arguments(tmp_path), train_dataset=tiny_data(), grit_config=settings()
        )
    trainer.train()
    assert read(tmp_path) == trainer.grit_manager.history
    assert trainer.grit_manager.log_file == tmp_path / "grit_log.jsonl"


def test_a_manager_with_a_log_of_its_own_keeps_it(tmp_path):
    model = tiny_model()
    manager = GRITManager(model, settings(), log_file=tmp_path / "mine" / "log.jsonl")
    args = arguments(tmp_path / "out")
    GritTrainer(model=model, args=args, train_dataset=tiny_data(), grit_manager=manager).train()
    assert len((tmp_path / "mine" / "log.jsonl").read_text().splitlines()) == len(manager.history)
    assert not (tmp_path / "out" / "grit_log.jsonl").exists()


@pytest.mark.parametrize("mode", ["eigen_adamw", "adamw", "sgd"])
def test_spectra_effective_ranks_and_conditions(mode, tmp_path):
    """Worked out again from the manager's covariances at the very step that the record is of."""
    seen = {}

    def look(state, **_):
        if state.global_step == 7:  # the step that has just been done is number 6, which is recorded
            manager = trainer.grit_manager
            seen.update({p.name: [c[i].double() for c in s.covariances()] for s, i, p in manager.layers()})
            seen["lam"] = {p.name: (float(s["lam_a"][i]), float(s["lam_g"][i])) for s, i, p in manager.layers()}

    trainer = GritTrainer(
        model=tiny_model(rank=4),
        args=arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=tiny_data(),
        grit_config=settings(mode=mode, log_top_eigs=3),
        callbacks=[Watch("on_step_end", look)],
    )
    trainer.train()
    records = read(tmp_path)
    assert [r["step"] for r in of_kind(records, "spectra")] == [0, 2, 4, 6]
    layers = of_kind(records, "spectra")[-1]["layers"]
    assert set(layers) == set(seen) - {"lam"} and len(layers) == 6
    for name, entry in layers.items():
        assert entry["r"] == 4 and entry["samples"] > 100 and entry["ready_a"] is entry["ready_g"] is True
        for side, cov, lam in zip("ag", seen[name], seen["lam"][name], strict=True):
            values = torch.linalg.eigvalsh(cov).flip(0)
            assert entry[f"eigenvalues_{side}"] == pytest.approx(values[:3].tolist(), rel=1e-4)
            share = values / values.sum()
            entropy = -(share * share.log()).sum()
            assert entry[f"effective_rank_{side}"] == pytest.approx(float(entropy.exp()), rel=1e-4)
            assert entry[f"condition_{side}"] == pytest.approx(float(values[0] / values[-1]), rel=1e-2)
            if mode == "eigen_adamw":
                assert f"damping_share_{side}" not in entry  # damping plays no part there
            else:
                expected = lam / (float(cov.trace()) / 4)
                assert entry[f"damping_share_{side}"] == pytest.approx(expected, rel=1e-4) and expected > 0
    first = of_kind(records, "spectra")[0]["layers"]  # B is zero then: nothing is known of gradients at A
    assert all("eigenvalues_g" not in e and not e["ready_g"] and "eigenvalues_a" in e for e in first.values())


@pytest.mark.parametrize("mode", ["adamw", "sgd", "eigen_adamw"])
def test_norms_of_raw_and_natural_gradients(mode, tmp_path):
    raw, natural = [], []

    def before(model, **_):
        raw.append(float(torch.nn.utils.get_total_norm([p.grad for p in lora_parameters(model)])))

    trainer = GritTrainer(
        model=tiny_model(),
        args=arguments(tmp_path, max_grad_norm=0.0),
        train_dataset=tiny_data(),
        grit_config=settings(mode=mode, grafting=False, kl_clip=0.0),
        callbacks=[Watch("on_pre_optimizer_step", before)],
    )
    inner = trainer.create_optimizer().optimizer
    step = inner.step

    def recording():
        gradients = [p.grad for group in inner.param_groups for p in group["params"]]
        natural.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step()

    inner.step = recording
    trainer.train()
    effects = of_kind(read(tmp_path), "effect")
    assert [r["gradient_norm_raw"] for r in effects] == pytest.approx(raw[::2], rel=1e-5)
    if mode == "eigen_adamw":  # no natural gradient is formed; a rotation leaves the norm as it is
        assert all("gradient_norm_natural" not in r for r in effects) and natural == []
    else:
        assert [r["gradient_norm_natural"] for r in effects] == pytest.approx(natural[::2], rel=1e-5)
        assert all(n > 2 * r for n, r in zip(natural, raw, strict=True))
        assert all(0 < r["cosine_median"] < 1 - 1e-3 and r["damping_share"] > 0 for r in effects)


def test_reprojection_events_tell_the_change_of_delta_w(tmp_path):
    """Measured again from the weights right before and after the reprojection of step 4."""
    model, products = tiny_model(rank=8), {}
    manager = GRITManager(model, settings(rank_shrink="events", **SHRINKING), log_file=tmp_path / "grit_log.jsonl")
    optimizer = GritOptimizer(torch.optim.AdamW(lora_parameters(model), lr=1e-2), manager)
    rows = tiny_data()

    def measure():
        return {p.name: (p.b.double() @ p.a.double()).detach() for p in manager.pairs()}

    reproject = manager.neural_reprojection

    def watched(*args, **kwargs):
        products["before"] = measure()
        reproject(*args, **kwargs)
        products["after"] = measure()

    manager.neural_reprojection = watched
    for i in range(0, 16, 4):
        model(**{k: torch.tensor([row[k] for row in rows[i : i + 4]]) for k in rows[0]}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (event,) = of_kind(read(tmp_path), "reprojection")
    assert event["step"] == 4 and event["mode"] == "balanced" and event["shrink"] is True
    assert set(event["layers"]) == set(manager.base_rank)
    ranks = {pair.name: pair.rank for pair in manager.pairs()}
    for name, said in event["layers"].items():
        before, after = products["before"][name], products["after"][name]
        change = float((after - before).norm() / before.norm())
        assert said["relative_change"] == pytest.approx(change, rel=1e-3) and change > 1e-3
        assert said["k_a"] == said["k_b"] == ranks[name] < 8


@pytest.mark.parametrize("shrink", ["end", "events", "never"])
def test_the_last_record_has_ranks_and_capture(shrink, tmp_path):
    trainer = train(tmp_path, rank_shrink=shrink, max_grad_norm=0.0, **SHRINKING)
    records, manager = read(tmp_path), trainer.grit_manager
    final = records[-1]
    assert [r["kind"] for r in records].count("final") == 1 and final["kind"] == "final" and final["step"] == 8
    assert final["capture"] == dict.fromkeys(manager.base_rank, "hooks")
    assert set(final["ranks"]) == set(final["spectra"]) == set(manager.base_rank)
    for pair in manager.pairs():
        entry = final["ranks"][pair.name]
        assert entry["base_r"] == 8 and entry["r"] == pair.rank == pair.a.shape[0] == pair.b.shape[1]
        assert 2 <= entry["final_k_a"] == entry["final_k_b"] < 8
        if shrink == "never":
            assert entry["r"] == 8
        else:  # what was just cut to size is the size
            assert entry["r"] == entry["final_k_a"]
    events = of_kind(records, "reprojection")
    assert [e["step"] for e in events] == ([4, 8] if shrink == "never" else [4, 8, 8])
    assert final["skipped_steps"] == 0 and final["failed_inversions"] == 0
    assert final["inversions"] == manager.inversions >= 4
    assert final["effect"]["effective"] is True and "factors" not in final


def test_layers_that_fall_back_to_gradients_are_named(tmp_path):
    """A kernel that multiplies with the weight itself: the module is never called."""
    model = tiny_model()
    silent = model.base_model.model.model.layers[0].self_attn.q_proj
    weight_a, weight_b = (module["default"] for module in (silent.lora_A, silent.lora_B))
    silent.forward = lambda x: silent.base_layer(x) + 2.0 * (x @ weight_a.weight.T @ weight_b.weight.T)
    trainer = GritTrainer(
        model=model, args=arguments(tmp_path), train_dataset=tiny_data(), grit_config=settings(capture="auto")
    )
    trainer.train()
    records, name = read(tmp_path), "base_model.model.model.layers.0.self_attn.q_proj"
    (said,) = of_kind(records, "capture")
    assert said["gradients"] == [name] and said["step"] == 0
    kinds = records[-1]["capture"]
    assert kinds.pop(name) == "gradients" and set(kinds.values()) == {"hooks"} and len(kinds) == 5


def test_heat_maps_put_factors_into_the_last_record(tmp_path):
    trainer = train(tmp_path / "first", log_eig_heatmaps=True)
    final = read(tmp_path / "first")[-1]
    assert all("factors" not in r for r in read(tmp_path / "first")[:-1])
    layers = list(trainer.grit_manager.layers())
    assert list(final["factors"]) == [pair.name for _, _, pair in layers[:4]]
    for state, i, pair in layers[:4]:
        cov_a, cov_g = (c[i] for c in state.covariances())
        assert torch.equal(torch.tensor(final["factors"][pair.name]["cov_a"]), cov_a)
        assert torch.equal(torch.tensor(final["factors"][pair.name]["cov_g"]), cov_g)
        assert cov_a.shape == (8, 8) and cov_g.norm() > 0
    train(tmp_path / "chosen", log_eig_heatmaps=True, log_eig_heatmaps_modules=["1.mlp.down_proj", "v_proj"])
    chosen = read(tmp_path / "chosen")[-1]["factors"]
    assert sorted(name.split("layers.")[1] for name in chosen) == [
        "0.self_attn.v_proj",
        "1.mlp.down_proj",
        "1.self_attn.v_proj",
    ]


def test_switches_and_frequency_of_records(tmp_path):
    train(tmp_path, log_fisher_spectrum=False, log_freq=3, log_top_eigs=2)
    records = read(tmp_path)
    assert of_kind(records, "spectra") == [] and [r["step"] for r in of_kind(records, "effect")] == [0, 3, 6]
    assert all(len(entry["eigenvalues_a"]) == 2 for entry in records[-1]["spectra"].values())


def test_no_record_appears_twice_after_a_resume(tmp_path):
    """Killed after step 7, resumed from step 4: the records of steps 4 to 6 were there already."""
    changes = {"save_strategy": "steps", "save_steps": 4, "max_steps": 10}

    def stop(state, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, of_arguments=changes, callbacks=[Watch("on_step_end", stop)], log_freq=1, **SHRINKING)
    assert {r["step"] for r in read(tmp_path)} == {0, 1, 2, 3, 4, 5, 6}
    trainer = GritTrainer(
        model=tiny_model(rank=8),
        args=arguments(tmp_path, **changes),
        train_dataset=tiny_data(),
        grit_config=settings(log_freq=1, **SHRINKING),
    )
    trainer.train(resume_from_checkpoint=True)
    records = read(tmp_path)
    keys = [(r["step"], r["kind"]) for r in records if r["kind"] != "reprojection"]
    assert len(keys) == len(set(keys)) and records == trainer.grit_manager.history
    assert [r["step"] for r in of_kind(records, "effect")] == list(range(10))
    assert [r["step"] for r in of_kind(records, "reprojection")] == [4, 8, 10]
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


def test_a_new_run_into_an_old_folder_starts_a_new_log(tmp_path):
    train(tmp_path)
    first = read(tmp_path)
    train(tmp_path)
    assert read(tmp_path) == first


def test_skipped_steps_and_infinities_are_json(tmp_path):
    def spoil(state, model, **_):
        if state.global_step == 3:
            lora_parameters(model)[0].grad.fill_(math.inf)
        if state.global_step == 4:
            lora_parameters(model)[1].grad[0, 0] = math.nan

    spoiler = Watch("on_pre_optimizer_step", spoil)
    before = {}
    keep = Watch("on_step_begin", lambda state, model, **_: before.update({state.global_step: lora_weights(model)}))
    # Without max_grad_norm the Trainer takes no norm before the callback spoils it.
    trainer = train(tmp_path, of_arguments={"max_grad_norm": 0.0}, callbacks=[spoiler, keep])
    skipped = of_kind(read(tmp_path), "skipped")
    assert [(r["step"], r["gradient_norm"]) for r in skipped] == [(3, "inf"), (4, "nan")]
    assert skipped == of_kind(trainer.grit_manager.history, "skipped")
    assert all(torch.equal(before[3][n], w) and torch.equal(before[5][n], w) for n, w in before[4].items())
    assert any(not torch.equal(before[6][n], w) for n, w in before[5].items())
    assert read(tmp_path)[-1]["skipped_steps"] == 2 and trainer.grit_manager.step == 8


def test_the_trainers_reports_get_grits_numbers(tmp_path):
    """Whoever listens to the Trainer's log, read back from TensorBoard's own file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = []
    watch = Watch("on_log", lambda state, logs_=logs, **kwargs: logs_.append((state.global_step, dict(kwargs["logs"]))))
    trainer = train(
        tmp_path, of_arguments={"report_to": ["tensorboard"], "eval_strategy": "no"}, callbacks=[watch], mode="adamw"
    )
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    tags = {tag.removeprefix("train/") for tag in events.Tags()["scalars"]}
    expected = {
        "grit/gradient_norm_raw",
        "grit/gradient_norm_natural",
        "grit/rank_mean",
        "grit/ready_layers",
        "grit/skipped_steps",
        "grit/damping_share",
        "grit/effective_rank_a",
        "grit/effective_rank_g",
        "grit/condition_a",
        "grit/condition_g",
        "grit/cosine_raw_natural",
    }
    assert expected <= tags and "loss" in tags
    for name in ("grit/gradient_norm_raw", "grit/effective_rank_a", "grit/ready_layers"):
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == list(range(1, 9))
        assert [s.value for s in scalars] == pytest.approx([log[name] for _, log in logs if "loss" in log], rel=1e-6)
    raw = [s.value for s in events.Scalars("train/grit/gradient_norm_raw")]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert raw == pytest.approx(norms, rel=1e-5)
    assert {s.value for s in events.Scalars("train/grit/ready_layers")} == {6.0}
