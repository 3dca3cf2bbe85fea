"""The usual edits of a student, each made as text in a copy of the repository: it takes effect, or
is refused with a sentence. What only a GPU shows of them is in test_graph.py and test_cuda.py."""

import ast
import functools
import math
import os
import re
import runpy
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, ROOT, checkpoint, history, rows, slow, stopped_in_epoch
from torch.optim import lr_scheduler

import compare
import data
import freeze
import train
from plumbing import settings
from plumbing.weights import load_optimizer

LITTLE = ["--image-size", "32", "--train-size", "20", "--batch-size", "8"]
QUICK = [*LITTLE, "--dataset", "synthetic", "--weights", "none", "--device", "cpu"]
QUICK += ["--precision", "fp32"]
VALIDATED = [*LITTLE, "--val-share", "0.05"]  # 100 of 2000 pictures
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
    """A copy of the repository: copy.edit(file, old, new), and copy.do("train.py --epochs 1")."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignored = shutil.ignore_patterns(".*", "results", "data", "tests", "*.png", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored)
        self.edit("plumbing/datasets.py", '{"train": 2000, "test": 500}', "dict(train=40, test=60)")

    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{old} stands {text.count(old)} times in {file}"
        (self.folder / file).write_text(text.replace(old, new))

    def do(self, line: str, status: int = 0) -> str:
        """What a command prints that ends so: train.py on few pictures, or another one."""
        command, *words = line.split()
        if command == "train.py":
            words = [*QUICK, *words]
        log = self.folder / "log"
        arguments = str(self.folder), [command, *words], str(log)
        process = CONTEXT.Process(target=apart, args=arguments)
        process.start()
        process.join()
        printed = log.read_text()
        assert process.exitcode == status, printed
        assert ("Traceback" in printed) == (status == 1), printed
        return printed

    def run(self, name: str = "*") -> Path:
        """The one run whose folder's name is that."""
        (file,) = (self.folder / "results").glob(f"{name}/history.csv")
        return file.parent


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path / "copy")


# ---------------------------------------------------------------- an edit, and what is said


# A command, what it prints, how it ends, and what is in the run's folder then.
Does = namedtuple("Does", "line prints status left", defaults=("", 0, ""))
KEEP = "        run.keep(epoch, scores, correct)\n"
MODE = "        freeze.train_mode(tail)"
ORDER = "        order, flips = data.epoch_order"
LEAVE = "        if epoch == 2:\n            break\n"
FLIP = "    if flips is not None:"
TAIL = "    tail = nn.Sequential(*backbone[cut:], pooling, head)\n"
LOSS = "LOSS = F.cross_entropy"
SCHEDULERS = "torch.optim.lr_scheduler"
OPTIMIZER = "OPTIMIZER = functools.partial(torch.optim.Adam"
RIGHT = "right / len(labels),"
PROBE = "--weights results/synthetic-fc-fp32-s0-n20-b8-px32-none/epoch2.pt"
PARTS = '"scaler": scaler, "schedule": schedule}'
MINE = '"schedule": schedule, "mine": type("Mine", (), {"state_dict": lambda _: F})()}'
# Edits are (file, old text, new text).
ADAMW = "train.py", OPTIMIZER, f"{OPTIMIZER}W, weight_decay=0.1"
SMOOTH = "train.py", LOSS, "LOSS = functools.partial(F.cross_entropy, label_smoothing=0.1)"
MISTYPED = "train.py", LOSS, "LOSS = functools.partial(F.cross_entropy, lable_smoothing=0.1)"
PUT_RIGHT = "train.py", "lable_smoothing", "label_smoothing"
BREAK = "train.py", KEEP, KEEP + LEAVE
BREAK_TOO_SOON = "train.py", KEEP, LEAVE + KEEP
CROP = "train.py", "AUGMENT = None", "AUGMENT = data.random_crop"
DROPOUT = "freeze.py", TAIL, TAIL.replace("head)", "nn.Dropout(0.9), head)")
LINEAR = "freeze.py", TAIL, TAIL.replace("head)", "nn.Linear(512, 512), head)")
SEE_MODE = "train.py", ORDER, f"        print('training', tail[-2].training)\n{ORDER}"
THAW = "train.py", MODE, f"        model.layer3.requires_grad_(True)\n{MODE}"
HALF = f"lambda optimizer, steps: {SCHEDULERS}.LambdaLR(optimizer, lambda i: np.cos(i / steps))"
NUMPY = "train.py", "import torch\nimport", "import numpy as np\nimport torch\nimport"
UNREADABLE = "train.py", PARTS, PARTS.replace('"schedule": schedule}', MINE)
INVERT = "data.py", FLIP, f"    pixels = 255 - pixels\n{FLIP}"
CROP_INSIDE = "data.py", FLIP, f"    pixels = random_crop(pixels, torch.default_generator)\n{FLIP}"
COMMENT = "train.py", f"{LOSS}  #", f"{LOSS}  # mine,"
DOCSTRING = "train.py", '"""Forward, backward, update.', '"""What is done in a step.'

ONE, TWO, LATEST = (f"history.csv {name}.pt" for name in ("epoch1", "epoch2", "latest"))
FEW = {
    "what is another run, and what is not": [
        Does("train.py --epochs 2"),
        COMMENT,
        DOCSTRING,
        Does("train.py --epochs 2 --resume", ": finished"),
        ADAMW,
        Does("train.py --epochs 3 --resume", "another OPTIMIZER in train.py: give this", 2, TWO),
        INVERT,
        Does("train.py --epochs 1", "replaces.*transform in data.py, OPTIMIZER in tr", left=ONE),
    ],
    "an augmentation": [CROP, Does("train.py --epochs 1 --unfreeze layer4", "AUGMENT changes")],
    "a crop inside transform": [CROP_INSIDE, Does("train.py --epochs 1", "another .*AUGMENT", 2)],
    "a new layer": [LINEAR, Does("train.py --epochs 1 --unfreeze layer4", "is not in the opt", 2)],
    "a loop that is left": [
        BREAK,
        Does("train.py --epochs 5", "epoch2.pt, where the loop ended", left=TWO),
        Does("train.py --epochs 5 --resume", ": finished", left=TWO),
    ],
}
SLOW = {
    "another transform": [
        Does("train.py --epochs 1"),
        INVERT,
        Does("evaluate.py results/*/epoch1.pt", "trained with another transform in data.py"),
    ],
    "a layer that learns nothing in the tail": [
        DROPOUT,
        SEE_MODE,
        Does("train.py --epochs 3 --unfreeze layer4", "(training True.*){3}"),
    ],
    "a thawed stage": [THAW, Does("train.py --epochs 1 --unfreeze layer4", "layer3.0.conv1", 2)],
    "a loop left too soon": [BREAK_TOO_SOON, Does("train.py --epochs 5", "is lost: ", 0, LATEST)],
    "a mistyped idea, and put right": [
        Does("train.py --epochs 2"),
        Does("evaluate.py results/*/epoch2.pt --per-class"),
        MISTYPED,
        Does("train.py --epochs 1", "lable", 1, f"{TWO} epoch2.confusion.csv epoch2.mistakes"),
        PUT_RIGHT,
        Does("train.py --epochs 1", left=ONE),
    ],
    "seeds of two codes": [  # which are not compared as one
        Does("train.py --epochs 1 --seed 0"),
        Does("train.py --epochs 1 --seed 0 --unfreeze layer4"),
        SMOOTH,
        Does("train.py --epochs 1 --seed 2"),
        Does("compare.py results/*/epoch1.pt", "left out: .*-s2.*no other .* has the same code"),
    ],
    "a probe first": [  # and fine-tune then (Kumar et al. 2022): two commands of the README
        Does("train.py --epochs 2"),
        Does(f"train.py --unfreeze layer4 --epochs 1 {PROBE}", "its last layer is kept"),
        Does(f"train.py --dataset synthetic-other --epochs 1 {PROBE}", "its last layer is new"),
    ],
    "numbers of numpy": [  # which are kept as numbers
        NUMPY,
        ("train.py", "SCHEDULE = None", f"SCHEDULE = {HALF}"),
        ("plumbing/report.py", RIGHT, "torch.tensor(right / len(labels)).numpy()[()],"),
        Does("train.py --epochs 2", left=TWO),
        Does("compare.py results/*/epoch2.pt"),
    ],
    "a part that nobody reads": [UNREADABLE, Does("train.py --epochs 3", "plain values alone", 2)],
}


@pytest.mark.parametrize("name", [*FEW, *map(slow, SLOW)])
def test_an_edit_takes_effect_or_is_refused_with_a_sentence(copy, name):
    for step in (FEW | SLOW)[name]:
        if isinstance(step, Does):
            printed = copy.do(step.line, step.status)
            assert re.search(step.prints, printed, re.DOTALL), printed
            if step.left:
                assert {file.name for file in copy.run().iterdir()} == {*step.left.split()}
        else:
            copy.edit(*step)


# ---------------------------------------------------------------- an edit, and what comes out


@pytest.mark.slow
def test_a_schedule_by_the_epoch_is_in_the_history(copy):
    cosine = f"lambda optimizer, epochs: {SCHEDULERS}.CosineAnnealingLR(optimizer, epochs)"
    copy.edit("train.py", "SCHEDULE = None", f"SCHEDULE = {cosine}")
    copy.do("train.py --unfreeze layer4 --epochs 2 4")
    longer, shorter = copy.run("*-e4-*"), copy.run("*-e2-*")  # with a schedule two runs
    expected = [1e-3 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    found = history(longer, "fc_lr", "layer4_lr")
    assert [fc for fc, _ in found] == pytest.approx(expected)
    assert [layer4 for _, layer4 in found] == pytest.approx([rate / 10 for rate in expected])
    assert history(shorter, "fc_lr") == [[1e-3], [pytest.approx(5e-4)]]


def test_a_schedule_by_the_step_with_a_warm_up_is_in_the_history(copy):
    """With the rate of an epoch's last step."""
    warm_up = f"lambda o, n_steps: {SCHEDULERS}.LinearLR(o, 0.1, 1.0, n_steps)"
    copy.edit("train.py", "SCHEDULE = None", f"SCHEDULE = {warm_up}")
    copy.do("train.py --epochs 3")
    used = [1e-3 * (0.1 + 0.9 * step / 9) for step in range(9)]  # three steps an epoch
    assert [rate for (rate,) in history(copy.run(), "fc_lr")] == pytest.approx(used[2::3])


@pytest.mark.slow
def test_a_tag_puts_an_idea_beside_the_published_recipe(copy):
    copy.do("train.py --unfreeze layer4 --epochs 1")
    for edit in (SMOOTH, ADAMW, CROP):
        copy.edit(*edit)
    copy.do("train.py --unfreeze layer4 --epochs 1 --tag smooth")
    printed = copy.do("compare.py results/*/epoch1.pt --csv results/summary.csv")
    assert "fc+layer4 smooth over fc+layer4: " in printed
    table = rows(copy.folder / "results/summary.csv")
    assert [row["tag"] for row in table] == ["", "smooth"]
    for different in ("code", "train_loss"):
        assert table[0][different] != table[1][different]
    saved = checkpoint(copy.run("*smooth*"), 1)
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


@pytest.mark.slow
def test_a_stage_that_is_unfrozen_in_the_loop_learns_from_then_on(copy):
    learns = "settings.unfrozen if epoch > 1 else settings.unfrozen[-1:]"
    copy.edit("train.py", MODE, f"        freeze.freeze(model, {learns})\n{MODE}")
    copy.do("train.py --unfreeze layer4 --epochs 1 2")
    before = freeze.build("resnet18", 10).layer4[0].conv1.weight
    first, second = (checkpoint(copy.run(), n)["model"]["layer4.0.conv1.weight"] for n in (1, 2))
    assert torch.equal(before, first) and not torch.equal(before, second)


@pytest.mark.slow
def test_a_metric_is_added_in_one_place_and_is_in_every_table(copy):
    copy.do("train.py --epochs 1")
    top = '"top5": (logits.topk(5)[1] == labels[:, None]).sum().item() / len(labels),'
    copy.edit("plumbing/report.py", RIGHT, f"{RIGHT}\n        {top}")
    assert re.search(r"2/2 .* top5 0\.[0-9]", copy.do("train.py --epochs 2 --resume"))
    table = rows(copy.run() / "history.csv")
    assert table[0]["test_top5"] == "" and 0.3 < float(table[1]["test_top5"]) <= 1
    assert float(table[1]["seconds"]) > 0 and float(table[1]["fc_lr"]) == 1e-3
    for command in ("compare.py", "evaluate.py"):
        printed = copy.do(f"{command} results/*/epoch2.pt --csv summary.csv")
        (row,) = rows(copy.folder / "summary.csv")
        assert "top5" in printed.splitlines()[0]
        assert float(row["test_top5"]) == pytest.approx(float(table[1]["test_top5"]), abs=0.01)


TOY = """

def toy():
    early = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    late = nn.Sequential(nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(early, late, *pooling, nn.Linear(16, 1000))
"""


@pytest.mark.slow
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
    words = "train.py --model toy --unfreeze late --lr late=1e-3 head=1e-2 --epochs 2"
    printed = copy.do(words)
    assert "early             240  frozen" in printed and "learns at 0.01" in printed
    folder = copy.run("synthetic-head+late-fp32-*")
    assert history(folder, "late_lr", "head_lr") == [[1e-3, 1e-2]] * 2
    copy.do("evaluate.py results/*/epoch2.pt")
    refused = copy.do("train.py --model toy --unfreeze fc", status=2)
    assert "toy has early, late, head" in refused


@pytest.mark.parametrize(
    "old, new",
    [
        *(("f(x[:a])", "f(x[a:])"), ("f(x[2:])", "f(x[::2])"), ("f(*b)", "f(**b)")),
        *(("a - b", "b - a"), ("x = 1", "x = 1.0"), ("x = None", "x = 0")),
        ("for a in b: pass\nelse: c()", "for a in b: c()"),
        ("def f(a, *, b=1): pass", "def f(a, b=1): pass"),
    ],
)
def test_no_edit_looks_like_another(old, new):
    one, other = (settings.syntax(ast.parse(text)) for text in (old, new))
    assert one != other and one == settings.syntax(ast.parse(f"{old}  # a comment"))


# ---------------------------------------------------------------- resumed in the middle


def warm_up_and_cosine(optimizer, steps):
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, steps - 3)
    return lr_scheduler.SequentialLR(optimizer, [first, rest], [3])


def one_cycle(optimizer, steps):
    rates = [group["lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, rates, steps)  # which moves beta, too


SGD = functools.partial(torch.optim.SGD, momentum=0.9)
ADAMW_FUSED = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=True)
RECIPES = {
    "cosine": {"SCHEDULE": lambda o, epochs: lr_scheduler.CosineAnnealingLR(o, epochs)},
    "crop": {"AUGMENT": data.random_crop},
    "one cycle": {"SCHEDULE": one_cycle},
    "warm-up": {"SCHEDULE": warm_up_and_cosine},
    "erase, SGD": {"AUGMENT": data.random_erase, "OPTIMIZER": SGD},
    "one step down": {"SCHEDULE": lambda o, epochs: lr_scheduler.MultiStepLR(o, [1])},
    "AdamW": {"OPTIMIZER": ADAMW_FUSED},
}
ROUNDED = [(name, precision) for name in RECIPES for precision in ("bf16", "fp16")]
RECIPES["dropout"] = {"RECIPE": train.RECIPE | {"model": "mobilenet_v3_small"}}
IN_FP32 = [(name, "fp32") for name in RECIPES]
RARELY = [slow(*row) for row in [*IN_FP32[1:], *ROUNDED]]


@pytest.mark.parametrize("recipe, precision", [IN_FP32[0], *RARELY])
def test_each_alternative_goes_on_to_the_last_bit(run, monkeypatch, every_epoch, recipe, precision):
    for name, value in RECIPES[recipe].items():
        monkeypatch.setattr(train, name, value)
    flags = [*LITTLE, "--unfreeze", "layer4", "--epochs", "3", "--precision", precision]
    whole = run(*flags)
    flags += ["--out", str(whole.parent.with_name("stopped")), "--resume"]
    with stopped_in_epoch(2):
        run(*flags)
    resumed = run(*flags)
    columns = *COLUMNS, "fc_lr", "layer4_lr"
    assert history(whole, *columns) == history(resumed, *columns)
    one, other = checkpoint(whole, 3)["model"], checkpoint(resumed, 3)["model"]
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


def test_with_validation_pictures_the_test_is_looked_at_once(run, capsys):
    flags = [*VALIDATED, "--epochs", "2"]
    folder = run(*flags)
    run(*flags, "--unfreeze", "layer4", "--out", str(folder.parent))
    table = rows(folder / "history.csv")
    assert "val_accuracy" in table[0] and "test_accuracy" not in table[0]
    assert {file.name for file in folder.iterdir()} == {"history.csv", "epoch2.pt", "best.pt"}
    best = torch.load(folder / "best.pt", weights_only=True)
    accuracies = [float(row["val_accuracy"]) for row in table]
    assert best["history"][-1]["val_accuracy"] == max(accuracies)
    assert len(best["history"]) == 1 + accuracies.index(max(accuracies))
    capsys.readouterr()
    compare.main([str(file) for file in folder.parent.glob("*/epoch2.pt")])
    out = " ".join(capsys.readouterr().out.split())
    assert "compared on 100 validation pictures" in out
    assert "chosen on 100 validation pictures; on 60 test pictures, looked at once: " in out
    assert "these test pictures were used to choose" not in out
    (folder / "epoch2.pt").unlink()  # as if killed after its first best epoch: it begins again
    run(*flags, "--resume", "--out", str(folder.parent))
    assert (folder / "epoch2.pt").exists()
