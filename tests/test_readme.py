"""What README.md tells people to copy does what it says."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, history
from PIL import Image

import data
import evaluate
import example
import freeze
from plumbing import datasets


def block(readme: str, words: str) -> str:
    """The one block of Python code with these words in it."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (found,) = [code for code in blocks if words in code]
    return found


def test_one_s_own_script_says_what_evaluate_says(finished, tmp_path, capsys, monkeypatch):
    """Of a photograph that a telephone has turned, which goes down to the training pictures' size
    first."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(3).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    names = {"FILE": finished / "epoch2.pt", "torch": torch, "data": data, "freeze": freeze}
    with torch.no_grad():
        exec(block("README.md", 'read_picture("cat.jpg"'), names)
    printed = capsys.readouterr().out
    evaluate.main([str(finished / "epoch2.pt"), "--image", "cat.jpg"])
    likely = capsys.readouterr().out.splitlines()[1].removeprefix("cat.jpg: ").split(", ")
    probabilities = names["logits"].softmax(1)[0].sort(descending=True)
    classes = [names["settings"]["classes"][i] for i in probabilities.indices[:5]]
    assert likely == [f"{n} {p:.1%}" for n, p in zip(classes, probabilities.values)]
    assert printed.strip() == classes[0]


@pytest.mark.parametrize("readme", ["README.md", "README.ja.md"])
def test_what_is_quoted_linked_or_said_to_be_edited_is_there(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    quoted = block(readme, "inputs.fill(DEVICE)")
    lines = [line.strip() for line in (ROOT / "example.py").read_text().splitlines()]
    places = [lines.index(line.strip()) for line in quoted.splitlines() if line != "..."]
    assert places == sorted(places) and len(places) > 5
    recipe, loop = (ROOT / "train.py").read_text().split("def train_step", 1)
    for name in ("OPTIMIZER", "SCHEDULE", "LOSS", "AUGMENT"):
        assert f"`{name}`" in text and re.search(f"^{name} = ", recipe, re.M)
    for words in ("def fine_tune", "run.keep(", "freeze.train_mode(tail)", "def train_epoch"):
        assert words in loop
    assert "def metrics(" in (ROOT / "plumbing/report.py").read_text()
    linked = set(re.findall(r"\]\(((?!http)[^)#]+)", text))
    assert not [name for name in linked if not (ROOT / name).exists()]


def test_the_example_learns_what_train_py_learns(run, monkeypatch):
    """On the same pictures, order and flips, from the same random weights: to rounding, which Adam
    makes grow."""
    few = data.stratified_subset(datasets.synthetic("train"), 60, seed=0)
    test = datasets.synthetic("test")
    folder = run("--unfreeze", "layer4", "--image-size", "32")
    expected = history(folder, "train_loss", "test_accuracy")

    def pairs(images: data.Images) -> list:
        pictures = map(Image.fromarray, images.pixels.numpy())
        return list(zip(pictures, images.labels.tolist()))

    settings = {"TRAIN": pairs(few), "TEST": pairs(test), "SIZE": 32, "BATCH": 25, "EPOCHS": 2}
    for name, value in (settings | {"DEVICE": "cpu"}).items():
        monkeypatch.setattr(example, name, value)
    found = example.main()
    assert [loss for loss, _ in found] == pytest.approx([row[0] for row in expected], rel=2e-3)
    assert [right for _, right in found] == pytest.approx([row[1] for row in expected], abs=0.05)


@pytest.mark.slow
def test_the_example_learns_its_own_pictures_and_needs_the_rooms_alone(tmp_path):
    for name in ("example", "freeze", "data", "features"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    words = [sys.executable, "example.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last, _ = done.stdout.splitlines()
    assert last.startswith("epoch 4") and float(last.split()[-1].rstrip("%")) > 75
