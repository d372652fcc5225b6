"""The vision baseline: LoRA on the same layers as GRIT-VLM, Hugging Face's Trainer and AdamW."""

from trainers.vision.common import vision_arm

ARM = vision_arm(name="baseline_lora", title="Vanilla LoRA")
