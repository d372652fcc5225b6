"""The arms of the vision pipeline: vanilla LoRA and GRIT-VLM on the same layers, along the path that all arms share."""
