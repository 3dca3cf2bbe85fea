"""A run's settings, and its name, its row in a CSV file and its likeness to another from them."""

from argparse import Namespace
from dataclasses import asdict, dataclass

from torch import nn

import freeze
from data import Images
from plumbing import ranks, weights
from plumbing.files import fingerprint


@dataclass(frozen=True)
class Settings:
    """What makes a run the run it is. Two runs with the same settings are the same run."""

    dataset: str  # cifar10, cifar100, synthetic, or the name of a folder of pictures
    strategy: str  # what learns: fc, fc+layer4, fc+layer3+layer4, ...
    model: str
    weights: str  # imagenet, none, or the name of a weights file
    train_size: int  # images to train on, the same share of every class; 0: all there are
    image_size: int  # side of the square the network sees
    batch_size: int
    learning_rates: str  # fc=0.001 layer4=0.0001
    frozen_batchnorm: str  # eval, or train: the usual mistake
    precision: str  # bf16, fp16, fp32
    seed: int
    classes: tuple[str, ...]
    train_data: str  # sha256 of pixels and labels
    test_data: str
    initial_network: str  # sha256 of all its values
    ranks: int = 1  # processes, each with batches of its own

    @property
    def name(self) -> str:
        """The run's folder: cifar10-fc+layer4-bf16-s0, and what was not left at its default."""
        name = f"{self.dataset}-{self.strategy}-{self.precision}-s{self.seed}"
        name += f"-n{self.train_size}" if self.train_size else ""
        name += "-mistake" if self.frozen_batchnorm == "train" else ""
        name += f"-b{self.batch_size}" if self.batch_size != 128 else ""
        name += f"-r{self.ranks}" if self.ranks > 1 else ""
        name += f"-px{self.image_size}" if self.image_size != 224 else ""
        name += f"-{self.model}" if self.model != "resnet18" else ""
        name += f"-{self.weights}" if self.weights != "imagenet" else ""
        published = strategy_rates(self.strategy, freeze.LEARNING_RATES).split()
        others = [rate for rate in self.learning_rates.split() if rate not in published]
        return "-".join([name, *others])

    def row(self) -> dict:
        """Its columns in a CSV file: all that tells runs apart; of the images, their number and
        the data set's name stand for them."""
        columns = asdict(self)
        for name in ("classes", "train_data", "test_data", "initial_network", "train_size"):
            del columns[name]
        return columns


def strategy_of(stages: list[str]) -> str:
    """fc+layer3+layer4: fc first, then the stages in the order they run."""
    backbone = [name for name in freeze.STAGES if name in stages and name != "fc"]
    return "+".join(["fc", *backbone])


def strategy_rates(strategy: str, rates: dict[str, float]) -> str:
    """fc=0.001 layer4=0.0001: the rate of each stage that has one."""
    return " ".join(f"{name}={rates[name]:g}" for name in strategy.split("+") if name in rates)


def settings_of(args: Namespace, train: Images, test: Images, model: nn.Module) -> Settings:
    """The settings of the run that train.py's flags ask for. model: before any training."""
    strategy, dataset = strategy_of(args.unfreeze), args.dataset
    if dataset == "folder":
        dataset = args.data_dir.name
    return Settings(
        dataset=dataset,
        strategy=strategy,
        model=args.model,
        weights=weights.name_of(args.weights),
        train_size=args.train_size or 0,
        image_size=args.image_size,
        batch_size=args.batch_size,
        learning_rates=strategy_rates(strategy, args.rates),
        frozen_batchnorm=args.frozen_batchnorm,
        precision=args.precision,
        seed=args.seed,
        classes=train.classes,
        train_data=fingerprint(train.pixels, train.labels),
        test_data=fingerprint(test.pixels, test.labels),
        initial_network=fingerprint(*model.state_dict().values()),
        ranks=ranks.count(),
    )
