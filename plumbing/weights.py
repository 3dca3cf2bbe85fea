"""From a file to a network: a checkpoint of train.py, torchvision's weights, or anybody's."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import freeze
from data import UserError
from plumbing.convolution import use_fast_convolutions
from plumbing.files import socket_timeout
from plumbing.machine import memory_is_full, pick_device, pick_precision
from plumbing.settings import Settings

NEEDED = {"settings", "metadata", "history", "model", "seconds", "test_correct"}
WRAPPINGS = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights")
MADE_FOR = ("capturable", "fused", "foreach")  # a device: an optimizer does not read it back

State = dict[str, torch.Tensor]


def load_tensors(path: str | Path, kind: str) -> object:
    """What torch.save wrote, on the CPU. kind: what the file should be. Raises UserError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except Exception as error:  # torch.load meets a foreign file with many kinds of errors
        if memory_is_full(error):
            raise
        raise UserError(f"{path} is damaged, or no {kind}") from error


def read_checkpoint(path: str | Path) -> dict:
    """What train.py saved, on the CPU. Raises UserError naming the file."""
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path}")
    content = load_tensors(path, "checkpoint of train.py")
    names = content.keys() if isinstance(content, dict) else set()
    if names >= NEEDED:
        return content
    wrong = "is no checkpoint of train.py"
    if names & {"arguments", "facts"}:
        wrong = "was written by an earlier version, which knew less of a run: train it again"
    elif any(str(name).endswith(".weight") for name in names):
        wrong = f"holds weights alone: start a run from it, with train.py --weights {path}"
    raise UserError(f"{path} {wrong}")


def summary_row(path: str | Path, checkpoint: dict, scores: dict[str, float]) -> dict:
    """A checkpoint's row of summary.csv: the run and its settings, its length, what came out.
    seconds, device and torch are those of its training."""
    last, metadata = checkpoint["history"][-1], checkpoint["metadata"]
    row = {"run": Path(path).resolve().parent.name, "epochs": last["epoch"]}
    row |= Settings(**checkpoint["settings"]).row() | {"train_images": metadata["train_images"]}
    row |= {"test_images": len(checkpoint["test_correct"]), "train_loss": last["train_loss"]}
    row |= scores | {"trainable_parameters": metadata["trainable_parameters"]}
    row |= {"seconds": checkpoint["seconds"]}
    row |= {name: metadata[name] for name in ("device", "torch")}
    if "val_accuracy" in scores:
        row["val_images"] = len(checkpoint["val_correct"])
    return row


class Trained(NamedTuple):
    """A checkpoint's whole network, on a device."""

    model: nn.Module
    checkpoint: dict
    image_size: int
    device: torch.device
    precision: str


def load_model(checkpoint: dict, device: str = "", precision: str = "") -> Trained:
    """The network, on the device and in the precision of its training unless others are asked for.
    Raises UserError for a device that is not there."""
    settings = checkpoint["settings"]
    where = pick_device(device or checkpoint["metadata"]["device_type"])
    how = pick_precision(precision or settings["precision"], where)
    if how == "bf16" and not precision and pick_precision("auto", where) == "fp16":
        how = "fp16"  # a card that emulates bf16 slowly
    model = freeze.build(settings["model"], len(settings["classes"]))
    model.load_state_dict(checkpoint["model"])
    use_fast_convolutions(model)
    return Trained(model.to(where), checkpoint, settings["image_size"], where, how)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Puts back an optimizer's state_dict, without what was chosen for the device it was on."""
    groups = optimizer.state_dict()["param_groups"]
    for today, before in zip(groups, saved["param_groups"]):
        today |= {name: before[name] for name in before if name not in MADE_FOR}
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def pretrained(args: Namespace, classes: tuple[str, ...]) -> nn.Module:
    """The network that train.py's flags ask for. Raises UserError."""
    state, keep_head = load(args.weights, args.model, classes)
    return freeze.build(args.model, len(classes), state, args.seed, keep_head)


def load(weights: str, model: str, classes: tuple[str, ...] = ()) -> tuple[State | None, bool]:
    """The state_dict to start from: "imagenet" (torchvision's IMAGENET1K_V1), a path, or "none",
    which gives None. And whether to keep its last layer: yes in a checkpoint of train.py with
    these same classes. Raises UserError."""
    if weights == "none":
        return None, False
    file, keep_head = Path(weights), False
    if weights == "imagenet":
        content = imagenet(model)
    elif file.is_file():
        content = load_tensors(file, "file of weights: save model.state_dict() with torch.save")
    else:
        raise UserError(f"no weights file {file}: --weights takes imagenet, none or a path")
    settings = content.get("settings") if isinstance(content, dict) else None
    if isinstance(settings, dict) and "classes" in settings:  # train.py's
        keep_head = tuple(settings["classes"]) == classes
        kept = "kept: the classes are the same" if keep_head else "new: the classes are others"
        print(f"weights  {file.name} of {file.parent.name}; its last layer is {kept}", flush=True)
    network = freeze.untrained(model)
    state = unwrapped(content, file, network)
    return fitted(state, file, model, network, keep_head), keep_head


def imagenet(model: str) -> State:
    """From torch.hub's folder, or downloaded and its hash checked. Raises UserError."""
    from torchvision.models import get_model_weights  # here: to import it takes seconds

    published = get_model_weights(model).IMAGENET1K_V1
    how = {"map_location": "cpu", "weights_only": True, "progress": sys.stdout.isatty()}
    try:
        with socket_timeout():
            return published.get_state_dict(check_hash=True, **how)
    except Exception as error:  # of the network, of the hash, or of the file
        if memory_is_full(error):
            raise
        wrong = f"cannot download or read the ImageNet weights ({str(error)[:200]})"
        by_hand = f"put {published.url} into {torch.hub.get_dir()}/checkpoints"
        raise UserError(f"{wrong}: {by_hand}, or use --weights PATH or none") from error


def unwrapped(content: object, file: Path, network: nn.Module) -> State:
    """The weights without the dictionaries around them, and without a prefix before every key.
    What was taken off is printed. Raises UserError."""
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no weights but a {type(content).__name__}")
    taken = []
    while inside := [name for name in WRAPPINGS if isinstance(content.get(name), dict)]:
        taken.append(f'["{inside[0]}"]')
        content = content[inside[0]]
    state = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    # The prefix is what stands before the network's first weight, and before a later one too.
    keys = [key for key in network.state_dict() if key.endswith("weight")]
    first, later = keys[0], keys[len(keys) // 2]
    starts = [key.removesuffix(first) for key in state if key.endswith(first)]
    prefix = min((start for start in starts if start + later in state), key=len, default="")
    if prefix:
        taken.append(f"the prefix {prefix}")
    if taken:
        print(f"weights  {file.name}: taken out of {', '.join(taken)}", flush=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def fitted(state: State, file: Path, model: str, network: nn.Module, keep_head: bool) -> State:
    """What fits the network, its last layer only with keep_head. What is left over is printed.
    Raises UserError naming what is missing, superfluous, of another shape or no numbers."""
    head = f"{freeze.last_layer(network)}."
    own = {key: value for key, value in state.items() if key.startswith(head)}
    try:
        rest = {key: value for key, value in state.items() if key not in own}
        missing, left_over = network.load_state_dict(rest, strict=False)
    except RuntimeError as error:  # of other shapes
        shape = str(error).splitlines()[1].strip()
        raise UserError(f"{file} is no {model}: {shape}; try another --model") from error
    loaded = {key: value for key, value in network.state_dict().items() if not key.startswith(head)}
    if missing := [key for key in missing if key in loaded]:
        raise UserError(f"{file} is no {model}: it lacks {', '.join(missing[:5])}")
    if broken := [key for key, value in loaded.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{file} is broken: {broken[0]} holds values that are no finite numbers")
    layers = {key.split(".")[0] for key in loaded}
    if more := [key for key in left_over if key.split(".")[0] in layers]:
        raise UserError(f"{file} is no {model}: it has {more[0]} besides; try another --model")
    if left_over:
        some = ", ".join(left_over[:5])
        print(f"weights  {file.name}: {len(left_over)} not used: {some}", flush=True)
    return loaded | own if keep_head else loaded
