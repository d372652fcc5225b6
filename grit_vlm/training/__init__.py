"""GRIT-VLM inside Hugging Face's Trainer."""
