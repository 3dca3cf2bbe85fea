"""Wrong input, as a table: one line that names the culprit and the remedy, status 2, nothing written."""

import csv
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, complaint
from PIL import Image

import benchmark
import data
import evaluate
import train

MAINS = {"train": train.main, "evaluate": evaluate.main, "benchmark": benchmark.main}
FOLDER = ("--dataset", "folder", "--data-dir")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good checkpoint, bad ones, and folders of pictures each with one thing wrong."""
    here = tmp_path_factory.mktemp("place")
    train.main([*SMALL, "--epochs", "1", "--out", str(here / "runs")])
    (run,) = (here / "runs").iterdir()
    good = (run / "checkpoint.pt").read_bytes()
    (here / "good.pt").write_bytes(good)
    (here / "half.pt").write_bytes(good[:len(good) // 2])
    (here / "empty.pt").write_bytes(b"")
    torch.save({"fc.bias": torch.zeros(3)}, here / "weights.pt")
    (here / "nothing").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(here / "whole.png")
    Image.new("1", (30_000, 30_000)).save(here / "huge.png")
    whole = (here / "whole.png").read_bytes()

    def pictures(name: str, files: dict[str, bytes], without: tuple[str, ...] = ()) -> Path:
        sound = {f"{split}/{label}/0.png": whole for split in ("train", "test") for label in ("cat", "dog")}
        for file, content in (sound | files).items():
            if not file.startswith(without or ("-",)):
                (here / name / file).parent.mkdir(parents=True, exist_ok=True)
                (here / name / file).write_bytes(content)
        return here / name

    pictures("zero", {"train/cat/1.png": b""})
    pictures("text", {"train/cat/1.jpg": b"I am not a picture"})
    pictures("half", {"test/dog/1.png": whole[:60]})
    pictures("huge", {"train/dog/1.png": (here / "huge.png").read_bytes()})
    pictures("one", {}, without=("train/cat", "test/cat"))
    pictures("untested", {}, without=("test",))
    pictures("stranger", {"test/horse/0.png": whole})
    pictures("named", {"train/cat/1.png/x": b"a folder"}, without=("train/cat/0.png",))
    (pictures("dangling", {}) / "train/cat/1.png").symlink_to("nowhere.png")
    (pictures("circle", {}) / "train/cat/again").symlink_to("..")
    (pictures("hollow", {}) / "train/horse").mkdir()
    return here


def below(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("script, flags, expected", [
    ("train", ["--unfreeze", "layer9"], r"--unfreeze: invalid choice: 'layer9' \(choose from"),
    ("train", ["--epochs", "0"], "--epochs: must be a whole number from 1 to 2147483647, not '0'"),
    ("train", ["--epochs", "ten"], "--epochs: must be .* not 'ten'"),
    ("train", ["--batch-size", "0"], "--batch-size: must be a whole number from 1"),
    ("train", ["--batch-size", "9223372036854775808"], "--batch-size: must be a whole number from 1 to"),
    ("train", ["--image-size", "31"], "--image-size: must be a whole number from 32 to 4096"),
    ("train", ["--image-size", "3000000"], "--image-size: must be a whole number from 32 to 4096"),
    ("train", ["--seed", "-1"], "--seed"),
    ("train", ["--seed", "18446744073709551616"], "--seed: must be a whole number from 0 to"),
    ("train", ["--lr", "layer4=1e-3"], "--lr layer4=...: only what learns has a rate, here fc"),
    ("train", ["--lr", "1e-3"], "--lr: '1e-3' is not STAGE=RATE"),
    ("train", ["--lr", "fc=fast"], "--lr: 'fc=fast' is not STAGE=RATE with a finite rate above 0"),
    ("train", ["--lr", "fc=0"], "--lr: 'fc=0' is not STAGE=RATE with a finite rate above 0"),
    ("train", ["--lr", "fc=nan"], "--lr: 'fc=nan' is not"),
    ("train", ["--lr", "fc=inf"], "--lr: 'fc=inf' is not"),
    ("train", ["--weights", "nowhere.pth"], "no weights file .*/nowhere.pth: --weights takes imagenet, none or"),
    ("train", ["--weights", __file__], "test_wrong_input.py holds no state_dict of torchvision's resnet18"),
    ("train", ["--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
    ("train", ["--dataset", "folder", "--data-dir", "nowhere"], "no .*/nowhere/train: --dataset folder reads"),
    ("train", ["--train-size", "2001"], "train size must be from 10 .* to 2000"),
    ("train", ["--train-size", "9"], "train size must be from 10"),
    ("train", ["--out", "/proc/nothing"], "cannot write to /proc/nothing/.*: choose another --out"),
    ("train", ["--out", __file__], "cannot write to .*: choose another --out"),
    ("train", ["--image-size", "32", "--unfreeze", "layer4", "--train-size", "21", "--batch-size", "20"], "leaves a batch of one"),
    ("train", ["--nothing"], "unrecognized arguments: --nothing"),
    ("train", ["--epoch", "3"], "unrecognized arguments: --epoch"),
    ("train", ["--epochs", "3", "0"], "--epochs: must be a whole number from 1"),
    ("train", ["--epochs"], "--epochs: expected at least one argument"),
    ("train", ["--frozen-batchnorm", "half"], "--frozen-batchnorm: invalid choice: 'half'"),
    ("train", ["--frozen-batchnorm", "train", "--image-size", "32", "--train-size", "26"], "leaves a batch of one"),
    ("train", ["--cache", "tape"], "--cache: invalid choice: 'tape'"),
    ("train", ["--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    ("train", ["--train-size", "1.5"], "--train-size: must be a whole number from 1 to .* not '1.5'"),
    ("train", ["--weights", "nothing"], "no weights file .*/nothing"),
    ("train", ["--weights", "empty.pt"], "empty.pt holds no state_dict of torchvision's resnet18"),
    ("train", ["--weights", "weights.pt"], "weights.pt holds no state_dict of torchvision's resnet18"),
    ("train", [*FOLDER, "nothing"], "no .*nothing/train"),
    ("train", [*FOLDER, "good.pt"], "no .*good.pt/train"),
    ("train", [*FOLDER, "zero"], "cannot read the picture .*zero/train/cat/1.png"),
    ("train", [*FOLDER, "text"], "cannot read the picture .*text/train/cat/1.jpg"),
    ("train", [*FOLDER, "half", "--train-size", "2"], "cannot read the picture .*half/test/dog/1.png"),
    ("train", [*FOLDER, "huge"], "cannot read the picture .*huge/train/dog/1.png: Image size .900000000 pixels. exceeds"),
    ("train", [*FOLDER, "one", "--train-size", "1"], "holds one class, dog: telling classes apart takes two"),
    ("train", [*FOLDER, "untested", "--train-size", "2"], "no .*untested/test or .*untested/val"),
    ("train", [*FOLDER, "stranger", "--train-size", "2"], "has classes the training set lacks: horse"),
    ("train", [*FOLDER, "named"], "named/train: .*no valid file for the classes cat"),
    ("train", [*FOLDER, "dangling"], "cannot read the picture .*dangling/train/cat/1.png"),
    ("train", [*FOLDER, "circle"], "a symbolic link leads round in a circle: .*again"),
    ("train", [*FOLDER, "hollow"], "hollow/train: .*horse"),
    ("train", [*FOLDER, "stranger", "--train-size", "1"], "train size must be from 2 .one image per class. to 2"),
    ("evaluate", ["nowhere.pt"], "no checkpoint nowhere.pt"),
    ("evaluate", [__file__], "test_wrong_input.py is not a checkpoint that train.py wrote whole"),
    ("evaluate", ["weights.pt"], "weights.pt is not a checkpoint that train.py wrote whole"),
    ("evaluate", ["half.pt"], "half.pt is not a checkpoint that train.py wrote whole"),
    ("evaluate", ["good.pt", "nowhere.pt"], "no checkpoint nowhere.pt"),
    ("evaluate", ["good.pt", "--image", "nowhere.jpg"], "cannot read the picture nowhere.jpg"),
    ("evaluate", ["good.pt", "--image", __file__], "cannot read the picture .*test_wrong_input.py"),
    ("evaluate", ["good.pt", "--image", __file__, "--per-class"], "one at a time"),
    ("evaluate", ["good.pt", "--cka", "--logged"], "--logged scores nothing, .* one at a time"),
    ("evaluate", ["good.pt", "--csv", "/proc/nothing/summary.csv"], "cannot write /proc/nothing/summary.csv .No such file or directory.: name another file"),
    ("evaluate", ["good.pt", "--csv", "."], "cannot write .* .it is a folder.: name another file"),
    ("evaluate", ["good.pt", "--image", __file__, "--paired", "paired.csv"], "one at a time"),
    ("evaluate", ["good.pt", "--paired", "."], "cannot write .* .it is a folder.: name another file"),
    ("evaluate", ["good.pt", "--logged", "--paired", "paired.csv"], "--paired takes two checkpoints or more"),
    ("evaluate", [], "the following arguments are required: CHECKPOINT"),
    ("evaluate", ["empty.pt"], "empty.pt is not a checkpoint that train.py wrote whole"),
    ("evaluate", ["nothing"], "no checkpoint nothing"),
    ("evaluate", ["good.pt", "--image", "zero/train/cat/1.png"], "cannot read the picture zero/train/cat/1.png"),
    ("evaluate", ["good.pt", "--image", "huge.png"], "cannot read the picture huge.png: Image size"),
    ("evaluate", ["good.pt", "--image", "nothing"], "cannot read the picture nothing"),
    ("evaluate", ["good.pt", "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
    ("evaluate", ["good.pt", "--per-clas"], "unrecognized arguments: --per-clas"),
    ("benchmark", ["--lr", "fc=1"], "--lr is not for the benchmark"),
    ("benchmark", ["--cache", "off"], "--cache is not for the benchmark"),
    ("benchmark", ["--strategies", "layer2"], "invalid choice: 'layer2'"),
    ("benchmark", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ("benchmark", ["--epochs", "0"], "--epochs: must be a whole number"),
    ("benchmark", [*FOLDER, "nothing"], "no .*nothing/train"),
    ("benchmark", [*FOLDER, "zero"], "cannot read the picture .*zero/train/cat/1.png"),
    ("benchmark", ["--dataset", "synthetic", "--csv", "/proc/nothing/speed.csv"], "/proc/nothing"),
    ("benchmark", ["--weights", "weights.pt"], "weights.pt holds no state_dict"),
    ("run_all.sh", ["--unfreeze", "layer2"], "the runs themselves set --unfreeze; for one run use train.py"),
    ("run_all.sh", ["--epochs=3"], "the runs themselves set --epochs"),
    ("run_all.sh", ["--seed", "1"], 'for seeds SEEDS="0 1 2"'),
    ("run_all.sh", ["--out"], "--out needs a folder"),
    ("run_all.sh", ["--out", ""], "--out needs a folder"),
    pytest.param("train", ["--device", "cuda"], "--device cuda: this PyTorch .* sees no cuda device; --device auto",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
])
def test_is_refused_in_one_line_and_nothing_is_written(place, monkeypatch, capsys, script, flags, expected):
    monkeypatch.chdir(place)
    before = below(place)
    if script == "run_all.sh":
        done = subprocess.run(["bash", str(ROOT / script), *flags], capture_output=True, text=True)
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("run_all.sh: error: ")
    else:
        first = {"train": [word for word in SMALL if not flags or flags[:2] != list(FOLDER[:2]) or word not in ("--train-size", "60")],
                 "benchmark": ["--weights", "none"], "evaluate": []}[script]
        line = complaint(MAINS[script], [*first, *flags], capsys)
    assert re.search(expected, line), line
    assert below(place) == before


def test_class_names_of_every_kind_survive_a_csv(tmp_path):
    names = ("a, b", 'the "best"', "two\nlines", "猫", "é ", "'", ";")
    evaluate.report_classes(tmp_path, torch.eye(7).roll(1, 0), data.Images(torch.zeros(7, 9, 9, 3, dtype=torch.uint8), torch.arange(7), names))

    with open(tmp_path / "confusion.csv", newline="", encoding="utf-8") as file:
        header, *table = csv.reader(file)
    assert header == ["true class", *names] and [row[0] for row in table] == list(names)
