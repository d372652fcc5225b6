"""Plain LoRA and AdamW, with TRL's SFTTrainer for text: what every other arm is compared with."""

from trainers.run import Arm

ARM = Arm(name="baseline_lora", title="Baseline LoRA")
