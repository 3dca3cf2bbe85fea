"""evaluate.py: scoring checkpoints, and naming pictures."""

import contextlib
import io
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


@pytest.fixture(scope="module")
def probabilities(finished):
    """Of the test pictures, float32 [60, 10], as its network gives them."""
    network = load_model(checkpoint(finished)).model.eval()
    with torch.no_grad():
        return network(data.transform(datasets.synthetic("test").pixels, 48)).softmax(1)


@pytest.fixture(scope="module")
def per_class(finished, tmp_path_factory):
    """A copy of that run's folder beside whose checkpoint --per-class has written, and what it
    printed."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("copied") / "run")
    (folder / "epoch2.mistakes").mkdir()
    (folder / "epoch2.mistakes/99.png").write_bytes(b"of an earlier scoring")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main([str(folder / "epoch2.pt"), "--per-class"])
    return folder, printed.getvalue()


@pytest.mark.parametrize(
    "model, unfreeze, precision, images, rel",
    [
        ("resnet18", [], "bf16", 1, 1e-2),
        ("resnet18", ["layer4"], "fp16", 1, 1e-2),
        ("resnet34", ["layer4"], "fp32", 0, 1e-4),
        ("mobilenet_v3_small", ["layer4"], "fp32", 1, 1e-3),
        ("convnext_tiny", ["layer4"], "fp32", 1, 1e-3),
    ],
)
@pytest.mark.slow
def test_evaluation_agrees_with_the_last_epoch(
    run, tmp_path, model, unfreeze, precision, images, rel
):
    """The whole network, rebuilt from the checkpoint alone, against the folded prefix and the tail.
    images: how many may be rounded across."""
    few = "--train-size", "20", "--batch-size", "10", "--image-size", "32", "--epochs", "1"
    folder = run("--model", model, "--unfreeze", *unfreeze, "--precision", precision, *few)
    evaluate.main([str(folder / "epoch1.pt"), "--csv", str(tmp_path / "summary.csv")])
    (row,) = rows(tmp_path / "summary.csv")
    loss, accuracy = history(folder, "test_loss", "test_accuracy")[-1]
    assert (row["model"], row["precision"]) == (model, precision)
    assert abs(float(row["test_accuracy"]) - accuracy) * 60 < images + 0.5
    assert float(row["test_loss"]) == pytest.approx(loss, rel=rel)


def test_each_checkpoint_has_a_line_and_a_row_of_the_csv(finished, tmp_path, capsys):
    """And one that is missing does not cost the others theirs."""
    missing, summary = tmp_path / "nowhere.pt", tmp_path / "summary.csv"
    words = [missing, finished / "epoch1.pt", finished / "epoch2.pt", "--csv", summary]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(list(map(str, words)))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and str(missing) in printed.err
    table = rows(summary)
    assert list(table[0]) == [
        *("run", "epochs", "dataset", "strategy", "tag", "model", "weights", "val_share"),
        *("image_size", "batch_size", "learning_rates", "schedule_epochs", "frozen_batchnorm"),
        *("precision", "seed", "test_seed", "ranks", "code", "train_images", "test_images"),
        *("train_loss", "test_loss", "test_accuracy", "trainable_parameters", "seconds"),
        *("device", "torch"),
    ]
    expected = {"run": finished.name, "dataset": "synthetic", "strategy": "fc+layer4", "seed": "0"}
    expected |= {"trainable_parameters": "8398858", "precision": "fp32"}
    expected |= {"torch": torch.__version__, "train_images": "60", "test_images": "60"}
    expected |= {"learning_rates": "fc=0.001 layer4=0.001"}
    header, *lines = printed.out.splitlines()
    assert " ".join(header.split()) == "train loss test loss accuracy images epochs run"
    for row, line, epochs, logged in zip(table, lines, "12", history(finished, "train_loss")):
        assert (expected | {"epochs": epochs}).items() <= row.items()
        assert float(row["train_loss"]) == logged[0]
        loss, accuracy = float(row["test_loss"]), float(row["test_accuracy"])
        figures = [f"{logged[0]:.4f}", f"{loss:.4f}", f"{accuracy:.2%}"]
        assert line.split() == [*figures, "60", epochs, finished.name]


def test_what_is_right_and_a_row_of_the_matrix_for_each_true_class(per_class, probabilities):
    folder, printed = per_class
    labels, said = datasets.synthetic("test").labels, probabilities.argmax(1)
    assert torch.equal(checkpoint(folder)["test_correct"], said == labels)
    expected = np.zeros((10, 10), int)
    for true, answer in zip(labels, said):
        expected[true, answer] += 1
    table = rows(folder / "epoch2.confusion.csv")
    assert [row.pop("true class") for row in table] == list(table[0]) == list(CLASSES)
    assert [list(map(int, row.values())) for row in table] == expected.tolist()
    for name, correct in zip(CLASSES, expected.diagonal()):
        assert f"{correct / 6:.2%}    {name}, {correct} of 6" in printed


def test_the_most_confident_mistakes_are_kept_as_pictures(per_class, probabilities):
    folder, images = per_class[0] / "epoch2.mistakes", datasets.synthetic("test")
    highest, said = probabilities.max(1)
    wrong = [i for i in range(60) if said[i] != images.labels[i]]
    wrong.sort(key=lambda i: -highest[i])
    table = rows(folder / "mistakes.csv")
    numbered = [f"{number:02}.png" for number in range(1, 13)]
    assert [row["file"] for row in table] == numbered
    assert {file.name for file in folder.iterdir()} == {*numbered, "mistakes.csv"}
    for i, row in zip(wrong, table):
        assert (row["true"], row["said"]) == (CLASSES[images.labels[i]], CLASSES[said[i]])
        assert float(row["probability"]) == pytest.approx(highest[i].item(), rel=1e-4)
        with Image.open(folder / row["file"]) as picture:
            assert np.array_equal(np.asarray(picture), images.pixels[i].numpy())


def test_class_names_of_every_kind_survive_a_csv_and_a_list_of_mistakes_may_be_empty(tmp_path):
    names = ("a, b", 'the "best"', "two\nlines", "猫", "é ", "'", ";")
    images = data.Images(torch.zeros(7, 9, 9, 3, dtype=torch.uint8), torch.arange(7), names)
    evaluate.report_classes(tmp_path / "epoch1.pt", torch.eye(7), images)
    table = rows(tmp_path / "epoch1.confusion.csv")
    assert [row.pop("true class") for row in table] == list(table[0]) == list(names)
    (mistakes,) = (tmp_path / "epoch1.mistakes").iterdir()  # the list alone, and no picture
    assert mistakes.read_text() == "file,true,said,probability\n" and not rows(mistakes)
    evaluate.report_classes(tmp_path / "epoch1.pt", torch.eye(7).roll(1, 0), images)
    said = [(row["true"], row["said"]) for row in rows(mistakes)]
    assert sorted(said) == sorted(zip(names, (names[-1], *names)))


def test_a_picture_is_prepared_as_in_training(finished, probabilities, tmp_path, capsys):
    """And pictures of any size and kind get five classes."""
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for pixels, file in zip(datasets.synthetic("test").pixels, files):
        Image.fromarray(pixels.numpy()).save(file)
    files.append(tmp_path / "a b.jpg")
    Image.new("L", (300, 200), 128).save(files[-1])
    evaluate.main([str(finished / "epoch2.pt"), "--image", *map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(0) == str(finished / "epoch2.pt") and len(lines) == len(files)
    for line, predicted in zip(lines, probabilities[:8]):
        assert f": {CLASSES[predicted.argmax()]} {predicted.max():.1%}" in line
    for line, file in zip(lines, files):
        named, _, best = line.rpartition(": ")
        percentages = [float(part.split()[1].rstrip("%")) for part in best.split(", ")]
        assert named == str(file) and len(percentages) == 5 and sum(percentages) <= 100.5
        assert percentages == sorted(percentages, reverse=True)


def test_bf16_is_scored_in_fp16_on_a_card_that_emulates_it(finished, monkeypatch):
    """As on a T4; unless bf16 is asked for."""
    older_card = {"auto": "fp16", "bf16": "bf16", "fp32": "fp32"}
    monkeypatch.setattr("plumbing.weights.pick_precision", lambda name, _: older_card[name])
    saved = checkpoint(finished)
    saved["settings"]["precision"] = "bf16"
    assert load_model(saved, "cpu").precision == "fp16"
    assert load_model(saved, "cpu", "bf16").precision == "bf16"
    saved["settings"]["precision"] = "fp32"
    assert load_model(saved, "cpu").precision == "fp32"
