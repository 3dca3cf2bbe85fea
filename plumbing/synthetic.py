"""Drawn textures and shapes: two data sets that need no files.

The ten classes of one, "synthetic", are to be learned from few pictures; on those of the other,
"synthetic-other", a network can be pretrained before. No class is in both.
"""

import numpy as np
import torch

from data import Images

COUNT = {"train": 2000, "test": 500}


def load(split: str) -> Images:
    """uint8 [2000 train or 500 test, 32, 32, 3], the same every time.

    Ten balanced classes; position, size, tilt, contrast, colours and noise are random, so
    neither a colour nor a place gives a class away.
    """
    generator = np.random.default_rng([0, split == "test"])
    return painted(generator, shapes(*places(generator, COUNT[split])))


def load_other(split: str) -> Images:
    """As many of ten other classes."""
    generator = np.random.default_rng([1, split == "test"])
    return painted(generator, other_shapes(*places(generator, COUNT[split])))


def painted(generator: np.random.Generator, drawings: dict[str, np.ndarray]) -> Images:
    """The drawings of each class, bool [count, 32, 32], in colours: image i of class i % 10."""
    masks = np.stack(list(drawings.values()))
    count = masks.shape[1]
    labels = np.arange(count) % len(masks)
    mask = masks[labels, np.arange(count)][..., None]
    middle = generator.uniform(90, 165, (count, 1, 1, 3))
    contrast = generator.normal(0, 1, (count, 1, 1, 3))
    strength = generator.uniform(50, 80, (count, 1, 1, 1))
    contrast *= strength / np.linalg.norm(contrast, axis=-1, keepdims=True)
    noise = generator.normal(0, 10, (count, 32, 32, 3))
    picture = middle + np.where(mask, contrast, -contrast) + noise
    pixels = torch.from_numpy(picture.clip(0, 255).astype(np.uint8))
    return Images(pixels, torch.from_numpy(labels), tuple(drawings))


def places(generator: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """Of `count` pictures: coordinates x and y of their pixels, [count, 32, 32], moved and tilted
    at random, and a radius, a period and a phase, [count, 1, 1]."""

    def draw(low: float, high: float) -> np.ndarray:  # one number per image
        return generator.uniform(low, high, (count, 1, 1))

    row, column = np.mgrid[0:32, 0:32] - 15.5
    angle, radius = draw(-0.2, 0.2), draw(8, 11)
    period, phase = draw(6, 8), draw(0, 2 * np.pi)
    row, column = row - draw(-3, 3), column - draw(-3, 3)
    x = np.cos(angle) * column - np.sin(angle) * row
    y = np.sin(angle) * column + np.cos(angle) * row
    return x, y, radius, period, phase


def shapes(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, period: np.ndarray, phase: np.ndarray
) -> dict[str, np.ndarray]:
    """Every class drawn in every picture, bool [count, 32, 32]: what is inside."""
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


def other_shapes(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, period: np.ndarray, phase: np.ndarray
) -> dict[str, np.ndarray]:
    """The same of the other classes."""
    distance, direction, step = np.hypot(x, y), np.arctan2(y, x), 2 * np.pi / period
    farther = np.maximum(abs(x), abs(y))
    course = np.floor((y + phase) / period)  # of bricks, every second one moved by half a brick
    mortar = [(y + phase) % period, (x + period * (course % 2)) % (2 * period)]
    mesh = [(part + phase) % period for part in (x, y)]
    return {
        "bricks": np.minimum(*mortar) > period / 4,
        "crescent": (distance < radius) & (np.hypot(x - radius / 2, y) > 0.8 * radius),
        "frame": (farther < 0.9 * radius) & (farther > 0.55 * radius),
        "grid": np.minimum(*mesh) < period / 4,
        "half": (distance < radius) & (y < 0),
        "hexagon": np.maximum(abs(y), abs(y) / 2 + abs(x) * 0.87) < 0.85 * radius,
        "rays": np.sin(6 * direction + phase) > 0,
        "rings": np.sin(step * distance + phase) > 0,
        "spiral": np.sin(step * distance + 2 * direction + phase) > 0,
        "star": distance < radius * (0.7 + 0.3 * np.cos(5 * direction)),
    }
