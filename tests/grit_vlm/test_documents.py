"""Names and fields of documents 000, 001 and 003; and the table of mended calls in docs/grit_vlm.md.

The calls themselves are in the modules of DOCUMENTS.
"""

import importlib
import inspect
from dataclasses import MISSING, fields
from pathlib import Path

import mended
import pytest
import test_document_000_layers
import test_document_000_models
import test_document_001
import test_document_003
import test_document_003_devices

DOCUMENTS = (
    test_document_000_layers,
    test_document_000_models,
    test_document_001,
    test_document_003,
    test_document_003_devices,
)
MENDED = mended.MENDED
GUIDE = Path(__file__).parents[2] / "docs" / "grit_vlm.md"
BEGIN, END = "<!-- mended: begin -->", "<!-- mended: end -->"

NAMES = {
    "grit_vlm": "GRITLoRAConfig create_vlm_grit_adapter GRITLoRALayer GRITLoRALinear FisherInformationMatrix "
    "VLMGRITAdapter GRITTrainer GRITTrainingArguments MultiModalProjector ModelGRITConfig ModalityConfig "
    "LayerSelectionStrategy create_grit_optimizer create_linear_scheduler compute_natural_gradient get_device_config "
    "get_model_config",
    "grit_vlm.core.fisher_info": "FisherInformationMatrix",
    "grit_vlm.core.grit_lora": "GRITLoRAConfig GRITLoRALayer GRITLoRALinear",
    "grit_vlm.models.vlm_adapter": "VLMGRITAdapter create_vlm_grit_adapter",
    "grit_vlm.config": "ModelGRITConfig ModalityConfig LayerSelectionStrategy get_model_config get_device_config",
    "grit_vlm.config.model_configs": "ModelGRITConfig ModalityConfig",
    "grit_vlm.training.trainer": "GRITTrainer GRITTrainingArguments",
    "grit_vlm.optimizers.natural_gradient": "create_grit_optimizer",
    "grit_vlm.utils.projection": "MultiModalProjector create_linear_scheduler create_cosine_scheduler "
    "create_adaptive_scheduler",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_where_the_documents_have_it(module):
    home = importlib.import_module(module)
    found = {name: getattr(home, name) for name in NAMES[module].split()}
    root = importlib.import_module("grit_vlm")
    # One thing by one name, wherever it is imported from.
    assert all(thing is getattr(root, name, thing) for name, thing in found.items())
    if module == "grit_vlm":
        assert set(found) <= set(root.__all__) <= set(dir(root))


MEMBERS = {
    "FisherInformationMatrix": "fisher_diagonal fisher_blocks kfac_factors",
    "GRITLoRALayer": "forward update_fisher_and_projection apply_natural_gradient_update compute_natural_gradient "
    "get_fisher_for_param update_projection project_gradients lora_A lora_B scaling lora_dropout base_layer "
    "projection_matrix eigenvalues step_count",
    "VLMGRITAdapter": "update_mixed_modal_fisher get_mixed_modal_projections get_trainable_parameters get_grit_layers "
    "vision_layers text_layers cross_modal_layers multimodal_projector vision_scheduler text_scheduler",
    "MultiModalProjector": "compute_mixed_modal_projection",
    "GRITTrainer": "train training_step create_optimizer grit_args",
}


@pytest.mark.parametrize("name", MEMBERS)
def test_every_method_and_attribute_is_there_and_explained(name):
    thing = getattr(importlib.import_module("grit_vlm"), name)
    assert thing.__doc__
    for member in MEMBERS[name].split():
        assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def defaults(config):
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(config)
    }


def test_the_fields_of_document_003_and_their_defaults():
    from grit_vlm.config import LayerSelectionStrategy, ModalityConfig, ModelGRITConfig

    modality = defaults(ModalityConfig)
    assert modality.pop("projection_budget") is None  # of document 001
    assert modality == {
        "layer_patterns": [], "strategy": LayerSelectionStrategy.ALL, "n_layers": None, "step_size": None,
        "specific_indices": None, "rank": None, "alpha": None, "dropout": None, "enable_natural_gradient": True,
        "enable_projection": True, "fisher_approximation": "diagonal",
    }  # fmt: skip
    model = defaults(ModelGRITConfig)
    # The document has no default for these two, and an example without them.
    assert (model.pop("model_name"), model.pop("model_type")) == ("custom", "custom")
    assert model == {
        "vision": None, "text": None, "cross_modal": None, "fusion": None, "global_rank": 16, "global_alpha": 32,
        "global_dropout": 0.1, "fisher_damping": 1e-4, "fisher_ema_decay": 0.95, "fisher_update_freq": 10,
        "projection_budget_start": 32, "projection_budget_end": 96, "projection_schedule": "linear",
        "max_layers_per_modality": None,
    }  # fmt: skip
    # Document 001 writes vision_config for vision.
    own = ModalityConfig(rank=4)
    for name in ("vision", "text", "cross_modal", "fusion"):
        config = ModelGRITConfig(**{f"{name}_config": own})
        assert getattr(config, name) is getattr(config, f"{name}_config") is own


def test_the_defaults_of_layers_and_estimates_are_those_of_the_documents():
    from grit_vlm import FisherInformationMatrix, GRITLoRAConfig, GRITTrainingArguments, ModelGRITConfig

    layer, model = defaults(GRITLoRAConfig), defaults(ModelGRITConfig)
    shared = [name for name in model if name in layer]
    assert set(shared) == {
        "fisher_damping", "fisher_ema_decay", "fisher_update_freq", "projection_budget_start", "projection_budget_end",
        "projection_schedule",
    }  # fmt: skip
    assert {name: layer[name] for name in shared} == {name: model[name] for name in shared}
    assert (layer["r"], layer["lora_alpha"], layer["lora_dropout"]) == tuple(
        model[f"global_{name}"] for name in ("rank", "alpha", "dropout")
    )
    assert (layer["fisher_approximation"], layer["enable_natural_gradient"]) == ("diagonal", True)
    estimate = inspect.signature(FisherInformationMatrix).parameters
    assert [estimate[name].default for name in ("damping", "ema_decay", "update_freq")] == [1e-4, 0.95, 10]
    assert {"fisher_update_freq", "enable_projection", "grit_optimizer_type"} <= set(defaults(GRITTrainingArguments))


def table():
    rows = [entry.row() for entry in sorted(MENDED, key=lambda entry: entry.document)]
    return "\n".join([BEGIN, "| document | as written | as it works here | why |", "|---|---|---|---|", *rows, END])


def test_every_mended_call_is_made_by_a_test():
    made = {name for module in DOCUMENTS for name in vars(module) if name.startswith("test_")}
    assert {entry.test for entry in MENDED} <= made  # `mended` has looked at what they call
    assert {entry.document for entry in MENDED} == {"000", "001", "003"}
    assert len({entry.written for entry in MENDED}) == len(MENDED) >= 20


def test_the_guide_shows_the_same_table():
    text = GUIDE.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert shown == table(), f"write it anew: python {Path(__file__).relative_to(GUIDE.parents[1])}"


if __name__ == "__main__":
    before, _, rest = GUIDE.read_text(encoding="utf-8").partition(BEGIN)
    GUIDE.write_text(before + table() + rest.partition(END)[2], encoding="utf-8")
