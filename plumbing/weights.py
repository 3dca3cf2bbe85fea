"""Weights files: torchvision's own, downloaded once and checked, or anybody's.

What people have is a state_dict wrapped in another dictionary, with a prefix before every key, with
a head of its own or none. What is taken off is said in a line.
"""

import hashlib
import re
from argparse import Namespace
from http.client import HTTPException
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model_weights

import freeze
from data import UserError
from plumbing.datasets import download
from plumbing.files import locked
from plumbing.machine import memory_is_full

WRAPPINGS = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights")
HDF5 = b"\x89HDF\r\n\x1a\n"  # how such a file begins
FORMATS = {  # by the ending
    ".onnx": "ONNX: save the network that it was exported from",
    ".safetensors": "safetensors: torch.save(safetensors.torch.load_file(FILE), OTHER) makes one",
    ".pb": "TensorFlow's",
    ".tflite": "TensorFlow's",
    ".msgpack": "Flax's",
}
NAMED = 5  # of many keys, how many are named

State = dict[str, torch.Tensor]


def pretrained(args: Namespace, classes: tuple[str, ...]) -> nn.Module:
    """The network that train.py's flags ask for, with a last layer for these classes. Raises
    UserError."""
    state, keep_head = load(args.weights, args.model, classes)
    return freeze.build(args.model, len(classes), state, args.seed, keep_head)


def load(weights: str, model: str, classes: tuple[str, ...] = ()) -> tuple[State | None, bool]:
    """The state_dict to start from: "imagenet" (torchvision's IMAGENET1K_V1), a path, or "none",
    which gives None. And whether its last layer tells these classes apart, so that it is kept; it
    does in a checkpoint of train.py with the same ones. Raises UserError."""
    if weights == "none":
        return None, False
    file = Path(weights)
    if weights == "imagenet":
        file = imagenet_file(model)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        takes = "--weights takes imagenet, none or the path of a file"
        raise UserError(f"no weights file {file}: {takes}") from error
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    except Exception as error:  # torch meets a foreign file with many kinds of errors, some long
        if memory_is_full(error):
            raise
        raise UserError(f"{file} {why_not_read(file, error)}") from error
    keep_head = False
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):  # train.py's
        keep_head = tuple(content["settings"]["classes"]) == classes
        kept = "kept: the classes are the same" if keep_head else "new: the classes are others"
        print(f"weights  {file.name} of {file.parent.name}; its last layer is {kept}", flush=True)
    network = freeze.untrained(model)
    state = unwrapped(content, file, network)
    return checked(state, file, model, network, keep_head), keep_head


def why_not_read(file: Path, error: Exception) -> str:
    """What a file holds that torch.load does not take with weights_only=True, and what to do."""
    with open(file, "rb") as opened:
        start = opened.read(len(HDF5))
    kind = FORMATS.get(file.suffix.lower())
    if start == HDF5:
        kind = "HDF5, which Keras writes"
    if "TorchScript" in str(error):
        kind = "TorchScript: torch.save(torch.jit.load(FILE).state_dict(), OTHER) makes one"
    if kind:
        return f"holds no PyTorch state_dict: it is {kind}"
    if found := re.search(r"GLOBAL (\S+)|[Cc]lass:? (\S+)", str(error)):
        name = (found[1] or found[2]).strip("`'\"")
        rest = "and only tensors are read, because reading other objects can run code"
        return f"holds a {name}, {rest}: save model.state_dict() alone"
    return "is damaged, or no file of weights: save model.state_dict() with torch.save"


def unwrapped(content: object, file: Path, network: nn.Module) -> State:
    """The weights without what they are wrapped in, and without a prefix. Raises UserError."""
    taken = []
    while isinstance(content, dict):
        inside = [name for name in WRAPPINGS if isinstance(content.get(name), dict)]
        if not inside:
            break
        taken.append(f'["{inside[0]}"]')
        content = content[inside[0]]
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no weights but a {type(content).__name__}")
    state = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}
    keys = [key for key in network.state_dict() if key.endswith("weight")]
    first, second = keys[0], keys[len(keys) // 2]  # by which the prefix is found
    starts = [key.removesuffix(first) for key in state if key.endswith(first)]
    prefix = min((start for start in starts if start + second in state), key=len, default="")
    if prefix:
        taken.append(f"the prefix {prefix}")
    if taken:
        print(f"weights  {file.name}: taken out of {', '.join(taken)}", flush=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def checked(state: State, file: Path, model: str, network: nn.Module, keep_head: bool) -> State:
    """What fits the network, key by key. Raises UserError naming what is missing or of another
    shape, and values that are no numbers; says what is left over."""
    wanted, head = network.state_dict(), f"{freeze.last_layer(network)}."
    for key in wanted:
        if key.endswith("num_batches_tracked"):  # not in files from before PyTorch 0.4.1
            state.setdefault(key, wanted[key])
    kept = {key: value for key, value in state.items() if keep_head and key.startswith(head)}
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    wanted = {key: value for key, value in wanted.items() if not key.startswith(head)}
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{file} is no {model}: it lacks {some(missing)}")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            shapes = f"{list(state[key].shape)} and not {list(value.shape)}"
            raise UserError(f"{file} is no {model}: its {key} is {shapes}; try another --model")
        if not torch.isfinite(state[key].float()).all():
            raise UserError(f"{file} is broken: {key} holds values that are no finite numbers")
    left_over = [key for key in state if key not in wanted]
    layers = {key.split(".")[0] for key in wanted}
    if more := [key for key in left_over if key.split(".")[0] in layers]:
        raise UserError(f"{file} is no {model}: it has {some(more)} besides; try another --model")
    if left_over:
        print(f"weights  {file.name}: not used: {some(left_over)}", flush=True)
    return {key: state[key] for key in wanted} | kept


def some(keys: list[str]) -> str:
    """The first few of them, and how many more."""
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def imagenet_file(model: str) -> Path:
    """torchvision's file in torch.hub's folder; its hash is checked always, not only once."""
    url = get_model_weights(model)["IMAGENET1K_V1"].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    expected = file.stem.rsplit("-", 1)[1]  # resnet18-f37072fd.pth: the beginning of its sha256
    place = f"put {file.name} from {url} into {file.parent}"
    by_hand = f"{place}, or use --weights PATH or --weights none"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file.parent, file.stem, wait=True):
                if not file.exists():  # another run may have fetched it meanwhile
                    download(url, file, sha256=expected)
        except (OSError, ValueError, HTTPException, UserError) as error:
            what = f"could not download the ImageNet weights ({error})"
            raise UserError(f"{what}: {by_hand}") from error
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(expected):
        what = f"{file} is damaged (its sha256 does not begin with {expected})"
        raise UserError(f"{what}: delete it and {by_hand}")
    return file
