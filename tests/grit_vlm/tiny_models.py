"""Small vision-language models with the real module names of each family: random weights, every block there."""

import torch

VISION_BLOCKS, TEXT_BLOCKS, HIDDEN, IMAGE, PATCH = 12, 5, 32, 16, 8
IMAGE_TOKEN, TOKENS = 1, 4  # a picture of 16 pixels in patches of 8 is 4 tokens

VISION = dict(hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=VISION_BLOCKS, num_attention_heads=2)
PIXELS = dict(image_size=IMAGE, patch_size=PATCH)
TEXT = dict(
    hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=TEXT_BLOCKS, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
)  # fmt: skip


def _model(family, vision, text, **more):
    import transformers

    vision, text = {**VISION, **PIXELS, **vision}, {**TEXT, **text}
    config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text, **more)
    return getattr(transformers, f"{family}ForConditionalGeneration")(config)


def idefics3(vision=None, text=None, scale_factor=1, family="Idefics3"):
    more = {"image_token_id": IMAGE_TOKEN, "scale_factor": scale_factor, "pad_token_id": 0}
    return _model(family, vision or {}, {"model_type": "llama", **(text or {})}, **more)


def _llava(family="Llava", tower="clip", text="llama", **more):
    vision, text = {"model_type": f"{tower}_vision_model"}, {"model_type": text}
    if family == "PaliGemma":
        vision["projection_dim"], text["head_dim"] = HIDDEN, 16
    return _model(family, vision, text, image_token_index=IMAGE_TOKEN, **more)


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=VISION_BLOCKS, embed_dim=HIDDEN, hidden_size=HIDDEN, num_heads=2, mlp_ratio=2, patch_size=PATCH)
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, pad_token_id=0)
    return Qwen2VLForConditionalGeneration(config)


def batch(model, seed=0):
    """Two questions with a picture each, answers to learn, as the model's `forward` takes them."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type
    ids = torch.randint(4, TEXT["vocab_size"], (2, 12), generator=generator)
    ids[:, :TOKENS] = IMAGE_TOKEN
    pixels = torch.rand(2, 3, IMAGE, IMAGE, generator=generator)
    more = {}
    if kind in ("idefics3", "smolvlm"):
        pixels = pixels[:, None]
    elif kind == "paligemma":
        more = {"token_type_ids": torch.zeros_like(ids)}
    elif kind == "qwen2_vl":  # a row for each patch, of 3 colours at 2 times; 2×2 patches become one token
        ids[:, 1:TOKENS] = 5
        pixels = torch.rand(2 * TOKENS, 3 * 2 * PATCH * PATCH, generator=generator)
        more = {"image_grid_thw": torch.tensor([[1, 2, 2]] * 2), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": ids, **more}


BUILDERS = {
    "idefics3": idefics3,
    "smolvlm": lambda: idefics3(family="SmolVLM"),
    # The CLIP tower's first token stands for the whole picture; "default" drops it, SigLIP has none.
    "llava": lambda: _llava(vision_feature_select_strategy="default"),
    "llava_siglip": lambda: _llava(tower="siglip", vision_feature_select_strategy="full"),
    "vipllava": lambda: _llava("VipLlava", vision_feature_layers=[-2, -5, -8]),
    "paligemma": lambda: _llava("PaliGemma", "siglip", "gemma", projection_dim=HIDDEN),
    "qwen2_vl": qwen2_vl,
}
