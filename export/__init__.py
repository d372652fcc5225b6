"""From a trained adapter to a model that Ollama serves."""
