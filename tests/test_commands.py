"""The command lines: what a user types, sees and finds on disk."""

import base64
import csv
import io
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, checkpoint, complaint, history, rows
from PIL import Image

import data
import evaluate
import freeze
import runs
import train

CLASSES = data.synthetic("train").classes


def everything_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# ---------------------------------------------------------------- a run, and scoring it


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, never written to by the tests."""
    out = tmp_path_factory.mktemp("finished")
    train.main([*SMALL, "--unfreeze", "layer4", "--lr", "layer4=1e-3", "--out", str(out)])
    (folder,) = out.iterdir()
    return folder


def test_what_a_run_prints(run, capsys):
    folder = run("--unfreeze", "layer3", "layer4", "--lr", "layer3=3e-5", "--batch-size", "30")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(folder)
    assert lines[1] == "data     60 train and 60 test images, 10 classes"
    table = [line.split() for line in lines[3:9]]
    assert table == [["stem", "9,536", "frozen"], ["layer1", "147,968", "frozen"], ["layer2", "525,568", "frozen"],
                     ["layer3", "2,099,712", "learns", "at", "3e-05"], ["layer4", "8,393,728", "learns", "at", "0.0001"],
                     ["fc", "5,130", "learns", "at", "0.001"]]
    assert lines[9].startswith("device ") and lines[9].endswith("(%d threads), fp32" % torch.get_num_threads())
    assert lines[10].startswith("cache    0.00 GB of features in host memory, ")
    assert "filled in" in lines[11] and [line.split()[0] for line in lines[13:15]] == ["1/2", "2/2"]
    assert lines[15].startswith(f"saved    {folder}/checkpoint.pt and history.csv") and len(lines) == 16
    assert "\r" not in "".join(lines)  # live progress is for terminals
    assert max(len(line) for line in lines[1:15]) <= 80


def test_what_a_run_leaves(finished):
    assert finished.name == "synthetic-layer4-e2-s0-n60-b25-px48-none-fp32-layer4=0.001"
    assert {file.name for file in finished.iterdir()} == {"history.csv", "checkpoint.pt"}
    table = rows(finished / "history.csv")
    assert list(table[0])[:6] == ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"]
    assert list(table[0])[6:] == ["train_seconds", "layer4_drift"]
    assert [row["epoch"] for row in table] == ["1", "2"]
    assert all(0 <= float(row[name]) <= 1 for row in table for name in ("train_accuracy", "test_accuracy"))
    stages = [freeze.stages(model)["layer4"] for model in (runs.read_checkpoint(finished / "checkpoint.pt")[1], freeze.build(10))]
    assert float(table[-1]["layer4_drift"]) == pytest.approx(freeze.distance(stages[0], freeze.vector(stages[1])), rel=1e-4)
    saved = checkpoint(finished)  # read with weights_only=True: plain values and tensors
    assert saved["classes"] == list(CLASSES) and saved["stages"] == ["layer4", "fc"]
    assert saved["architecture"] == "resnet18" and saved["arguments"]["image_size"] == 48
    assert saved["settings"]["--lr"] == "layer4=0.001 fc=0.001" and saved["trainable_parameters"] == 8_398_858
    assert saved["versions"]["torch"] == torch.__version__ and len(saved["history"]) == 2


@pytest.mark.parametrize("flags, name", [
    ([], "cifar10-fc-e10-s0"),
    (["--unfreeze", "layer4", "layer3", "--epochs", "50"], "cifar10-layer3+layer4-e50-s0"),
    (["--unfreeze", "fc", "layer4", "--seed", "2"], "cifar10-layer4-e10-s2"),
    (["--train-size", "500", "--batch-size", "64", "--weights", "a/b.pth"], "cifar10-fc-e10-s0-n500-b64-b"),
    (["--dataset", "folder", "--data-dir", "my/pictures"], "pictures-fc-e10-s0"),
    (["--unfreeze", "layer4", "--lr", "layer4=3e-4", "fc=0.01"], "cifar10-layer4-e10-s0-fc=0.01-layer4=0.0003"),
    (["--unfreeze", "layer4", "--lr", "layer4=1e-4", "fc=0.01"], "cifar10-layer4-e10-s0-fc=0.01"),
])
def test_a_run_is_named_by_what_was_run(flags, name):
    _, args = train.parse(flags)
    assert train.run_name(args, [s for s in train.freeze.STAGES if s in [*args.unfreeze, "fc"]], *args.epochs) == name


def test_the_defaults_are_the_experiment():
    _, args = train.parse([])
    assert (args.dataset, args.weights, args.image_size, args.batch_size, args.epochs, args.seed) == (
        "cifar10", "imagenet", 224, 128, [10], 0)


@pytest.mark.parametrize("unfreeze, precision, images, rel", [
    ([], "fp32", 0, 1e-4), (["layer4"], "fp32", 0, 1e-4), (["layer4"], "bf16", 1, 1e-2), (["layer4"], "fp16", 1, 1e-2)])
def test_evaluation_agrees_with_the_last_epoch(run, tmp_path, unfreeze, precision, images, rel):
    """The whole network as saved, against the folded prefix and the tail; bf16 may round an image across."""
    folder = run("--unfreeze", *unfreeze, "--precision", precision, "--image-size", "32", "--epochs", "1")
    evaluate.main([str(folder / "checkpoint.pt"), "--csv", str(tmp_path / "summary.csv")])
    (row,) = rows(tmp_path / "summary.csv")
    loss, accuracy = history(folder, "test_loss", "test_accuracy")[-1]
    assert abs(float(row["test_accuracy"]) - accuracy) * 60 < images + 0.5 and row["precision"] == precision
    assert float(row["test_loss"]) == pytest.approx(loss, rel=rel)


def test_the_summary_has_a_row_for_each_checkpoint(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "other")
    evaluate.main([str(finished / "checkpoint.pt"), str(tmp_path / "other/checkpoint.pt"), "--csv", str(tmp_path / "summary.csv")])
    one, two = rows(tmp_path / "summary.csv")
    assert list(one) == ["run", "dataset", "unfrozen", "epochs", "seed", "train_loss", "test_loss", "test_accuracy",
                         "trainable_parameters", "seconds", "device", "precision", "torch", "learning_rates", "weights",
                         "train_images", "test_images", "frozen_batchnorm"]
    assert (one["run"], two["run"]) == (finished.name, "other")
    assert (one["dataset"], one["unfrozen"], one["epochs"], one["seed"]) == ("synthetic", "layer4+fc", "2", "0")
    assert float(one["train_loss"]) == history(finished, "train_loss")[-1][0]
    assert [one[name] for name in ("trainable_parameters", "precision", "torch")] == ["8398858", "fp32", torch.__version__]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["train", "loss", "test", "loss", "accuracy", "images", "run"] and len(lines) == 3
    assert lines[1].endswith(f"{float(one['test_accuracy']):.2%}      60  {finished.name}")


def test_what_was_logged_is_what_is_scored(finished, tmp_path, monkeypatch, capsys):
    evaluate.main([str(finished / "checkpoint.pt"), "--csv", str(tmp_path / "scored.csv")])
    monkeypatch.setattr(evaluate, "predict", None)  # nothing is scored
    evaluate.main([str(finished / "checkpoint.pt"), "--csv", str(tmp_path / "logged.csv"), "--logged"])
    (scored,), (logged,) = rows(tmp_path / "scored.csv"), rows(tmp_path / "logged.csv")
    assert float(logged.pop("test_loss")) == pytest.approx(float(scored.pop("test_loss")), rel=1e-4) and logged == scored


def test_runs_are_compared_image_by_image(run, tmp_path, capsys):
    files = [str(run(*flags) / "checkpoint.pt") for flags in (["--epochs", "1"], ["--unfreeze", "layer4", "--lr", "layer4=1e-3"])]
    capsys.readouterr()
    evaluate.main([*files, "--paired", str(tmp_path / "scored.csv")])
    evaluate.main([*files, "--paired", str(tmp_path / "logged.csv"), "--logged"])
    (row,) = rows(tmp_path / "logged.csv")
    assert rows(tmp_path / "scored.csv") == [row]
    fc, layer4 = (torch.load(file, weights_only=True)["test_correct"].double().numpy() for file in files)
    assert float(row["difference"]) == pytest.approx((layer4 - fc).mean())
    assert float(row["standard_error"]) == pytest.approx((layer4 - fc).std() / 60**0.5)
    assert (int(row["only_run_right"]), int(row["only_other_right"]), int(row["test_images"])) == ((layer4 > fc).sum(), (fc > layer4).sum(), 60)
    assert ("layer4" in row["run"], "layer4" in row["other"]) == (True, False)
    line = f"{100 * float(row['difference']):+.2f} ± {100 * float(row['standard_error']):.2f} points,"
    assert capsys.readouterr().out.count(line) == 2


def test_a_paired_difference_and_its_error():
    one, other = torch.tensor([True] * 9 + [False]), torch.tensor([True] * 5 + [False] * 4 + [True])
    assert evaluate.paired(one, other) == (pytest.approx(0.3), pytest.approx((one.double() - other.double()).std(correction=0).item() / 10**0.5), 4, 1)
    assert evaluate.paired(one, one) == (0, 0, 0, 0)


def test_runs_on_other_test_images_are_not_compared(finished, tmp_path, capsys):
    other = torch.load(finished / "checkpoint.pt", weights_only=True)
    other["settings"]["test images of sha256"] = "another"
    torch.save(other, tmp_path / "other.pt")
    line = complaint(evaluate.main, [finished / "checkpoint.pt", tmp_path / "other.pt", "--logged", "--paired", tmp_path / "paired.csv"], capsys)
    assert "two checkpoints or more, of the same test images" in line and not (tmp_path / "paired.csv").exists()


def test_a_checkpoint_that_fails_does_not_cost_the_others_their_rows(finished, tmp_path, capsys):
    files = [str(tmp_path / "nowhere.pt"), str(finished / "checkpoint.pt")]
    assert str(tmp_path / "nowhere.pt") in complaint(evaluate.main, [*files, "--csv", tmp_path / "summary.csv"], capsys)
    assert [row["run"] for row in rows(tmp_path / "summary.csv")] == [finished.name]


def test_flags_given_twice_add_up():
    _, args = train.parse(["--unfreeze", "layer3", "--unfreeze", "layer4", "--lr", "fc=1", "--lr", "layer4=2"])
    assert args.unfreeze == ["layer3", "layer4"] and args.lr == [("fc", 1), ("layer4", 2)]


def test_per_class_accuracies_and_the_confusion_matrix(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    evaluate.main([str(tmp_path / "run/checkpoint.pt"), "--per-class"])
    with open(tmp_path / "run/confusion.csv", newline="") as file:
        (corner, *columns), *table = csv.reader(file)
    counts = np.array([[int(number) for number in row[1:]] for row in table])
    assert columns == [row[0] for row in table] == list(CLASSES)
    assert counts.sum(1).tolist() == [6] * 10
    assert counts.trace() / 60 == pytest.approx(history(finished, "test_accuracy")[-1][0])
    printed = capsys.readouterr().out
    for name, row, correct in zip(CLASSES, counts, counts.diagonal()):
        assert f"{correct / 6:.2%}    {name}, {correct} of 6" in printed


def test_the_most_confident_mistakes_are_kept_as_pictures(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    evaluate.main([str(tmp_path / "run/checkpoint.pt"), "--per-class"])
    images = data.synthetic("test")
    _, model = runs.read_checkpoint(finished / "checkpoint.pt")
    probabilities, said = model.eval()(data.transform(images.pixels, 48)).softmax(1).max(1)
    wrong = sorted((i for i in range(60) if said[i] != images.labels[i]), key=lambda i: -probabilities[i])[:12]
    table = rows(tmp_path / "run/mistakes.csv")
    assert len(table) == 12
    for i, row in zip(wrong, table):
        assert (row["true"], row["said"]) == (CLASSES[images.labels[i]], CLASSES[said[i]])
        assert float(row["probability"]) == pytest.approx(probabilities[i].item(), rel=1e-4)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))), images.pixels[i].numpy())


def test_cka_is_one_for_what_did_not_move_and_for_rotated_features():
    x = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert evaluate.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    other = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x, y = x - x.mean(0), other - other.mean(0)
    gram, gram_other = x @ x.T, y @ y.T  # the definition by N x N Gram matrices
    expected = (gram * gram_other).sum() / (gram.norm() * gram_other.norm())
    assert evaluate.linear_cka(x, other) == pytest.approx(expected.item()) and expected < 0.6


def test_how_far_the_features_moved(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    evaluate.main([str(tmp_path / "run/checkpoint.pt"), "--cka"])
    (row,) = rows(tmp_path / "run/cka.csv")
    saved = checkpoint(finished)
    pixels, kept = data.synthetic("test").pixels, []
    for model in (runs.read_checkpoint(finished / "checkpoint.pt")[1], freeze.build(10)):
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            kept.append(model.eval()(data.transform(pixels, 48)).double())
    assert row["stage"] == "layer4" and float(row["cka"]) == pytest.approx(evaluate.linear_cka(*kept), abs=1e-5)
    assert f"{float(row['cka']):.4f}    CKA of layer4 with the pretrained one" in capsys.readouterr().out
    evaluate.main([str(tmp_path / "run/checkpoint.pt"), "--cka", "--precision", "bf16"])
    (rounded,) = rows(tmp_path / "run/cka.csv")
    assert rounded["cka"] != row["cka"] and float(rounded["cka"]) == pytest.approx(float(row["cka"]), abs=0.02)
    torch.save(saved | {"settings": saved["settings"] | {"weights of sha256": "0"}}, tmp_path / "run/checkpoint.pt")
    assert "none is not what the run began with" in complaint(evaluate.main, [tmp_path / "run/checkpoint.pt", "--cka"], capsys)


def test_naming_pictures(finished, tmp_path, capsys):
    for name, size, mode in (("a b.png", (300, 200), "RGB"), ("c.jpg", (9, 9), "L")):
        Image.new(mode, size, 128).save(tmp_path / name)
    evaluate.main([str(finished / "checkpoint.pt"), "--image", str(tmp_path / "a b.png"), str(tmp_path / "c.jpg")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines[1:], ("a b.png", "c.jpg")):
        named, _, best = line.rpartition(": ")
        percentages = [float(part.split()[1].rstrip("%")) for part in best.split(", ")]
        assert named == str(tmp_path / name) and len(percentages) == 5
        assert percentages == sorted(percentages, reverse=True) and sum(percentages) <= 100.5


def test_a_picture_is_prepared_as_in_training(finished, tmp_path, capsys):
    """The class named for a picture of the test set is the class that scoring predicts for it."""
    images = data.synthetic("test")
    _, model = runs.read_checkpoint(str(finished / "checkpoint.pt"))
    predicted = model.eval()(data.transform(images.pixels[:8], 48)).softmax(1)
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for pixels, file in zip(images.pixels, files):
        Image.fromarray(pixels.numpy()).save(file)
    evaluate.main([str(finished / "checkpoint.pt"), "--image", *map(str, files)])
    for line, probabilities in zip(capsys.readouterr().out.splitlines()[1:], predicted):
        assert f": {CLASSES[probabilities.argmax()]} {probabilities.max():.1%}" in line


def test_your_own_pictures(tmp_path, capsys):
    """A folder data set from training to naming, and with the data moved in between."""
    images = data.synthetic("train")
    for split, first in (("train", 0), ("test", 40)):
        for i in range(first, first + 20):
            file = tmp_path / "mine" / split / f"class {images.labels[i] % 3}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.pixels[i].numpy()).resize((40 + i, 50)).save(file)
    train.main(["--dataset", "folder", "--data-dir", str(tmp_path / "mine"), "--weights", "none", "--image-size", "48",
                "--epochs", "1", "--out", str(tmp_path / "out"), "--precision", "fp32", "--device", "cpu"])
    (tmp_path / "mine").rename(tmp_path / "moved")
    file = tmp_path / "out/mine-fc-e1-s0-px48-none-fp32/checkpoint.pt"
    assert checkpoint(file.parent)["classes"] == ["class 0", "class 1", "class 2"]
    evaluate.main([str(file), "--data-dir", str(tmp_path / "moved"), "--per-class"])
    assert capsys.readouterr().out.splitlines()[-5].split()[3] == "20"
    shutil.rmtree(tmp_path / "moved/test")  # a checkpoint whose pictures are gone is named
    assert str(file) in complaint(evaluate.main, [file], capsys)


def test_layer4_learns_the_drawn_pictures_and_fc_alone_does_not(run):
    flags = ["--image-size", "32", "--train-size", "200", "--batch-size", "100", "--epochs", "20"]
    (fc,), (layer4,) = (history(run(*flags, "--unfreeze", *stages), "test_accuracy")[-1] for stages in ([], ["layer4"]))
    assert fc < 0.25 and layer4 > fc + 0.08


# ---------------------------------------------------------------- the shell scripts


@pytest.fixture
def scripts(tmp_path):
    """A copy of the shell scripts and a `python` that can import everything and notes what it is asked to run."""
    for name in ("run_all.sh", "setup.sh", "tests/run.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    fake_python(tmp_path / "bin/python", imports=True)

    def run(*command: str, **variables: str):
        environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log")} | variables
        done = subprocess.run(["bash", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        return done, [line.replace(f"{tmp_path}/", "") for line in log]

    return run


def fake_python(file: Path, imports: bool) -> None:
    """Answers -c (import something), makes a virtual environment of itself, and logs anything else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"""#!/bin/sh
case "$1" in
    -c) exit {0 if imports else 1} ;;
    -m) echo "$@" >> "$LOG"
        if [ "$2" = venv ]; then mkdir -p "$4/bin"; sed 's/exit 1 ;;/exit 0 ;;/' "$0" > "$4/bin/python"; chmod +x "$4/bin/python"; fi ;;
    *) echo "$@" >> "$LOG"
       if [ -n "$FOREVER" ]; then trap 'sleep 0.2; echo stopped >> "$LOG"; exit 143' TERM; while :; do sleep 0.05; done; fi
       case "$*" in *"$FAIL"*) [ -z "$FAIL" ] || exit 3 ;; esac ;;
esac
""")
    file.chmod(0o755)


def test_run_all_makes_the_four_runs_in_two_and_scores_them(scripts):
    done, log = scripts("run_all.sh", "--data-dir", "/my data", "--batch-size", "256")
    flags = "--out results --resume --data-dir /my data --batch-size 256"
    assert done.returncode == 0, done.stderr
    assert log == [f"train.py --unfreeze layer4 --epochs 10 50 --seed 0 {flags}",
                   f"train.py --unfreeze layer3 layer4 --epochs 10 50 --seed 0 {flags}",
                   "evaluate.py results/*/checkpoint.pt --csv results/summary.csv"]
    assert done.stdout.splitlines()[-1] == "table: results/summary.csv, learning curves: results/*/history.csv"


def test_run_all_with_seeds_and_the_baseline(scripts):
    _, log = scripts("run_all.sh", "--out", "here", SEEDS="3 4", WITH_FC="1")
    assert len(log) == 2 * 3 + 1 and all("--out here" in line for line in log[:-1])
    assert log[0] == "train.py --unfreeze --epochs 10 50 --seed 3 --out here --resume" and "--csv here/summary.csv" in log[-1]
    assert {line.split("--seed ")[1][0] for line in log[:-1]} == {"3", "4"}


def test_run_all_without_the_baseline(scripts):
    _, log = scripts("run_all.sh", WITH_FC="0")
    assert len(log) == 2 + 1


def test_the_demo_only_presets_flags(scripts):
    _, log = scripts("run_all.sh", "--demo", "--device", "cpu")
    preset = "--dataset synthetic --weights none --image-size 32 --train-size 100 --batch-size 50"
    assert len(log) == 3 and all(line.endswith(f"--out results/demo --resume {preset} --device cpu") for line in log[:2])


def test_run_all_stops_at_a_run_that_fails(scripts):
    done, log = scripts("run_all.sh", FAIL="layer3")
    assert done.returncode == 3 and len(log) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_run_all_stops_the_run_and_hears_it_out(scripts, tmp_path, number, status):
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "FOREVER": "1"}
    process = subprocess.Popen(["bash", "run_all.sh"], cwd=tmp_path, env=environment,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(10) == status
    run, last = (tmp_path / "log").read_text().splitlines()
    assert "train.py" in run and last == "stopped"


def test_run_all_explains_itself(scripts):
    done, log = scripts("run_all.sh", "--help")
    assert done.returncode == 0 and "bash run_all.sh --demo" in done.stdout and not log


@pytest.mark.parametrize("script", ["run_all.sh", "tests/run.sh"])
def test_what_is_missing_is_installed_once(scripts, tmp_path, script):
    for name in ("python", "python3"):
        fake_python(tmp_path / "bin" / name, imports=False)
    done, log = scripts(script)
    assert done.returncode == 0, done.stderr
    assert log[:2] == ["-m venv --clear .venv", "-m pip install --quiet -r requirements.txt"]
    again, log = scripts(script)
    assert again.returncode == 0 and sum("venv" in line for line in log) == 1
