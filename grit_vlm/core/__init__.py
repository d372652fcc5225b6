"""Fisher estimates and LoRA layers that use them."""
