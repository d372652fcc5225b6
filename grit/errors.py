"""What can go wrong during training with GRIT."""


class CaptureError(RuntimeError):
    """Layers that get gradients but whose hooks report nothing."""


class NotAppliedError(RuntimeError):
    """Backward passes were seen, but no step went through a `GritOptimizer`."""


class NonFiniteGradientsError(RuntimeError):
    """Too many steps in a row had NaN or infinite gradients."""
