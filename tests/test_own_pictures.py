"""What only a whole command shows of your own pictures: train.py, evaluate.py, plot.py."""

import csv
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
from plumbing.weights import load_model, read_checkpoint

LITTLE = ("--weights", "none", "--image-size", "32", "--epochs", "1", "--precision", "fp32")
LITTLE += ("--device", "cpu", "--dataset", "folder", "--data-dir")
DRAWN = datasets.synthetic("train")


@pytest.fixture(autouse=True)
def nothing_said():
    pictures.say_once.cache_clear()


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


# ---------------------------------------------------------------- training on them


def test_what_jupyter_and_macos_leave_changes_nothing(tmp_path, capsys):
    clean, stray = two_classes(tmp_path / "clean/mine"), two_classes(tmp_path / "stray/mine")
    for split in ("train", "test"):
        for name in (".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints"):
            picture(stray / split / name / "0-checkpoint.png", 50)
        (stray / split / "cat/._0.png").write_bytes(b"what macOS leaves")
    (stray / ".ipynb_checkpoints").mkdir()
    one = trained(clean)
    capsys.readouterr()
    other = trained(stray)
    assert f"left out of {stray / 'train'}: 4 hidden or system" in capsys.readouterr().out
    one, other = checkpoint(one.parent, 1), checkpoint(other.parent, 1)
    assert one["settings"] == other["settings"]
    assert one["settings"]["classes"] == ("cat", "dog")


def test_what_it_works_on_is_said_before_it_works(tmp_path, capsys):
    root = two_classes(tmp_path / "mine", "Train", "validation")
    picture(root / "Train/dog/more.png", 50)
    trained(root)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (told,) = [number for number, line in enumerate(lines) if line.startswith("data ")]
    assert lines.index(f"test pictures from {root / 'validation'}") < told
    assert lines[told] == "data     13 train and 12 test images"
    assert lines[told + 1] == "2 classes: cat, dog; from 6 of cat to 7 of dog"
    assert lines[told + 2].startswith("stage")


def test_a_share_for_the_test_is_found_again_by_evaluate(tmp_path, capsys):
    root = two_classes(tmp_path / "mine", "")
    file = trained(root, "--test-share", "0.34")
    assert "test pictures: 4 of 12" in capsys.readouterr().out
    evaluate.main([str(file), "--csv", str(tmp_path / "scores.csv")])
    (row,) = rows(tmp_path / "scores.csv")
    last = checkpoint(file.parent, 1)["history"][-1]
    assert row["test_images"] == "4" and row["train_images"] == "8"
    assert float(row["test_loss"]) == pytest.approx(last["test_loss"], rel=1e-4)
    moved = root.rename(tmp_path / "moved")
    evaluate.main([str(file), "--data-dir", str(moved), "--csv", str(tmp_path / "again.csv")])
    assert rows(tmp_path / "again.csv") == [row]


def test_a_share_of_a_data_set_with_a_test_is_refused(tmp_path, capsys):
    words = ["--dataset", "synthetic", "--weights", "none", "--test-share", "0.2"]
    line = complaint(train.main, [*words, "--out", tmp_path / "out"], capsys)
    assert "--test-share is for --dataset folder" in line
    for share in ("0", "1", "-0.1", "nan", "20%", "2"):
        line = complaint(train.main, [f"--test-share={share}"], capsys)
        assert "--test-share: must be between 0 and 1" in line


def test_test_pictures_that_are_training_pictures_get_a_warning(tmp_path, capsys):
    root = two_classes(tmp_path / "mine")
    for name in ("0", "1", "2"):
        shutil.copy(root / f"train/cat/{name}.png", root / f"test/cat/{name}0.png")
    trained(root)
    warning = "warning: 3 of the 15 test pictures are training pictures too"
    assert warning in capsys.readouterr().out


def test_without_twins_there_is_no_warning(tmp_path, capsys):
    trained(two_classes(tmp_path / "mine"))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "Training"])
def test_a_picture_folder_is_no_place_to_download_cifar_to(tmp_path, capsys, name, split):
    root = two_classes(tmp_path / "mine", split)
    before = sorted(root.rglob("*"))
    words = ["--dataset", name, "--data-dir", root, "--weights", "none", "--out", tmp_path / "out"]
    line = complaint(train.main, words, capsys)
    assert "--dataset folder was probably meant" in line and str(root) in line
    assert sorted(root.rglob("*")) == before


def test_a_data_folder_that_cannot_be_written_is_named_as_such(tmp_path, capsys):
    """/proc can be read, and nobody can write to it."""
    words = ["--data-dir", "/proc", "--weights", "none", "--out", tmp_path / "out"]
    line = complaint(train.main, words, capsys)
    assert "cannot write to --data-dir /proc" in line and "--out" not in line


def test_all_broken_pictures_are_named_in_one_line(tmp_path, capsys):
    root = two_classes(tmp_path / "mine")
    for name in ("cat/1.png", "dog/5.png"):
        (root / "train" / name).write_bytes(b"broken")
    line = complaint(train.main, [*LITTLE, root, "--out", tmp_path / "out"], capsys)
    assert "cat/1.png" in line and "dog/5.png" in line


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
    assert [row["true class"] for row in rows(file.with_suffix(".confusion.csv"))][0] == (
        r"caf\udce9"
    )


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
    photograph = Image.fromarray(pixels)
    photograph.save(tmp_path / "photograph.png")
    evaluate.main([str(finished), "--image", str(tmp_path / "photograph.png")])
    (said,) = named(capsys).values()
    loaded = load_model(torch.load(finished, weights_only=True))
    answers = []
    for size in (32, 64):
        small = np.array(photograph.resize((size, size), Image.Resampling.BILINEAR))
        x = data.transform(torch.from_numpy(small)[None], 64)
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
    assert "b.png" in one and "f.tif: holds floating-point" in other


def test_no_picture_of_several_can_be_read(finished, tmp_path, capsys):
    (tmp_path / "b.png").write_bytes(b"broken")
    line = complaint(evaluate.main, [finished, "--image", tmp_path / "b.png"], capsys)
    assert f"cannot read the picture {tmp_path / 'b.png'}" in line


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


def test_a_broken_picture_in_a_folder_is_told_and_has_no_row(finished, tmp_path, capsys):
    picture(tmp_path / "new/a.png", 3)
    (tmp_path / "new/b.png").write_bytes(b"broken")
    words = [finished, "--image", tmp_path / "new", "--csv", tmp_path / "predictions.csv"]
    assert "b.png" in complaint(evaluate.main, words, capsys)
    assert [row["file"] for row in rows(tmp_path / "predictions.csv")] == [
        str(tmp_path / "new/a.png")
    ]


def test_a_full_memory_is_not_a_bad_picture(finished, tmp_path, monkeypatch):
    file = picture(tmp_path / "a.png", 3)

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        evaluate.main([str(finished), "--image", str(file)])


def test_a_flag_that_does_not_apply_is_refused(run, finished, tmp_path, capsys):
    drawn_run = run("--image-size", "32", "--epochs", "1", "--train-size", "20")
    line = complaint(evaluate.main, [drawn_run / "epoch1.pt", "--data-dir", tmp_path], capsys)
    assert "--data-dir: this run's pictures are drawn" in line
    words = [finished, "--image", picture(tmp_path / "a.png", 3), "--data-dir", tmp_path]
    assert "--data-dir is for scoring" in complaint(evaluate.main, words, capsys)


def test_a_class_without_test_pictures_has_no_accuracy(tmp_path, capsys):
    root = two_classes(tmp_path / "mine")
    picture(root / "train/horse/0.png", 60)
    file = trained(root)
    capsys.readouterr()
    evaluate.main([str(file), "--per-class"])
    printed = capsys.readouterr().out
    assert "horse: no test pictures" in printed and "of 0" not in printed
    assert " of 6" in printed


@pytest.mark.parametrize("wrap", ["plain", "prefixed", "keys that are no names"])
def test_healthy_weights_given_to_evaluate_are_told_where_they_belong(finished, tmp_path, wrap):
    state = torch.load(finished, weights_only=True)["model"]
    if wrap == "prefixed":
        state = {f"module.{key}": value for key, value in state.items()}
    if wrap == "keys that are no names":
        state = {0: torch.zeros(1)} | state
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(data.UserError, match="--weights .*weights.pt") as failure:
        read_checkpoint(tmp_path / "weights.pt")
    assert "delete" not in str(failure.value) and "damaged" not in str(failure.value)


def test_another_s_checkpoint_is_not_to_be_deleted(tmp_path):
    torch.save({"epoch": 3, "state": 5}, tmp_path / "other.pt")
    with pytest.raises(data.UserError, match="is no checkpoint of train.py") as failure:
        read_checkpoint(tmp_path / "other.pt")
    assert "delete" not in str(failure.value) and "damaged" not in str(failure.value)


def test_quoted_patterns_and_home_are_spelled_out(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    pattern = str(finished.parent.parent / "*/epoch?.pt")
    evaluate.main([pattern, "--csv=~/scores.csv"])
    (row,) = rows(tmp_path / "scores.csv")
    assert row["run"] == finished.parent.name and row["test_images"] == "12"


# ---------------------------------------------------------------- pictures of the figures


@pytest.fixture
def drawable(finished, tmp_path):
    """A folder to plot: a run and its summary."""
    shutil.copytree(finished.parent, tmp_path / "results" / finished.parent.name)
    file = tmp_path / "results" / finished.parent.name / "epoch1.pt"
    evaluate.main([str(file), "--csv", str(tmp_path / "results/summary.csv")])
    return tmp_path / "results"


def test_a_summary_that_excel_has_saved_is_read(drawable, capsys):
    plain = plot.read(drawable)
    summary = drawable / "summary.csv"
    summary.write_bytes("\ufeff".encode() + summary.read_bytes())
    (history,) = drawable.glob("*/history.csv")
    history.write_bytes("\ufeff".encode() + history.read_bytes())
    assert [run["run"] for run in plot.read(drawable)] == [run["run"] for run in plain]
    plot.main([str(drawable)])
    assert (drawable / "curves.png").exists()


@pytest.mark.parametrize("count, side", [(20, 20), (200, 20), (3, 3)])
def test_of_many_classes_the_most_confused_are_drawn(tmp_path, count, side):
    names = [f"class {number}" for number in range(count)]
    counts = np.eye(count, dtype=int) * 10
    if count > 30:
        for number in range(0, 40, 2):  # every other of the first forty
            counts[number, (number + 2) % 40] += 5
    with open(tmp_path / "epoch1.confusion.csv", "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["true class", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts.tolist()))
    figure = plot.confusion(tmp_path / "epoch1.confusion.csv")
    (axis,) = figure.axes
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert len(shown) == len(axis.get_xticklabels()) == side
    title = ""
    if count > side:
        title = "the 20 most confused of 200 classes"
        assert shown == names[0:40:2]
    assert axis.get_title() == title
    width, height = figure.get_size_inches()
    assert max(width, height) < 20


def test_plot_ends_as_the_other_commands_do(tmp_path, capsys):
    assert "summary.csv" in complaint(plot.main, [tmp_path], capsys)
    (tmp_path / "summary.csv").write_text("run;epochs\na;1\n")
    assert "is not what train.py and compare.py write" in complaint(plot.main, [tmp_path], capsys)
    (tmp_path / "summary.csv").write_bytes("run,epochs".encode("utf-16"))
    line = complaint(plot.main, [tmp_path], capsys)
    assert f"{tmp_path / 'summary.csv'}" in line


def test_test_pictures_of_another_size_get_that_of_the_training_pictures(tmp_path):
    """A network that learned from 32x32 pictures is not tested on sharp ones."""
    sharp = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for label in ("cat", "dog"):
        for split, size in (("train", (32, 32)), ("test", (120, 90))):
            file = tmp_path / split / label / "1.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(sharp).resize(size).save(file)
    words = ["--dataset", "folder", "--data-dir", str(tmp_path), "--image-size", "64"]
    train_images, _, test, *_ = datasets.load_splits(flags.parse("", train.RECIPE, words), False)
    assert train_images.pixels.shape == test.pixels.shape == (2, 32, 32, 3)
    small = Image.fromarray(sharp).resize((32, 32), pictures.BILINEAR)
    assert np.array_equal(test.pixels[0].numpy(), np.asarray(small))
