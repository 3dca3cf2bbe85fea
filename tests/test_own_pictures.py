"""What only a whole command shows of your own pictures: train.py, evaluate.py, plot.py."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import checkpoint, rows
from PIL import Image
from test_pictures import data_set, picture

import evaluate
import plot
import train
from plumbing import datasets, flags
from plumbing.files import write_rows

LITTLE = ("--weights", "none", "--image-size", "32", "--epochs", "1", "--precision", "fp32")
LITTLE += ("--device", "cpu", "--dataset", "folder", "--data-dir")
NO_TEXT, SPELLED = "a class", "a class"
if sys.platform == "linux":  # where names of files are bytes
    NO_TEXT, SPELLED = os.fsdecode(b"Caf\xe9"), r"Caf\udce9"


def two_classes(root: Path, *splits: str) -> Path:
    """Six pictures of each of two classes in each split, no two the same."""
    folders = [f"{split}/{label}" for split in splits for label in ("cat", "dog")]
    return data_set(root, *[f"{folder}/{name}.png" for folder in folders for name in range(6)])


def trained(root: Path, *flags: str) -> Path:
    """The checkpoint of a run on these pictures."""
    out = root.parent / "out"
    train.main([*LITTLE, str(root), "--out", str(out), *flags])
    (file,) = out.glob("*/epoch1.pt")
    return file


def load_splits(*words: object) -> datasets.Splits:
    return datasets.load_splits(flags.parse("", train.RECIPE, list(map(str, words))), False)


def test_what_it_works_on_is_said_before_it_works(tmp_path, capsys):
    root = two_classes(tmp_path / "mine", "Train", "validation")
    picture(root / "Train" / NO_TEXT / "only.png", seed=50)
    sys.stdout.reconfigure(errors="backslashreplace")  # as command() does
    file = trained(root)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (told,) = [number for number, line in enumerate(lines) if line.startswith("data ")]
    assert lines.index(f"test pictures from {root / 'validation'}") < told
    assert f"warning: no test pictures of {SPELLED}" in lines[:told]
    assert lines[told] == "data     13 train and 12 test images"
    assert lines[told + 1] == f"3 classes: {SPELLED}, cat, dog; from 1 of {SPELLED} to 6 of cat"
    assert lines[told + 2].startswith("stage")
    evaluate.main([str(file), "--per-class"])
    printed = capsys.readouterr().out
    assert f"{SPELLED}: no test pictures" in printed
    assert " of 6" in printed and "of 0" not in printed
    assert rows(file.with_suffix(".confusion.csv"))[0]["true class"] == SPELLED


@pytest.mark.parametrize("val", [(), ("val",)], ids=["a share", "a folder"])
def test_validation_pictures_are_a_folder_or_a_share_of_the_training_pictures(tmp_path, val):
    root = two_classes(tmp_path, "train", "test", *val)
    share = [] if val else ["--val-share", "0.34"]
    splits = load_splits("--dataset", "folder", "--data-dir", root, *share)
    assert splits.val.labels.bincount().tolist() == ([6, 6] if val else [2, 2])
    trained_on = {pixels.numpy().tobytes() for pixels in splits.train.pixels}
    assert len(trained_on) == splits.train_images == (12 if val else 8)
    assert not trained_on & {pixels.numpy().tobytes() for pixels in splits.val.pixels}
    assert splits.hashes.keys() == {"train", "val", "test"}


def test_another_test_seed_draws_other_validation_pictures_and_another_seed_does_not():
    found = []
    for seed in ([], ["--seed", "1"], ["--test-seed", "1"]):
        splits = load_splits("--dataset", "synthetic", "--val-share", "0.05", *seed)
        found.append(splits.hashes["val"])
    assert found[0] == found[1] != found[2]


def test_test_pictures_that_are_training_pictures_get_a_warning(tmp_path, capsys):
    root = two_classes(tmp_path, "train", "test")
    load_splits("--dataset", "folder", "--data-dir", root)
    assert "warning" not in capsys.readouterr().out
    for name in ("0", "1", "2"):
        Image.open(root / f"train/cat/{name}.png").save(root / f"test/cat/{name}0.bmp")
    load_splits("--dataset", "folder", "--data-dir", root)
    warning = "warning: 3 of the 15 test pictures are training pictures too"
    assert warning in capsys.readouterr().out


def test_test_pictures_of_another_size_get_that_of_the_training_pictures(tmp_path):
    """A network that learned from 32x32 pictures is not tested on sharp ones."""
    for label in ("cat", "dog"):
        picture(tmp_path / f"train/{label}/1.png", (32, 32))
        sharp = picture(tmp_path / f"test/{label}/1.png", (120, 90))
    splits = load_splits("--dataset", "folder", "--data-dir", tmp_path, "--image-size", "64")
    assert splits.train.pixels.shape == splits.test.pixels.shape == (2, 32, 32, 3)
    small = Image.fromarray(sharp).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(splits.test.pixels[0].numpy(), np.asarray(small))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a run on little pictures shown at 64, some of them drawn for the test;
    never written beside."""
    root = two_classes(tmp_path_factory.mktemp("finished") / "mine", ".")
    return trained(root, "--image-size", "64", "--test-share", "0.34")


def test_a_share_for_the_test_is_found_again_by_evaluate(finished, tmp_path):
    here, moved = tmp_path / "here.csv", tmp_path / "moved.csv"
    evaluate.main([str(finished), "--csv", str(here)])
    (row,) = rows(here)
    last = checkpoint(finished.parent, 1)["history"][-1]
    assert row["test_images"] == "4" and row["train_images"] == "8"
    assert float(row["test_loss"]) == pytest.approx(last["test_loss"], rel=1e-4)
    root = shutil.copytree(finished.parents[2] / "mine", tmp_path / "moved")
    evaluate.main([str(finished), "--data-dir", str(root), "--csv", str(moved)])
    assert rows(moved) == [row]


def test_all_pictures_of_a_folder_are_named_that_can_be_read(finished, tmp_path, capsys):
    folder, file = tmp_path / "unlabelled", tmp_path / "predictions.csv"
    data_set(folder, *[f"{number:03}.png" for number in range(130)])  # more than a batch
    data_set(folder, "more/deeper.png", ".hidden.png")
    (folder / "notes.txt").write_text("cats, mostly")
    (folder / "005b.png").write_bytes(b"broken")
    Image.new("F", (9, 9)).save(folder / "f.tif")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(finished), "--image", str(folder), "--csv", str(file)])
    printed = capsys.readouterr()
    one, other = printed.err.splitlines()
    assert stopped.value.code == 2
    assert "005b.png" in one and "f.tif: it holds values" in other
    left_out, _, *lines = printed.out.splitlines()
    assert left_out == f"left out of {folder}: 1 hidden or system, 1 .txt"
    table = rows(file)
    assert len(lines) == len(table) == 131
    assert list(table[0]) == ["file", "class", "probability", "cat", "dog"]
    assert table[-1]["file"] == str(folder / "more/deeper.png")
    for line, row in zip(lines, table):
        assert line.startswith(f"{row['file']}: {row['class']} {float(row['probability']):.1%}")
        assert float(row["cat"]) + float(row["dog"]) == pytest.approx(1, abs=1e-5)
        assert float(row[row["class"]]) == float(row["probability"])


def test_a_summary_that_excel_has_saved_is_read(finished, tmp_path):
    run = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    evaluate.main([str(run / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    (plain,) = plot.read(tmp_path)
    for file in (tmp_path / "summary.csv", run / "history.csv"):
        file.write_bytes("\ufeff".encode() + file.read_bytes())
    (saved,) = plot.read(tmp_path)
    assert saved["run"] == plain["run"] and saved["history"].keys() == plain["history"].keys()


def test_of_many_classes_the_most_confused_are_drawn(tmp_path):
    names = [f"class {number}" for number in range(200)]
    counts = np.eye(200, dtype=int) * 10
    for number in range(0, 40, 2):  # every other of the first forty
        counts[number, (number + 2) % 40] += 5
    table = [{"true class": name} | dict(zip(names, row)) for name, row in zip(names, counts)]
    write_rows(tmp_path / "epoch1.confusion.csv", table)
    figure = plot.confusion(tmp_path / "epoch1.confusion.csv")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == names[0:40:2]
    assert len(axis.get_xticklabels()) == 20 and max(figure.get_size_inches()) < 20
    assert axis.get_title() == "the 20 most confused of 200 classes"
