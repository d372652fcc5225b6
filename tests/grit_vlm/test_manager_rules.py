"""What a manager and an optimizer take over, refuse, and do not mix up."""

import pytest
import small_vlm
import torch
from peft import LoraConfig, get_peft_model
from small_net import Net, optimizer_of, train
from torch import nn

from grit.layers import GritLayerError
from grit_vlm import GRITLoRAConfig, GRITLoRALinear, GRITTrainer, GRITTrainingArguments, create_grit_optimizer
from grit_vlm.core.capture import Tokens
from grit_vlm.core.manager import FisherManager
from grit_vlm.optimizers.natural_gradient import OptimizerTypeError
from probes.readings import numbers


def test_a_long_pass_is_thinned_out_evenly():
    layer = GRITLoRALinear(nn.Linear(3, 2), GRITLoRAConfig(r=2, buffer_tokens=10))
    count = torch.arange(1000.0)
    tokens = Tokens(*(count[:, None].expand(-1, n) for n in (3, 2, 2, 2)))
    layer.take(tokens)
    kept = layer.activation_buffer[0]
    assert len(kept) == 10 and kept.x[:, 0].tolist() == kept.e[:, 0].tolist()
    assert kept.x[0, 0] == 0 and kept.x[-1, 0] == 999 and (kept.x[1:, 0] - kept.x[:-1, 0] == 111).all()
    assert kept.x.untyped_storage().nbytes() == 10 * 3 * 4  # the other tokens are free
    layer.take(tokens)
    assert len(layer.activation_buffer) == 1


def test_fixed_budgets_are_not_shared_between_modalities():
    """A modality with more budget than directions hands nothing to one whose budget is fixed, or of another kind."""
    for estimates, fixed in ((("diagonal", "diagonal"), True), (("kfac", "diagonal"), False)):
        layers = {
            str(i): GRITLoRALinear(
                nn.Linear(4, 4),
                GRITLoRAConfig(
                    r=2, enable_projection=True, fisher_approximation=estimate, fisher_min_samples=1,
                    projection_budget_start=start, projection_budget_end=start + (not fixed),
                ),
            )
            for i, (estimate, start) in enumerate(zip(estimates, (500, 3), strict=True))
        }  # fmt: skip
        manager = FisherManager(nn.ModuleList(layers.values()), layers, modality={"0": "vision", "1": "text"})
        for layer in layers.values():
            layer.fisher_matrix.observe(*(torch.randn(9, n) for n in (4, 2, 2, 4)))
        assert manager.projections()["text"] == {"1": 3}
        assert manager.projections()["vision"] == {"0": 2 if estimates[0] == "kfac" else 16}


def test_a_second_adapter_on_a_layer_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    layer = GRITLoRALinear(model.base_model.model[0], GRITLoRAConfig(r=2), "a")
    with pytest.raises(GritLayerError, match=r"every trainable LoRA layer among grit_layers, got others: .*\[b\]"):
        FisherManager(model, {"0": layer})


def test_layers_share_one_update_frequency():
    layers = {str(n): GRITLoRALinear(nn.Linear(3, 3), GRITLoRAConfig(r=2, fisher_update_freq=n)) for n in (2, 50)}
    with pytest.raises(GritLayerError, match=r"expected one for all layers, got \[2, 50\]"):
        FisherManager(nn.ModuleList(layers.values()), layers)


def test_a_trust_region_comes_back_after_plain_sgd():
    net = Net()
    optimizer_of(net, "grit_sgd", optimizer=torch.optim.SGD(net.lora, lr=0.1))
    optimizer = optimizer_of(net, "adaptive_adam", lr=50.0)
    assert optimizer.manager.config.kl_clip == 1e-3
    train(net, optimizer, 3)
    assert optimizer.manager.last_metrics["grit/trust_region_factor"] < 1
    with pytest.raises(OptimizerTypeError, match="adaptive_adam expects κ above 0, got 0"):
        optimizer_of(net, "adaptive_adam", kl_clip=0.0)


def test_only_the_eigenbasis_keeps_moments():
    for kind, kept in (("grit_adam", 2), ("grit_adam_preconditioned", 0)):
        net = Net()
        optimizer = optimizer_of(net, kind, lr=0.01)
        train(net, optimizer, 2)
        assert len(optimizer.manager.moments) == kept


def test_moments_follow_an_estimate_that_was_updated_by_hand():
    """Between two updates that are due, by update_mixed_modal_fisher of the document's loop."""
    net = Net(fisher_approximation="kfac", fisher_update_freq=3)
    optimizer = optimizer_of(net, "grit_adam", lr=0.01)
    train(net, optimizer, 7)
    layer, (moments, *_) = net.first, optimizer.manager.moments.values()
    layer.fisher_matrix.observe(*(torch.randn(9, n).double() for n in (6, 3, 3, 7)))
    assert not moments.has_followed(layer.fisher_matrix)
    train(net, optimizer, 1, start=7)
    assert moments.has_followed(layer.fisher_matrix)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_readings_show_what_is_applied_where_blocks_are_filled_up(damping):
    """White tokens: the preconditioner is a scalar on each side, whatever stands beside it in the last run."""
    net = Net(fisher_approximation="block_diagonal", fisher_block_size=4, fisher_damping=damping)
    optimizer = optimizer_of(net, "grit_adam_preconditioned", lr=0.01)
    train(net, optimizer, 1)
    fisher = net.first.fisher_matrix
    for side, size in (("A", 6), ("B", 7)):
        blocks = torch.diag_embed(torch.ones(3, 2, 4))
        blocks[:, -1, size - 4 :, size - 4 :] = 0.0
        fisher._sums[side] = blocks.double() * fisher.weight
    fisher._eigen.clear()
    reading = next(r for r in optimizer.manager.readings() if r.layer.startswith("0."))
    said = numbers(reading)
    for letter in "ag":
        assert said[f"anisotropy_{letter}"] == pytest.approx(0, abs=1e-9) and not said[f"empty_{letter}"]


def test_estimates_that_cannot_be_inverted_are_counted():
    net = Net(fisher_approximation="kfac", fisher_damping=0.0, buffer_tokens=2)  # two tokens, three directions
    optimizer = optimizer_of(net, "grit_adam_preconditioned", lr=0.01)
    train(net, optimizer, 1)
    assert optimizer.manager.failed_inversions == 4


def test_a_ready_optimizer_is_clipped_and_told_the_steps(tmp_path):
    adapter = small_vlm.adapter(enable_projection=True)
    arguments = GRITTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, max_grad_norm=1e-9, use_cpu=True, report_to="none", save_strategy="no",
        fisher_update_freq=7, per_device_train_batch_size=2,
    )  # fmt: skip
    optimizer = create_grit_optimizer(adapter.get_trainable_parameters(), "grit_sgd", adapter.get_grit_layers(), lr=1.0)
    batch = small_vlm.batch(adapter.model)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(len(batch["input_ids"]))]
    trainer = GRITTrainer(
        adapter.model.get_base_model(),
        arguments,
        grit_adapter=adapter,
        train_dataset=rows,
        optimizers=(optimizer, None),
    )
    before = [p.detach().clone() for p in adapter.get_trainable_parameters()]
    trainer.train()
    assert adapter.manager.total_steps == 2
    assert all(layer.fisher_matrix.update_freq == 7 for layer in adapter.grit_layers.values())
    moved = [(p.detach() - old).norm() for p, old in zip(adapter.get_trainable_parameters(), before, strict=True)]
    assert 0 < max(moved) < 1e-8
