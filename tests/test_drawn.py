"""The drawn pictures, which need no files."""

import torch

from plumbing.drawn import synthetic  # taken here before conftest.py makes it draw fewer


def test_drawn_pictures_are_balanced_and_the_same_every_time():
    train, again, test = synthetic("train"), synthetic("train"), synthetic("test")
    assert train.pixels.shape == (2000, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert test.pixels.shape == (500, 32, 32, 3) and train.pixels is not again.pixels
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    assert torch.bincount(train.labels).tolist() == [200] * 10 and len(train.classes) == 10
    assert torch.bincount(test.labels).tolist() == [50] * 10 and test.classes == train.classes


def test_no_test_picture_is_a_training_picture():
    train = {pixels.numpy().tobytes() for pixels in synthetic("train").pixels}
    test = {pixels.numpy().tobytes() for pixels in synthetic("test").pixels}
    assert len(train) == 2000 and len(test) == 500 and not train & test


def test_no_colour_gives_a_class_away():
    """The mean colours of the classes differ by little beside those of the pictures of one."""
    images = synthetic("train")
    colours = images.pixels.float().mean((1, 2))
    of_classes = torch.stack([colours[images.labels == label].mean(0) for label in range(10)])
    assert of_classes.std(0).max() < 0.3 * colours.std(0).min()
