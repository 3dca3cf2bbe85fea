"""The room features.py: looking a feature up is computing it."""

import pytest
import torch
from torch import nn

import data
import features
import freeze
from data import UserError
from features import Features
from plumbing import datasets

CPU = torch.device("cpu")
PREFIXES = {"pool": nn.AvgPool2d(16), "nothing": nn.Sequential()}
PREFIXES["resnet18"], _ = freeze.split(freeze.build("resnet18", 10), "layer3")


@pytest.fixture
def images():
    return datasets.synthetic("test").pixels[:20]


def features_of(prefix, images, dtype=torch.float32, augment=None) -> Features:
    return Features(PREFIXES[prefix], images, 32, CPU, dtype, mirrored=True, augment=augment)


@pytest.mark.parametrize("name, close", [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_a_lookup_gives_what_computing_gives(images, name, close):
    dtype, seen = getattr(torch, name), []
    inputs = features_of("resnet18", images, dtype)
    indices, flips = torch.tensor([3, 19, 3, 0]), torch.tensor([True, False, False, True])
    estimate, computed = inputs.bytes, inputs(indices, flips)
    store = torch.empty(inputs.shape, dtype=dtype)
    inputs.fill(CPU, lambda chunks: seen.extend(map(len, chunks)) or chunks, store)
    assert inputs.store is store and seen == [16, 16, 8]  # it goes through what shows how far it is
    inputs.prefix = None  # which is not run again
    assert inputs.store.nbytes == estimate
    assert len(inputs.store) == 40
    found = inputs(indices, flips)
    torch.testing.assert_close(found, computed, rtol=close, atol=close)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(inputs(indices[:1], flips[:1]), inputs(indices[:1], ~flips[:1]))


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_batches_are_the_prefix_of_the_pictures_in_order(images, prefix, filled):
    inputs = features_of(prefix, images)
    if filled:
        inputs.fill(CPU)
    order, flips = data.epoch_order(20, 0, 1)
    with torch.no_grad():
        expected = inputs.prefix(data.transform(images, 32, flips=flips))
        plain = inputs.prefix(data.transform(images, 32))
    for size in (8, [8, 8, 4]):
        batches = list(inputs.batches(size, order, flips))
        assert [len(batch) for batch in batches] == [8, 8, 4]
        torch.testing.assert_close(torch.cat(batches), expected[order], rtol=1e-4, atol=1e-5)
    found = torch.cat(list(inputs.batches(8)))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pixels, found",
    [
        (torch.rand(4, 8, 8, 3), "float32 .4, 8, 8, 3."),  # would train, and be right by chance
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "uint8 .4, 3, 8, 8."),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "uint8 .8, 8, 3."),
    ],
)
def test_other_pixels_are_refused(pixels, found):
    with pytest.raises(UserError, match=f"must be uint8 .N, H, W, 3. .* not {found}"):
        features_of("nothing", pixels)


def test_a_transform_that_is_random_is_refused(images, monkeypatch):
    def cropped(pixels, size, dtype=torch.float32, flips=None):
        first = torch.randint(3, ()).item()
        return data.transform(pixels[:, first : first + 28], size, dtype, flips)

    monkeypatch.setattr(features, "transform", cropped)
    with pytest.raises(UserError, match="another picture each time.* belongs into AUGMENT"):
        for _ in range(20):
            features_of("nothing", images)


def test_augmented_pictures_are_drawn_by_epoch_and_position_alone(images):
    inputs = features_of("nothing", images, augment=data.random_crop)
    order, flips = data.epoch_order(len(images), 0, 1)

    def epoch(number: int) -> torch.Tensor:
        generator = data.epoch_generator(3, number, CPU)
        return torch.cat(list(inputs.batches(8, order, flips, generator)))

    one = epoch(1)
    torch.manual_seed(99)
    assert torch.equal(one, epoch(1)) and not torch.equal(one, epoch(2))
    with pytest.raises(UserError, match="they cannot be filled"):
        inputs.fill(CPU)
    with pytest.raises(UserError, match="take a generator"):
        next(inputs.batches(8))


def test_an_augmentation_that_gives_other_pixels_is_refused(images):
    for wrong in (lambda pixels, _: pixels / 255, lambda pixels, _: pixels[:, 1:]):
        inputs = features_of("nothing", images, augment=wrong)
        with pytest.raises(UserError, match="AUGMENT must give uint8 .8, 32, 32, 3."):
            next(inputs.batches(8, generator=data.epoch_generator(0, 1, CPU)))
