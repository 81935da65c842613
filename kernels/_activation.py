"""The activation functions, their derivatives and tanh, in float32 registers; the kind is known at compile time.

Slopes are found together with values because both are made of the same parts.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within a few ulp of x's own, also near zero, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    series = 62.0 / 2835 + z * (-1382.0 / 155925 + z * (21844.0 / 6081075))
    series = x + x * z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * series)))
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.4, series, tl.where(x < 0, -size, size))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """activation(x) and its derivative. `x != x` lets NaN through where a comparison would drop it."""
    if KIND == "none":
        value = x
        slope = x * 0.0 + 1.0
    elif KIND == "relu":
        value = tl.where((x > 0) | (x != x), x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif KIND == "relu2":
        r = tl.where((x > 0) | (x != x), x, 0.0)
        value = r * r
        slope = 2.0 * r
    elif KIND == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.70710678118654752)
        value = x * cdf
        slope = cdf + x * 0.39894228040143268 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid(2 u)
        z = x * x
        s = sigmoid(x * (1.5957691216057308 + z * 0.07135481627159629))
        value = x * s
        slope = s + x * (1.5957691216057308 + z * 0.21406444881478886) * s * (1.0 - s)
    elif KIND == "silu":
        s = sigmoid(x)
        value = x * s
        slope = s + x * s * (1.0 - s)
    elif KIND == "sigmoid":
        value = sigmoid(x)
        slope = value * (1.0 - value)
    else:
        tl.static_assert(KIND == "tanh", "unknown activation")
        value = tanh(x)
        slope = 1.0 - value * value
    return value, slope
