"""What errors on a few images say about images not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE, MEAN_CONFIDENCE = 0.95, 0.99


def share_above(images: int, above: int, confidence: float = CONFIDENCE) -> float:
    """Upper bound on the share of all images whose error is above a limit, when `above` of `images` are.

    Clopper and Pearson's exact one-sided bound; for images drawn as those to come are. Also for a limit that is the largest error seen
    (above=0), by order statistics.
    """
    from scipy.stats import beta

    return 1.0 if above == images else float(beta.ppf(confidence, above + 1, images - above))


def mean_at_most(errors: Sequence[float], confidence: float = MEAN_CONFIDENCE) -> float:
    """Upper bound on the mean error of all images (Student's t, one-sided); infinite for a single one, which has no spread."""
    from scipy.stats import t

    images, mean = len(errors), sum(errors) / len(errors)
    if images == 1:
        return math.inf
    variance = sum((error - mean) ** 2 for error in errors) / (images - 1)
    return mean + float(t.ppf(confidence, images - 1)) * math.sqrt(variance / images)
