"""Folders of pictures as people have them: which files are pictures, and how one is opened."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from torchvision import transforms

from data import UserError, open_picture, read_picture
from plumbing import datasets, pictures

ORIENTATION, RESOLUTION, UNIT = 0x0112, 0x011A, 0x0128  # EXIF tags


def picture(path, size=(20, 16), mode="RGB", seed=0, **options) -> np.ndarray:
    """Writes a random picture; gives its RGB pixels as PIL reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return np.asarray(Image.open(path).convert("RGB"))


def data_set(root: Path, *names: str) -> Path:
    """Pictures by these names, each another one; by default two classes, two splits."""
    usual = "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"
    for seed, name in enumerate(names or usual):
        picture(root / name, seed=seed)
    return root


def refused(root: Path, split: str = "train", **more) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(UserError) as failure:
        pictures.folder(root, split, 224, **more)
    return str(failure.value)


def first(folder, image_size: int = 224) -> np.ndarray:
    """The first training picture, uint8 [height, width, 3]."""
    return pictures.folder(folder, "train", image_size).pixels[0].numpy()


@pytest.fixture(autouse=True)
def said_anew(monkeypatch):
    """What is said once is said anew in each test, and no test is too slow to be silent."""
    pictures.say_once.cache_clear()
    monkeypatch.setattr(pictures, "progress", lambda items, *_: items)


# ---------------------------------------------------------------- sizes


def test_pictures_of_one_small_size_stay_as_they_are_and_in_order(tmp_path):
    expected = []
    for label in ("cat", "dog"):
        for number in range(6):  # which several threads read
            file = tmp_path / f"train/{label}/{number}.png"
            expected.append(picture(file, seed=len(expected)))
    test = picture(tmp_path / "val/dog/1.png", seed=50)
    images = datasets.load("folder", "train", tmp_path, 20)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(images.pixels.numpy(), expected)
    held_out = datasets.load("folder", "test", tmp_path, 20, images.classes)
    assert held_out.labels.tolist() == [1] and np.array_equal(held_out.pixels.numpy(), [test])


@pytest.mark.parametrize("sizes", [((20, 16), (90, 50)), ((90, 50), (90, 50))])
def test_pictures_of_several_or_large_sizes_are_resized_as_torchvision_does(tmp_path, sizes):
    resize, expected = transforms.Resize((64, 64)), []
    for number, size in enumerate(sizes):
        pixels = picture(tmp_path / f"train/a/{number}.png", size, seed=number)
        expected.append(np.asarray(resize(Image.fromarray(pixels))))
    images = pictures.folder(tmp_path, "train", 64)
    assert np.array_equal(images.pixels.numpy(), expected)


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    tmp_path, monkeypatch
):
    data_set(tmp_path)
    monkeypatch.setattr(pictures, "free_memory", lambda *_: 1900)
    monkeypatch.setattr(pictures, "open_picture", None)
    message = refused(tmp_path)
    assert "2 pictures of 20x16 take 0.0 GB" in message and "--image-size" in message


# ---------------------------------------------------------------- which folders are splits


@pytest.mark.parametrize("train, test", [("train", "val"), ("Train", "Test"), ("TRAINING", "test")])
def test_a_split_s_usual_names_are_taken_and_said(tmp_path, capsys, train, test):
    data_set(tmp_path, f"{train}/cat/1.png", f"{test}/cat/1.png", f"{test}/cat/2.png")
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 1
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 2
    assert capsys.readouterr().out == f"test pictures from {tmp_path / test}\n"


def test_beside_test_val_is_to_validate_on(tmp_path):
    data_set(tmp_path, "train/cat/1.png", "val/cat/1.png", "val/cat/2.png", "test/cat/1.png")
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 1
    assert len(pictures.folder(tmp_path, "val", 224).labels) == 2


def test_a_heap_of_test_pictures_is_to_be_named_and_val_is_for_the_test(tmp_path, capsys):
    data_set(tmp_path, "train/cat/1.png", "val/cat/1.png", "test/1.png", "test/2.png")
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 1
    heap, test = capsys.readouterr().out.splitlines()
    assert f"evaluate.py --image {tmp_path / 'test'}" in heap
    assert test == f"test pictures from {tmp_path / 'val'}"
    assert "val" not in pictures.split_folders(tmp_path)


def test_accents_are_the_same_however_a_system_writes_them(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data_set(tmp_path, f"train/{composed}/1.png", f"train/{decomposed}/2.png", "train/tea/1.png")
    images = pictures.folder(tmp_path, "train", 224)
    assert images.classes == (composed, "tea") and images.labels.tolist() == [0, 0, 1]


def test_without_a_split_the_folders_that_are_there_are_named(tmp_path):
    assert "only no folders: --dataset folder reads DIR/train" in refused(tmp_path)
    data_set(tmp_path, "cat/1.png", "dog/1.png", ".git/1.png")
    message = refused(tmp_path)
    assert "only cat, dog:" in message and "--test-share 0.2" in message


@pytest.mark.parametrize("closed", [".", "train", "train/cat"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, closed):
    data_set(tmp_path)
    scandir = os.scandir

    def guarded(path):
        if Path(path) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", guarded)
        message = refused(tmp_path)
    assert f"cannot read the folder {tmp_path / closed} (Permission denied)" in message


def test_classes_that_are_missing_or_strange_are_named(tmp_path):
    data_set(tmp_path)
    message = refused(tmp_path, "test", classes=("cat",))
    assert "test has classes the training set lacks: dog" in message
    (tmp_path / "train/empty").mkdir()
    assert "train: no pictures of empty (read: .avif" in refused(tmp_path)


def test_a_test_folder_may_lack_a_class_but_not_all_pictures(tmp_path):
    data_set(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/dog/1.png")
    (tmp_path / "test/cat").mkdir()
    assert pictures.folder(tmp_path, "test", 224, ("cat", "dog")).labels.tolist() == [1]
    (tmp_path / "test/dog/1.png").rename(tmp_path / "test/1.png")
    assert "test: no pictures of cat, dog" in refused(tmp_path, "test")
    (tmp_path / "test/1.png").unlink()
    assert "test holds no pictures" in refused(tmp_path, "test")


def test_pictures_that_lie_deeper_are_refused_and_a_circle_of_links_is(tmp_path):
    data_set(tmp_path, "train/cat/1.png", "train/animals/pets/cats/1.JPG")
    message = f"pictures lie deeper than {tmp_path / 'train'}/<class>/"
    assert refused(tmp_path).startswith(f"{message}: {tmp_path}/train/animals/pets/cats/1.JPG")
    data_set(tmp_path / "other", "train/cat/1.png")
    (tmp_path / "other/train/cat/again").symlink_to("..")
    assert "train/cat/again" in refused(tmp_path / "other")


# ---------------------------------------------------------------- a share for the test


def shares(root: Path, share: float):
    train = pictures.folder(root, "train", 224, test_share=share)
    return train, pictures.folder(root, "test", 224, train.classes, share)


def many(root: Path) -> Path:
    """Ten pictures of each of two classes, no two the same."""
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(10)]
    return data_set(root, *names)


@pytest.mark.parametrize("under", ["", "Training"])
def test_a_share_of_each_class_is_for_the_test_and_the_rest_is_trained_on(tmp_path, capsys, under):
    many(tmp_path / under)
    train, test = shares(tmp_path, 0.2)
    assert train.labels.bincount().tolist() == [8, 8] and test.labels.bincount().tolist() == [2, 2]
    assert "--test-share 0.2: 4 of 20 pictures" in capsys.readouterr().out
    everything = [pixels.numpy().tobytes() for pixels in (*train.pixels, *test.pixels)]
    assert len(set(everything)) == 20
    again = pictures.folder(tmp_path, "test", 224, train.classes, 0.2)
    assert again.pixels.equal(test.pixels)


def test_a_small_share_is_one_picture_of_each_class(tmp_path):
    train, test = shares(many(tmp_path), 0.01)
    assert test.labels.tolist() == [0, 1] and len(train.labels) == 18


def test_a_share_that_cannot_be_is_refused(tmp_path):
    many(tmp_path)
    picture(tmp_path / "horse/only.png")
    assert "leaves no pictures to train on of horse" in refused(tmp_path, test_share=0.2)
    data_set(tmp_path, "train/cat/1.png", "Val/cat/1.png")
    message = refused(tmp_path, test_share=0.2)
    assert "--test-share" in message and str(tmp_path / "Val") in message


# ---------------------------------------------------------------- which files are pictures


def test_what_is_left_out_is_counted_by_ending(tmp_path, capsys):
    data_set(tmp_path)
    stray = [".ipynb_checkpoints/0.png", "cat/._1.png", "__MACOSX/1.png", "cat/Thumbs.db"]
    for name in [*stray, "cat/1.heic", "cat/2.HEIC", "dog/3.heic", "cat/README", "list.txt"]:
        file = tmp_path / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    picture(tmp_path / "train/1.png")
    images = pictures.folder(tmp_path, "train", 224)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    start = f"left out of {tmp_path / 'train'}: "
    assert capsys.readouterr().out.splitlines() == [
        f"{start}4 hidden or system, 3 .heic, 1 .txt, 1 without an ending",
        f"{start}1 pictures in no class",
    ]


def test_every_ending_that_is_read_is_one_that_pillow_knows():
    Image.init()
    assert not pictures.ENDINGS - Image.EXTENSION.keys() - {".avif"}
    endings = "jpg JPG jpeg jfif PNG bmp gif webp avif tif ppm"
    assert {f".{ending.lower()}" for ending in endings.split()} <= pictures.ENDINGS


# ---------------------------------------------------------------- opening one


@pytest.mark.parametrize(
    "mode, suffix", [("L", "PNG"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "webp")]
)
def test_pictures_of_any_mode(tmp_path, mode, suffix):
    expected = picture(tmp_path / f"train/a/1.{suffix}", mode=mode)
    assert np.array_equal(first(tmp_path), expected)


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp")])
def test_a_transparent_picture_is_put_on_white_and_that_is_said_once(
    tmp_path, capsys, mode, suffix
):
    shape = np.zeros((16, 20, 4), np.uint8)
    shape[4:8, 5:9, 3] = 255
    shape[9:, :, 3] = 128
    (tmp_path / "train/a").mkdir(parents=True)
    for name in ("1", "2"):
        Image.fromarray(shape).convert(mode).save(
            f"{tmp_path}/train/a/{name}.{suffix}", quality=100
        )
    expected = np.full((16, 20, 3), 255)
    expected[4:8, 5:9] = 0
    expected[9:] = 127
    assert np.array_equal(first(tmp_path), expected)
    assert capsys.readouterr().out == "transparent pictures are put on white\n"


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_a_colour_that_means_nothing_is_white(tmp_path, mode):
    drawn = np.zeros((9, 9, 3), np.uint8)
    drawn[2:4, 2:4] = 200
    image, nothing = Image.fromarray(drawn), (0, 0, 0)
    if mode == "P":
        image, nothing = image.convert("L").convert(mode), 0
    image.save(tmp_path / "a.png", transparency=nothing)
    seen = read_picture(tmp_path / "a.png")[0]
    assert (seen[0, 0] == 255).all() and (seen[2, 2] < 255).all()


def test_what_is_opaque_is_not_said_to_be_transparent(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 0, 255)).save(tmp_path / "opaque.png")
    image, transparent = open_picture(tmp_path / "opaque.png")
    assert not transparent and image.getextrema() == ((0, 0),) * 3


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "train/a/1.png")
    assert np.array_equal(first(tmp_path)[..., 1], ramp >> 8)


def deep_png(file: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits in colour, which PIL does not write. pixels: uint16 [H, W, 3]."""
    height, width, _ = pixels.shape
    lines = [b"\0" + line.astype(">u2").tobytes() for line in pixels]
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(lines)), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in parts.items():
        content += struct.pack(">I", len(part)) + name + part
        content += struct.pack(">I", zlib.crc32(name + part))
    file.write_bytes(content)


@pytest.mark.parametrize("grey", [True, False])
def test_twelve_bits_in_files_of_sixteen_are_refused_and_one_dark_picture_is_not(tmp_path, grey):
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    deep = np.random.default_rng(0).integers(0, 4096, (4, 5, 3), np.uint16)
    if grey:
        Image.fromarray(deep[..., 0]).save(folder / "1.png")
    else:
        deep_png(folder / "1.png", deep)
    message = refused(tmp_path)
    assert "are nearly black, none above 15 of 255: save them with 8 bits" in message
    picture(folder / "2.png", (5, 4))
    assert first(tmp_path).max() == 15


@pytest.mark.parametrize("kind, low, high", [("i4", 0, 100_000), ("i4", -9, 9), ("f4", 0, 1)])
def test_values_of_which_nobody_knows_what_is_white_are_refused(tmp_path, kind, low, high):
    grey = np.linspace(low, high, 320).reshape(16, 20).astype(kind)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=f"a.tif: .* {low:g} to {high:g} in 32 bits: .* 8 bits"):
        open_picture(tmp_path / "a.tif")


def test_pictures_that_are_all_of_one_colour_get_a_warning(tmp_path, capsys):
    (tmp_path / "train/a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (9, 9), (60 + number,) * 3).save(tmp_path / f"train/a/{number}.png")
    pictures.folder(tmp_path, "train", 224)
    assert capsys.readouterr().out.startswith("warning: every picture in")
    picture(tmp_path / "train/a/9.png", (9, 9))
    pictures.folder(tmp_path, "train", 224)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("orientation", [2, 6, 9], ids=["mirrored", "on its side", "no such"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_every_orientation_is_turned_as_pillow_does(tmp_path, suffix, orientation):
    exif, file = Image.Exif(), tmp_path / f"train/a/1.{suffix}"
    exif[ORIENTATION] = orientation
    picture(file, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(first(tmp_path), expected)


def test_a_picture_stands_upright_whatever_else_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION], exif[RESOLUTION], exif[UNIT] = 6, (72, 1), 2
    content = exif.tobytes().replace(
        struct.pack(">HHI", UNIT, 3, 1), struct.pack(">HHI", UNIT, 8, 1)
    )
    content = content.replace(struct.pack(">HIH", 8, 1, 2), struct.pack(">HIh", 8, 1, -2))
    stored = picture(tmp_path / "train/a/1.jpg", exif=content)
    with pytest.raises(struct.error), Image.open(tmp_path / "train/a/1.jpg") as image:
        ImageOps.exif_transpose(image)
    assert np.array_equal(first(tmp_path), np.rot90(stored, -1))


def test_exif_that_is_rubbish_leaves_the_picture_as_it_is(tmp_path):
    stored = picture(tmp_path / "train/a/1.jpg", exif=b"Exif\0\0rubbish")
    assert np.array_equal(first(tmp_path), stored)


def test_a_png_with_a_long_text_is_read(tmp_path):
    more = PngImagePlugin.PngInfo()
    more.add_itxt("workflow", "a" * 3_000_000, zip=True)
    expected = picture(tmp_path / "train/a/1.png", pnginfo=more)
    assert np.array_equal(first(tmp_path), expected)


# ---------------------------------------------------------------- what cannot be opened


def test_all_broken_pictures_are_named_at_once(tmp_path):
    data_set(tmp_path)
    whole = (tmp_path / "train/cat/1.png").read_bytes()
    contents = {"0": b"", "2": b"not a picture", "3": whole[:300]}
    for name, content in contents.items():
        (tmp_path / f"train/cat/{name}.png").write_bytes(content)
    (tmp_path / "train/cat/4.png").symlink_to("nowhere.png")
    Image.new("F", (9, 9)).save(tmp_path / "train/cat/5.tif")
    message = refused(tmp_path)
    for name in ("0.png", "2.png", "3.png", "4.png", "5.tif"):
        assert f"cannot read the picture {tmp_path}/train/cat/{name}: " in message
    assert "cat/1.png" not in message and "more" not in message


def test_of_many_broken_pictures_ten_are_named_and_the_others_counted(tmp_path):
    data_set(tmp_path)
    for number in range(1, 14):
        (tmp_path / f"train/cat/{number:02}.jpg").write_bytes(b"broken")
    message = refused(tmp_path)
    assert message.count("cannot read the picture") == 10 and message.endswith("; and 3 more")
    assert "cat/01.jpg" in message and "cat/11.jpg" not in message


def test_a_full_memory_is_not_blamed_on_a_picture(tmp_path, monkeypatch):
    data_set(tmp_path)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        pictures.folder(tmp_path, "train", 224)
