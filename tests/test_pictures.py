"""Folders of pictures as people have them."""

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from data import UserError
from plumbing import datasets, pictures


def picture(path, size=(20, 16), mode="RGB", seed=0, **options) -> np.ndarray:
    """Writes a random picture; gives its RGB pixels as PIL reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return np.asarray(Image.open(path).convert("RGB"))


def first(folder, image_size: int = 224) -> np.ndarray:
    """The first training picture, uint8 [height, width, 3]."""
    return pictures.folder(folder, "train", image_size).pixels[0].numpy()


def test_pictures_of_one_small_size_stay_as_they_are(tmp_path):
    one = picture(tmp_path / "train/cat/1.png")
    two = picture(tmp_path / "train/dog/1.png", seed=1)
    test = picture(tmp_path / "val/dog/1.png", seed=2)
    images = datasets.load("folder", "train", tmp_path, 224)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    assert np.array_equal(images.pixels.numpy(), [one, two])
    held_out = datasets.load(
        "folder", "test", tmp_path, 224, images.classes
    )  # val/ serves as test/
    assert held_out.labels.tolist() == [1] and np.array_equal(held_out.pixels.numpy(), [test])


@pytest.mark.parametrize(
    "mode, suffix",
    [
        *(("L", "png"), ("RGBA", "png"), ("P", "png"), ("1", "png"), ("LA", "png")),
        *(("CMYK", "jpg"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("P", "tif")),
    ],
)
def test_pictures_of_any_mode(tmp_path, mode, suffix):
    expected = picture(tmp_path / f"train/a/1.{suffix}", mode=mode)
    assert np.array_equal(first(tmp_path), expected)


def test_pictures_of_several_or_large_sizes_are_resized_once_as_torchvision_does(tmp_path):
    small = picture(tmp_path / "train/a/1.png", (20, 16))
    large = picture(tmp_path / "train/a/2.png", (90, 50))
    picture(tmp_path / "test/a/1.png", (90, 50))
    images = pictures.folder(tmp_path, "train", 64)
    resize = transforms.Resize((64, 64))
    expected = [np.asarray(resize(Image.fromarray(pixels))) for pixels in (small, large)]
    assert np.array_equal(images.pixels.numpy(), expected)
    test = pictures.folder(tmp_path, "test", 64)  # all of one size, but a larger one
    assert test.pixels.shape == (1, 64, 64, 3)


def test_many_large_pictures_keep_their_order(tmp_path):
    """They are read by several threads."""
    expected = []
    for number in range(12):
        expected.append(picture(tmp_path / f"train/a/{number:02}.png", (90, 80), seed=number))
    assert np.array_equal(pictures.folder(tmp_path, "train", 90).pixels.numpy(), expected)


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "train/a/1.png")
    assert np.array_equal(first(tmp_path)[..., 1], ramp >> 8)


def test_a_telephone_s_picture_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    stored = picture(tmp_path / "train/a/1.jpg", (20, 16), exif=exif)
    assert np.array_equal(first(tmp_path), np.rot90(stored, -1))


def test_folders_that_are_not_a_data_set(tmp_path):
    with pytest.raises(UserError, match="no .*/train: --dataset folder reads DIR/train"):
        pictures.folder(tmp_path, "train", 224)
    picture(tmp_path / "train/cat/1.png")
    with pytest.raises(UserError, match="no .*/test or .*/val:"):
        pictures.folder(tmp_path, "test", 224)
    picture(tmp_path / "test/dog/1.png")
    picture(tmp_path / "test/cat/1.png")
    with pytest.raises(UserError, match="test has classes the training set lacks: dog"):
        pictures.folder(tmp_path, "test", 224, classes=("cat",))
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        pictures.folder(tmp_path, "train", 224)


@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    picture(tmp_path / "train/cat/1.png")
    broken = tmp_path / "train/cat/2.png"
    picture(broken)
    whole = broken.read_bytes()
    broken.write_bytes({"empty": b"", "text": b"not a picture", "truncated": whole[:300]}[content])
    with pytest.raises(UserError, match="cannot read the picture .*cat/2.png"):
        pictures.folder(tmp_path, "train", 224)


def test_links_that_lead_nowhere_or_round_in_a_circle(tmp_path):
    picture(tmp_path / "train/cat/1.png")
    (tmp_path / "train/cat/2.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match="cannot read the picture .*cat/2.png"):
        pictures.folder(tmp_path, "train", 224)
    (tmp_path / "train/cat/2.png").unlink()
    (tmp_path / "train/cat/again").symlink_to("..")
    with pytest.raises(UserError, match="in a circle: .*again"):
        pictures.folder(tmp_path, "train", 224)


def test_a_full_memory_is_not_blamed_on_a_picture(tmp_path, monkeypatch):
    picture(tmp_path / "train/cat/1.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(pictures.ImageOps, "exif_transpose", full)
    with pytest.raises(MemoryError):
        pictures.folder(tmp_path, "train", 224)
