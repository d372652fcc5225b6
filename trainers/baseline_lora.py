"""Plain LoRA with TRL's SFTTrainer and AdamW: what every other arm is compared with."""

from trainers.common import Arm

ARM = Arm(name="baseline_lora", title="Baseline LoRA")
