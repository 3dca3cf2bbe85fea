"""The room data.py: transforms, the order of an epoch, subsets, CIFAR from its archive."""

import hashlib
import io
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import data
from plumbing import datasets

# ---------------------------------------------------------------- transforms


def random_pixels(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (6, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size, off_by_one", [((32, 32), 0), ((50, 40), 0.02)])
def test_the_published_transforms(size, off_by_one):
    """Resize to 224x224, ToTensor, Normalize with ImageNet's mean and deviation, of PIL images:
    the same, or where sizes are no multiples a share of values that round to the next of 256
    levels."""
    width, height = size
    pixels = random_pixels(height, width)
    steps = [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
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


def test_other_devices_resize_as_pil_does(monkeypatch):
    """Where there is no uint8 kernel the two passes are rounded one by one; tried on the CPU's
    floats."""
    pixels = random_pixels(32, 32)
    expected = data.transform(pixels, 224)

    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    here = data.mean_and_variance(torch.device("cpu"))
    monkeypatch.setattr(data, "mean_and_variance", lambda _: here)
    difference = (data.transform(pixels.as_subclass(Elsewhere), 224) - expected).abs()
    assert difference.max() < 1e-5


def test_a_lower_precision_is_the_same_rounded():
    pixels = datasets.synthetic("test").pixels[:8]
    rounded = data.transform(pixels, 64, torch.bfloat16).float()
    torch.testing.assert_close(rounded, data.transform(pixels, 64), rtol=0, atol=0.02)


# ---------------------------------------------------------------- the order of an epoch


def test_order_and_flips_come_from_seed_and_epoch_alone():
    order, flips = data.epoch_order(1000, seed=3, epoch=7)
    torch.manual_seed(99)
    np.random.seed(99)
    again = data.epoch_order(1000, seed=3, epoch=7)
    assert torch.equal(order, again[0]) and torch.equal(flips, again[1])
    assert order.dtype == torch.int64 and flips.dtype == torch.bool
    assert sorted(order.tolist()) == list(range(1000)) and 400 < flips.sum() < 600
    for seed, epoch in [(3, 8), (4, 7), (7, 3)]:
        other = data.epoch_order(1000, seed, epoch)
        assert not torch.equal(order, other[0]) and not torch.equal(flips, other[1])


# ---------------------------------------------------------------- subsets


def test_a_subset_is_stratified_seeded_and_nested():
    images = datasets.synthetic("train")
    for size in (10, 37, 500, 2000):
        subset = data.stratified_subset(images, size, seed=1)
        counts = torch.bincount(subset.labels, minlength=10)
        assert len(subset.pixels) == len(subset.labels) == size
        assert counts.max() - counts.min() <= 1

    def taken(size: int, seed: int) -> set[bytes]:
        subset = data.stratified_subset(images, size, seed)
        return {image.numpy().tobytes() for image in subset.pixels}

    assert taken(37, 1) == taken(37, 1) < taken(500, 1)
    assert taken(500, 1) != taken(500, 2)


def test_a_subset_of_unequal_classes_keeps_their_shares():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    pixels = torch.zeros(1000, 1, 1, 3, dtype=torch.uint8)
    images = data.Images(pixels, labels, ("a", "b", "c"))
    counts = torch.bincount(data.stratified_subset(images, 100, seed=0).labels)
    assert (counts - torch.tensor([60, 30, 10])).abs().max() <= 2
    assert torch.bincount(data.stratified_subset(images, 3, seed=0).labels).tolist() == [1, 1, 1]


def test_a_subset_keeps_every_picture_with_its_label():
    images = datasets.synthetic("train")
    labels = {}
    for pixels, label in zip(images.pixels, images.labels.tolist()):
        labels[pixels.numpy().tobytes()] = label
    subset = data.stratified_subset(images, 300, seed=2)
    for pixels, label in zip(subset.pixels, subset.labels.tolist()):
        assert labels[pixels.numpy().tobytes()] == label


@pytest.mark.parametrize("size", [0, 9, 2001])
def test_a_subset_that_cannot_be(size):
    with pytest.raises(data.UserError, match=f"from 10 .* to 2000 .*, not {size}"):
        data.stratified_subset(datasets.synthetic("train"), size, seed=0)


# ---------------------------------------------------------------- CIFAR


def packed(folder: str, files: dict[str, dict]) -> tuple[bytes, dict[str, str]]:
    """Pickles in a .tar.gz, and the md5 of each."""
    archive, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            pickled = pickle.dumps(content)
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
            sums[name] = hashlib.md5(pickled).hexdigest()
    return archive.getvalue(), sums


def planes(seed: int) -> np.ndarray:
    """Four random pictures as CIFAR keeps them: a row of red, green and blue each."""
    return np.random.default_rng(seed).integers(0, 256, (4, 3072), np.uint8)


def little_cifar(monkeypatch) -> dict[str, bytes]:
    """Makes torchvision's CIFAR-10 and CIFAR-100 data sets of a few images; gives both archives."""
    ten = {f"data_batch_{i}": {"data": planes(i), "labels": [0, 1, 2, 3]} for i in range(1, 6)}
    ten["test_batch"] = {"data": planes(6), "labels": [3, 2, 1, 0]}
    ten["batches.meta"] = {"label_names": list("abcdefghij")}
    hundred = {
        "train": {"data": planes(7), "fine_labels": [9, 8, 7, 6]},
        "test": {"data": planes(8), "fine_labels": [1, 1, 1, 1]},
        "meta": {"fine_label_names": [f"class{i}" for i in range(100)]},
    }
    archives = {}
    for dataset, files, names in [
        (torchvision.datasets.CIFAR10, ten, "batches.meta"),
        (torchvision.datasets.CIFAR100, hundred, "meta"),
    ]:
        archive, sums = packed(dataset.base_folder, files)
        meta = dataset.meta | {"md5": sums.pop(names)}
        test_list = [[name, md5] for name, md5 in sums.items() if "test" in name]
        train_list = [[name, md5] for name, md5 in sums.items() if "test" not in name]
        monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive).hexdigest())
        monkeypatch.setattr(dataset, "meta", meta)
        monkeypatch.setattr(dataset, "train_list", train_list)
        monkeypatch.setattr(dataset, "test_list", test_list)
        archives[dataset.filename] = archive
    return archives


@pytest.fixture
def archives(monkeypatch):
    return little_cifar(monkeypatch)


def test_cifar_10_as_tensors(archives, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archives["cifar-10-python.tar.gz"])
    train, test = data.cifar(tmp_path), data.cifar(tmp_path, train=False)
    assert train.pixels.shape == (20, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == [0, 1, 2, 3] * 5 and test.labels.tolist() == [3, 2, 1, 0]
    assert train.labels.dtype == torch.int64 and train.classes == tuple("abcdefghij")
    expected = planes(1).reshape(4, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(train.pixels[:4].numpy(), expected) and train.pixels.is_contiguous()


def test_cifar_100_as_tensors(archives, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archives["cifar-100-python.tar.gz"])
    train = data.cifar(tmp_path, "cifar100")
    assert train.labels.tolist() == [9, 8, 7, 6] and len(train.classes) == 100


def test_the_room_alone_downloads_what_is_not_there(archives, server, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    server.files = {f"/{name}": content for name, content in archives.items()}
    assert len(data.cifar(tmp_path).labels) == 20
    assert set(server.asked) == {"/cifar-10-python.tar.gz"}
    server.files.clear()
    assert len(data.cifar(tmp_path, download=False).labels) == 20
