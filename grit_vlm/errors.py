"""The exception of this package."""


class GritVlmError(ValueError):
    """Settings, layers or a model that GRIT-VLM cannot use; the message lists every problem."""
