"""Wrong input, as a table: one line that names the culprit, status 2, nothing written."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, complaint
from PIL import Image

import compare
import evaluate
import train
from study import benchmark

MAINS = {"train": train, "evaluate": evaluate, "compare": compare, "benchmark": benchmark}
# What comes before the wrong words, so that nothing else is wrong and nothing takes long.
BEFORE = {"train": SMALL, "benchmark": ("--weights", "none")}
FOLDER = ("--dataset", "folder", "--data-dir")
LITTLE = ("--image-size", "32", "--train-size", "20", "--epochs")
BATCH_OF_ONE = ("--image-size", "32", "--train-size", "26")  # in batches of 25


def write_checkpoints(here: Path) -> None:
    """A good checkpoint, bad ones, and a run's folder that holds a bad one."""
    train.main([*SMALL, *LITTLE, "1", "--out", str(here / "runs")])
    (file,) = (here / "runs").glob("*/epoch1.pt")
    good = file.read_bytes()
    (here / "good.pt").write_bytes(good)
    (here / "half.pt").write_bytes(good[: len(good) // 2])
    (here / "empty.pt").write_bytes(b"")
    torch.save({"module.fc.weight": torch.zeros(3)}, here / "weights.pt")
    torch.save({0: torch.zeros(1), "state": 5}, here / "other.pt")
    torch.save({"arguments": {}, "model": {}}, here / "old.pt")
    file.with_name("epoch3.pt").write_bytes(good[: len(good) // 2])


def write_pictures(here: Path) -> None:
    """Folders of pictures, each with one thing wrong, and pictures that are wrong themselves."""
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(here / "whole.png")
    Image.new("1", (13_400, 13_400)).save(here / "huge.png")
    whole, huge = (here / "whole.png").read_bytes(), (here / "huge.png").read_bytes()
    two = "train/cat/0.png train/dog/0.png"

    def pictures(name: str, names: str, content: bytes = whole) -> Path:
        """Sound pictures by these names, the last one with this content."""
        files = [here / name / file for file in names.split()]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(whole)
        files[-1].write_bytes(content)
        return here / name

    pictures("half", f"{two} test/cat/0.png test/dog/1.png", whole[:60])
    pictures("huge", f"{two} train/dog/1.png", huge)
    pictures("one", "train/dog/0.png test/dog/0.png")
    pictures("untested", two)
    pictures("stranger", f"{two} test/horse/0.png")
    pictures("named", "train/dog/0.png train/cat/1.png/x")
    pictures("three", f"{two} val/cat/0.png test/cat/0.png")
    (pictures("circle", two) / "train/cat/again").symlink_to("..")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    here = tmp_path_factory.mktemp("place")
    write_checkpoints(here)
    write_pictures(here)
    (here / "nothing").mkdir()
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
    ("train", ["--weights", "empty.pt"], "empty.pt is damaged, or no file of weights"),
    ("train", ["--weights", "weights.pt"], "weights.pt is no resnet18: it lacks conv1.weight"),
    ("train", ["--out", "/proc/nothing"], "/proc/nothing.*--out"),
    ("train", ["--out", __file__], "test_wrong_input.py.*--out"),
    ("train", ["--out", "runs", *LITTLE, "3", "--resume"], "runs/.*/epoch3.pt"),
    ("train", ["--dataset", "cifar10", "--data-dir", "/proc/nothing"], "--data-dir /proc/nothing"),
    ("evaluate", ["good.pt", "nowhere.pt"], "no checkpoint nowhere.pt"),
    ("evaluate", ["weights.pt"], "weights.pt holds weights alone: .*--weights weights.pt$"),
    ("evaluate", ["other.pt"], "other.pt is no checkpoint of train.py$"),
    ("evaluate", ["half.pt"], "half.pt is damaged"),
    ("evaluate", ["old.pt"], "old.pt was written by an earlier version"),
    ("evaluate", ["good.pt", "--csv", "/proc/nothing/summary.csv"], "/proc/nothing/summary.csv"),
    ("evaluate", ["good.pt", "--csv", "."], "it is a folder"),
    ("compare", ["good.pt", "half.pt"], "half.pt is damaged"),
    ("benchmark", ["--dataset", "synthetic", "--csv", "/proc/no/a.csv"], "/proc/no/a.csv"),
    ("train", [*FOLDER, "nothing"], "no .*/nothing/train"),
    ("train", [*FOLDER, "half", "--train-size", "2"], "half/test/dog/1.png"),
    ("train", [*FOLDER, "huge"], "huge/train/dog/1.png.*179560000 pixels"),
    ("train", [*FOLDER, "one", "--train-size", "1"], "one holds one class, dog"),
    ("train", [*FOLDER, "untested", "--train-size", "2"], "no .*untested/test or testing or val"),
    ("train", [*FOLDER, "stranger", "--train-size", "2"], "stranger/test has classes .*: horse"),
    ("train", [*FOLDER, "stranger", "--train-size", "1"], "train size.*from 2 .*to 2.*1"),
    ("train", [*FOLDER, "named"], "named/train: .*cat"),
    ("train", [*FOLDER, "three", "--val-share", "0.2"], "has validation pictures already"),
    ("train", [*FOLDER, "circle"], "circle.*again"),
    ("evaluate", ["good.pt", "--image", "nowhere.jpg"], "picture nowhere.jpg"),
    ("evaluate", ["good.pt", "--image", "half/test/dog/1.png"], "picture half/test/dog/1.png"),
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
