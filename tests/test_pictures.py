"""Folders of pictures as people have them: which files are pictures, and how one is opened."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from torchvision import transforms

from data import Images, UserError, open_picture, read_picture
from plumbing import datasets, pictures

ORIENTATION, UNIT = 0x0112, 0x0128  # EXIF tags
USUAL = "train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"


def picture(path, size=(20, 16), mode="RGB", seed=0, **options) -> np.ndarray:
    """Writes a random picture; gives its RGB pixels as PIL reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return np.asarray(Image.open(path).convert("RGB"))


def data_set(root: Path, *names: str) -> Path:
    """Pictures by these names, each another one; a name that ends with / is an empty folder."""
    for seed, name in enumerate(names):
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            picture(root / name, seed=seed)
    return root


def load(root: Path, split: str = "train", **more) -> Images:
    return pictures.folder(root, split, 224, **more)


def refused(root: Path, split: str = "train", **more) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(UserError) as failure:
        load(root, split, **more)
    return str(failure.value)


@pytest.mark.parametrize("small_bytes", [0, 20_000])  # with threads, and without
def test_pictures_of_one_small_size_stay_as_they_are(tmp_path, monkeypatch, small_bytes):
    """And in order."""
    monkeypatch.setattr(pictures, "SMALL_BYTES", small_bytes)
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(6)]
    expected = [picture(tmp_path / "train" / name, seed=i) for i, name in enumerate(names)]
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


def test_more_pictures_than_fit_into_memory_are_refused_unread(tmp_path, monkeypatch):
    data_set(tmp_path, *USUAL)
    monkeypatch.setattr(pictures, "free_memory", lambda *_: 1900)
    monkeypatch.setattr(pictures, "open_picture", None)
    message = refused(tmp_path)
    assert "2 pictures of 20x16 take 0.0 GB" in message and "--image-size" in message


@pytest.mark.parametrize(
    "folders, splits",
    [
        ("train val", "train test"),
        ("Train Test", "train test"),
        ("TRAINING testing", "train test"),
        ("train val test", "train val test"),
    ],
)
def test_a_split_s_usual_names_are_taken_and_said(tmp_path, capsys, folders, splits):
    folders = [tmp_path / name for name in folders.split()]
    data_set(tmp_path, *[f"{folder.name}/cat/1.png" for folder in folders])
    assert pictures.split_folders(tmp_path) == dict(zip(splits.split(), folders))
    load(tmp_path)
    load(tmp_path, "test")
    assert capsys.readouterr().out == f"test pictures from {folders[-1]}\n"


def test_a_heap_of_test_pictures_is_to_be_named_and_val_is_for_the_test(tmp_path, capsys):
    data_set(tmp_path, "train/cat/1.png", "val/cat/1.png", "test/1.png", "test/2.png")
    assert pictures.split_folders(tmp_path)["test"] == tmp_path / "val"
    assert f"evaluate.py --image {tmp_path / 'test'}" in capsys.readouterr().out


def test_accents_are_the_same_however_a_system_writes_them(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data_set(tmp_path, f"train/{composed}/1.png", f"train/{decomposed}/2.png", "train/tea/1.png")
    images = load(tmp_path)
    assert images.classes == (composed, "tea") and images.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "names, more, said",
    [
        ([], {}, "only no folders: --dataset folder reads DIR/train"),
        (["cat/1.png", "dog/1.png", ".git/1.png"], {}, "only cat, dog:.*--test-share 0.2"),
        (USUAL, {"split": "test", "classes": ("cat",)}, "the training set lacks: dog"),
        (["train/cat/1.png", "train/empty/"], {}, r"train: no pictures of empty \(read: .avif"),
        (["test/1.png", "test/cat/"], {"split": "test"}, "test: no pictures of cat"),
        (["test/cat/"], {"split": "test"}, "test holds no pictures"),
        (["train/a/1.png", "train/b/c/1.JPG"], {}, "deeper than .*/train/<class>/: .*b/c/1.JPG"),
        (["a/1.png", "a/2.png", "b/1.png"], {"test_share": 0.2}, "leaves no pictures .* of b"),
        (["train/a/1.png", "Val/a/1.png"], {"test_share": 0.2}, "--test-share: .*/Val already"),
    ],
)
def test_what_a_folder_lacks_or_has_too_much_is_named(tmp_path, names, more, said):
    message = refused(data_set(tmp_path, *names), **more)
    assert re.search(said, message), message


def test_a_test_folder_may_lack_a_class(tmp_path):
    data_set(tmp_path, "test/cat/", "test/dog/1.png")
    assert load(tmp_path, "test", classes=("cat", "dog")).labels.tolist() == [1]


@pytest.mark.parametrize("closed", [".", "train", "train/cat"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, closed):
    data_set(tmp_path, *USUAL)
    scandir = os.scandir

    def guarded(path):
        if Path(path) == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", guarded)
        message = refused(tmp_path)
    assert f"cannot read the folder {tmp_path / closed} (Permission denied)" in message


@pytest.mark.parametrize("under, share, drawn", [("", 0.2, 2), ("Training", 0.2, 2), ("", 0.01, 1)])
def test_a_share_of_each_class_is_tested_and_not_trained_on(tmp_path, capsys, under, share, drawn):
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(10)]
    data_set(tmp_path / under, *names)
    train = load(tmp_path, test_share=share)
    test = load(tmp_path, "test", classes=train.classes, test_share=share)
    assert f"--test-share {share}: {2 * drawn} of 20 pictures" in capsys.readouterr().out
    assert train.labels.bincount().tolist() == [10 - drawn] * 2
    assert test.labels.bincount().tolist() == [drawn] * 2
    everything = [pixels.numpy().tobytes() for pixels in (*train.pixels, *test.pixels)]
    assert len(set(everything)) == 20
    again = load(tmp_path, "test", classes=train.classes, test_share=share)
    assert again.pixels.equal(test.pixels)


def test_what_is_left_out_is_counted_by_ending(tmp_path, capsys):
    data_set(tmp_path, *USUAL)
    stray = [".ipynb_checkpoints/0.png", "cat/._1.png", "__MACOSX/1.png", "cat/Thumbs.db"]
    for name in [*stray, "cat/1.heic", "cat/2.HEIC", "dog/3.heic", "cat/README", "list.txt"]:
        file = tmp_path / "train" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    picture(tmp_path / "train/1.png")
    images = load(tmp_path)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    start = f"left out of {tmp_path / 'train'}: "
    assert capsys.readouterr().out.splitlines() == [
        f"{start}4 hidden or system, 3 .heic, 1 .txt, 1 without an ending",
        f"{start}1 pictures in no class",
    ]


def test_every_ending_that_is_read_is_one_that_pillow_knows():
    Image.init()
    assert not pictures.ENDINGS - Image.EXTENSION.keys() - {".avif"}
    endings = "jpg jpeg jfif png bmp gif webp avif tif ppm"
    assert {f".{ending}" for ending in endings.split()} <= pictures.ENDINGS


WORKFLOW = PngImagePlugin.PngInfo()  # which an image generator writes
WORKFLOW.add_itxt("workflow", "a" * 3_000_000, zip=True)


@pytest.mark.parametrize(
    "suffix, more",
    [
        *(("png", {"mode": "L"}), ("png", {"mode": "1"}), ("gif", {"mode": "P"})),
        *(("jpg", {"mode": "CMYK"}), ("webp", {}), ("png", {"mode": "RGBA"})),  # which is opaque
        *(("png", {"pnginfo": WORKFLOW}), ("png", {"exif": b"rubbish"})),
        ("jpg", {"exif": b"Exif\0\0rubbish"}),
    ],
)
def test_pictures_of_any_kind_are_read_as_pillow_does(tmp_path, capsys, suffix, more):
    """Whatever else they hold."""
    expected = picture(tmp_path / f"train/a/1.{suffix}", **more)
    assert np.array_equal(load(tmp_path).pixels[0], expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp")])
def test_transparent_pictures_are_put_on_white_said_once(tmp_path, capsys, mode, suffix):
    shape = np.zeros((16, 20, 4), np.uint8)
    shape[4:8, 5:9, 3] = 255
    shape[9:, :, 3] = 128
    (tmp_path / "train/a").mkdir(parents=True)
    for name in ("1", "2"):
        file = tmp_path / f"train/a/{name}.{suffix}"
        Image.fromarray(shape).convert(mode).save(file, quality=100)
    expected = np.full((16, 20, 3), 255)
    expected[4:8, 5:9] = 0
    expected[9:] = 127
    assert np.array_equal(load(tmp_path).pixels[0], expected)
    assert capsys.readouterr().out == "transparent pictures are put on white\n"


def test_a_colour_that_means_nothing_is_white(tmp_path):
    drawn = np.zeros((9, 9, 3), np.uint8)
    drawn[2:4, 2:4] = 200
    Image.fromarray(drawn).save(tmp_path / "a.png", transparency=(0, 0, 0))
    seen = read_picture(tmp_path / "a.png")[0]
    assert (seen[0, 0] == 255).all() and (seen[2, 2] == 200).all()


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png")[0, ..., 1], ramp >> 8)


def test_twelve_bits_in_files_of_sixteen_are_refused_and_one_dark_picture_is_not(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    deep = np.random.default_rng(0).integers(0, 4096, (4, 5), np.uint16)
    Image.fromarray(deep).save(tmp_path / "train/a/1.png")
    message = refused(tmp_path)
    assert "are nearly black, none above 15 of 255: save them with 8 bits" in message
    picture(tmp_path / "train/a/2.png", (5, 4))
    assert load(tmp_path).pixels[0].max() == 15


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
    load(tmp_path)
    assert capsys.readouterr().out.startswith("warning: every picture in")
    picture(tmp_path / "train/a/9.png", (9, 9))
    load(tmp_path)
    assert capsys.readouterr().out == ""


# On its side, mirrored, turned by Pillow as it opens it, no such orientation.
@pytest.mark.parametrize("suffix, orientation", [("jpg", 6), ("png", 2), ("tif", 6), ("jpg", 9)])
def test_every_orientation_is_turned_as_pillow_does(tmp_path, suffix, orientation):
    exif, file = Image.Exif(), tmp_path / f"train/a/1.{suffix}"
    exif[ORIENTATION] = orientation
    picture(file, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(load(tmp_path).pixels[0], expected)


def test_a_picture_stands_upright_whatever_else_its_exif_says(tmp_path):
    exif, file = Image.Exif(), tmp_path / "a.jpg"
    exif[ORIENTATION], exif[UNIT] = 6, 2
    unit, wrong = struct.pack(">HHIH", UNIT, 3, 1, 2), struct.pack(">HHIh", UNIT, 8, 1, -2)
    stored = picture(file, exif=exif.tobytes().replace(unit, wrong))
    with pytest.raises(struct.error), Image.open(file) as image:
        ImageOps.exif_transpose(image)
    assert np.array_equal(read_picture(file)[0], np.rot90(stored, -1))


def test_all_broken_pictures_are_named_at_once_and_of_many_ten(tmp_path):
    folder = data_set(tmp_path, *USUAL) / "train/cat"
    whole = (folder / "1.png").read_bytes()
    for name, content in {"0": b"", "2": b"not a picture", "3": whole[:300]}.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "4.png").symlink_to("nowhere.png")
    Image.new("F", (9, 9)).save(folder / "5.tif")
    message = refused(tmp_path)
    for name in ("0.png", "2.png", "3.png", "4.png", "5.tif"):
        assert f"cannot read the picture {folder / name}: " in message
    assert "cat/1.png" not in message and "more" not in message
    for number in range(10, 18):
        (folder / f"{number}.jpg").write_bytes(b"broken")
    message = refused(tmp_path)
    assert message.count("cannot read the picture") == 10 and message.endswith("; and 3 more")


def test_a_full_memory_is_not_blamed_on_a_picture(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        load(data_set(tmp_path, *USUAL))
