"""Compare tensors."""

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected|, Euclidean lengths."""
    return ((found - expected).norm() / expected.norm()).item()
