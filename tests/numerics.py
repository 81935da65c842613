"""Every tolerance of the test-suite, derived here from what the dtype and plain torch can do."""

import torch

FORWARD, BACKWARD = 2.0, 3.0  # how many times eager's own error in the same dtype is accepted
ULPS = 4  # plus a few units in the last place of the largest value: eager may happen to be exact


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """max |actual - exact|, with exact in float64; inf where only one of them is not finite."""
    actual, exact = actual.double(), exact.double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (actual - exact).abs()).nan_to_num(nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def largest(exact: torch.Tensor) -> float:
    """The largest finite magnitude in a tensor."""
    finite = exact.double()[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def bound(eager: torch.Tensor, exact: torch.Tensor, factor: float, scale: float | None = None) -> float:
    """The largest error accepted: `factor` times eager's, plus a few ulp of `scale`, or of the largest exact value."""
    limits = torch.finfo(eager.dtype)
    scale = largest(exact) if scale is None else scale
    return factor * max_error(eager, exact) + ULPS * limits.eps * scale + limits.tiny


def assert_close(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    factor: float,
    what: str,
    scale: float | None = None,
) -> None:
    """`actual` is as near to `exact` as `eager` is, within `factor`; see `bound`."""
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    error, limit = max_error(actual, exact), bound(eager, exact, factor, scale)
    assert error <= limit, f"{what}: error {error:.3e} exceeds {limit:.3e} (eager: {max_error(eager, exact):.3e})"
