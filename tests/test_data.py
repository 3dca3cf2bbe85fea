"""The room data.py: transforms, the order of an epoch, subsets, CIFAR from its archive."""

import hashlib
import io
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100

import data


def random_pixels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (6, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size, off_by_one", [((32, 32), 0), ((50, 40), 0.02)])
def test_the_published_transforms(size, off_by_one):
    """The same as of PIL images, or where sizes are no multiples a share of values that round to
    the next of 256 levels."""
    width, height = size
    pixels = random_pixels(height, width)
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize((224, 224)), transforms.ToTensor(), normalize]
    textbook = transforms.Compose(steps)
    flips = torch.tensor([True, False, False, True, True, False])
    expected = torch.stack([textbook(Image.fromarray(image.numpy())) for image in pixels])
    mirrored = torch.where(flips.view(-1, 1, 1, 1), expected.flip(3), expected)
    plain, flipped = data.transform(pixels, 224), data.transform(pixels, 224, flips=flips)
    assert plain.dtype == torch.float32
    assert plain.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in [(plain, expected), (flipped, mirrored)]:
        difference = (ours - theirs).abs()
        assert (difference > 1e-5).float().mean() <= off_by_one
        assert difference.max() < 1.01 / 255 / 0.224
    rounded = data.transform(pixels, 224, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), plain, rtol=0, atol=0.02)


def test_other_devices_resize_as_pil_does(monkeypatch):
    """Where there is no uint8 kernel the two passes are rounded one by one; tried on the CPU's
    floats."""

    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    pixels, here = random_pixels(32, 32), data.mean_and_variance(torch.device("cpu"))
    monkeypatch.setattr(data, "mean_and_variance", lambda _: here)
    found = data.transform(pixels.as_subclass(Elsewhere), 224)
    assert (found - data.transform(pixels, 224)).abs().max() < 1e-5


def test_order_and_flips_come_from_seed_and_epoch_alone():
    order, flips = data.epoch_order(1000, seed=3, epoch=7)
    torch.manual_seed(99)
    np.random.seed(99)
    again = data.epoch_order(1000, seed=3, epoch=7)
    assert all(map(torch.equal, (order, flips), again))
    assert sorted(order.tolist()) == list(range(1000)) and 400 < flips.sum() < 600
    for seed, epoch in [(3, 8), (4, 7), (7, 3)]:
        other = data.epoch_order(1000, seed, epoch)
        assert not torch.equal(order, other[0]) and not torch.equal(flips, other[1])


def numbered(*counts: int) -> data.Images:
    """So many images of each class, each with its number for a pixel."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return data.Images(torch.arange(sum(counts)), labels, tuple("abcdefghij"[: len(counts)]))


def test_a_subset_is_seeded_and_nested_and_keeps_each_image_s_label():
    images, taken = numbered(*[200] * 10), []
    for size, seed in [(37, 1), (37, 1), (500, 1), (500, 2)]:
        subset = data.stratified_subset(images, size, seed)
        assert torch.equal(subset.labels, images.labels[subset.pixels])
        taken.append(set(subset.pixels.tolist()))
        assert len(taken[-1]) == size
    assert taken[0] == taken[1] < taken[2] != taken[3]


@pytest.mark.parametrize("expected, off", [([60, 30, 10], 2), ([1, 1, 1], 0)])
def test_a_subset_keeps_the_classes_shares_and_one_of_each(expected, off):
    subset = data.stratified_subset(numbered(600, 300, 100), sum(expected), seed=0)
    counts = torch.bincount(subset.labels)
    assert (counts - torch.tensor(expected)).abs().max() <= off and counts.sum() == sum(expected)


@pytest.mark.parametrize("size", [0, 2, 10])
def test_a_subset_that_cannot_be(size):
    with pytest.raises(data.UserError, match=f"from 3 .* to 9 .*, not {size}"):
        data.stratified_subset(numbered(3, 3, 3), size, seed=0)


def planes(seed: int) -> np.ndarray:
    """Four random pictures as CIFAR keeps them: a row of red, green and blue each."""
    return np.random.default_rng(seed).integers(0, 256, (4, 3072), np.uint8)


def little_cifar(monkeypatch) -> list[bytes]:
    """Makes torchvision's CIFAR-10 and CIFAR-100 data sets of a few images; gives both archives."""
    ten = {f"data_batch_{i}": {"data": planes(i), "labels": [0, 1, 2, 3]} for i in range(1, 6)}
    ten["test_batch"] = {"data": planes(6), "labels": [3, 2, 1, 0]}
    ten["batches.meta"] = {"label_names": list("abcdefghij")}
    hundred = {"meta": {"fine_label_names": [f"class{i}" for i in range(100)]}}
    for number, split in ((7, "train"), (8, "test")):
        hundred[split] = {"data": planes(number), "fine_labels": [9, 8, 7, 6]}
    archives = []
    for dataset, files in ((CIFAR10, ten), (CIFAR100, hundred)):
        archive, lists = io.BytesIO(), {"train": [], "test": []}
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            for name, content in files.items():
                pickled = pickle.dumps(content)
                member = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
                member.size = len(pickled)
                tar.addfile(member, io.BytesIO(pickled))
                md5 = hashlib.md5(pickled).hexdigest()
                if "meta" in name:
                    monkeypatch.setattr(dataset, "meta", dataset.meta | {"md5": md5})
                else:
                    split = "test" if "test" in name else "train"
                    lists[split].append([name, md5])
        archives.append(archive.getvalue())
        monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archives[-1]).hexdigest())
        monkeypatch.setattr(dataset, "train_list", lists["train"])
        monkeypatch.setattr(dataset, "test_list", lists["test"])
    return archives


def test_the_room_alone_downloads_what_is_not_there(server, monkeypatch, tmp_path):
    ten, _ = little_cifar(monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    server.files = {"/cifar-10-python.tar.gz": ten}
    train = data.cifar(tmp_path)
    assert set(server.asked) == {"/cifar-10-python.tar.gz"}
    assert train.pixels.shape == (20, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == [0, 1, 2, 3] * 5 and train.labels.dtype == torch.int64
    expected = planes(1).reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train.pixels[:4].numpy(), expected) and train.pixels.is_contiguous()
    server.files.clear()
    test = data.cifar(tmp_path, train=False, download=False)
    assert test.labels.tolist() == [3, 2, 1, 0] and test.classes == tuple("abcdefghij")
