"""What only a whole command shows of your own pictures: train.py, evaluate.py, plot.py."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint, complaint, rows
from PIL import Image

import data
import evaluate
import plot
import train
from plumbing import datasets, flags, pictures
from plumbing.files import write_csv
from plumbing.weights import load_model, read_checkpoint

LITTLE = ("--weights", "none", "--image-size", "32", "--epochs", "1", "--precision", "fp32")
LITTLE += ("--device", "cpu", "--dataset", "folder", "--data-dir")
DRAWN = datasets.synthetic("train")


@pytest.fixture(autouse=True)
def said_anew(monkeypatch):
    """What is said once is said anew in each test, and no test is too slow to be silent."""
    pictures.say_once.cache_clear()
    monkeypatch.setattr("plumbing.cli.show_line", lambda *_: None)


def picture(file: Path, number: int, size: tuple[int, int] = (32, 32)) -> Path:
    """Writes one of the drawn pictures."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAWN.pixels[number].numpy()).resize(size).save(file)
    return file


def two_classes(root: Path, *splits: str) -> Path:
    """Six pictures of each of two classes in each split, no two the same."""
    number = 0
    for split in splits or ("train", "test"):
        for label in ("cat", "dog"):
            for name in range(6):
                picture(root / split / label / f"{name}.png", number)
                number += 1
    return root


def trained(root: Path, *flags: str) -> Path:
    """The checkpoint of a run on these pictures."""
    out = root.parent / "out"
    train.main([*LITTLE, str(root), "--out", str(out), *flags])
    (file,) = out.glob("*/epoch1.pt")
    return file


def load_splits(*words: object) -> datasets.Splits:
    return datasets.load_splits(flags.parse("", train.RECIPE, list(map(str, words))), False)


# ---------------------------------------------------------------- training on them


def test_what_it_works_on_is_said_before_it_works(tmp_path, capsys):
    root = two_classes(tmp_path / "mine", "Train", "validation")
    picture(root / "Train/horse/only.png", 50)
    file = trained(root)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (told,) = [number for number, line in enumerate(lines) if line.startswith("data ")]
    assert lines.index(f"test pictures from {root / 'validation'}") < told
    assert "warning: no test pictures of horse" in lines[:told]
    assert lines[told] == "data     13 train and 12 test images"
    assert lines[told + 1] == "3 classes: cat, dog, horse; from 1 of horse to 6 of cat"
    assert lines[told + 2].startswith("stage")
    evaluate.main([str(file), "--per-class"])
    printed = capsys.readouterr().out
    assert "horse: no test pictures" in printed and " of 6" in printed and "of 0" not in printed


def test_a_share_for_the_test_is_found_again_by_evaluate(tmp_path):
    root = two_classes(tmp_path / "mine", "")
    file = trained(root, "--test-share", "0.34")
    evaluate.main([str(file), "--csv", str(tmp_path / "scores.csv")])
    (row,) = rows(tmp_path / "scores.csv")
    last = checkpoint(file.parent, 1)["history"][-1]
    assert row["test_images"] == "4" and row["train_images"] == "8"
    assert float(row["test_loss"]) == pytest.approx(last["test_loss"], rel=1e-4)
    moved = root.rename(tmp_path / "moved")
    evaluate.main([str(file), "--data-dir", str(moved), "--csv", str(tmp_path / "again.csv")])
    assert rows(tmp_path / "again.csv") == [row]


def test_a_share_that_cannot_be_is_refused(tmp_path, capsys):
    with pytest.raises(data.UserError, match="--test-share is for --dataset folder"):
        load_splits("--dataset", "synthetic", "--test-share", "0.2")
    root = two_classes(tmp_path, "train", "val", "test")
    with pytest.raises(data.UserError, match="--val-share: .* has validation pictures already"):
        load_splits("--dataset", "folder", "--data-dir", root, "--val-share", "0.2")
    for share in ("0", "1", "nan", "20%"):
        line = complaint(train.main, [f"--test-share={share}"], capsys)
        assert "--test-share: must be between 0 and 1" in line


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


def test_test_pictures_that_are_training_pictures_get_a_warning(tmp_path, capsys):
    root = two_classes(tmp_path)
    load_splits("--dataset", "folder", "--data-dir", root)
    assert "warning" not in capsys.readouterr().out
    for name in ("0", "1", "2"):
        Image.open(root / f"train/cat/{name}.png").save(root / f"test/cat/{name}0.bmp")
    load_splits("--dataset", "folder", "--data-dir", root)
    warning = "warning: 3 of the 15 test pictures are training pictures too"
    assert warning in capsys.readouterr().out


def test_test_pictures_of_another_size_get_that_of_the_training_pictures(tmp_path):
    """A network that learned from 32x32 pictures is not tested on sharp ones."""
    sharp = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for label in ("cat", "dog"):
        for split, size in (("train", (32, 32)), ("test", (120, 90))):
            file = tmp_path / split / label / "1.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(sharp).resize(size).save(file)
    splits = load_splits("--dataset", "folder", "--data-dir", tmp_path, "--image-size", "64")
    assert splits.train.pixels.shape == splits.test.pixels.shape == (2, 32, 32, 3)
    small = Image.fromarray(sharp).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(splits.test.pixels[0].numpy(), np.asarray(small))


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_class_whose_name_is_no_text_is_trained_scored_and_named(tmp_path, capsys):
    root = two_classes(tmp_path / "mine")
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / name)
    sys.stdout.reconfigure(errors="backslashreplace")  # as command() does
    file = trained(root)
    evaluate.main([str(file), "--per-class"])
    evaluate.main([str(file), "--image", str(root / "test" / name / "0.png")])
    assert r"caf\udce9, " in capsys.readouterr().out
    assert rows(file.with_suffix(".confusion.csv"))[0]["true class"] == r"caf\udce9"


# ---------------------------------------------------------------- scoring, and naming pictures


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a run on little pictures shown at 64, never written beside."""
    root = two_classes(tmp_path_factory.mktemp("finished") / "mine")
    return trained(root, "--image-size", "64")


def named(capsys) -> dict[str, str]:
    """What evaluate.py said of each picture, by its file."""
    _, *lines = capsys.readouterr().out.splitlines()
    return dict(line.rsplit(": ", 1) for line in lines)


def test_a_photograph_goes_down_to_the_training_pictures_size_first(finished, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    evaluate.main([str(finished), "--image", str(tmp_path / "photograph.png")])
    (said,) = named(capsys).values()
    loaded = load_model(torch.load(finished, weights_only=True))
    answers = []
    for size in (32, 64):
        x = data.transform(data.read_picture(tmp_path / "photograph.png", (size, size)), 64)
        with torch.no_grad():
            best = loaded.model.eval()(x).softmax(1)[0].topk(2)
        likely = [f"{loaded.classes[i]} {p:.1%}" for p, i in zip(best.values, best.indices)]
        answers.append(", ".join(likely))
    assert said == answers[0] != answers[1]


def test_a_bad_picture_does_not_keep_the_others_from_being_named(finished, tmp_path, capsys):
    good = [str(picture(tmp_path / f"{name}.png", 30)) for name in ("a", "c")]
    (tmp_path / "b.png").write_bytes(b"broken")
    Image.new("F", (9, 9)).save(tmp_path / "f.tif")
    words = [finished, "--image", good[0], tmp_path / "b.png", tmp_path / "f.tif", good[1]]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(map(str, words)))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert [line.split(": ")[0] for line in printed.out.splitlines()[1:]] == good
    one, other = printed.err.splitlines()
    assert "b.png" in one and "f.tif: it holds values" in other


def test_photographs_are_made_small_as_they_are_read(finished, tmp_path, monkeypatch):
    """300 of a telephone's would not fit into memory."""
    kept = []
    joined = torch.cat

    def watched(tensors, *more):
        kept.extend(tuple(tensor.shape) for tensor in tensors if tensor.dtype == torch.uint8)
        return joined(tensors, *more)

    monkeypatch.setattr(torch, "cat", watched)
    for name in ("a", "b"):
        Image.new("RGB", (900, 700), "gray").save(tmp_path / f"{name}.png")
    evaluate.main([str(finished), "--image", str(tmp_path / "*.png")])
    assert kept == [(1, 32, 32, 3)] * 2


def test_all_pictures_of_a_folder_are_named_on_the_screen_and_in_a_csv(finished, tmp_path, capsys):
    folder, file = tmp_path / "unlabelled", tmp_path / "predictions.csv"
    for number in range(130):  # more than a batch
        picture(folder / f"{number:03}.png", number)
    picture(folder / "more/deeper.png", 131)
    picture(folder / ".hidden.png", 132)
    (folder / "notes.txt").write_text("cats, mostly")
    evaluate.main([str(finished), "--image", str(folder), "--csv", str(file)])
    left_out, _, *lines = capsys.readouterr().out.splitlines()
    assert left_out == f"left out of {folder}: 1 hidden or system, 1 .txt"
    table = rows(file)
    assert len(lines) == len(table) == 131
    assert list(table[0]) == ["file", "class", "probability", "cat", "dog"]
    assert table[-1]["file"] == str(folder / "more/deeper.png")
    for line, row in zip(lines, table):
        assert line.startswith(f"{row['file']}: {row['class']} {float(row['probability']):.1%}")
        assert float(row["cat"]) + float(row["dog"]) == pytest.approx(1, abs=1e-5)
        assert float(row[row["class"]]) == float(row["probability"])


def test_a_flag_that_does_not_apply_is_refused(finished, tmp_path, capsys):
    words = [finished, "--image", picture(tmp_path / "a.png", 3), "--data-dir", tmp_path]
    assert "--data-dir is for scoring" in complaint(evaluate.main, words, capsys)
    saved = torch.load(finished, weights_only=True)
    saved["metadata"]["dataset"] = "synthetic"
    with pytest.raises(data.UserError, match="--data-dir: this run's pictures are drawn"):
        datasets.TestSets().of(saved, tmp_path)


def test_weights_given_to_evaluate_are_told_where_they_belong(finished, tmp_path):
    """A file that is healthy is never said to be damaged, or to be deleted."""
    state = torch.load(finished, weights_only=True)["model"]
    prefixed = {f"module.{key}": value for key, value in state.items()}
    for content in (state, prefixed, {0: torch.zeros(1)} | state):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(data.UserError, match="--weights .*weights.pt") as failure:
            read_checkpoint(tmp_path / "weights.pt")
        assert "delete" not in str(failure.value) and "damaged" not in str(failure.value)
    torch.save({"epoch": 3, "state": 5}, tmp_path / "other.pt")
    with pytest.raises(data.UserError, match="is no checkpoint of train.py") as failure:
        read_checkpoint(tmp_path / "other.pt")
    assert "delete" not in str(failure.value) and "damaged" not in str(failure.value)


# ---------------------------------------------------------------- pictures of the figures


def test_a_summary_that_excel_has_saved_is_read(finished, tmp_path):
    run = shutil.copytree(finished.parent, tmp_path / finished.parent.name)
    evaluate.main([str(run / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    plain = plot.read(tmp_path)
    for file in (tmp_path / "summary.csv", run / "history.csv"):
        file.write_bytes("\ufeff".encode() + file.read_bytes())
    assert [run["run"] for run in plot.read(tmp_path)] == [run["run"] for run in plain]
    plot.main([str(tmp_path)])
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("count", [3, 200])
def test_of_many_classes_the_most_confused_are_drawn(tmp_path, count):
    names = [f"class {number}" for number in range(count)]
    counts, shown, title = np.eye(count, dtype=int) * 10, names, ""
    if count == 200:
        for number in range(0, 40, 2):  # every other of the first forty
            counts[number, (number + 2) % 40] += 5
        shown, title = names[0:40:2], "the 20 most confused of 200 classes"
    table = [[name, *row] for name, row in zip(names, counts.tolist())]
    write_csv(tmp_path / "epoch1.confusion.csv", ["true class", *names], table)
    figure = plot.confusion(tmp_path / "epoch1.confusion.csv")
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == shown
    assert len(axis.get_xticklabels()) == len(shown) and axis.get_title() == title
    assert max(figure.get_size_inches()) < 20


def test_plot_ends_as_the_other_commands_do(tmp_path, capsys):
    assert "summary.csv" in complaint(plot.main, [tmp_path], capsys)
    (tmp_path / "summary.csv").write_text("run;epochs\na;1\n")
    assert "is not what train.py and compare.py write" in complaint(plot.main, [tmp_path], capsys)
    (tmp_path / "summary.csv").write_bytes("run,epochs".encode("utf-16"))
    line = complaint(plot.main, [tmp_path], capsys)
    assert f"{tmp_path / 'summary.csv'}" in line
