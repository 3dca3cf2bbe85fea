"""A pretrained ResNet18, and which of its stages learn.

    model = build(10, load_weights("imagenet"))         # a new fc for 10 classes
    freeze(model, ["layer4", "fc"])                     # everything else is frozen
    optimizer = torch.optim.Adam(param_groups(model, ["layer4", "fc"]))
    train_mode(model, ["layer4", "fc"])                 # instead of model.train(), every epoch
    prefix, tail = split(model, ["layer4", "fc"])       # model(x) == tail(prefix(x))

Freezing takes two things. `requires_grad = False` stops the optimizer, and eval mode stops
BatchNorm, which otherwise normalizes with the batch's statistics and keeps moving its running
ones, frozen or not (pytorch/pytorch#86590).

Imports torch and torchvision only, nothing of this repository: copy it into yours.
"""

import copy
import hashlib
import sys
from collections.abc import Collection
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet, ResNet18_Weights, resnet18

# The experiment, from the input to the output: every stage and its learning rate when it learns.
# fc, layer4 and layer3 are the published ones; each earlier stage has a tenth of the next.
LEARNING_RATES = {
    "stem": 1e-8,
    "layer1": 1e-7,
    "layer2": 1e-6,
    "layer3": 1e-5,
    "layer4": 1e-4,
    "fc": 1e-3,
}
STAGES = tuple(LEARNING_RATES)


def load_weights(weights: str) -> dict[str, torch.Tensor] | None:
    """The state_dict to start from: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), a
    path (torchvision's keys, any number of classes), or "none", which gives None.
    Raises ValueError or OSError with a sentence for the user."""
    if weights == "none":
        return None
    file = _imagenet_file() if weights == "imagenet" else Path(weights)
    if not file.is_file():
        raise FileNotFoundError(f"no weights file {file}: --weights takes imagenet, none or the path of a state_dict")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        resnet18(num_classes=len(state["fc.bias"])).load_state_dict(state)
    except OSError as error:
        raise OSError(f"cannot read {file} ({error.strerror})") from error
    except Exception as error:  # torch meets a foreign file with many kinds of errors, some of pages
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{file} holds no state_dict of torchvision's resnet18 ({reason[:160]})") from error
    return state


def _imagenet_file() -> Path:
    """torchvision's IMAGENET1K_V1 in torch.hub's folder; its hash is checked always, not only once."""
    url = ResNet18_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    expected = file.stem.rsplit("-", 1)[1]  # resnet18-f37072fd.pth: the beginning of its sha256
    by_hand = f"put {file.name} from {url} into {file.parent}, or use --weights PATH or --weights none"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=expected, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
            raise OSError(f"could not download the ImageNet weights ({error}): {by_hand}") from error
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(expected):
        raise ValueError(f"{file} is damaged (its sha256 does not begin with {expected}): delete it and {by_hand}")
    return file


def build(num_classes: int, state: dict[str, torch.Tensor] | None = None, seed: int = 0) -> ResNet:
    """A float32, channels_last ResNet18 with what load_weights gave, or with random weights, and
    a new fc, [512 -> num_classes]; everything random comes from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = resnet18(num_classes=len(state["fc.bias"]) if state else num_classes)
        if state:
            model.load_state_dict(state)
            model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model.to(memory_format=torch.channels_last)


def stages(model: ResNet) -> dict[str, nn.Module]:
    """The model's stages by name, in the order they run; avgpool and flatten, which learn
    nothing, run between the last two."""
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    return {"stem": stem} | {name: getattr(model, name) for name in STAGES[1:]}


def freeze(model: ResNet, unfrozen: Collection[str]) -> None:
    """Let the unfrozen stages learn, and no others; goes with train_mode, its other half."""
    for name, stage in stages(model).items():
        stage.requires_grad_(name in unfrozen)


def train_mode(model: ResNet, unfrozen: Collection[str]) -> None:
    """What model.train() should be when something is frozen: frozen stages stay in eval mode,
    so their BatchNorm uses, and keeps, the pretrained statistics."""
    model.eval()
    for name, stage in stages(model).items():
        stage.train(name in unfrozen)


def param_groups(model: ResNet, unfrozen: Collection[str], learning_rates: dict[str, float] = LEARNING_RATES) -> list[dict]:
    """One optimizer group per unfrozen stage, with its name and learning rate, fc first."""
    return [{"name": name, "params": list(stage.parameters()), "lr": learning_rates[name]}
            for name, stage in reversed(stages(model).items()) if name in unfrozen]


def vector(stage: nn.Module) -> torch.Tensor:
    """A copy of all parameters of a stage, BatchNorm's scale and shift among them, float32 [count]."""
    return torch.cat([parameter.detach().flatten() for parameter in stage.parameters()])


def distance(stage: nn.Module, start: torch.Tensor) -> float:
    """How far a stage's parameters have moved from `start`, which vector gave: the norm of the
    difference over the norm of the start, from 0 up; 1 is as far as from all zeros."""
    return ((vector(stage) - start).norm() / start.norm()).item()


def split(model: ResNet, unfrozen: Collection[str]) -> tuple[nn.Module, nn.Module]:
    """Cut the model before its first unfrozen stage: model(x) == tail(prefix(x)) in eval mode.

    The tail shares its modules with the model: training it trains the model. The prefix is a
    frozen copy in eval mode, where a BatchNorm is one multiplication and one addition per channel:
    for speed the convolution before it absorbs them. Exact up to rounding.
    """
    blocks = list(stages(model).values())
    blocks[-1:] = [model.avgpool, nn.Flatten(), model.fc]
    cut = min(STAGES.index(name) for name in unfrozen)
    prefix, tail = nn.Sequential(*blocks[:cut]), nn.Sequential(*blocks[cut:])
    if STAGES[cut] == "fc":  # 512 numbers an image are what is to be kept; averaging them again changes nothing
        prefix.append(model.avgpool)
    prefix = copy.deepcopy(prefix).eval().requires_grad_(False)
    for parent in list(prefix.modules()):
        children = list(parent.named_children())
        for (name, child), (next_name, following) in zip(children, children[1:]):
            if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(child, following))
                setattr(parent, next_name, nn.Identity())
    return prefix, tail
