"""The usual edits of a student, each made as text in a copy of the repository: it takes effect, or
is refused with a sentence. What only a GPU shows of them is in test_graph.py and test_cuda.py."""

import ast
import functools
import math
import multiprocessing
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, checkpoint, history, rows

import compare
import data
import freeze
import train
from plumbing import run as runs
from plumbing import settings
from plumbing.schedule import load_optimizer

QUICK = ["--dataset", "synthetic", "--weights", "none", "--image-size", "32", "--device", "cpu"]
QUICK += ["--precision", "fp32", "--train-size", "40", "--batch-size", "15"]
COLUMNS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


def apart(folder: str, words: list[str], log: str) -> None:
    """A command of the copy, in a process of its own that has torch already."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115  # until it ends
    sys.path[:] = [folder, *(path for path in sys.path if path not in ("", str(ROOT)))]
    ours = {ROOT, ROOT / "plumbing", ROOT / "study"}
    for name, module in list(sys.modules.items()):  # the copy's own are to be imported
        if Path(getattr(module, "__file__", None) or "/").parent in ours:
            del sys.modules[name]
    os.chdir(folder)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()


class Copy:
    """A copy of the repository: copy.edit(file, old, new), and copy(command, *flags)."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignored = shutil.ignore_patterns(".*", "results", "data", "tests", "*.png", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "torchvision.models", "torchvision.datasets"])

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{old} stands {text.count(old)} times in {file}"
        (self.folder / file).write_text(text.replace(old, new))

    def __call__(self, *words: str) -> tuple[int, str]:
        """The status and what was printed."""
        log = self.folder / "log"
        arguments = str(self.folder), list(map(str, words)), str(log)
        process = self.context.Process(target=apart, args=arguments)
        process.start()
        process.join()
        return process.exitcode, log.read_text()

    def train(self, *flags: str, status: int = 0) -> str:
        found, printed = self("train.py", *QUICK, *flags)
        assert found == status and "Traceback" not in printed, printed
        return printed

    def run(self, name: str = "*") -> Path:
        """The one run whose folder's name is that."""
        (file,) = (self.folder / "results").glob(f"{name}/history.csv")
        return file.parent


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path / "copy")


RECIPE = "train.py"
SMOOTHED = "functools.partial(F.cross_entropy, label_smoothing=0.1)"
SMOOTH = "LOSS = F.cross_entropy", f"LOSS = {SMOOTHED}"
ADAMW = (
    "OPTIMIZER = functools.partial(torch.optim.Adam, fused=True)",
    "OPTIMIZER = functools.partial(torch.optim.AdamW, weight_decay=0.1, fused=True)",
)


# ---------------------------------------------------------------- the recipe's own alternatives


def test_a_schedule_by_the_epoch_is_in_the_history(copy):
    cosine = (
        "lambda optimizer, epochs: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)"
    )
    copy.edit(RECIPE, "SCHEDULE = None", f"SCHEDULE = {cosine}")
    copy.train("--unfreeze", "layer4", "--epochs", "2", "4")
    longer, shorter = copy.run("*-e4-*"), copy.run("*-e2-*")  # with a schedule two runs
    expected = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    found = history(longer, "fc_lr", "layer4_lr")
    assert [fc for fc, _ in found] == pytest.approx(expected)
    assert [layer4 for _, layer4 in found] == pytest.approx([rate / 10 for rate in expected])
    assert history(shorter, "fc_lr") == [[1e-3], [pytest.approx(5e-4)]]


def test_a_schedule_by_the_step_with_a_warm_up(copy):
    """The history has the rate of an epoch's last step."""
    scheduler = "torch.optim.lr_scheduler.LinearLR"
    new = f"SCHEDULE = lambda o, n_steps: {scheduler}(o, 0.1, 1.0, n_steps)"
    copy.edit(RECIPE, "SCHEDULE = None", new)
    copy.train("--epochs", "3")
    used = [1e-3 * (0.1 + 0.9 * step / 9) for step in range(9)]  # three steps an epoch
    rates = [rate for (rate,) in history(copy.run(), "fc_lr")]
    assert rates == pytest.approx(used[2::3])


def test_augmented_pictures_go_through_the_prefix_in_every_epoch_and_test_pictures_do_not(copy):
    copy.train("--unfreeze", "layer4", "--epochs", "2")
    copy.edit(RECIPE, "AUGMENT = None", "AUGMENT = data.random_crop")
    printed = copy.train("--unfreeze", "layer4", "--epochs", "2", "--tag", "crop")
    assert "cache    not of training pictures: AUGMENT changes them in every epoch" in printed
    assert "features of 500 of 540 images in host memory" in printed
    plain, cropped = copy.run("*layer4-fp32*"), copy.run("*layer4-crop-fp32*")
    assert history(plain, "train_loss") != history(cropped, "train_loss")


def test_a_crop_inside_transform_is_refused_with_what_to_use(copy):
    crop = "    pixels = random_crop(pixels, torch.default_generator)\n"
    old = "    if flips is not None:"
    copy.edit("data.py", old, crop + old)
    printed = copy.train("--epochs", "1", status=2)
    assert "data.transform gives another picture each time" in printed and "AUGMENT" in printed


# ---------------------------------------------------------------- other code is another run


def test_another_optimizer_does_not_go_on_from_a_run_of_the_old_one(copy):
    copy.train("--epochs", "1")
    copy.edit(RECIPE, *ADAMW)
    printed = copy.train("--epochs", "2", "--resume", status=2)
    assert "was trained with another OPTIMIZER in train.py: give this variation a name" in printed
    assert len(history(copy.run(), *COLUMNS)) == 1
    copy.train("--epochs", "2", "--resume", "--tag", "adamw")
    saved = torch.load(copy.run("*adamw*") / "epoch2.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


def test_a_run_begun_anew_takes_the_whole_place_of_one_of_other_code(copy):
    copy.train("--epochs", "2", "3")
    copy.edit(RECIPE, *SMOOTH)
    printed = copy.train("--epochs", "1")
    assert "replaces" in printed and "trained with another LOSS in train.py" in printed
    assert {file.name for file in copy.run().iterdir()} == {"history.csv", "epoch1.pt"}
    assert len(history(copy.run(), *COLUMNS)) == 1


def test_a_tag_puts_an_idea_beside_the_published_recipe(copy):
    copy.train("--unfreeze", "layer4", "--epochs", "1")
    copy.edit(RECIPE, *SMOOTH)
    copy.train("--unfreeze", "layer4", "--epochs", "1", "--tag", "smooth")
    files = sorted((copy.folder / "results").glob("*/epoch1.pt"))
    status, printed = copy("compare.py", *files, "--csv", "results/summary.csv")
    assert status == 0 and "fc+layer4 smooth over fc+layer4: " in printed
    table = rows(copy.folder / "results/summary.csv")
    assert [row["tag"] for row in table] == ["", "smooth"]
    assert table[0]["code"] != table[1]["code"]
    assert "LOSS" not in printed


@pytest.mark.slow
def test_runs_of_two_codes_and_one_name_are_not_compared_as_one(copy):
    """Seeds of the old loss and of the new one."""
    for seed in ("0", "1"):
        copy.train("--epochs", "1", "--seed", seed)
        copy.train("--epochs", "1", "--seed", seed, "--unfreeze", "layer4")
    copy.edit(RECIPE, *SMOOTH)
    copy.train("--epochs", "1", "--seed", "2")
    files = sorted((copy.folder / "results").glob("*/epoch1.pt"))
    _, printed = copy("compare.py", *files)
    assert "left out: synthetic-fc-fp32-s2" in printed and "of other code" in printed


def test_comments_and_docstrings_change_no_run(copy):
    copy.train("--epochs", "1")
    copy.edit(RECIPE, "LOSS = F.cross_entropy  #", "LOSS = F.cross_entropy  # mine,")
    copy.edit(RECIPE, '"""Forward, backward, update.', '"""What is done in a step.')
    assert ": finished" in copy.train("--epochs", "1", "--resume")


@pytest.mark.parametrize(
    "old, new",
    [
        ("f(x[:a])", "f(x[a:])"),
        ("f(x[2:])", "f(x[::2])"),
        ("f(*b)", "f(**b)"),
        ("a - b", "b - a"),
        ("x = 1", "x = 1.0"),
        ("x = None", "x = 0"),
        ("for a in b: pass\nelse: c()", "for a in b: c()"),
        ("def f(a, *, b=1): pass", "def f(a, b=1): pass"),
    ],
)
def test_no_edit_looks_like_another(old, new):
    one, other = (settings.syntax(ast.parse(text)) for text in (old, new))
    assert one != other and one == settings.syntax(ast.parse(f"{old}  # a comment"))


@pytest.mark.slow
def test_what_was_drawn_of_the_old_code_goes_too_and_not_before_the_first_epoch(copy):
    copy.train("--epochs", "2")
    assert copy("evaluate.py", copy.run() / "epoch2.pt", "--per-class")[0] == 0
    before = {file.name for file in copy.run().iterdir()}
    copy.edit(
        RECIPE, "LOSS = F.cross_entropy", "LOSS = functools.partial(F.cross_entropy, lable=1)"
    )
    assert "Traceback" in copy("train.py", *QUICK, "--epochs", "1")[1]
    assert {file.name for file in copy.run().iterdir()} == before  # a mistyped idea costs nothing
    copy.edit(RECIPE, "lable=1", "label_smoothing=0.1")
    copy.train("--epochs", "1")
    assert {file.name for file in copy.run().iterdir()} == {"history.csv", "epoch1.pt"}


def test_evaluate_says_that_the_network_was_trained_with_another_transform(copy):
    copy.train("--epochs", "1")
    copy.edit(
        "data.py",
        "    if flips is not None:",
        "    pixels = 255 - pixels\n    if flips is not None:",
    )
    _, printed = copy("evaluate.py", copy.run() / "epoch1.pt")
    assert "was trained with another transform in data.py" in printed


# ---------------------------------------------------------------- edits of the loop


LOOP = "        run.keep(epoch, scores, correct)\n"


def test_a_loop_that_is_left_early_leaves_its_last_epoch(copy):
    copy.edit(RECIPE, LOOP, f"{LOOP}        if epoch == 2:\n            break\n")
    assert "epoch2.pt, where the loop ended" in copy.train("--epochs", "5")
    assert {file.name for file in copy.run().iterdir()} == {"history.csv", "epoch2.pt"}
    assert len(checkpoint(copy.run(), 2)["history"]) == 2


@pytest.mark.slow
def test_a_run_that_ended_early_is_finished(copy):
    copy.edit(RECIPE, LOOP, f"{LOOP}        if epoch == 2:\n            break\n")
    copy.train("--epochs", "5")
    assert ": finished" in copy.train("--epochs", "5", "--resume")
    assert {file.name for file in copy.run().iterdir()} == {"history.csv", "epoch2.pt"}


@pytest.mark.slow
def test_a_loop_that_is_left_before_the_epoch_is_kept_says_what_is_lost(copy):
    copy.edit(RECIPE, LOOP, f"        if epoch == 2:\n            break\n{LOOP}")
    printed = copy.train("--epochs", "5")
    assert "the last epoch is lost: leave the loop after run.keep" in printed
    assert {file.name for file in copy.run().iterdir()} == {"history.csv", "latest.pt"}


def test_a_layer_that_is_added_to_the_tail_is_in_train_mode_or_refused(copy):
    old = "    tail = nn.Sequential(*backbone[cut:], pooling, head)\n"
    copy.edit("freeze.py", old, old.replace("head)", "nn.Dropout(0.9), head)"))
    see = "        print('training', tail[-2].training)\n"
    copy.edit(
        RECIPE,
        "        order, flips = data.epoch_order",
        f"{see}        order, flips = data.epoch_order",
    )
    printed = copy.train("--epochs", "3", "--unfreeze", "layer4")
    assert printed.count("training True") == 3
    copy.edit("freeze.py", "nn.Dropout(0.9), head)", "nn.Linear(512, 512), head)")
    printed = copy.train("--epochs", "1", "--unfreeze", "layer4", "--tag", "wide", status=2)
    assert "has requires_grad and is not in the optimizer" in printed


def test_a_stage_that_is_thawed_in_the_frozen_part_is_refused(copy):
    thaw = "        model.layer3.requires_grad_(True)\n        freeze.train_mode(tail)"
    copy.edit(RECIPE, "        freeze.train_mode(tail)", thaw)
    printed = copy.train("--epochs", "1", "--unfreeze", "layer4", status=2)
    assert "layer3.0.conv1.weight has requires_grad" in printed and "--unfreeze" in printed


def test_a_stage_that_is_unfrozen_in_the_loop_learns_from_then_on(copy):
    learns = "settings.unfrozen if epoch > 1 else settings.unfrozen[-1:]"
    new = f"        freeze.freeze(model, {learns})\n        freeze.train_mode(tail)"
    copy.edit(RECIPE, "        freeze.train_mode(tail)", new)
    copy.train("--unfreeze", "layer4", "--epochs", "1", "2")
    before = freeze.build("resnet18", 10).layer4[0].conv1.weight
    first, second = (checkpoint(copy.run(), n)["model"]["layer4.0.conv1.weight"] for n in (1, 2))
    assert torch.equal(before, first) and not torch.equal(before, second)


@pytest.mark.slow
def test_a_logger_in_the_loop_sees_every_epoch(copy):
    line = 'print(epoch, run.history[-1]["test_loss"], file=open("log.txt", "a"))'
    copy.edit(RECIPE, LOOP, f"{LOOP}        {line}\n")
    copy.train("--epochs", "2")
    logged = [line.split() for line in (copy.folder / "log.txt").read_text().splitlines()]
    assert [[float(number) for number in line] for line in logged] == history(
        copy.run(), "epoch", "test_loss"
    )


@pytest.mark.slow
def test_numbers_of_numpy_are_kept_as_numbers(copy):
    half = "lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR("
    half += "optimizer, lambda i: np.cos(i / steps) ** 2)"
    copy.edit(RECIPE, "SCHEDULE = None", f"SCHEDULE = {half}")
    copy.edit(RECIPE, "import torch\nimport", "import numpy as np\nimport torch\nimport")
    copy.edit(
        "plumbing/report.py",
        "right / len(labels),",
        "torch.tensor(right / len(labels)).numpy()[()],",
    )
    copy.train("--epochs", "2")
    file = copy.run() / "epoch2.pt"
    assert checkpoint(copy.run(), 2)["history"][0]["fc_lr"] == pytest.approx(1e-3, rel=0.5)
    assert copy("compare.py", file)[0] == 0


@pytest.mark.slow
def test_a_checkpoint_that_nobody_could_read_is_refused_at_once(copy):
    old = '"scaler": scaler, "schedule": schedule}'
    new = old.replace("}", ', "mine": type("Mine", (), {"state_dict": lambda _: F})()}')
    copy.edit(RECIPE, old, new)
    status, printed = copy("train.py", *QUICK, "--epochs", "3")
    assert status != 0 and "3/3" not in printed


# ---------------------------------------------------------------- a metric, a network


def test_a_metric_is_added_in_one_place_and_is_in_every_table(copy):
    copy.train("--epochs", "1")
    old = '        "accuracy": right / len(labels),\n'
    top = '        "top5": (logits.topk(5)[1] == labels[:, None]).sum().item() / len(labels),\n'
    copy.edit("plumbing/report.py", old, old + top)
    printed = copy.train("--epochs", "2", "--resume")
    assert re.search(r"2/2 .* top5 0\.[0-9]", printed)
    table = rows(copy.run() / "history.csv")
    assert table[0]["test_top5"] == "" and 0.3 < float(table[1]["test_top5"]) <= 1
    assert float(table[1]["seconds"]) > 0 and float(table[1]["fc_lr"]) == 1e-3
    file = copy.run() / "epoch2.pt"
    for command in ("compare.py", "evaluate.py"):
        status, printed = copy(command, file, "--csv", "summary.csv")
        (row,) = rows(copy.folder / "summary.csv")
        assert status == 0 and "top5" in printed.splitlines()[0]
        assert float(row["test_top5"]) == pytest.approx(float(table[1]["test_top5"]), abs=0.01)
    assert copy("plot.py", copy.folder / "results")[0] == 2  # there is no summary.csv in it


TOY = """

def toy():
    early = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    late = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(early, late, *pooling, nn.Linear(16, 1000))
"""


def test_another_network_is_a_change_of_freeze_py_alone(copy):
    copy.edit("freeze.py", "MODELS = (\n", 'MODELS = (\n    "toy",\n')
    parts = '{"early": model[0], "late": model[1], "head": model[4]}'
    case = f"    if isinstance(model, nn.Sequential):\n        return {parts}\n"
    old = '    if hasattr(model, "layer4"):  # a ResNet\n'
    copy.edit("freeze.py", old, case + old)
    own = '    if name == "toy":\n        return toy()\n'
    imports = "    from torchvision.models import get_model"
    copy.edit("freeze.py", imports, own + imports)
    (copy.folder / "freeze.py").open("a").write(TOY)
    words = ["--model", "toy", "--unfreeze", "late", "--lr", "late=1e-3", "head=1e-2"]
    printed = copy.train(*words, "--epochs", "2")
    assert "early             240  frozen" in printed and "learns at 0.01" in printed
    folder = copy.run("synthetic-head+late-fp32-*")
    assert history(folder, "late_lr", "head_lr") == [[1e-3, 1e-2]] * 2
    assert copy("evaluate.py", folder / "epoch2.pt")[0] == 0
    assert "toy has early, late, head" in copy.train("--model", "toy", "--unfreeze", "fc", status=2)


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", pytest.param("convnext_tiny", marks=pytest.mark.slow)]
)
def test_the_other_networks_train_and_are_scored(copy, name):
    copy.train("--model", name, "--unfreeze", "layer4", "--epochs", "1")
    status, printed = copy("evaluate.py", copy.run() / "epoch1.pt")
    assert status == 0
    (tested,), accuracy = history(copy.run(), "test_accuracy"), printed.split()[-4].rstrip("%")
    assert float(accuracy) / 100 == pytest.approx(tested[0], abs=0.01)


# ---------------------------------------------------------------- going on from one's own network


def test_probe_first_and_fine_tune_then(copy):
    """Kumar et al. 2022: two commands of the README. fc is kept, since the classes are the same."""
    copy.train("--epochs", "2")
    probe = copy.run() / "epoch2.pt"
    printed = copy.train("--unfreeze", "layer4", "--epochs", "1", "--weights", str(probe))
    assert "its last layer is kept: the classes are the same" in printed
    tuned = copy.run("*layer4*")
    before = torch.load(probe, weights_only=True)["model"]["fc.weight"]
    after = checkpoint(tuned, 1)["model"]["fc.weight"]
    assert (before - after).abs().max() < 0.01  # three steps at 1e-3 from there
    other = copy.train("--dataset", "synthetic-other", "--epochs", "1", "--weights", str(probe))
    assert "its last layer is new: the classes are others" in other


@pytest.mark.slow
def test_more_epochs_at_a_lower_rate(copy):
    copy.train("--unfreeze", "layer4", "--epochs", "2")
    first = copy.run()
    words = ["--unfreeze", "layer4", "--lr", "layer4=1e-5", "fc=1e-4", "--epochs", "1"]
    copy.train(*words, "--weights", str(first / "epoch2.pt"))
    (second,) = {file.parent for file in copy.folder.glob("results/*/epoch1.pt")}
    assert history(second, "fc_lr", "layer4_lr") == [[1e-4, 1e-5]]
    assert history(second, "train_loss")[0] < history(first, "train_loss")[1]


# ---------------------------------------------------------------- resumed in the middle


def cosine(optimizer, epochs):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


def warm_up_and_cosine(optimizer, steps):
    scheduler = torch.optim.lr_scheduler
    first = scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    rest = scheduler.CosineAnnealingLR(optimizer, steps - 3)
    return scheduler.SequentialLR(optimizer, [first, rest], [3])


def one_cycle(optimizer, steps):
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)  # which moves beta, too


SGD = functools.partial(torch.optim.SGD, momentum=0.9)
ADAMW_FUSED = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=True)


def one_step_down(optimizer, epochs):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])


RECIPES = {
    "cosine": {"SCHEDULE": cosine},
    "warm-up": {"SCHEDULE": warm_up_and_cosine},
    "one cycle": {"SCHEDULE": one_cycle},
    "crop": {"AUGMENT": data.random_crop},
    "erase, SGD": {"AUGMENT": data.random_erase, "OPTIMIZER": SGD},
    "one step down": {"SCHEDULE": one_step_down},
    "AdamW, cosine": {"OPTIMIZER": ADAMW_FUSED, "SCHEDULE": cosine},
}


@pytest.mark.parametrize(
    "recipe",
    [
        *("cosine", "one cycle", "crop"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(RECIPES)[4:]),
        pytest.param("warm-up", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "precision",
    ["fp32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bf16", "fp16"))],
)
def test_each_alternative_goes_on_to_the_last_bit(run, monkeypatch, recipe, precision):
    for name, value in RECIPES[recipe].items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(runs, "CHECKPOINT_INTERVAL", 0)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    flags = ["--unfreeze", "layer4", "--epochs", "4", "--image-size", "32", "--train-size", "40"]
    flags += ["--precision", precision]
    whole, score, calls = run(*flags), train.score_epoch, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*arguments)

    flags += ["--out", str(whole.parent.with_name("stopped")), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "score_epoch", stopping)
        run(*flags)
    resumed = run(*flags)
    rates = "fc_lr", "layer4_lr"
    assert history(whole, *COLUMNS, *rates) == history(resumed, *COLUMNS, *rates)
    one, other = checkpoint(whole, 4)["model"], checkpoint(resumed, 4)["model"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_rate_that_was_lowered_by_hand_stays_lowered_and_what_is_for_a_device_is_not_taken():
    weights = [torch.nn.Parameter(torch.ones(2))]
    before = torch.optim.Adam(weights, lr=1e-3)
    weights[0].grad = torch.ones(2)
    before.step()
    before.param_groups[0]["lr"] *= 0.1
    today = torch.optim.Adam(weights, lr=1e-3, fused=True)
    load_optimizer(today, before.state_dict())
    (group,) = today.param_groups
    assert group["lr"] == pytest.approx(1e-4) and group["fused"] is True
    assert today.state[weights[0]]["step"] == 1


@pytest.mark.slow
def test_a_network_with_dropout_goes_on_to_the_last_bit(run, monkeypatch):
    """Its random numbers come from the seed and the epoch, too."""
    flags = ["--model", "mobilenet_v3_small", "--image-size", "32", "--train-size", "40"]
    whole = run(*flags, "--epochs", "2", "3")
    torch.rand(7)
    parts = run(*flags, "--epochs", "2")
    torch.rand(3)
    run(*flags, "--epochs", "2", "3", "--resume", "--out", str(parts.parent))
    assert history(whole, *COLUMNS) == history(parts, *COLUMNS)
    assert history(run(*flags, "--seed", "1"), *COLUMNS) != history(whole, *COLUMNS)[:2]


def test_runs_with_other_columns_are_each_under_their_own(run, tmp_path, capsys):
    flags = ["--image-size", "32", "--train-size", "40", "--epochs", "1"]
    plain = run(*flags) / "epoch1.pt"
    validated = run(*flags, "--val-share", "0.3") / "epoch1.pt"
    capsys.readouterr()
    compare.main([str(validated), str(plain), "--csv", str(tmp_path / "summary.csv")])
    one, other = rows(tmp_path / "summary.csv")
    assert one["val_accuracy"] and not other["val_accuracy"]
    assert 0 <= float(other["test_accuracy"]) <= 1 and "cpu" in other["device"]
    printed = capsys.readouterr().out
    assert "val loss" in printed and "test loss" in printed


# ---------------------------------------------------------------- validation


def test_with_validation_pictures_the_test_is_looked_at_once(run, capsys):
    flags = ["--val-share", "0.3", "--train-size", "40", "--image-size", "32", "--epochs", "3"]
    folder = run(*flags, "--dataset", "synthetic")
    run(*flags, "--unfreeze", "layer4", "--out", str(folder.parent))
    table = rows(folder / "history.csv")
    assert "val_accuracy" in table[0] and "test_accuracy" not in table[0]
    assert {file.name for file in folder.iterdir()} == {"history.csv", "epoch3.pt", "best.pt"}
    best = torch.load(folder / "best.pt", weights_only=True)
    accuracies = [float(row["val_accuracy"]) for row in table]
    assert best["history"][-1]["val_accuracy"] == max(accuracies)
    assert len(best["history"]) == 1 + accuracies.index(max(accuracies))
    capsys.readouterr()
    compare.main([str(file) for file in folder.parent.glob("*/epoch3.pt")])
    out = " ".join(capsys.readouterr().out.split())
    assert "compared on 600 validation pictures" in out
    assert re.search(
        "chosen on 600 validation pictures; on 60 test pictures, looked at once: ", out
    )
    assert "these test pictures were used to choose" not in out


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_first_best_epoch_begins_again(run):
    flags = ["--val-share", "0.3", "--train-size", "40", "--image-size", "32", "--epochs", "1"]
    folder = run(*flags)
    (folder / "epoch1.pt").unlink()
    run(*flags, "--resume", "--out", str(folder.parent))
    assert (folder / "epoch1.pt").exists()


@pytest.mark.slow
def test_another_test_seed_draws_other_validation_pictures_and_another_seed_does_not(run):
    flags = ["--val-share", "0.3", "--image-size", "32", "--epochs", "1"]
    found = []
    for more in (["--seed", "0"], ["--seed", "1"], ["--test-seed", "1"]):
        found.append(checkpoint(run(*flags, *more), 1)["settings"])
    one, other_seed, other_pictures = (each["val_data"] for each in found)
    assert one == other_seed != other_pictures
    assert found[2]["test_seed"] == 1
