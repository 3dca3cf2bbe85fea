"""Drawn textures and shapes: a data set that needs no files."""

import numpy as np
import torch

from data import Images

COUNT = {"train": 2000, "test": 500}


def synthetic(split: str) -> Images:
    """uint8 [2000 train or 500 test, 32, 32, 3], the same every time.

    Ten balanced classes; position, size, tilt, contrast, colours and noise are random, so
    neither a colour nor a place gives a class away.
    """
    count = COUNT[split]
    generator = np.random.default_rng([0, split == "test"])
    labels = np.arange(count) % 10
    drawings = shapes(generator, count)
    mask = np.stack(list(drawings.values()))[labels, np.arange(count)][..., None]
    middle = generator.uniform(90, 165, (count, 1, 1, 3))
    contrast = generator.normal(0, 1, (count, 1, 1, 3))
    strength = generator.uniform(50, 80, (count, 1, 1, 1))
    contrast *= strength / np.linalg.norm(contrast, axis=-1, keepdims=True)
    noise = generator.normal(0, 10, (count, 32, 32, 3))
    picture = middle + np.where(mask, contrast, -contrast) + noise
    pixels = torch.from_numpy(picture.clip(0, 255).astype(np.uint8))
    return Images(pixels, torch.from_numpy(labels), tuple(drawings))


def shapes(generator: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Every class drawn `count` times, bool [count, 32, 32]: what is inside."""

    def draw(low: float, high: float) -> np.ndarray:  # one number per image
        return generator.uniform(low, high, (count, 1, 1))

    row, column = np.mgrid[0:32, 0:32] - 15.5
    angle, radius = draw(-0.2, 0.2), draw(8, 11)
    period, phase = draw(6, 8), draw(0, 2 * np.pi)
    row, column = row - draw(-3, 3), column - draw(-3, 3)
    x = np.cos(angle) * column - np.sin(angle) * row
    y = np.sin(angle) * column + np.cos(angle) * row
    distance, step = np.hypot(x, y), 2 * np.pi / period
    nearer, farther = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    dot = [(part + phase) % period - period / 2 for part in (x, y)]
    return {
        "bars": np.sin(step * y + phase) > 0,
        "checks": np.sin(step * x + phase) * np.sin(step * y + phase) > 0,
        "cross": (nearer < radius / 4) & (farther < radius),
        "diagonals": np.sin(step * (x + y) / np.sqrt(2) + phase) > 0,
        "disc": distance < radius,
        "dots": np.hypot(*dot) < period / 4,
        "ring": (distance < radius) & (distance > 0.6 * radius),
        "square": farther < 0.85 * radius,
        "triangle": (y < 0.7 * radius) & (abs(x) * 1.7 < y + radius),
        "waves": np.sin(step * (y + 2 * np.sin(step * x / 1.5)) + phase) > 0,
    }
