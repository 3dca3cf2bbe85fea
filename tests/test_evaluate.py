"""evaluate.py: scoring checkpoints, and naming pictures."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL, checkpoint, complaint, history, rows
from PIL import Image

import data
import evaluate
import train
from plumbing import datasets
from plumbing.weights import load_model

CLASSES = datasets.synthetic("train").classes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, never written to by the tests."""
    out = tmp_path_factory.mktemp("finished")
    asked = ["--unfreeze", "layer4", "--lr", "layer4=1e-3"]
    train.main([*SMALL, *asked, "--out", str(out)])
    (file,) = out.glob("*/history.csv")
    return file.parent


@pytest.fixture
def copied(finished, tmp_path):
    """The checkpoint of a copy of that run, to write beside."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied/epoch2.pt"


def network(folder) -> torch.nn.Module:
    return load_model(checkpoint(folder)).model.eval()


def read_table(file) -> tuple[list[str], list[list[str]]]:
    with open(file, newline="", encoding="utf-8") as opened:
        header, *table = csv.reader(opened)
    return header, table


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "unfreeze, precision, images, rel",
    [
        ([], "fp32", 0, 1e-4),
        (["layer4"], "fp32", 0, 1e-4),
        (["layer4"], "bf16", 1, 1e-2),
        pytest.param(["layer4"], "fp16", 1, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_evaluation_agrees_with_the_last_epoch(run, tmp_path, unfreeze, precision, images, rel):
    """The whole network as saved, against the folded prefix and the tail; bf16 may round an image
    across."""
    few = "--train-size", "20", "--batch-size", "10", "--image-size", "32", "--epochs", "1"
    folder = run("--unfreeze", *unfreeze, "--precision", precision, *few)
    evaluate.main([str(folder / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    (row,) = rows(tmp_path / "summary.csv")
    loss, accuracy = history(folder, "test_loss", "test_accuracy")[-1]
    assert row["precision"] == precision
    assert abs(float(row["test_accuracy"]) - accuracy) * 60 < images + 0.5
    assert float(row["test_loss"]) == pytest.approx(loss, rel=rel)


def test_the_csv_has_a_row_for_each_checkpoint(finished, copied, tmp_path):
    summary = tmp_path / "summary.csv"
    evaluate.main([str(finished / "epoch2.pt"), str(copied), "--csv", str(summary)])
    one, two = rows(summary)
    assert list(one) == [
        *("run", "epochs", "dataset", "strategy", "tag", "model", "weights", "val_share"),
        *("image_size", "batch_size", "learning_rates", "schedule_epochs", "frozen_batchnorm"),
        *("precision", "seed", "test_seed", "ranks", "code", "train_images", "test_images"),
        *("train_loss", "test_loss", "test_accuracy", "trainable_parameters", "seconds"),
        *("device", "torch"),
    ]
    assert (one["run"], two["run"]) == (finished.name, "copied")
    assert (one["dataset"], one["strategy"]) == ("synthetic", "fc+layer4")
    assert (one["epochs"], one["seed"]) == ("2", "0")
    assert float(one["train_loss"]) == history(finished, "train_loss")[-1][0]
    assert (one["trainable_parameters"], one["precision"]) == ("8398858", "fp32")
    assert one["torch"] == torch.__version__
    assert (one["train_images"], one["test_images"]) == ("60", "60")
    assert one["learning_rates"] == "fc=0.001 layer4=0.001"


def test_a_line_is_printed_for_each_checkpoint(finished, copied, tmp_path, capsys):
    files = [str(finished / "epoch2.pt"), str(copied)]
    evaluate.main([*files, "--csv", str(tmp_path / "summary.csv")])
    header, *lines = capsys.readouterr().out.splitlines()
    names = ["train", "loss", "test", "loss", "accuracy", "images", "epochs", "run"]
    assert header.split() == names
    table = rows(tmp_path / "summary.csv")
    assert len(lines) == len(table) == 2
    for line, row in zip(lines, table):
        loss, accuracy = float(row["test_loss"]), float(row["test_accuracy"])
        assert line.split()[1:] == [f"{loss:.4f}", f"{accuracy:.2%}", "60", "2", row["run"]]


def test_a_checkpoint_that_fails_does_not_cost_the_others_their_rows(finished, tmp_path, capsys):
    missing, summary = tmp_path / "nowhere.pt", tmp_path / "summary.csv"
    words = [missing, finished / "epoch2.pt", "--csv", summary]
    assert str(missing) in complaint(evaluate.main, words, capsys)
    assert [row["run"] for row in rows(summary)] == [finished.name]


def test_the_network_is_rebuilt_from_the_checkpoint_alone(run, tmp_path):
    """Which of the ResNets it is, too."""
    how = "--image-size", "32", "--epochs", "1", "--unfreeze", "layer4"
    folder = run(*how, "--model", "resnet34")
    evaluate.main([str(folder / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    (row,) = rows(tmp_path / "summary.csv")
    loss, accuracy = history(folder, "test_loss", "test_accuracy")[-1]
    assert row["model"] == "resnet34"
    assert float(row["test_accuracy"]) == pytest.approx(accuracy)
    assert float(row["test_loss"]) == pytest.approx(loss, rel=1e-4)


# ---------------------------------------------------------------- by class


def test_accuracies_by_class_and_the_confusion_matrix(finished, copied, capsys):
    evaluate.main([str(copied), "--per-class"])
    (_, *columns), table = read_table(copied.parent / "epoch2.confusion.csv")
    counts = np.array([[int(number) for number in row[1:]] for row in table])
    assert columns == [row[0] for row in table] == list(CLASSES)
    assert counts.sum(1).tolist() == [6] * 10
    assert counts.trace() / 60 == pytest.approx(history(finished, "test_accuracy")[-1][0])
    printed = capsys.readouterr().out
    for name, correct in zip(CLASSES, counts.diagonal()):
        assert f"{correct / 6:.2%}    {name}, {correct} of 6" in printed


def test_a_row_of_the_confusion_matrix_is_a_true_class(finished, copied):
    images = datasets.synthetic("test")
    said = network(finished)(data.transform(images.pixels, 48)).argmax(1)
    expected = np.zeros((10, 10), int)
    for true, answer in zip(images.labels, said):
        expected[true, answer] += 1
    evaluate.main([str(copied), "--per-class"])
    _, table = read_table(copied.parent / "epoch2.confusion.csv")
    assert [[int(number) for number in row[1:]] for row in table] == expected.tolist()


def test_the_most_confident_mistakes_are_kept_as_pictures(finished, copied):
    folder = copied.parent / "epoch2.mistakes"
    folder.mkdir()
    (folder / "99.png").write_bytes(b"of an earlier scoring")
    evaluate.main([str(copied), "--per-class"])
    images = datasets.synthetic("test")
    logits = network(finished)(data.transform(images.pixels, 48))
    probabilities, said = logits.softmax(1).max(1)
    wrong = [i for i in range(60) if said[i] != images.labels[i]]
    wrong.sort(key=lambda i: -probabilities[i])
    table = rows(folder / "mistakes.csv")
    numbered = [f"{number:02}.png" for number in range(1, 13)]
    assert [row["file"] for row in table] == numbered
    assert {file.name for file in folder.iterdir()} == {*numbered, "mistakes.csv"}
    for i, row in zip(wrong, table):
        assert (row["true"], row["said"]) == (CLASSES[images.labels[i]], CLASSES[said[i]])
        assert float(row["probability"]) == pytest.approx(probabilities[i].item(), rel=1e-4)
        with Image.open(folder / row["file"]) as picture:
            assert np.array_equal(np.asarray(picture), images.pixels[i].numpy())


def test_a_network_without_mistakes_leaves_an_empty_list_of_them(tmp_path):
    images = data.Images(torch.zeros(2, 9, 9, 3, dtype=torch.uint8), torch.arange(2), ("a", "b"))
    evaluate.report_classes(tmp_path / "epoch1.pt", torch.eye(2), images)
    assert [file.name for file in (tmp_path / "epoch1.mistakes").iterdir()] == ["mistakes.csv"]
    assert rows(tmp_path / "epoch1.mistakes/mistakes.csv") == []


def test_class_names_of_every_kind_survive_a_csv(tmp_path):
    names = ("a, b", 'the "best"', "two\nlines", "猫", "é ", "'", ";")
    images = data.Images(torch.zeros(7, 9, 9, 3, dtype=torch.uint8), torch.arange(7), names)
    answers = torch.eye(7).roll(1, 0)
    evaluate.report_classes(tmp_path / "epoch1.pt", answers, images)
    header, table = read_table(tmp_path / "epoch1.confusion.csv")
    assert header == ["true class", *names]
    assert [row[0] for row in table] == list(names)
    mistakes = rows(tmp_path / "epoch1.mistakes/mistakes.csv")
    answers = {row["true"]: row["said"] for row in mistakes}
    assert answers == dict(zip(names, (names[-1], *names)))


# ---------------------------------------------------------------- naming pictures


def test_pictures_of_any_size_and_kind_are_named(finished, tmp_path, capsys):
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "a b.png")
    Image.new("L", (9, 9), 128).save(tmp_path / "c.jpg")
    files = [str(tmp_path / "a b.png"), str(tmp_path / "c.jpg")]
    evaluate.main([str(finished / "epoch2.pt"), "--image", *files])
    checkpoint_line, *lines = capsys.readouterr().out.splitlines()
    assert checkpoint_line == str(finished / "epoch2.pt")
    assert len(lines) == 2
    for line, file in zip(lines, files):
        named, _, best = line.rpartition(": ")
        percentages = [float(part.split()[1].rstrip("%")) for part in best.split(", ")]
        assert named == file
        assert len(percentages) == 5
        assert percentages == sorted(percentages, reverse=True)
        assert sum(percentages) <= 100.5


def test_a_picture_is_prepared_as_in_training(finished, tmp_path, capsys):
    """The class named for a picture of the test set is the one that scoring predicts for it."""
    images = datasets.synthetic("test")
    predicted = network(finished)(data.transform(images.pixels[:8], 48)).softmax(1)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for pixels, file in zip(images.pixels, files):
        Image.fromarray(pixels.numpy()).save(file)
    evaluate.main([str(finished / "epoch2.pt"), "--image", *map(str, files)])
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(files)
    for line, probabilities in zip(lines, predicted):
        assert f": {CLASSES[probabilities.argmax()]} {probabilities.max():.1%}" in line


def test_your_own_pictures_from_training_to_scoring(tmp_path, capsys):
    """A folder data set, moved in between, and then gone."""
    images = datasets.synthetic("train")
    mine, moved = tmp_path / "mine", tmp_path / "moved"
    for i in range(40):
        split = "train" if i < 20 else "test"
        file = mine / split / f"class {images.labels[i] % 3}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels[i].numpy()).resize((40 + i, 50)).save(file)
    words = ["--dataset", "folder", "--data-dir", str(mine), "--weights", "none"]
    words += ["--image-size", "48", "--epochs", "1", "--out", str(tmp_path / "out")]
    train.main([*words, "--precision", "fp32", "--device", "cpu"])
    mine.rename(moved)
    file = tmp_path / "out/mine-fc-fp32-s0-px48-none/epoch1.pt"
    assert checkpoint(file.parent, 1)["settings"]["classes"] == ("class 0", "class 1", "class 2")
    capsys.readouterr()
    evaluate.main([str(file), "--data-dir", str(moved), "--per-class"])
    source, header, scores, *_ = capsys.readouterr().out.splitlines()
    assert source == f"test pictures from {moved}/test"
    assert header.split()[5] == "images"
    assert scores.split()[3] == "20"
    shutil.rmtree(moved / "test")  # a checkpoint whose pictures are gone is named
    assert str(file) in complaint(evaluate.main, [file], capsys)


def test_bf16_is_scored_in_fp16_on_a_card_that_emulates_it(finished, monkeypatch):
    """As on a T4; unless bf16 is asked for."""

    def older_card(name: str, _) -> str:
        return "fp16" if name == "auto" else name

    monkeypatch.setattr("plumbing.weights.pick_precision", older_card)
    saved = checkpoint(finished)
    saved["settings"]["precision"] = "bf16"
    assert load_model(saved, "cpu").precision == "fp16"
    assert load_model(saved, "cpu", "bf16").precision == "bf16"
    saved["settings"]["precision"] = "fp32"
    assert load_model(saved, "cpu").precision == "fp32"
