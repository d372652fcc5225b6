"""From a trained adapter to a model that Ollama serves."""


class ExportError(RuntimeError):
    """An adapter or model that cannot be exported, opened or served; nothing wrong is written in its place."""
