"""evaluate.py: scoring checkpoints, and naming pictures."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import checkpoint, history, rows
from PIL import Image

import data
import evaluate
from plumbing import datasets
from plumbing.weights import load_model

CLASSES = datasets.synthetic("train").classes


@pytest.fixture
def copied(finished, tmp_path):
    """The checkpoint of a copy of that run, to write beside."""
    shutil.copytree(finished, tmp_path / "copied")
    return tmp_path / "copied/epoch2.pt"


def network(folder) -> torch.nn.Module:
    return load_model(checkpoint(folder)).model.eval()


def without_progress(printed: str) -> list[str]:
    """The lines but for those that are printed once a minute."""
    return [line for line in printed.splitlines() if not line.startswith("scoring, ")]


def read_table(file) -> tuple[list[str], list[list[str]]]:
    with open(file, newline="", encoding="utf-8") as opened:
        header, *table = csv.reader(opened)
    return header, table


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "model, unfreeze, precision, images, rel",
    [
        ("resnet18", [], "fp32", 0, 1e-4),
        ("resnet18", ["layer4"], "fp32", 0, 1e-4),
        ("resnet18", ["layer4"], "bf16", 1, 1e-2),
        pytest.param("resnet18", ["layer4"], "fp16", 1, 1e-2, marks=pytest.mark.slow),
        pytest.param("resnet34", ["layer4"], "fp32", 0, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_evaluation_agrees_with_the_last_epoch(
    run, tmp_path, model, unfreeze, precision, images, rel
):
    """The whole network, rebuilt from the checkpoint alone, against the folded prefix and the tail;
    bf16 may round an image across."""
    few = "--train-size", "20", "--batch-size", "10", "--image-size", "32", "--epochs", "1"
    folder = run("--model", model, "--unfreeze", *unfreeze, "--precision", precision, *few)
    evaluate.main([str(folder / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    (row,) = rows(tmp_path / "summary.csv")
    loss, accuracy = history(folder, "test_loss", "test_accuracy")[-1]
    assert (row["model"], row["precision"]) == (model, precision)
    assert abs(float(row["test_accuracy"]) - accuracy) * 60 < images + 0.5
    assert float(row["test_loss"]) == pytest.approx(loss, rel=rel)


def test_each_checkpoint_has_a_line_and_a_row_of_the_csv(finished, copied, tmp_path, capsys):
    """And one that is missing does not cost the others theirs."""
    missing, summary = tmp_path / "nowhere.pt", tmp_path / "summary.csv"
    words = [missing, finished / "epoch2.pt", copied, "--csv", summary]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(map(str, words)))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and str(missing) in printed.err
    one, two = table = rows(summary)
    assert list(one) == [
        *("run", "epochs", "dataset", "strategy", "tag", "model", "weights", "val_share"),
        *("image_size", "batch_size", "learning_rates", "schedule_epochs", "frozen_batchnorm"),
        *("precision", "seed", "test_seed", "ranks", "code", "train_images", "test_images"),
        *("train_loss", "test_loss", "test_accuracy", "trainable_parameters", "seconds"),
        *("device", "torch"),
    ]
    assert (one["run"], two["run"]) == (finished.name, "copied")
    expected = {"dataset": "synthetic", "strategy": "fc+layer4", "epochs": "2", "seed": "0"}
    expected |= {"trainable_parameters": "8398858", "precision": "fp32"}
    expected |= {"torch": torch.__version__, "train_images": "60", "test_images": "60"}
    expected |= {"learning_rates": "fc=0.001 layer4=0.001"}
    assert expected.items() <= one.items()
    assert float(one["train_loss"]) == history(finished, "train_loss")[-1][0]
    header, *lines = without_progress(printed.out)
    assert " ".join(header.split()) == "train loss test loss accuracy images epochs run"
    for line, row in zip(lines, table):
        loss, accuracy = float(row["test_loss"]), float(row["test_accuracy"])
        assert line.split()[1:] == [f"{loss:.4f}", f"{accuracy:.2%}", "60", "2", row["run"]]


# ---------------------------------------------------------------- by class


def test_a_row_of_the_confusion_matrix_is_a_true_class(finished, copied, capsys):
    """And each class has its share of these."""
    images = datasets.synthetic("test")
    said = network(finished)(data.transform(images.pixels, 48)).argmax(1)
    expected = np.zeros((10, 10), int)
    for true, answer in zip(images.labels, said):
        expected[true, answer] += 1
    evaluate.main([str(copied), "--per-class"])
    (_, *columns), table = read_table(copied.parent / "epoch2.confusion.csv")
    assert columns == [row[0] for row in table] == list(CLASSES)
    assert [[int(number) for number in row[1:]] for row in table] == expected.tolist()
    printed = capsys.readouterr().out
    for name, correct in zip(CLASSES, expected.diagonal()):
        assert f"{correct / 6:.2%}    {name}, {correct} of 6" in printed


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


NAMES = ("a, b", 'the "best"', "two\nlines", "猫", "é ", "'", ";")


@pytest.mark.parametrize("mistakes", [7, 0])
def test_class_names_of_every_kind_survive_a_csv(tmp_path, mistakes):
    """And a network without mistakes leaves an empty list of them."""
    pixels = torch.zeros(7, 9, 9, 3, dtype=torch.uint8)
    answers = torch.eye(7).roll(min(mistakes, 1), 0)
    evaluate.report_classes(
        tmp_path / "epoch1.pt", answers, data.Images(pixels, torch.arange(7), NAMES)
    )
    header, table = read_table(tmp_path / "epoch1.confusion.csv")
    assert header == ["true class", *NAMES] and [row[0] for row in table] == list(NAMES)
    folder = tmp_path / "epoch1.mistakes"
    said = [(row["true"], row["said"]) for row in rows(folder / "mistakes.csv")]
    assert sorted(said) == sorted(zip(NAMES, (NAMES[-1], *NAMES)))[:mistakes]
    assert len([*folder.glob("*.png")]) == mistakes


# ---------------------------------------------------------------- naming pictures


def test_a_picture_is_prepared_as_in_training(finished, tmp_path, capsys):
    """What is said of pictures of the test set is what scoring predicts; and pictures of any size
    and kind get five classes."""
    images = datasets.synthetic("test")
    predicted = network(finished)(data.transform(images.pixels[:8], 48)).softmax(1)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for pixels, file in zip(images.pixels, files):
        Image.fromarray(pixels.numpy()).save(file)
    files += [tmp_path / "a b.png", tmp_path / "c.jpg"]
    Image.new("RGB", (300, 200), "gray").save(files[-2])
    Image.new("L", (9, 9), 128).save(files[-1])
    evaluate.main([str(finished / "epoch2.pt"), "--image", *map(str, files)])
    checkpoint_line, *lines = without_progress(capsys.readouterr().out)
    assert checkpoint_line == str(finished / "epoch2.pt") and len(lines) == len(files)
    for line, probabilities in zip(lines, predicted):
        assert f": {CLASSES[probabilities.argmax()]} {probabilities.max():.1%}" in line
    for line, file in zip(lines, files):
        named, _, best = line.rpartition(": ")
        percentages = [float(part.split()[1].rstrip("%")) for part in best.split(", ")]
        assert named == str(file) and len(percentages) == 5 and sum(percentages) <= 100.5
        assert percentages == sorted(percentages, reverse=True)


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
