"""The one error of this package."""


class GritVlmError(ValueError):
    """Settings, layers or a model that GRIT-VLM cannot work with; the message lists every mistake."""
