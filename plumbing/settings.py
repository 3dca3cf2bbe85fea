"""A run's settings. From them come its name, its row in a CSV file, and whether two runs are the
same one. Below, two of the settings in detail: the rates over time, and the recipe's code."""

import ast
import hashlib
import inspect
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import freeze
from data import UserError
from plumbing import distributed
from plumbing.distributed import Splits
from plumbing.files import fingerprint

ROOT = Path(__file__).parent.parent
# In a CSV file the names of the data set and of the weights stand for these.
NO_COLUMNS = ("classes", "train_size", "train_data", "val_data", "test_data", "initial_network")


@dataclass(frozen=True)
class Settings:
    """What makes a run the run it is. Two runs with the same settings are the same run."""

    dataset: str  # cifar10, cifar100, synthetic, or the name of a folder of pictures
    strategy: str  # what learns: fc, fc+layer4, fc+layer3+layer4, ...
    tag: str  # the user's name for a variation of the recipe, or nothing
    model: str
    weights: str  # imagenet, none, or the name of a weights file
    train_size: int  # images to train on, the same share of every class; 0: all there are
    val_share: float  # of the training images, to validate on
    image_size: int  # side of the square the network sees
    batch_size: int
    learning_rates: str  # fc=0.001 layer4=0.0001
    schedule_epochs: int  # that the schedule is made for; 0: the rates are constant
    frozen_batchnorm: str  # eval, or train: the usual mistake
    precision: str  # bf16, fp16, fp32
    seed: int
    test_seed: int  # of the pictures drawn for test and validation
    ranks: int  # processes, each with batches of its own
    classes: tuple[str, ...]
    train_data: str  # sha256 of pixels and labels
    val_data: str
    test_data: str
    initial_network: str  # sha256 of all its values
    code: dict[str, str]  # of the recipe: by file and name, sha256 of what it says

    @property
    def name(self) -> str:
        """The run's folder: cifar10-fc+layer4-bf16-s0, and what was not left at its default."""
        name = f"{self.dataset}-{self.strategy}"
        name += f"-{self.tag}" if self.tag else ""
        name += f"-{self.precision}-s{self.seed}"
        name += f"-n{self.train_size}" if self.train_size else ""
        name += f"-val{self.val_share:g}" if self.val_share else ""
        name += f"-t{self.test_seed}" if self.test_seed else ""
        name += "-mistake" if self.frozen_batchnorm == "train" else ""
        name += f"-b{self.batch_size}" if self.batch_size != 128 else ""
        name += f"-r{self.ranks}" if self.ranks > 1 else ""
        name += f"-px{self.image_size}" if self.image_size != 224 else ""
        name += f"-e{self.schedule_epochs}" if self.schedule_epochs else ""
        name += f"-{self.model}" if self.model != "resnet18" else ""
        name += f"-{self.weights}" if self.weights != "imagenet" else ""
        return "-".join([name, *other_rates(self.learning_rates)])

    @property
    def unfrozen(self) -> list[str]:
        """The stages that learn, in the order they run."""
        head, *backbone = self.strategy.split("+")
        return [*backbone, head]

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each stage that learns."""
        parts = [part.split("=") for part in self.learning_rates.split()]
        return {stage: float(rate) for stage, rate in parts}

    def row(self) -> dict:
        """Its columns in a CSV file: all that tells runs apart, and one hash for the code."""
        code = "".join(f"{name} {digest}\n" for name, digest in sorted(self.code.items()))
        columns = asdict(self) | {"code": hashlib.sha256(code.encode()).hexdigest()[:8]}
        return {name: columns[name] for name in columns if name not in NO_COLUMNS}


def settings_of(
    args: Namespace,
    rates: dict[str, float],
    precision: str,
    images: Splits,
    model: nn.Module,
    lengths: list[int],
    schedule: Callable | None,
    train_file: str,
) -> Settings:
    """The settings of the run that train.py's flags ask for. rates: of the stages that learn, in
    the order they run; model: before any training; lengths: epochs asked for."""
    *backbone, head = rates
    stages = [head, *backbone]
    as_asked = ["tag", "model", "image_size", "batch_size", "frozen_batchnorm", "seed", "test_seed"]
    return Settings(
        **{name: getattr(args, name) for name in as_asked},
        dataset=args.data_dir.name if args.dataset == "folder" else args.dataset,
        strategy="+".join(stages),
        weights=name_of_weights(args.weights),
        train_size=args.train_size or 0,
        val_share=args.val_share or 0.0,
        learning_rates=rates_in_words({stage: rates[stage] for stage in stages}),
        schedule_epochs=max(lengths) if schedule else 0,
        precision=precision,
        ranks=distributed.world_size(),
        classes=images.train.classes,
        train_data=images.hashes["train"],
        val_data=images.hashes.get("val", ""),
        test_data=images.hashes["test"],
        initial_network=fingerprint(*model.state_dict().values()),
        code=recipe_code(train_file),
    )


def name_of_weights(weights: str) -> str:
    """In a run's name: imagenet, none, the file's name, or of a checkpoint the run's and it."""
    path = Path(weights)
    if not path.is_absolute():
        return weights  # imagenet or none
    if (path.parent / "history.csv").exists():
        return f"{path.parent.name}-{path.stem}"
    return path.name if path.stem in ("imagenet", "none") else path.stem


def rates_in_words(rates: dict[str, float]) -> str:
    """fc=0.001 layer4=0.0001, to the last digit."""
    return " ".join(f"{name}={float(rate)!r}" for name, rate in rates.items())


def other_rates(learning_rates: str) -> list[str]:
    """Those that are not as published: layer4=0.001, ..."""
    published = rates_in_words(freeze.LEARNING_RATES).split()
    return [rate for rate in learning_rates.split() if rate not in published]


def lengths_of_runs(epochs: list[int], schedule: Callable | None) -> list[list[int]]:
    """The lengths that were asked for, by run. With constant rates one run leaves them all; a
    schedule is another one for each length, so each is a run of its own."""
    lengths = sorted(set(epochs))
    return [lengths] if schedule is None else [[length] for length in lengths]


class Schedule:
    """Learning rates over time. make: None for constant ones, or a function that gives a scheduler
    of torch.optim.lr_scheduler: of (optimizer, epochs) for one that takes a step after each epoch,
    of (optimizer, steps) for one that takes a step after each training step."""

    def __init__(
        self, make: Callable | None, optimizer: torch.optim.Optimizer, epochs: int, steps: int
    ):
        self.optimizer, self.scheduler, self.by_step = optimizer, None, False
        if make:
            _, length, *_ = inspect.signature(make).parameters  # the second one's name decides
            self.by_step = "step" in length
            self.scheduler = make(optimizer, steps if self.by_step else epochs)
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise UserError("SCHEDULE: ReduceLROnPlateau needs a metric, and is given none here")

    def advance(self) -> None:
        groups = self.optimizer.param_groups
        self.used = {f"{group['name']}_lr": float(group["lr"]) for group in groups}
        if self.scheduler:
            self.scheduler.step()

    def after_step(self) -> None:
        if self.by_step:
            self.advance()

    def after_epoch(self) -> dict[str, float]:
        """By stage, as stage_lr, the rates of the epoch's last step."""
        if not self.by_step:
            self.advance()
        return self.used

    def state_dict(self) -> dict:
        return self.scheduler.state_dict() if self.scheduler else {}

    def load_state_dict(self, state: dict) -> None:
        if self.scheduler:
            self.scheduler.load_state_dict(state)


def recipe_code(train_file: str | Path) -> dict[str, str]:
    """Of train.py, freeze.py, data.py and features.py, by file and top-level name, a hash of the
    parsed source. Comments and docstrings are left out: to change them is to change no run."""
    found = {}
    files = {room: ROOT / f"{room}.py" for room in ("freeze", "data", "features")}
    for module, file in ({"train": Path(train_file)} | files).items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                node.body = node.body[ast.get_docstring(node) is not None :] or [ast.Pass()]
        for node in tree.body:
            for name in names_of(node):
                text = found.get(f"{module}.{name}", "") + syntax(node)
                found[f"{module}.{name}"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def syntax(node: object) -> str:
    """A parsed statement as text, the same under every Python: ast.dump and ast.unparse are not."""
    if isinstance(node, list):
        return f"[{' '.join(map(syntax, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    given = [field for field in ast.iter_fields(node) if field[1] not in (None, [])]
    fields = [f"{name}={syntax(value)}" for name, value in given]
    return f"{type(node).__name__}({' '.join(fields)})"


def names_of(node: ast.stmt) -> list[str]:
    """What a statement at a module's top defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for name in ast.walk(ast.Tuple(node.targets)) if isinstance(name, ast.Name)]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return ["the imports"]
    return ["other lines"]


def changed_names(before: dict[str, str], now: dict[str, str]) -> set[str]:
    """What differs between two versions of the code: train.LOSS, ..."""
    return {name for name in before.keys() | now if before.get(name) != now.get(name)}


def in_words(changed: set[str]) -> str:
    """LOSS in train.py, transform in data.py"""
    names = [name.partition(".") for name in sorted(changed)]
    return ", ".join(f"{name} in {file}.py" for file, _, name in names)
