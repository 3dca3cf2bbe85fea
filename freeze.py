"""A pretrained ResNet, and which of its stages learn.

    model = build("resnet18", 10, state)                # a state_dict, and a new fc for 10 classes
    freeze(model, ["fc", "layer4"])                     # everything else is frozen
    optimizer = torch.optim.Adam(param_groups(model, LEARNING_RATES))
    train_mode(model)                                   # instead of model.train(), every epoch
    prefix, tail = split(model, "layer4")               # model(x) == tail(prefix(x))

Freezing takes two things. `requires_grad = False` stops the optimizer, and eval mode stops
BatchNorm, which otherwise normalizes with the batch's statistics and keeps moving its running
ones, frozen or not (pytorch/pytorch#86590).

Imports torch and torchvision only, nothing of this repository: copy it into yours.
"""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import ResNet, get_model

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")  # from the input to the output
LEARNING_RATES = {"fc": 1e-3, "layer4": 1e-4, "layer3": 1e-5}  # the published ones


def build(
    name: str, num_classes: int, state: dict[str, torch.Tensor] | None = None, seed: int = 0
) -> ResNet:
    """A float32, channels_last network: one of MODELS with the pretrained weights in `state`, or
    with random ones, and a new fc, [features -> num_classes]. state: torchvision's keys; its fc
    is thrown away. Everything random comes from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if state is None:
            model = get_model(name, weights=None, num_classes=num_classes)
        else:
            model = get_model(name, weights=None)
            features, model.fc = model.fc.in_features, nn.Identity()
            backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
            model.load_state_dict(backbone)
            model.fc = nn.Linear(features, num_classes)
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


def train_mode(model: nn.Module) -> None:
    """What model.train() should be when something is frozen, for any network: a module that has
    parameters of which none learns is put into eval mode, with all that is inside it, so its
    BatchNorm uses, and keeps, the pretrained statistics. One without parameters of its own,
    such as Dropout, follows the module it is in."""
    model.train()
    for module in model.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and not any(learns):
            module.eval()


def param_groups(model: ResNet, rates: Mapping[str, float]) -> list[dict]:
    """One optimizer group for each stage that learns, with its name and learning rate, fc first.
    rates: by stage, per step; KeyError for a stage that learns and has none."""
    groups = []
    for name, stage in reversed(stages(model).items()):
        parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        if parameters:
            groups.append({"name": name, "params": parameters, "lr": rates[name]})
    return groups


def split(model: ResNet, first: str) -> tuple[nn.Module, nn.Module]:
    """Cut the model before the stage `first`, the earliest one that learns: model(x) equals
    tail(prefix(x)) in eval mode.

    The tail shares its modules with the model: training it trains the model. The prefix is a
    frozen copy in eval mode, where a BatchNorm is one multiplication and one addition per channel:
    for speed the convolution before it absorbs them. Exact up to rounding.
    """
    *backbone, fc = stages(model).values()
    cut = STAGES.index(first)
    prefix = nn.Sequential(*backbone[:cut])
    tail = nn.Sequential(*backbone[cut:], Average(), fc)
    if first == "fc":  # one number a channel is to be kept; averaging it again changes nothing
        prefix.append(model.avgpool)
    prefix = copy.deepcopy(prefix).eval().requires_grad_(False)
    for parent in list(prefix.modules()):
        absorb_batchnorm(parent)
    return prefix, tail


def absorb_batchnorm(parent: nn.Module) -> None:
    """Every convolution directly inside `parent` takes over the BatchNorm that follows it."""
    children = list(parent.named_children())
    for (name, child), (next_name, following) in zip(children, children[1:]):
        if isinstance(child, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
            setattr(parent, name, fuse_conv_bn_eval(child, following))
            setattr(parent, next_name, nn.Identity())


class Average(nn.Module):
    """The model's avgpool and flatten: [B, C, H, W] to [B, C]. Written so that its gradient is in
    channels_last memory like all around it (avgpool's is not, and costs 3% of a step on a CPU)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


class Drift:
    """How far stages have moved from where they were when this was made."""

    def __init__(self, model: ResNet, names: Collection[str]):
        self.stages = {name: stages(model)[name] for name in names}
        self.before = {name: vector(stage) for name, stage in self.stages.items()}

    def now(self) -> dict[str, float]:
        """By stage, the norm of the difference of all parameters, BatchNorm's scale and shift
        among them, over the norm of the start: from 0 up; 1 is as far as from all zeros."""
        moved = {}
        for name, before in self.before.items():
            difference = vector(self.stages[name]) - before
            moved[name] = (difference.norm() / before.norm()).item()
        return moved


def vector(stage: nn.Module) -> torch.Tensor:
    """A copy of all parameters of a stage, float32 [count]."""
    return torch.cat([parameter.detach().flatten() for parameter in stage.parameters()])
