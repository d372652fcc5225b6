"""A two-block Idefics3 with GRIT-LoRA on vision, text and connector, for tests of the engine."""

import tiny_models
import torch

from grit_vlm import GRITLoRAConfig, VLMGRITAdapter

VISION = ["model.vision_model.encoder.layers.*.self_attn.q_proj"]
TEXT = ["model.text_model.layers.*.self_attn.v_proj"]
CROSS = ["model.connector.modality_projection.proj"]
LAYERS = {"vision_layers": VISION, "text_layers": TEXT, "cross_modal_layers": CROSS}


def base(seed=0, **more):
    torch.manual_seed(seed)
    return tiny_models.idefics3({"num_hidden_layers": 2}, {"num_hidden_layers": 2}, **more)


def settings(**changed):
    """Small, deterministic, ready after the first batch."""
    return GRITLoRAConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "fisher_min_samples": 1, **changed})


def adapter(seed=0, double=False, layers=LAYERS, model=None, **changed):
    """With B away from zero, so that every gradient and all Fisher information is there from the start."""
    model = base(seed) if model is None else model
    found = VLMGRITAdapter(model.double() if double else model, settings(**changed), **layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in found.grit_layers.values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return found


def batch(model, seed=0, padding=0, double=False):
    """`padding`: of the second question, at its end."""
    found = tiny_models.batch(model, seed)
    ids = found["input_ids"]
    found["labels"] = ids.masked_fill(ids == tiny_models.IMAGE_TOKEN, -100)
    if padding:
        found["attention_mask"][1, -padding:] = 0
        found["labels"][1, -padding:] = -100
    if double:
        found["pixel_values"] = found["pixel_values"].double()
    return found


def examples(count):
    model = base()
    batches = [batch(model, seed) for seed in range(0, count, 2)]
    return [{name: value[k] for name, value in found.items()} for found in batches for k in range(2)]
