"""An adapter as another trainer leaves it: plain PEFT and torch, nothing of this project."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def make(base, folder, texts, **config):
    """One step on each text."""
    torch.manual_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **config)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for text in texts:
        tokens = tokenizer(text + tokenizer.eos_token, return_tensors="pt")
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
