"""What can go wrong on the way from adapter to GGUF."""


class ExportError(RuntimeError):
    """An adapter or model that cannot be exported; nothing wrong is written in its place."""
