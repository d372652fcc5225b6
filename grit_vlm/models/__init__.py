"""GRIT on whole vision-language models."""
