"""Student's t distribution, without the second that importing a statistics package takes.

`compare_all` has to answer at once, and it needs three numbers: a tail, a quantile, and the power of a t-test. The
tests hold them against scipy.
"""

from __future__ import annotations

import math
from functools import cache

_NORMAL = 1e7
"""Degrees of freedom from which on the normal distribution is the same to eight digits."""
_SURE = 300.0
"""Degrees of freedom from which on doubt of the standard error changes no power by more than 0.001."""
_TINY = 1e-300


def two_sided(t: float, df: float) -> float:
    """P(|T| ≥ |t|), through the incomplete beta function (Abramowitz and Stegun 1964, 26.7.1).

    Args:
        t: Statistic; infinite gives 0.
        df: Degrees of freedom, > 0, fractions too.
    """
    if math.isinf(t):
        return 0.0
    if df > _NORMAL:
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t), t * t / (df + t * t))


@cache
def quantile(df: float, level: float = 0.95) -> float:
    """The t with P(|T| ≤ t) = `level`.

    Newton's method from the normal quantile, which is too small: the tail is convex, so no step goes too far.
    """
    t = normal_quantile((1 + level) / 2)
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    for _ in range(200 if df <= _NORMAL else 0):
        density = math.exp(constant - (df + 1) / 2 * math.log1p(t * t / df))
        step = (two_sided(t, df) - (1 - level)) / (2 * density)
        t += step
        if step <= 1e-11 * t:
            break
    return t


def power(shift: float, df: float, level: float = 0.95) -> float:
    """Probability that a two-sided t-test sees a shift of its mean, given in standard errors.

    The non-central t: P(|Z + shift| > t·√(χ²/df)), averaged over quantiles of χ² (Wilson and Hilferty 1931): within
    0.01 from two degrees of freedom on.

    Args:
        shift: True mean over the standard error of its estimate.
        df: Degrees of freedom of that standard error.
        level: 1 - α.
    """
    critical = quantile(df, level)
    if df > _SURE:
        return _normal(shift - critical) + _normal(-shift - critical)
    total = 0.0
    for z in _MIDPOINTS:
        root = max(0.0, 1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 1.5
        total += _normal(shift - critical * root) + _normal(-shift - critical * root)
    return total / len(_MIDPOINTS)


@cache
def normal_quantile(share: float) -> float:
    """The z below which a share of the standard normal distribution lies."""
    low, high = -40.0, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _normal(middle) < share else (low, middle)
    return (low + high) / 2


def _normal(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


_MIDPOINTS = tuple(normal_quantile((k + 0.5) / 60) for k in range(60))


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """Regularised I_x(a, b) with rest = 1 - x; continued fraction by Lentz's method (Press et al. 2007, 6.4)."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, rest, x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    )  # fmt: skip
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 100_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for part in (even, odd):
            d = 1 / _away_from_zero(1 + part * d)
            c = _away_from_zero(1 + part / c)
            change = c * d
            fraction *= change
        if abs(change - 1) < 1e-15:
            break
    return front * fraction / a


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
