"""Folders of pictures as people have them: DIR/train/<class>/* and DIR/test/<class>/*.

    images = folder(Path("pictures"), "train", 224)
    picture = read_image("cat.jpg")

Which folders are splits, which files are pictures and how one is opened is decided here alone.
What is left out, assumed or changed is said in a line.
"""

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, JpegImagePlugin, features

from data import Images, UserError, stratified_subset
from plumbing.machine import free_memory, memory_is_full
from plumbing.terminal import progress

BILINEAR = Image.Resampling.BILINEAR  # what torchvision resizes with unless told otherwise
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
ENDINGS |= {".webp", ".ppm", ".pgm", ".pbm", ".pnm"}  # what Pillow reads without extras
if features.check("avif"):  # from Pillow 11.3 on
    ENDINGS.add(".avif")
READ = " ".join(sorted(ENDINGS))
# What Jupyter, macOS, Windows and network drives leave, beside all that begins with a dot.
SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information", "#recycle", "@recycle"}
TURNS = {  # by EXIF orientation, what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NAMED = 10  # of many of a kind, how many are named
# A JPEG's dots per inch are not asked for: where EXIF says them in nonsense, PIL would not open it.
JpegImagePlugin.JpegImageFile._read_dpi_from_exif = lambda image: None
FLAT = 8  # levels of 256 between a picture's darkest and brightest value: nothing to be seen


# ---------------------------------------------------------------- which files


def folder(
    root: Path,
    split: str,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    test_share: float | None = None,
    size: list[int] | None = None,
) -> Images:
    """One split of the pictures in `root`. test_share: take this share of each class for the
    test, the same pictures every time, where there is no test folder. size: [height, width] that
    the training pictures have in memory, for the test pictures to have it too.

    Otherwise kept as they are when all are one size no larger than image_size, else resized to
    [image_size, image_size], as torchvision's Resize does to PIL images. Raises UserError.
    """
    path = split_folder(root, split, test_share)
    if split == "test" and not test_share:
        print(f"test pictures from {path}", flush=True)
    names, files = pictures_in(path)
    classes = classes or names
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"{path} has classes the training set lacks: {', '.join(unknown)}")
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    chosen = torch.arange(len(files))
    if test_share:
        chosen = share(labels, names, split, test_share)
        files = [files[i] for i in chosen]
    if size:
        pixels = torch.from_numpy(decode_as(files, (size[1], size[0]), resize=True))
    else:
        pixels = torch.from_numpy(decode(files, image_size))
    if (pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)).le(FLAT).all():
        print(f"warning: every picture in {path} is one flat colour, or nearly", flush=True)
    return Images(pixels, labels[chosen], classes)


def split_folder(root: Path, split: str, test_share: float | None) -> Path:
    """Where a split's classes are: DIR/train, or any usual name of it. Raises UserError."""
    there = [path for path in inside(root) if path.is_dir() and not is_system(path)]
    if test_share:
        if path := called(SPLITS["test"], there):
            raise UserError(f"--test-share: the test pictures are in {path} already")
        return called(SPLITS["train"], there) or root
    if path := called(SPLITS[split], there):
        return path
    named = ", ".join(path.name for path in there[:NAMED]) or "no folders"
    raise UserError(
        f"no {root}/{' or '.join(SPLITS[split])}, only {named}: --dataset folder reads "
        "DIR/train/<class>/* and DIR/test/<class>/*, with --data-dir DIR; --test-share 0.2 "
        "takes a fifth of DIR/<class>/* or DIR/train/<class>/* for the test"
    )


def called(names: tuple[str, ...], there: list[Path]) -> Path | None:
    """The folder with the first of these names, in whatever case."""
    for name in names:
        for path in there:
            if path.name.lower() == name:
                return path
    return None


def pictures_in(path: Path) -> tuple[tuple[str, ...], list[Path]]:
    """The classes, sorted, and the pictures of all of them, class by class. Says what is left
    out. Raises UserError."""
    names, files, left_out = [], [], Counter()
    for place in inside(path):
        if is_system(place):
            left_out["hidden or system"] += 1
        elif not place.is_dir():
            left_out[f"{place.suffix or place.name} in no class"] += 1
        else:
            names.append(place.name)
            files += pictures_of(place, left_out)
    if not names:
        raise UserError(f"{path} has no folder in it: it takes one for each class")
    filled = {file.parent.name for file in files}
    if not files:
        raise UserError(f"{path} holds no pictures (read: {READ})")
    if path.name.lower() not in SPLITS["test"] and (empty := sorted(set(names) - filled)):
        raise UserError(f"{path}: no pictures of {', '.join(empty)} (read: {READ})")
    if left_out:
        told = ", ".join(f"{count} {what}" for what, count in left_out.most_common(NAMED))
        say_once(f"left out of {path}: {told}")
    return tuple(names), files


def pictures_of(place: Path, left_out: Counter) -> list[Path]:
    """The pictures of one class; counts the other files in left_out. Raises UserError for
    pictures that lie deeper, of which nobody knows whether they are another class."""
    files = []
    for file in inside(place):
        if is_system(file):
            left_out["hidden or system"] += 1
        elif file.is_dir():
            if inner := next(deeper(file), None):
                raise UserError(f"pictures lie deeper than {place.parent}/<class>/: {inner}")
            left_out["folder"] += 1
        elif file.suffix.lower() in ENDINGS:
            files.append(file)
        else:
            left_out[file.suffix.lower() or "without an ending"] += 1
    return files


def deeper(place: Path) -> Iterator[Path]:
    """The pictures in a folder and all below it."""
    for where, folders, names in os.walk(place):
        folders[:] = [name for name in folders if not is_system(Path(name))]
        for name in sorted(names):
            if Path(name).suffix.lower() in ENDINGS and not name.startswith("."):
                yield Path(where) / name


def inside(root: Path) -> list[Path]:
    """Sorted. Raises UserError for a folder that is none or cannot be read."""
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise UserError(f"cannot read the folder {root} ({error.strerror})") from error


def is_system(path: Path) -> bool:
    return path.name.startswith(".") or path.name.lower() in SYSTEM


def in_both(train: Images, test: Images) -> int:
    """How many of the test pictures are among the training pictures, pixel for pixel."""
    seen = {picture.numpy().tobytes() for picture in train.pixels}
    return sum(picture.numpy().tobytes() in seen for picture in test.pixels)


def share(
    labels: torch.Tensor, classes: tuple[str, ...], split: str, test_share: float
) -> torch.Tensor:
    """Which of the pictures are in a split, int64: a share of each class for the test, and the
    rest for training. The same for every seed of a run, so that runs can be compared."""
    numbers = Images(torch.arange(len(labels)), labels, classes)
    size = max(round(test_share * len(labels)), len(classes))
    test = stratified_subset(numbers, size, seed=0).pixels
    if split == "test":
        print(f"test pictures: {size:,} of {len(labels):,}, the same share of each class, drawn")
        return test
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[test] = False
    if lacking := sorted(set(classes) - {classes[i] for i in labels[rest]}):
        which = ", ".join(lacking[:NAMED])
        raise UserError(f"--test-share {test_share:g} leaves no pictures to train on of {which}")
    return rest.nonzero().flatten()


# ---------------------------------------------------------------- opening them


def read_image(file: str | Path) -> Image.Image:
    """A picture as RGB, upright as its EXIF orientation says, on white where it is transparent.
    Raises UserError naming the file."""
    try:
        with Image.open(file) as image:
            deep = ";16" in str(image.tile)  # 16 bits a channel; of colours PIL keeps the upper 8
            return as_rgb(upright(image), deep)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # PIL's plugins raise nearly everything on a broken file
        if memory_is_full(error):
            raise
        raise UserError(f"cannot read the picture {file}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Only the orientation is asked for: whatever else is broken in a
    picture's metadata does not make it a bad picture."""
    image.load()
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # a telephone's idea of EXIF
        return image
    if orientation in TURNS:
        return image.transpose(TURNS[orientation])
    return image


def as_rgb(image: Image.Image, deep: bool = False) -> Image.Image:
    """8 bits of RGB. deep: there were 16. Raises UserError for values of which nobody knows what
    is white."""
    if image.mode == "F":
        low, high = image.getextrema()
        raise UserError(
            f"holds floating-point values from {low:g} to {high:g}: save it with 8 bits, 0 to 255"
        )
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
        values = np.asarray(image)
        if not 4096 <= values.max() < 65536 or values.min() < 0:
            found = f"values from {values.min()} to {values.max()} in {8 * values.itemsize} bits"
            raise UserError(
                f"holds {found}, which is nearly black or beyond white: save it with 8 bits, or "
                "spread over all 16"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    colours = [image.getchannel(band) for band in image.getbands() if band != "A"]
    if deep and 0 < max(colour.getextrema()[1] for colour in colours) < 16:
        raise UserError(
            "holds values below 4096 in 16 bits, which is nearly black: save it with 8 bits, "
            "or spread over all 16"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        if image.getextrema()[3][0] < 255:
            say_once("transparent pictures are put on white")
        return white.convert("RGB")
    return image.convert("RGB")


@functools.cache
def say_once(text: str) -> None:
    progress()
    print(text, flush=True)


def decode(files: list[Path], image_size: int) -> np.ndarray:
    """All pictures, uint8 [N, height, width, 3]: in their own size if they share one that is no
    larger than image_size, else resized to [image_size, image_size]. Raises UserError naming
    those that cannot be read."""
    pixels = None
    with contextlib.suppress(UserError):  # the second reading says all that is wrong
        size = read_image(files[0]).size
        if max(size) <= image_size:
            pixels = decode_as(files, size, resize=False)
    if pixels is None:
        pixels = decode_as(files, (image_size, image_size), resize=True)
    return pixels


def decode_as(files: list[Path], size: tuple[int, int], resize: bool) -> np.ndarray | None:
    """Pictures of one (width, height), uint8 [N, height, width, 3]; if one has another size and
    is not to be resized, None."""
    need = len(files) * size[0] * size[1] * 3
    free = free_memory("host", torch.device("cpu"), Path())
    if free is not None and need > free:
        raise UserError(
            f"{len(files):,} pictures of {size[0]}x{size[1]} take {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free: use a smaller --image-size or fewer pictures"
        )
    pixels, broken = np.empty((len(files), size[1], size[0], 3), np.uint8), []

    def decode_one(i: int) -> bool:
        try:
            image = read_image(files[i])
        except UserError as error:
            broken.append(str(error))
            return True
        fits = resize or image.size == size
        if fits:
            pixels[i] = image.resize(size, BILINEAR)
        return fits

    # PIL decodes outside the interpreter lock; tiny pictures only fight for it
    with ThreadPoolExecutor() as pool:
        run = map if max(size) <= 64 else pool.map
        for done, fits in enumerate(run(decode_one, range(len(files))), start=1):
            if not fits:
                pool.shutdown(cancel_futures=True)
                return None
            progress(f"reading pictures: {done:,} of {len(files):,}")
    progress()
    if broken:
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        raise UserError("; ".join(sorted(broken)[:NAMED]) + more)
    return pixels
