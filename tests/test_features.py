"""The room features.py: looking a feature up is computing it."""

import functools

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
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture
def images():
    return datasets.synthetic("test").pixels[:20]


@functools.cache
def network() -> nn.Module:
    return freeze.build("resnet18", 10)


def features_of(images, first="layer4", dtype=torch.float32, mirrored=True) -> Features:
    prefix, _ = freeze.split(network(), first)
    return Features(prefix, images, 48, CPU, dtype, mirrored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["fc", "layer4", "layer3"])
def test_a_lookup_gives_what_computing_gives(images, first, dtype):
    inputs = features_of(images, first, dtype)
    indices, flips = torch.tensor([3, 19, 3, 0]), torch.tensor([True, False, False, True])
    computed = inputs(indices, flips), inputs(indices)
    estimate = inputs.bytes  # known before it is allocated
    inputs.fill(CPU)
    assert inputs.store.nbytes == estimate and inputs.store.dtype == dtype
    assert len(inputs.store) == 40 and inputs.store.shape == inputs.shape
    for found, expected in zip((inputs(indices, flips), inputs(indices)), computed):
        close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
        torch.testing.assert_close(found, expected, **close)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(inputs(indices[:1], flips[:1]), inputs(indices[:1], ~flips[:1]))


def test_a_lookup_is_the_prefix_of_the_mirrored_picture(images):
    inputs = features_of(images)
    inputs.fill(CPU)
    flips = torch.arange(20) % 2 == 1
    with torch.no_grad():
        expected = inputs.prefix(data.transform(images, 48, flips=flips))
    found = inputs(torch.arange(20), flips)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_filled_cache_does_not_run_the_prefix_again(images):
    inputs = features_of(images, mirrored=False)
    inputs.fill(CPU)
    inputs.prefix = None
    assert inputs(torch.tensor([0, 1])).shape == (2, 256, 3, 3)


@pytest.mark.parametrize("filled", [True, False])
def test_batches_are_lookups_in_order(images, filled):
    inputs = features_of(images)
    if filled:
        inputs.fill(CPU)
    order, flips = data.epoch_order(20, 0, 1)
    batches = list(inputs.batches(8, order, flips))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    torch.testing.assert_close(torch.cat(batches), inputs(order, flips[order]))
    plain = list(inputs.batches(8))
    torch.testing.assert_close(torch.cat(plain), inputs(torch.arange(20)))


def test_the_prefix_may_be_any_module():
    pixels = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    inputs = Features(nn.AvgPool2d(16), pixels, 32, CPU, torch.float32, mirrored=True)
    inputs.fill(CPU)
    expected = nn.functional.avg_pool2d(data.transform(pixels, 32), 16)
    torch.testing.assert_close(inputs(torch.arange(5)), expected)
    torch.testing.assert_close(inputs(torch.arange(5), torch.ones(5) > 0), expected.flip(3))


def test_without_a_prefix_they_are_the_pictures_themselves(images):
    inputs = Features(nn.Sequential(), images, 48, CPU, torch.float32, mirrored=True)
    assert torch.equal(inputs(torch.arange(20)), data.transform(images, 48))


def test_filling_goes_through_what_shows_how_far_it_is_and_prints_nothing(images, capsys):
    seen = []

    def shown(chunks):
        for chunk in chunks:
            seen.append(len(chunk))
            yield chunk

    features_of(images).fill(CPU, shown)
    assert seen == [16, 16, 8]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "pixels, found",
    [
        (torch.rand(4, 8, 8, 3), "float32 .4, 8, 8, 3."),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "uint8 .4, 3, 8, 8."),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "uint8 .8, 8, 3."),
    ],
)
def test_other_pixels_are_refused(pixels, found):
    """Numbers in [0, 1] would train, and be right 12 times in a hundred."""
    with pytest.raises(UserError, match=f"must be uint8 .N, H, W, 3. .* not {found}"):
        features_of(pixels)


def test_a_transform_that_is_random_is_refused(images, monkeypatch):
    def cropped(pixels, size, dtype=torch.float32, flips=None):
        first = torch.randint(3, ()).item()
        return data.transform(pixels[:, first : first + 28], size, dtype, flips)

    monkeypatch.setattr(features, "transform", cropped)
    with pytest.raises(UserError, match="another picture each time.* belongs into AUGMENT"):
        for _ in range(20):
            features_of(images)


def test_augmented_pictures_are_drawn_by_epoch_and_position_alone(images):
    prefix, _ = freeze.split(freeze.build("resnet18", 10), "layer1")
    inputs = Features(prefix, images, 32, CPU, torch.float32, True, data.random_crop)
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
    prefix, _ = freeze.split(freeze.build("resnet18", 10), "layer1")
    for wrong in (lambda pixels, _: pixels / 255, lambda pixels, _: pixels[:, 1:]):
        inputs = Features(prefix, images, 32, CPU, torch.float32, True, wrong)
        with pytest.raises(UserError, match="AUGMENT must give uint8 .8, 32, 32, 3."):
            next(inputs.batches(8, generator=data.epoch_generator(0, 1, CPU)))
