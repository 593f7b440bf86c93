"""A model, images, photos and a target for tests of tuning."""

from __future__ import annotations

import torch
from PIL import Image

from bsa_vision.models.features import features
from tests.helpers import models

SMALL = dict(tile=(4, 4), block_size=16)


def dinov3():
    """Return the same model every time, for `bsa-vision tune tests.helpers.tuning:dinov3`."""
    return models.make("dinov3")


def images(count=4, size=(96, 96), **options):
    return [models.image(*size, seed=seed, **options) for seed in range(count)]


def photos(folder, count=3):
    """Write `count` random photos of 90 x 70 pixels to `folder` and return it."""
    folder.mkdir()
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 255, (70, 90, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{seed}.png")
    return folder


class CountingTarget:
    """The default target, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, image):
        self.calls += 1
        return features(model, image)
