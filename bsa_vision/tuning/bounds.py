"""Upper bounds on the errors of new images, from those of the held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE, MEAN_CONFIDENCE = 0.95, 0.99


def share_above(images: int, above: int, confidence: float = CONFIDENCE) -> float:
    """Return an upper bound on the share of all images whose error exceeds a limit.

    `above` of the `images` held-out images exceed it. The bound is Clopper and Pearson's exact
    one-sided one and assumes that held-out and new images have the same distribution. It also
    holds if the limit is the largest error measured (above=0), by order statistics.
    """
    from scipy.stats import beta

    return 1.0 if above == images else float(beta.ppf(confidence, above + 1, images - above))


def mean_at_most(errors: Sequence[float], confidence: float = MEAN_CONFIDENCE) -> float:
    """Return an upper bound on the mean error of all images (Student's t, one-sided).

    The bound is infinite for a single image, which has no variance.
    """
    from scipy.stats import t

    images, mean = len(errors), sum(errors) / len(errors)
    if images == 1:
        return math.inf
    variance = sum((error - mean) ** 2 for error in errors) / (images - 1)
    return mean + float(t.ppf(confidence, images - 1)) * math.sqrt(variance / images)
