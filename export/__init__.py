"""From a trained adapter to a model that Ollama serves."""

import db as db  # which says what to do where there is no environment


class ExportError(RuntimeError):
    """An adapter or model that cannot be exported, opened or served; nothing wrong is written in its place."""


class MergedOnlyError(ExportError):
    """An adapter that llama.cpp, or this release of Ollama, can only serve merged into its base."""
