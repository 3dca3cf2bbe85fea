"""The study of the usual advice, in miniature."""

import os
import subprocess

import pytest
from conftest import ROOT, SMALL, rows

from study.advice import table

EDITS = sorted((ROOT / "study/advice").glob("*.sed"))


@pytest.mark.parametrize("edit", EDITS, ids=lambda file: file.stem)
def test_an_edit_still_finds_its_lines(edit):
    """Each sed command changes train.py, which is Python after it."""
    text = (ROOT / "train.py").read_text()
    for command in edit.read_text().split("\ns/")[1:]:
        words = ["sed", "s/" + command.rstrip("\n")]
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
        assert done.stdout != text
        text = done.stdout
    compile(text, "train.py", "exec")


@pytest.mark.slow
def test_every_change_is_run_beside_the_published_recipe(tmp_path, capsys):
    flags = [*SMALL, "--image-size", "32", "--epochs", "6"]
    environment = os.environ | {"OUT": str(tmp_path), "STAGES": "layer4"}
    words = ["bash", ROOT / "study/advice/run.sh", *flags]
    subprocess.run(words, env=environment, check=True)
    runs = [str(file) for file in sorted(tmp_path.glob("*/epoch6.pt"))]
    table.main([*runs, "--csv", str(tmp_path / "advice.csv")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "fc+layer4" in line]
    changes = sorted([*(file.stem for file in EDITS), "batch64", "probe"])
    assert sorted(row["tag"] for row in rows(tmp_path / "advice.csv")) == changes
    assert len(lines) == len(changes)
