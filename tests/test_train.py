"""train.py's command line: what a user types, sees and finds on disk."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, history, rows
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import data
import train
from plumbing import flags
from plumbing.settings import Schedule, Settings, settings_of


def parse(*words: str):
    return flags.parse("", train.RECIPE, list(words))


def test_a_run_prints_what_it_does(run, capsys):
    how = "--lr", "layer3=3e-5", "--batch-size", "30", "--image-size", "32", "--epochs", "2", "1"
    folder = run("--unfreeze", "layer3", "layer4", *how)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == str(folder)
    assert lines[1] == "data     60 train and 60 test images"
    assert lines[2].split()[:4] == ["10", "classes:", "bars,", "checks,"]
    del lines[2:4]  # their names take two lines
    assert [line.split() for line in lines[3:9]] == [
        ["stem", "9,536", "frozen"],
        ["layer1", "147,968", "frozen"],
        ["layer2", "525,568", "frozen"],
        ["layer3", "2,099,712", "learns", "at", "3e-05"],
        ["layer4", "8,393,728", "learns", "at", "0.0001"],
        ["fc", "5,130", "learns", "at", "0.001"],
    ]
    assert lines[9].startswith("device ")
    assert lines[9].endswith(f"({torch.get_num_threads()} threads), fp32")
    assert lines[10].startswith("cache    0.00 GB of features in host memory, ")
    assert "filled in" in lines[11]
    table = [line for line in lines[12:] if not line.startswith("saved")]
    assert [line.split()[0] for line in table] == ["epoch", "1/2", "2/2"]
    saved = [line.split(",")[0] for line in lines[12:] if line.startswith("saved")]
    assert saved == [f"saved    {folder}/epoch{epochs}.pt" for epochs in (1, 2)]
    assert "\r" not in printed  # live progress is for terminals
    assert max(map(len, [*lines[1:12], *table])) <= 80


def test_a_run_leaves_its_history_and_a_checkpoint_for_each_length(finished):
    assert finished.name == "synthetic-fc+layer4-fp32-s0-n60-b25-px48-none-layer4=0.001"
    assert {file.name for file in finished.iterdir()} == {"history.csv", "epoch1.pt", "epoch2.pt"}
    assert {file.name for file in finished.parent.iterdir()} == {finished.name, ".locks"}
    table = rows(finished / "history.csv")
    assert list(table[0]) == [
        *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
        *("seconds", "train_seconds", "fc_lr", "layer4_lr"),
    ]
    assert [row["epoch"] for row in table] == ["1", "2"]
    for row in table:
        assert 0 <= float(row["train_accuracy"]) <= 1 and 0 <= float(row["test_accuracy"]) <= 1
        assert 0 < float(row["train_seconds"]) < float(row["seconds"])
        assert float(row["fc_lr"]) == float(row["layer4_lr"]) == 1e-3


@pytest.mark.parametrize(
    "words, name",
    [
        ("", "cifar10-fc-bf16-s0"),
        ("--unfreeze layer4 --unfreeze layer3", "cifar10-fc+layer3+layer4-bf16-s0"),
        ("--unfreeze fc layer4 --seed 2", "cifar10-fc+layer4-bf16-s2"),
        ("--train-size 500 --batch-size 64 --weights a/b.pth", "cifar10-fc-bf16-s0-n500-b64-b"),
        ("--dataset folder --data-dir my/pictures", "pictures-fc-bf16-s0"),
        ("--unfreeze stem --lr fc=1 --lr stem=2", "cifar10-fc+stem-bf16-s0-fc=1.0-stem=2.0"),
        (f"--lr fc={1 / 3}", f"cifar10-fc-bf16-s0-fc={1 / 3}"),  # to the last digit
        ("--unfreeze layer4 --lr layer4=1e-4 fc=0.01", "cifar10-fc+layer4-bf16-s0-fc=0.01"),
        ("--unfreeze layer2 --lr layer2=1e-6", "cifar10-fc+layer2-bf16-s0-layer2=1e-06"),
        ("--model resnet50 --image-size 96", "cifar10-fc-bf16-s0-px96-resnet50"),
        ("--frozen-batchnorm train", "cifar10-fc-bf16-s0-mistake"),
        ("--unfreeze layer4 --tag smooth-0.1", "cifar10-fc+layer4-smooth-0.1-bf16-s0"),
        ("--val-share 0.1 --test-seed 3", "cifar10-fc-bf16-s0-val0.1-t3"),
    ],
)
def test_a_run_is_named_by_what_was_run(words, name):
    assert settings(*words.split()).name == name


def settings(*words: str, schedule=None) -> Settings:
    args = parse(*words)
    few = data.Images(None, None, ("cat", "dog"))
    images = SimpleNamespace(train=few, hashes={"train": "1", "test": "2"})
    rates, network = flags.learning_rates(args, train.RECIPE["rates"]), torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(network.weight), torch.nn.init.zeros_(network.bias)
    return settings_of(args, rates, "bf16", images, network, args.epochs, schedule, train.__file__)


def test_with_a_schedule_the_length_does():
    one, other = (settings("--epochs", n, schedule=print) for n in ("10", "50"))
    assert one.name == "cifar10-fc-bf16-s0-e10" and other.name == "cifar10-fc-bf16-s0-e50"
    assert one != other
    rise = Schedule(lambda some, epochs, steps=1: StepLR(some, steps), SGD([torch.ones(1)]), 5, 9)
    assert not rise.by_step  # the second name decides


def test_the_defaults_are_the_experiment():
    args = parse()
    assert (args.dataset, args.weights, args.model) == ("cifar10", "imagenet", "resnet18")
    assert (args.image_size, args.batch_size, args.epochs, args.seed) == (224, 128, [10], 0)
    assert args.unfreeze == [] and args.tag == ""
    rates = flags.learning_rates(parse("--unfreeze", "layer3", "layer4"), train.RECIPE["rates"])
    assert rates == {"layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}
    assert (None, None, F.cross_entropy) == (train.SCHEDULE, train.AUGMENT, train.LOSS)
    assert train.OPTIMIZER.func is torch.optim.Adam


def test_what_the_user_asked_for_stays_as_it_is(tmp_path, monkeypatch):
    """Nothing writes into args after parsing."""
    args = parse(*SMALL, "--image-size", "32", "--out", str(tmp_path))
    asked = copy.deepcopy(vars(args))
    monkeypatch.setattr(flags, "parse", lambda *_: args)
    train.main([])
    assert vars(args) == asked


@pytest.mark.slow
def test_pretraining_on_other_pictures_helps(run):
    """What the demo shows: fc alone, on a network that has learned other drawn classes, is right
    more often than one that learns from random weights, two stages and all."""
    little = ["--image-size", "32", "--batch-size", "50", "--precision", "fp32"]
    pretraining = ["--dataset", "synthetic-other", "--train-size", "2000", "--epochs", "2"]
    pretraining += ["--unfreeze", "stem", "layer1", "layer2", "layer3", "layer4", "--lr"]
    pretraining += [f"{stage}=1e-3" for stage in ("stem", "layer1", "layer2", "layer3", "layer4")]
    before = run(*little, *pretraining) / "epoch2.pt"
    few = [*little, "--train-size", "100", "--epochs", "10"]
    ((from_random,),) = history(run(*few, "--unfreeze", "layer3", "layer4"), "test_accuracy")[-1:]
    ((pretrained,),) = history(run(*few, "--weights", str(before)), "test_accuracy")[-1:]
    assert pretrained > from_random + 0.15


@pytest.mark.slow
def test_layer4_learns_the_drawn_pictures_and_fc_alone_does_not(run):
    words = ["--image-size", "32", "--train-size", "200", "--batch-size", "100", "--epochs", "20"]
    columns = "train_accuracy", "test_accuracy"
    _, fc = history(run(*words), *columns)[-1]
    trained, layer4 = history(run(*words, "--unfreeze", "layer4"), *columns)[-1]
    assert fc < 0.25
    assert layer4 > fc + 0.08
    assert trained > 0.9  # its weights learn, not only its BatchNorm's statistics: that gives 0.73
