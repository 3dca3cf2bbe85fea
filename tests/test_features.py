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


@pytest.fixture
def images():
    return datasets.synthetic("test").pixels[:20]


@pytest.fixture(scope="module")
def prefix():
    return freeze.split(freeze.build("resnet18", 10), "layer3")[0]


def features_of(prefix, images, dtype=torch.float32, mirrored=True, augment=None) -> Features:
    return Features(prefix, images, 32, CPU, dtype, mirrored, augment)


@pytest.mark.parametrize(
    "dtype, close", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_a_lookup_gives_what_computing_gives(prefix, images, dtype, close):
    inputs = features_of(prefix, images, dtype)
    indices, flips = torch.tensor([3, 19, 3, 0]), torch.tensor([True, False, False, True])
    computed = inputs(indices, flips), inputs(indices)
    estimate = inputs.bytes  # known before it is allocated
    inputs.fill(CPU)
    inputs.prefix = None  # which is not run again
    assert inputs.store.nbytes == estimate and inputs.store.dtype == dtype
    assert len(inputs.store) == 40 and inputs.store.shape == inputs.shape
    for found, expected in zip((inputs(indices, flips), inputs(indices)), computed):
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(inputs(indices[:1], flips[:1]), inputs(indices[:1], ~flips[:1]))


@pytest.mark.parametrize("filled", [True, False])
def test_batches_are_the_prefix_of_the_pictures_in_order(prefix, images, filled):
    inputs = features_of(prefix, images)
    if filled:
        inputs.fill(CPU)
    order, flips = data.epoch_order(20, 0, 1)
    with torch.no_grad():
        expected = prefix(data.transform(images, 32, flips=flips))
        plain = prefix(data.transform(images, 32))
    for size in (8, [8, 8, 4]):
        batches = list(inputs.batches(size, order, flips))
        assert [len(batch) for batch in batches] == [8, 8, 4]
        torch.testing.assert_close(torch.cat(batches), expected[order], rtol=1e-4, atol=1e-5)
    found = torch.cat(list(inputs.batches(8)))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", [nn.AvgPool2d(16), nn.Sequential()], ids=["pool", "nothing"])
def test_the_prefix_may_be_any_module(prefix):
    pixels = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8)
    inputs = features_of(prefix, pixels)
    inputs.fill(CPU)
    expected = prefix(data.transform(pixels, 32))
    torch.testing.assert_close(inputs(torch.arange(5)), expected)
    torch.testing.assert_close(inputs(torch.arange(5), torch.ones(5) > 0), expected.flip(3))


def test_filling_goes_through_what_shows_how_far_it_is_and_prints_nothing(images, capsys):
    seen = []

    def shown(chunks):
        for chunk in chunks:
            seen.append(len(chunk))
            yield chunk

    inputs = features_of(nn.AvgPool2d(16), images)
    store = torch.empty(inputs.shape)
    inputs.fill(CPU, shown, store)
    assert seen == [16, 16, 8] and inputs.store is store
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
        features_of(nn.Sequential(), pixels)


def test_a_transform_that_is_random_is_refused(images, monkeypatch):
    def cropped(pixels, size, dtype=torch.float32, flips=None):
        first = torch.randint(3, ()).item()
        return data.transform(pixels[:, first : first + 28], size, dtype, flips)

    monkeypatch.setattr(features, "transform", cropped)
    with pytest.raises(UserError, match="another picture each time.* belongs into AUGMENT"):
        for _ in range(20):
            features_of(nn.Sequential(), images)


def test_augmented_pictures_are_drawn_by_epoch_and_position_alone(images):
    inputs = features_of(nn.Sequential(), images, augment=data.random_crop)
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
        inputs = features_of(nn.Sequential(), images, augment=wrong)
        with pytest.raises(UserError, match="AUGMENT must give uint8 .8, 32, 32, 3."):
            next(inputs.batches(8, generator=data.epoch_generator(0, 1, CPU)))
