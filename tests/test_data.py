"""Data sets, transforms and downloads. The only server asked is one on this machine."""

import hashlib
import io
import os
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

import data

# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("size, off_by_one", [((32, 32), 0), ((50, 40), 0.02)])
def test_the_published_transforms(size, off_by_one):
    """Resize to 224x224, ToTensor, Normalize with ImageNet's mean and deviation, of PIL images:
    the same, or where sizes are no multiples a share of values that round to the next of 256 levels."""
    width, height = size
    pixels = torch.randint(256, (6, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    textbook = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(),
                                   transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    flips = torch.tensor([True, False, False, True, True, False])
    pictures = [Image.fromarray(image.numpy()) for image in pixels]
    expected = torch.stack([textbook(picture) for picture in pictures])
    mirrored = torch.where(flips.view(-1, 1, 1, 1), expected.flip(3), expected)
    plain, flipped = data.transform(pixels, 224), data.transform(pixels, 224, flips=flips)
    assert plain.dtype == torch.float32 and plain.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in [(plain, expected), (flipped, mirrored)]:
        difference = (ours - theirs).abs()
        assert (difference > 1e-5).float().mean() <= off_by_one and difference.max() < 1.01 / 255 / 0.224


def test_other_devices_resize_as_pil_does(monkeypatch):
    """Where there is no uint8 kernel the two passes are rounded one by one; tried on the CPU's floats."""
    pixels = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = data.transform(pixels, 224)

    class Elsewhere(torch.Tensor):
        device = SimpleNamespace(type="cuda")

    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.Tensor(values))
    difference = (data.transform(pixels.as_subclass(Elsewhere), 224) - expected).abs()
    assert difference.max() < 1e-5


def test_a_lower_precision_is_the_same_rounded():
    pixels = data.synthetic("test").pixels[:8]
    torch.testing.assert_close(data.transform(pixels, 64, torch.bfloat16).float(), data.transform(pixels, 64),
                               rtol=0, atol=0.02)


# ---------------------------------------------------------------- subsets and drawn pictures


def test_a_subset_is_stratified_seeded_and_nested():
    images = data.synthetic("train")
    for size in (10, 37, 500, 2000):
        subset = data.stratified_subset(images, size, seed=1)
        counts = torch.bincount(subset.labels, minlength=10)
        assert len(subset.pixels) == len(subset.labels) == size and counts.max() - counts.min() <= 1

    def taken(size: int, seed: int) -> set[bytes]:
        return {image.numpy().tobytes() for image in data.stratified_subset(images, size, seed).pixels}

    assert taken(37, 1) == taken(37, 1) < taken(500, 1)
    assert taken(500, 1) != taken(500, 2)


def test_a_subset_of_unequal_classes_keeps_their_shares():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)
    images = data.Images(torch.zeros(1000, 1, 1, 3, dtype=torch.uint8), labels, ("a", "b", "c"))
    counts = torch.bincount(data.stratified_subset(images, 100, seed=0).labels)
    assert (counts - torch.tensor([60, 30, 10])).abs().max() <= 2
    assert torch.bincount(data.stratified_subset(images, 3, seed=0).labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [0, 9, 2001])
def test_a_subset_that_cannot_be(size):
    with pytest.raises(ValueError, match="from 10 .* to 2000"):
        data.stratified_subset(data.synthetic("train"), size, seed=0)


def test_drawn_pictures_are_balanced_and_the_same_every_time():
    train, again, test = data.synthetic("train"), data.synthetic("train"), data.synthetic("test")
    assert train.pixels.shape == (2000, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    assert torch.bincount(train.labels).tolist() == [200] * 10 and len(train.classes) == 10
    assert not {i.numpy().tobytes() for i in train.pixels} & {i.numpy().tobytes() for i in test.pixels}


def test_an_unknown_data_set():
    with pytest.raises(ValueError, match="cifar10, cifar100, folder, synthetic"):
        data.load("mnist", "train")


# ---------------------------------------------------------------- your own pictures


def picture(path, size=(20, 16), mode="RGB", seed=0, **options) -> np.ndarray:
    """Writes a random picture; gives its RGB pixels as PIL reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return np.asarray(Image.open(path).convert("RGB"))


def test_pictures_of_one_small_size_stay_as_they_are(tmp_path):
    one = picture(tmp_path / "train/cat/1.png")
    two = picture(tmp_path / "train/dog/1.png", seed=1)
    test = picture(tmp_path / "val/dog/1.png", seed=2)
    images = data.load("folder", "train", tmp_path, 224)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    assert np.array_equal(images.pixels.numpy(), [one, two])
    held_out = data.load("folder", "test", tmp_path, 224, images.classes)  # val/ serves as test/
    assert held_out.labels.tolist() == [1] and np.array_equal(held_out.pixels.numpy(), [test])


@pytest.mark.parametrize("mode, suffix", [("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png"),
                                          ("CMYK", "jpg"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("P", "tif")])
def test_pictures_of_any_mode(tmp_path, mode, suffix):
    expected = picture(tmp_path / f"train/a/1.{suffix}", mode=mode)
    assert np.array_equal(data.load("folder", "train", tmp_path).pixels[0].numpy(), expected)


def test_pictures_of_several_or_large_sizes_are_resized_once_as_torchvision_does(tmp_path):
    small = picture(tmp_path / "train/a/1.png", (20, 16))
    large = picture(tmp_path / "train/a/2.png", (90, 50))
    picture(tmp_path / "test/a/1.png", (90, 50))
    images = data.load("folder", "train", tmp_path, 64)
    resize = transforms.Resize((64, 64))
    assert np.array_equal(images.pixels.numpy(), [np.asarray(resize(Image.fromarray(p))) for p in (small, large)])
    assert data.load("folder", "test", tmp_path, 64).pixels.shape == (1, 64, 64, 3)  # all one size, but larger


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "train/a/1.png")
    assert np.array_equal(data.load("folder", "train", tmp_path).pixels[0, ..., 1].numpy(), ramp >> 8)


def test_a_telephone_s_picture_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    stored = picture(tmp_path / "train/a/1.jpg", (20, 16), exif=exif)
    assert np.array_equal(data.load("folder", "train", tmp_path).pixels[0].numpy(), np.rot90(stored, -1))


def test_folders_that_are_not_a_data_set(tmp_path):
    with pytest.raises(OSError, match="no .*/train: --dataset folder reads DIR/train"):
        data.load("folder", "train", tmp_path)
    picture(tmp_path / "train/cat/1.png")
    with pytest.raises(OSError, match="no .*/test or .*/val:"):
        data.load("folder", "test", tmp_path)
    picture(tmp_path / "test/dog/1.png")
    picture(tmp_path / "test/cat/1.png")
    with pytest.raises(ValueError, match="test has classes the training set lacks: dog"):
        data.load("folder", "test", tmp_path, classes=("cat",))
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(OSError, match="empty"):
        data.load("folder", "train", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    picture(tmp_path / "train/cat/1.png")
    broken = tmp_path / "train/cat/2.png"
    picture(broken)
    broken.write_bytes(broken.read_bytes()[:300] if content is None else content)  # None: truncated
    with pytest.raises(OSError, match="cannot read the picture .*cat/2.png"):
        data.load("folder", "train", tmp_path)


# ---------------------------------------------------------------- CIFAR


@pytest.fixture
def tiny_cifar(monkeypatch, server):
    """CIFAR-10 and CIFAR-100 of a few images, at two mirrors and an official host that all are `server`."""

    def archive(folder: str, files: dict[str, dict]) -> tuple[bytes, dict[str, str]]:
        packed, sums = io.BytesIO(), {}
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            for name, content in files.items():
                content = pickle.dumps(content)
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                sums[name] = hashlib.md5(content).hexdigest()
        return packed.getvalue(), sums

    def batch(seed: int, labels: dict) -> dict:
        return {"data": np.random.default_rng(seed).integers(0, 256, (4, 3072), np.uint8), **labels}

    ten = {f"data_batch_{i}": batch(i, {"labels": [0, 1, 2, 3]}) for i in range(1, 6)}
    ten |= {"test_batch": batch(6, {"labels": [3, 2, 1, 0]}), "batches.meta": {"label_names": list("abcdefghij")}}
    hundred = {"train": batch(7, {"fine_labels": [9, 8, 7, 6]}), "test": batch(8, {"fine_labels": [1, 1, 1, 1]}),
               "meta": {"fine_label_names": [f"class{i}" for i in range(100)]}}
    archives = {}
    for cifar, files, key in [(datasets.CIFAR10, ten, "batches.meta"), (datasets.CIFAR100, hundred, "meta")]:
        packed, sums = archive(cifar.base_folder, files)
        archives[cifar.filename] = packed
        monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(packed).hexdigest())
        monkeypatch.setattr(cifar, "url", f"{server.url}/official/{cifar.filename}")
        monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums.pop(key)})
        for split, names in [("train_list", [n for n in sums if "test" not in n]), ("test_list", [n for n in sums if "test" in n])]:
            monkeypatch.setattr(cifar, split, [[name, sums[name]] for name in names])
    monkeypatch.setitem(data.MIRRORS, "cifar10", [f"{server.url}/mirror1", f"{server.url}/mirror2"])
    server.ten, server.hundred = archives.values()
    return server


def files_in(folder) -> set[str]:
    return {os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(folder) for file in files}


def test_cifar_comes_from_the_first_mirror_once(tiny_cifar, tmp_path):
    tiny_cifar.files["/mirror1"] = tiny_cifar.ten
    train, test = (data.load("cifar10", split, tmp_path / "new") for split in ("train", "test"))
    assert train.pixels.shape == (20, 32, 32, 3) and train.pixels.dtype == torch.uint8
    assert train.labels.tolist() == [0, 1, 2, 3] * 5 and test.labels.tolist() == [3, 2, 1, 0]
    assert train.labels.dtype == torch.int64 and train.classes == tuple("abcdefghij")
    planes = np.random.default_rng(1).integers(0, 256, (4, 3072), np.uint8).reshape(4, 3, 32, 32)
    assert np.array_equal(train.pixels[:4].numpy(), planes.transpose(0, 2, 3, 1)) and train.pixels.is_contiguous()
    assert tiny_cifar.asked == ["/mirror1"]


def test_a_data_dir_that_cannot_be_is_not_blamed_on_the_servers(tiny_cifar, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=str(tmp_path / "file")) as failure:
        data.load("cifar10", "train", tmp_path / "file")
    assert "mirror" not in str(failure.value) and not tiny_cifar.asked


def test_cifar100(tiny_cifar, tmp_path):
    tiny_cifar.files["/official/cifar-100-python.tar.gz"] = tiny_cifar.hundred
    train = data.load("cifar100", "train", tmp_path)
    assert train.labels.tolist() == [9, 8, 7, 6] and len(train.classes) == 100


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut", "silent"])
def test_a_mirror_that_fails_is_passed_over(tiny_cifar, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(data, "SILENCE", 0.5)
    if fault == "wrong bytes":
        tiny_cifar.files["/mirror1"] = b"<html>a login page</html>"
    elif fault != "missing":
        tiny_cifar.files["/mirror1"] = tiny_cifar.ten
        (tiny_cifar.cut if fault == "cut" else tiny_cifar.silent).add("/mirror1")
    tiny_cifar.files["/mirror2"] = tiny_cifar.ten
    assert len(data.load("cifar10", "train", tmp_path).labels) == 20
    assert tiny_cifar.asked == ["/mirror1", "/mirror2"]
    folder = {f"cifar-10-batches-py/{name}" for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]}
    assert files_in(tmp_path) == folder | {"cifar-10-python.tar.gz"}


def test_all_sources_failing_says_which_and_what_to_do_and_leaves_nothing(tiny_cifar, tmp_path):
    tiny_cifar.files["/mirror2"] = tiny_cifar.ten
    tiny_cifar.cut.add("/mirror2")
    with pytest.raises(OSError) as failure:
        data.load("cifar10", "train", tmp_path / "new")
    message = str(failure.value)
    for part in ("/mirror1: HTTP Error 404", "/mirror2: ", "/official/cifar-10-python.tar.gz: HTTP Error 404",
                 f"Put that file (md5 {datasets.CIFAR10.tgz_md5}) into {tmp_path / 'new'}", "--dataset synthetic"):
        assert part in message
    assert files_in(tmp_path) == set()


def test_an_archive_put_there_by_hand_is_used_and_a_damaged_one_replaced(tiny_cifar, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tiny_cifar.ten)
    assert len(data.load("cifar10", "train", tmp_path).labels) == 20 and not tiny_cifar.asked
    batch = tmp_path / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(batch.read_bytes()[:100])  # an unpacking cut short: unpacked again
    assert len(data.load("cifar10", "train", tmp_path).labels) == 20 and not tiny_cifar.asked
    batch.unlink()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tiny_cifar.ten[:500])
    tiny_cifar.files["/mirror1"] = tiny_cifar.ten
    assert len(data.load("cifar10", "train", tmp_path).labels) == 20 and tiny_cifar.asked == ["/mirror1"]


# ---------------------------------------------------------------- the terminal


@pytest.mark.parametrize("columns", ["0", "40", "200"])
def test_progress_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(data, "_last_shown", 0)
    data.progress("a long line, " * 20)
    data.progress()
    shown = capsys.readouterr().out.split("\r")
    assert max(map(len, shown)) < (int(columns) or 81) and shown[1].startswith("a long line") and not shown[-2].strip()
