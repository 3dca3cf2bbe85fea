"""Folders of pictures as people have them: which files are pictures, and how one is opened."""

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torchvision import transforms

from data import Images, UserError, open_lazily, open_picture, read_picture
from plumbing import datasets, pictures

TRAIN_AND_TEST = ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png")


def picture(path, size=(20, 16), mode="RGB", seed=0, **options) -> np.ndarray:
    """Writes a random picture; gives its RGB pixels as PIL reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return np.asarray(open_lazily(path).convert("RGB"))


def data_set(root: Path, *names: str) -> Path:
    """Pictures by these names, each another one; by default two classes, two splits."""
    for seed, name in enumerate(names or TRAIN_AND_TEST):
        picture(root / name, seed=seed)
    return root


def refused(root: Path, split: str = "train", **more) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(UserError) as failure:
        pictures.folder(root, split, 224, **more)
    return str(failure.value)


def opened(file: Path) -> np.ndarray:
    """A picture file, uint8 [height, width, 3]."""
    return read_picture(file)[0].numpy()


def first(folder, image_size: int = 224) -> np.ndarray:
    """The first training picture, uint8 [height, width, 3]."""
    return pictures.folder(folder, "train", image_size).pixels[0].numpy()


@pytest.fixture(autouse=True)
def nothing_said():
    """What is said once is said anew in each test."""
    pictures.say_once.cache_clear()


# ---------------------------------------------------------------- sizes


def test_pictures_of_one_small_size_stay_as_they_are(tmp_path):
    one = picture(tmp_path / "train/cat/1.png")
    two = picture(tmp_path / "train/dog/1.png", seed=1)
    test = picture(tmp_path / "val/dog/1.png", seed=2)
    images = datasets.load("folder", "train", tmp_path, 224)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    assert np.array_equal(images.pixels.numpy(), [one, two])
    held_out = datasets.load("folder", "test", tmp_path, 224, images.classes)
    assert held_out.labels.tolist() == [1] and np.array_equal(held_out.pixels.numpy(), [test])


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


def test_pictures_that_do_not_fit_into_memory_are_refused_before_they_are_read(
    tmp_path, monkeypatch
):
    data_set(tmp_path)
    picture(tmp_path / "train/dog/2.png", (90, 50))
    monkeypatch.setattr(pictures, "free_memory", lambda *_: 400_000)
    message = refused(tmp_path)
    assert "3 pictures of 224x224 take 0.0 GB" in message and "--image-size" in message
    monkeypatch.setattr(pictures, "free_memory", lambda *_: None)  # a system that does not tell
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 3


# ---------------------------------------------------------------- which folders are splits


@pytest.mark.parametrize(
    "train, test",
    [
        *(("train", "test"), ("train", "val"), ("train", "valid"), ("train", "validation")),
        *(("Train", "Test"), ("training", "testing"), ("TRAINING", "Validation")),
    ],
)
def test_a_split_s_usual_names_are_taken_and_said(tmp_path, capsys, train, test):
    data_set(tmp_path, f"{train}/cat/1.png", f"{test}/cat/1.png", f"{test}/cat/2.png")
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 1
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 2
    assert capsys.readouterr().out == f"test pictures from {tmp_path / test}\n"


def test_of_test_and_val_the_test_pictures_are_those_in_test_and_that_is_said(tmp_path, capsys):
    data_set(tmp_path, "train/cat/1.png", "val/cat/1.png", "val/cat/2.png", "test/cat/1.png")
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 1
    assert len(pictures.folder(tmp_path, "val", 224).labels) == 2 and pictures.has_val(tmp_path)
    said = f"test pictures from {tmp_path / 'test'}\nvalidation pictures from {tmp_path / 'val'}\n"
    assert capsys.readouterr().out == said


def test_a_heap_of_test_pictures_is_to_be_named_and_val_is_for_the_test(tmp_path, capsys):
    """How Kaggle hands out data: nobody knows the classes of the pictures in test/."""
    data_set(tmp_path, "train/cat/1.png", "val/cat/1.png", "test/1.png", "test/2.png")
    assert len(pictures.folder(tmp_path, "test", 224).labels) == 1
    other, one = capsys.readouterr().out.splitlines()
    assert one == f"test pictures from {tmp_path / 'val'}" and not pictures.has_val(tmp_path)
    assert f"evaluate.py --image {tmp_path / 'test'}" in other


def test_accents_are_the_same_however_a_system_writes_them(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    data_set(tmp_path, f"train/{composed}/1.png", "train/tea/1.png", f"test/{decomposed}/1.png")
    train = pictures.folder(tmp_path, "train", 224)
    test = pictures.folder(tmp_path, "test", 224, train.classes)
    assert train.classes == (composed, "tea") and test.labels.tolist() == [0]
    data_set(tmp_path, f"train/{decomposed}/2.png")  # both in one folder
    train = pictures.folder(tmp_path, "train", 224)
    assert train.classes == (composed, "tea") and train.labels.tolist() == [0, 0, 1]


def test_without_a_split_the_folders_that_are_there_are_named(tmp_path):
    data_set(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / ".git").mkdir()
    message = refused(tmp_path)
    assert "only cat, dog:" in message and "--test-share 0.2" in message
    assert ".git" not in message
    data_set(tmp_path, "train/cat/1.png")
    assert "only cat, dog, train:" in refused(tmp_path, "test")


def test_a_folder_that_is_none_or_is_empty(tmp_path):
    assert "cannot read the folder" in refused(tmp_path / "nowhere")
    assert "only no folders: --dataset folder reads DIR/train" in refused(tmp_path)
    (tmp_path / "train").mkdir()
    assert "has no folder in it" in refused(tmp_path)


@pytest.mark.parametrize("closed", [".", "train", "train/cat"])
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch, closed):
    data_set(tmp_path)
    iterdir = Path.iterdir

    def guarded(path):
        if path == tmp_path / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    message = refused(tmp_path)
    assert f"cannot read the folder {tmp_path / closed} (Permission denied)" in message


def test_classes_that_are_missing_or_strange(tmp_path):
    data_set(tmp_path)
    message = refused(tmp_path, "test", classes=("cat",))
    assert "test has classes the training set lacks: dog" in message
    (tmp_path / "train/empty").mkdir()
    message = refused(tmp_path)
    assert "train: no pictures of empty (read: " in message and ".jpg" in message


def test_a_test_folder_may_lack_a_class_but_not_all_pictures(tmp_path):
    data_set(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/dog/1.png")
    (tmp_path / "test/cat").mkdir()
    images = pictures.folder(tmp_path, "test", 224, ("cat", "dog"))
    assert images.labels.tolist() == [1]
    (tmp_path / "test/dog/1.png").unlink()
    assert "test holds no pictures" in refused(tmp_path, "test")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("where", ["animals/cat/1.png", "animals/pets/cats/1.JPG"])
def test_pictures_that_lie_deeper_are_refused(tmp_path, split, where):
    data_set(tmp_path)
    picture(tmp_path / split / where)
    message = refused(tmp_path, split)
    assert f"pictures lie deeper than {tmp_path / split}/<class>/" in message
    assert str(tmp_path / split / where) in message


# ---------------------------------------------------------------- a share for the test


def shares(root: Path, share: float = 0.2):
    train = pictures.folder(root, "train", 224, test_share=share)
    return train, pictures.folder(root, "test", 224, train.classes, share)


def many(root: Path, count: int = 10) -> Path:
    for label in ("cat", "dog"):
        data_set(root / label, *(f"{number:02}.png" for number in range(count)))
    return root


def everything(images) -> list[bytes]:
    return [pixels.numpy().tobytes() for pixels in images.pixels]


@pytest.mark.parametrize("under", ["", "train", "Training"])
def test_a_share_of_each_class_is_taken_for_the_test(tmp_path, capsys, under):
    many(tmp_path / under)
    train, test = shares(tmp_path)
    assert train.labels.bincount().tolist() == [8, 8] and test.labels.bincount().tolist() == [2, 2]
    assert "test pictures: 4 of 20" in capsys.readouterr().out


def test_the_share_is_the_same_every_time_and_the_rest_is_trained_on(tmp_path):
    data_set(tmp_path / "cat", *(f"{number}.png" for number in range(5)))
    for number in range(5):
        picture(tmp_path / f"dog/{number}.png", seed=50 + number)
    train, test = shares(tmp_path, 0.4)
    again = pictures.folder(tmp_path, "test", 224, train.classes, 0.4)
    assert everything(again) == everything(test)
    assert not set(everything(train)) & set(everything(test))
    assert len(set(everything(train) + everything(test))) == 10


def test_a_small_share_is_one_picture_of_each_class(tmp_path):
    train, test = shares(many(tmp_path), 0.01)
    assert test.labels.tolist() == [0, 1] and len(train.labels) == 18


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    many(tmp_path)
    picture(tmp_path / "horse/only.png")
    assert "leaves no pictures to train on of horse" in refused(tmp_path, test_share=0.2)
    assert "no pictures to train on of cat, dog, horse" in refused(tmp_path, test_share=0.99)


def test_a_share_of_pictures_that_have_a_test_folder_is_refused(tmp_path):
    data_set(tmp_path, "train/cat/1.png", "Val/cat/1.png")
    for split in ("train", "test"):
        message = refused(tmp_path, split, test_share=0.2)
        assert "--test-share" in message and str(tmp_path / "Val") in message


# ---------------------------------------------------------------- which files are pictures

STRAY = (
    *(".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/0-checkpoint.png"),
    *("cat/._1.png", "__MACOSX/cat/1.png", "cat/__MACOSX/1.png", "@eaDir/1.png", "cat/.hidden.png"),
    *(".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", ".AppleDouble/1.png"),
    *("System Volume Information/1.png", "lost+found/1.png", "#recycle/1.png"),
)


@pytest.mark.parametrize("stray", STRAY)
def test_what_systems_leave_behind_is_no_data_and_is_counted(tmp_path, capsys, stray):
    data_set(tmp_path)
    file = tmp_path / "train" / stray
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    images = pictures.folder(tmp_path, "train", 224)
    assert images.classes == ("cat", "dog") and images.labels.tolist() == [0, 1]
    told = f"left out of {tmp_path / 'train'}: 1 hidden or system\n"
    assert capsys.readouterr().out == told


def test_all_that_is_stray_is_counted_in_one_line(tmp_path, capsys):
    data_set(tmp_path)
    for name in STRAY:
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("left out of") and line.endswith(f": {len(STRAY)} hidden or system")


def test_hidden_pictures_in_a_folder_of_notes_lie_no_deeper(tmp_path):
    data_set(tmp_path)
    picture(tmp_path / "train/cat/notes/.ipynb_checkpoints/1.png")
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 2


@pytest.mark.parametrize(
    "ending", ["jpg", "JPG", "jpeg", "jfif", "PNG", "bmp", "gif", "avif", "webp", "tif", "ppm"]
)
def test_endings_that_pillow_reads_are_read(tmp_path, ending):
    if ending == "avif" and ".avif" not in pictures.ENDINGS:
        pytest.skip("this Pillow reads no AVIF")
    data_set(tmp_path, "train/cat/1.png", f"train/cat/2.{ending}")
    assert len(pictures.folder(tmp_path, "train", 224).labels) == 2


def test_every_ending_that_is_read_is_one_that_pillow_knows():
    Image.init()
    assert not pictures.ENDINGS - Image.EXTENSION.keys()


def test_what_is_skipped_is_counted_by_ending(tmp_path, capsys):
    data_set(tmp_path)
    for name in ("cat/1.heic", "cat/2.HEIC", "dog/3.heic", "cat/labels.csv", "cat/README"):
        (tmp_path / "train" / name).write_bytes(b"something")
    (tmp_path / "train/list.txt").write_text("cat/1.png")
    (tmp_path / "train/cat/empty").mkdir()
    pictures.folder(tmp_path, "train", 224)
    (line,) = capsys.readouterr().out.splitlines()
    what = line.removeprefix(f"left out of {tmp_path / 'train'}: ").split(", ")
    assert what[0] == "3 .heic"
    assert set(what[1:]) == {"1 .csv", "1 without an ending", "1 .txt in no class", "1 folder"}


# ---------------------------------------------------------------- opening one


@pytest.mark.parametrize(
    "mode, suffix",
    [
        *(("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"), ("RGB", "jpg")),
        *(("RGB", "bmp"), ("RGB", "webp"), ("P", "tif"), ("P", "gif")),
    ],
)
def test_pictures_of_any_mode(tmp_path, mode, suffix):
    expected = picture(tmp_path / f"train/a/1.{suffix}", mode=mode)
    assert np.array_equal(first(tmp_path), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_a_black_shape_on_nothing_is_put_on_white_and_that_is_said_once(
    tmp_path, capsys, mode, suffix
):
    shape = np.zeros((16, 20, 4), np.uint8)
    shape[4:8, 5:9, 3] = 255
    (tmp_path / "train/a").mkdir(parents=True)
    options = {}
    if suffix == "webp":
        options["lossless"] = True
    for name in ("1", "2"):
        image = Image.fromarray(shape)
        if (mode, suffix) != ("LA", "webp"):
            image = image.convert(mode)
        image.save(tmp_path / f"train/a/{name}.{suffix}", **options)
    expected = np.full((16, 20, 3), 255)
    expected[4:8, 5:9] = 0
    assert np.array_equal(first(tmp_path), expected)
    assert capsys.readouterr().out == "transparent pictures are put on white\n"


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_colour_that_means_nothing_is_white(tmp_path, mode):
    drawn = np.zeros((9, 9, 3), np.uint8)
    drawn[2:4, 2:4] = 200
    image, nothing = Image.fromarray(drawn), (0, 0, 0)
    if mode != "RGB":
        image, nothing = image.convert("L").convert(mode), 0
    image.save(tmp_path / "a.png", transparency=nothing)
    seen = opened(tmp_path / "a.png")
    assert (seen[0, 0] == 255).all() and (seen[2, 2] < 255).all()


def test_what_is_half_transparent_is_mixed_with_white_and_what_is_opaque_is_not_mentioned(
    tmp_path, capsys
):
    Image.new("RGBA", (9, 9), (0, 0, 0, 255)).save(tmp_path / "opaque.png")
    assert opened(tmp_path / "opaque.png").max() == 0
    assert capsys.readouterr().out == ""
    Image.new("RGBA", (9, 9), (0, 0, 0, 128)).save(tmp_path / "half.png")
    assert np.unique(opened(tmp_path / "half.png")).tolist() == [127]


def test_sixteen_bits_of_grey_become_eight(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    ramp = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "train/a/1.png")
    assert np.array_equal(first(tmp_path)[..., 1], ramp >> 8)


def deep_png(file: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits in colour, which PIL does not write. pixels: uint16 [H, W, 1 to 4]."""
    height, width, bands = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    lines = [b"\0" + line.astype(">u2").tobytes() for line in pixels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(b"".join(lines)), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in parts.items():
        content += struct.pack(">I", len(part)) + name + part
        content += struct.pack(">I", zlib.crc32(name + part))
    file.write_bytes(content)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("highest", [1, 255, 4095])
def test_few_bits_of_sixteen_are_judged_over_the_whole_set(tmp_path, bands, highest):
    """12 bits in a file of 16 look black; one dark picture among others is only dark."""
    data_set(tmp_path)
    for number, top in enumerate((highest, max(highest // 2, 1))):
        pixels = np.full((4, 5, bands), top, np.uint16)
        pixels[0, 0] = 256 * (highest > 255)  # of colours, of which Pillow keeps the upper 8 bits
        if bands in (2, 4):
            pixels[..., -1] = 65535
        deep_png(tmp_path / f"train/cat/{number}.png", pixels)
    if bands > 1 and highest < 256:
        return  # all black in 8 bits: as good as any other black
    message = refused(tmp_path)
    assert "the pictures of 16 bits in" in message and "save them with 8 bits" in message
    deep_png(tmp_path / "train/dog/9.png", np.full((4, 5, bands), 51400, np.uint16) | 0xFF)
    assert pictures.folder(tmp_path, "train", 224).pixels.max() >= 200


def test_a_black_shape_in_sixteen_bits_on_nothing_is_no_fault(tmp_path):
    shape = np.zeros((4, 5, 4), np.uint16)
    shape[1, 1, 3] = 65535
    deep_png(tmp_path / "a.png", shape)
    seen, transparent, highest = open_picture(tmp_path / "a.png")
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 1))) == ((255,) * 3, (0,) * 3)
    assert transparent and highest == 0


@pytest.mark.parametrize("low, high", [(0, 100_000), (-9000, 9000)])
def test_grey_of_thirty_two_bits_is_refused(tmp_path, low, high):
    grey = np.linspace(low, high, 320).reshape(16, 20).astype(np.int32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=f"a.tif: holds values from {low} to {high} in 32 bits"):
        open_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("scale", [1, 255])
def test_floating_point_values_are_refused(tmp_path, scale):
    grey = np.linspace(0, scale, 320).reshape(16, 20).astype(np.float32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=f"floating-point values from 0 to {scale}: .* 8 bits"):
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


# ---------------------------------------------------------------- what EXIF says

RESOLUTION, UNIT, ORIENTATION = 0x011A, 0x0128, 0x0112


def broken_exif(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF of a picture to be turned, in which one tag has another type, count and 4 bytes."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[RESOLUTION], exif[UNIT] = 6, (72, 1), 2
    content = bytearray(exif.tobytes())
    assert content[6:8] == b"MM"
    (entries,) = struct.unpack_from(">H", content, 14)
    for at in range(16, 16 + 12 * entries, 12):
        if struct.unpack_from(">H", content, at) == (tag,):
            struct.pack_into(">HI4s", content, at + 2, kind, count, value)
            return bytes(content)
    raise AssertionError("no such tag")


ASCII, SHORT, UNDEFINED, SRATIONAL = 2, 3, 7, 10
BROKEN = {
    "a text": (RESOLUTION, ASCII, 3, b"72\0\0"),
    "an empty text": (RESOLUTION, ASCII, 1, b"\0\0\0\0"),
    "a letter": (RESOLUTION, ASCII, 2, b"x\0\0\0"),
    "undefined": (RESOLUTION, UNDEFINED, 1, b"\0\0\0\0"),
    "beyond the end": (RESOLUTION, SRATIONAL, 1, struct.pack(">I", 9999)),
    "an unknown type": (RESOLUTION, 99, 1, b"\0\0\0\0"),
    "a unit in words": (UNIT, ASCII, 4, b"cm\0\0"),
    "a negative unit": (UNIT, 8, 1, struct.pack(">hh", -2, 0)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_telephone_s_picture_stands_upright_whatever_its_resolution_says(tmp_path, broken):
    exif = broken_exif(*BROKEN[broken])
    stored = picture(tmp_path / "train/a/1.jpg", (20, 16), exif=exif)
    assert np.array_equal(first(tmp_path), np.rot90(stored, -1))


@pytest.mark.parametrize("fraction", [(-72, 1), (72, -1), (72, 0)])
def test_a_negative_or_endless_resolution_is_no_reason_to_refuse(tmp_path, fraction):
    exif = Image.Exif()
    exif[ORIENTATION], exif[RESOLUTION], exif[UNIT] = 6, (72, 1), 2
    content = bytearray(exif.tobytes())
    at = content.index(struct.pack(">HHI", RESOLUTION, 5, 1))
    (where,) = struct.unpack_from(">I", content, at + 8)
    struct.pack_into(">H", content, at + 2, SRATIONAL)
    struct.pack_into(">ii", content, 6 + where, *fraction)
    stored = picture(tmp_path / "train/a/1.jpg", (20, 16), exif=bytes(content))
    assert np.array_equal(first(tmp_path), np.rot90(stored, -1))


@pytest.mark.parametrize("content", [b"Exif\0\0", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\0\0"])
def test_exif_that_is_rubbish_leaves_the_picture_as_it_is(tmp_path, content):
    stored = picture(tmp_path / "train/a/1.jpg", exif=content)
    assert np.array_equal(first(tmp_path), stored)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_s_own_word_for_it(tmp_path, suffix, orientation):
    exif, file = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[ORIENTATION] = orientation
    picture(file, exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(opened(file), expected)


@pytest.mark.parametrize("name", ["XML:com.adobe.xmp", "workflow"])
def test_a_png_with_a_long_text_is_read(tmp_path, name):
    """Image generators write down how a picture was made: over 1 MB, when it is unpacked."""
    more = PngImagePlugin.PngInfo()
    more.add_itxt(name, "a" * 3_000_000, zip=True)
    expected = picture(tmp_path / "train/a/1.png", pnginfo=more)
    assert np.array_equal(first(tmp_path), expected)


# ---------------------------------------------------------------- what cannot be opened


@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    picture(tmp_path / "train/cat/1.png")
    broken = tmp_path / "train/cat/2.png"
    picture(broken)
    whole = broken.read_bytes()
    broken.write_bytes({"empty": b"", "text": b"not a picture", "truncated": whole[:300]}[content])
    assert f"cannot read the picture {broken}" in refused(tmp_path)


@pytest.mark.parametrize("size", [(20, 16), (90, 50)], ids=["one size", "several sizes"])
@pytest.mark.parametrize("name", ["0", "2"], ids=["the first", "a later one"])
def test_all_broken_pictures_are_named_at_once(tmp_path, name, size):
    picture(tmp_path / "train/cat/1.png")
    picture(tmp_path / "train/cat/3.png", size)
    (tmp_path / f"train/cat/{name}.png").write_bytes(b"broken")
    Image.new("F", (9, 9)).save(tmp_path / "train/cat/4.tif")
    message = refused(tmp_path)
    assert f"cat/{name}.png" in message and "cat/4.tif: holds floating-point" in message
    assert "cat/1.png" not in message and "cat/3.png" not in message and "more" not in message


def test_of_many_broken_pictures_ten_are_named_and_the_others_counted(tmp_path):
    picture(tmp_path / "train/cat/00.png")
    for number in range(1, 14):
        (tmp_path / f"train/cat/{number:02}.jpg").write_bytes(b"broken")
    message = refused(tmp_path)
    assert message.count("cannot read the picture") == 10 and message.endswith("; and 3 more")
    assert "cat/01.jpg" in message and "cat/11.jpg" not in message


def test_links_that_lead_nowhere_or_round_in_a_circle(tmp_path):
    picture(tmp_path / "train/cat/1.png")
    (tmp_path / "train/cat/2.png").symlink_to("nowhere.png")
    assert f"cannot read the picture {tmp_path / 'train/cat/2.png'}" in refused(tmp_path)
    (tmp_path / "train/cat/2.png").unlink()
    (tmp_path / "train/cat/again").symlink_to("..")
    assert f"deeper than {tmp_path / 'train'}/<class>/" in refused(tmp_path)


@pytest.mark.parametrize("when", ["load", "convert"])
def test_a_full_memory_is_not_blamed_on_a_picture(tmp_path, monkeypatch, when):
    data_set(tmp_path)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, when, full)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    with pytest.raises(MemoryError):
        pictures.folder(tmp_path, "train", 224)


# ---------------------------------------------------------------- the same pictures twice


def test_pictures_in_both_splits_are_counted_by_their_pixels(tmp_path):
    data_set(tmp_path)
    picture(tmp_path / "test/dog/other name.bmp", seed=0)  # the training set's first
    train, test = (pictures.folder(tmp_path, split, 224) for split in ("train", "test"))
    assert pictures.in_both(train, test) == 1
    assert pictures.in_both(train, train) == 2


def test_what_is_in_both_is_found_by_hashes_and_not_by_copies(tmp_path):
    """Pictures that take half of the free memory would not fit twice."""
    pixels = torch.randint(256, (200, 64, 64, 3), dtype=torch.uint8)
    images = Images(pixels, torch.zeros(200), ("a",))
    tracemalloc.start()
    assert pictures.in_both(images, images) == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < pixels.nbytes / 20
