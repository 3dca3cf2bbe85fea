"""Wrong input, as a table: one line that names the culprit, status 2, nothing written."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, complaint
from PIL import Image
from test_pictures import data_set

import compare
import evaluate
import train
from study import benchmark

MAINS = {"train": train, "evaluate": evaluate, "compare": compare, "benchmark": benchmark}
# What comes before the wrong words, so that nothing else is wrong and nothing takes long.
BEFORE = {"train": SMALL, "benchmark": ("--weights", "none")}
FOLDER = ("--dataset", "folder", "--data-dir")
BATCH_OF_ONE = ("--image-size", "32", "--train-size", "26")  # in batches of 25


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A good checkpoint, and folders of pictures, each with one thing wrong."""
    here = tmp_path_factory.mktemp("place")
    train.main([*SMALL, "--image-size", "32", "--train-size", "20", "--out", str(here / "runs")])
    (file,) = (here / "runs").glob("*/epoch2.pt")
    shutil.copy(file, here / "good.pt")
    two = "train/cat/0.png", "train/dog/0.png"
    for name in ("huge", "untested", "circle"):
        data_set(here / name, *two)
    Image.new("1", (13_400, 13_400)).save(here / "huge/train/dog/1.png")
    (here / "circle/train/cat/again").symlink_to("..")
    data_set(here / "one", "train/dog/0.png", "test/dog/0.png")
    data_set(here / "named", "train/dog/0.png", "train/cat/1.png/")
    data_set(here / "three", *two, "val/cat/0.png", "test/cat/0.png")
    return here


def below(folder: Path) -> dict[Path, int]:
    """Everything that is there and when it was written, but for the locks that a run leaves."""
    there = [path for path in folder.rglob("*") if ".locks" not in path.parts]
    return {path: path.lstat().st_mtime_ns for path in there}


# fmt: off
WRONG = [
    ("train", ["--tag", "a b"], "--tag: takes letters, digits"),
    ("train", ["--unfreeze", "layer4,layer3"], "layer4,layer3: resnet18 has stem.*spaces separate"),
    ("train", ["--unfreeze", "layer2"], "--unfreeze layer2.*--lr layer2="),
    ("train", ["--epochs", "3", "0"], "--epochs.*'0'"),
    ("train", ["--batch-size", "9223372036854775808"], "--batch-size.*2147483647"),
    ("train", ["--image-size", "31"], "--image-size.*from 32 to 4096.*'31'"),
    ("train", ["--seed", "-1"], "--seed"),
    ("train", ["--lr", "layer4=1e-3"], "--lr layer4=.*fc"),
    ("train", ["--lr", "fc=fast"], "--lr: 'fc=fast'"),
    ("train", ["--lr", "fc=0"], "--lr: 'fc=0'"),
    ("train", ["--lr", "fc=inf"], "--lr: 'fc=inf'"),
    ("train", ["--model", "vgg16"], "--model.*'vgg16'"),
    ("train", ["--epoch", "3"], "unrecognized.*--epoch"),
    ("train", [*BATCH_OF_ONE, "--unfreeze", "layer4"], "--batch-size 25.*a batch of one"),
    ("train", [*BATCH_OF_ONE, "--frozen-batchnorm", "train"], "--batch-size 25.*a batch of one"),
    ("train", ["--device", "cuda:99"], "--device cuda:99"),
    ("evaluate", ["good.pt", "--device", "cuda:99"], "good.pt: --device cuda:99"),
    ("train", ["--test-share", "0.2"], "--test-share is for --dataset folder"),
    ("train", ["--test-share", "0"], "--test-share: must be between 0 and 1"),
    ("evaluate", [], "CHECKPOINT"),
    ("evaluate", ["good.pt", "--image", __file__, "--data-dir", "."], "--data-dir is for scoring"),
    ("evaluate", ["good.pt", "--data-dir", "."], "--data-dir: this run's pictures are drawn"),
    ("evaluate", ["good.pt", "--image", __file__, "--per-class"], "--per-class.*--image"),
    ("evaluate", ["good.pt", "a.pt", "--image", "b", "--csv", "a.csv"], "--csv takes one"),
    ("compare", ["good.pt", "--paired", "paired.csv"], "--paired takes two"),
    ("benchmark", ["--lr", "fc=1"], "--lr is not for the benchmark"),
    ("benchmark", ["--strategies", "layer2"], "'layer2'"),
    ("run_all.sh", ["--unfreeze", "layer2"], "--unfreeze.*train.py"),
    ("run_all.sh", ["--seed", "1"], "--seed.*SEEDS="),
    ("run_all.sh", ["--out", ""], "--out"),
    ("train", ["--weights", "nothing"], "no weights file .*/nothing"),
    ("train", ["--out", "/proc/nothing"], "/proc/nothing.*--out"),
    ("train", ["--out", __file__], "test_wrong_input.py.*--out"),
    ("train", ["--dataset", "cifar10", "--data-dir", "/proc/nothing"], "--data-dir /proc/nothing"),
    ("evaluate", ["good.pt", "--csv", "/proc/nothing/summary.csv"], "/proc/nothing/summary.csv"),
    ("evaluate", ["good.pt", "--csv", "."], "it is a folder"),
    ("benchmark", ["--dataset", "synthetic", "--csv", "/proc/no/a.csv"], "/proc/no/a.csv"),
    ("train", [*FOLDER, "huge"], "huge/train/dog/1.png.*179560000 pixels"),
    ("train", [*FOLDER, "one", "--train-size", "1"], "one holds one class, dog"),
    ("train", [*FOLDER, "untested", "--train-size", "2"], "no .*untested/test or testing or val"),
    ("train", [*FOLDER, "named"], "named/train: .*cat"),
    ("train", [*FOLDER, "three", "--val-share", "0.2"], "has validation pictures already"),
    ("train", [*FOLDER, "circle"], "circle.*again"),
    ("evaluate", ["good.pt", "--image", "nowhere.jpg"], "picture nowhere.jpg"),
]
# fmt: on


@pytest.mark.parametrize("script, words, culprit", WRONG)
def test_wrong_input_is_refused_in_one_line(place, monkeypatch, capsys, script, words, culprit):
    monkeypatch.chdir(place)
    before = below(place)
    if script == "run_all.sh":
        command = ["bash", str(ROOT / script), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith("run_all.sh: error: ")
    else:
        line = complaint(MAINS[script].main, [*BEFORE.get(script, ()), *words], capsys)
    assert re.search(culprit, line), line
    assert below(place) == before
