"""The drawn pictures, which need no files."""

import pytest
import torch

# taken here before conftest.py makes it draw fewer
from plumbing.datasets import synthetic, synthetic_other

BOTH = pytest.mark.parametrize("draw", [synthetic, synthetic_other])


@BOTH
def test_drawn_pictures_are_balanced_and_the_same_every_time(draw):
    train, again, test = draw("train"), draw("train"), draw("test")
    assert train.pixels.shape == (2000, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert test.pixels.shape == (500, 32, 32, 3) and train.pixels is not again.pixels
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    assert torch.bincount(train.labels).tolist() == [200] * 10 and len(train.classes) == 10
    assert torch.bincount(test.labels).tolist() == [50] * 10 and test.classes == train.classes


@BOTH
def test_no_test_picture_is_a_training_picture(draw):
    train = {pixels.numpy().tobytes() for pixels in draw("train").pixels}
    test = {pixels.numpy().tobytes() for pixels in draw("test").pixels}
    assert len(train) == 2000 and len(test) == 500 and not train & test


@BOTH
def test_no_colour_gives_a_class_away(draw):
    """The mean colours of the classes differ by little beside those of the pictures of one."""
    images = draw("train")
    colours = images.pixels.float().mean((1, 2))
    of_classes = torch.stack([colours[images.labels == label].mean(0) for label in range(10)])
    assert of_classes.std(0).max() < 0.3 * colours.std(0).min()


def test_the_two_sets_share_no_class():
    assert not set(synthetic("test").classes) & set(synthetic_other("test").classes)
