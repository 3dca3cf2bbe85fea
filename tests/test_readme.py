"""What README.md tells people to copy does what it says."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
import evaluate
import freeze

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def block(words: str) -> str:
    """The one block of Python code with these words in it."""
    (found,) = [text for text in BLOCKS if words in text]
    return found


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_trained_network_in_one_s_own_script_says_what_evaluate_says(
    run, tmp_path, capsys, monkeypatch, orientation
):
    """Also of a photograph that a telephone has turned."""
    folder = run("--unfreeze", "layer4", "--image-size", "64", "--lr", "layer4=1e-3")
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(3).integers(0, 256, (6, 9, 3), np.uint8)
    photograph = Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC)
    photograph.save(tmp_path / "cat.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    names = {"FILE": folder / "epoch2.pt", "torch": torch, "data": data, "freeze": freeze}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        exec(block('read_picture("cat.jpg"'), names)
    capsys.readouterr()
    evaluate.main([str(folder / "epoch2.pt"), "--image", "cat.jpg"])
    likely = capsys.readouterr().out.splitlines()[1].removeprefix("cat.jpg: ").split(", ")
    probabilities = names["logits"].softmax(1)[0].sort(descending=True)
    classes = [names["settings"]["classes"][i] for i in probabilities.indices[:5]]
    assert likely == [f"{n} {p:.1%}" for n, p in zip(classes, probabilities.values)]
    assert printed.getvalue().strip() == classes[0]
