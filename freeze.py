"""A pretrained network, and which of its stages learn.

    model = build("resnet18", 10, state)                # a state_dict, and a new fc for 10 classes
    freeze(model, ["fc", "layer4"])                     # everything else is frozen
    optimizer = torch.optim.Adam(param_groups(model, LEARNING_RATES))
    train_mode(model)                                   # instead of model.train(), every epoch
    prefix, tail = split(model, "layer4")               # model(x) == tail(prefix(x))

Freezing takes two things. `requires_grad = False` stops the optimizer, and eval mode stops
BatchNorm, which otherwise normalizes with the batch's statistics and keeps moving its running
ones, frozen or not (pytorch/pytorch#86590).

Only this file knows what the stages of a network are. Another network is its name in MODELS, a case
in `stages`, and one in `untrained` if torchvision does not have it.

Imports torch and torchvision, nothing of this repository: copy it into yours.
"""

import copy
import warnings
from collections.abc import Collection, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

MODELS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("mobilenet_v3_small", "mobilenet_v3_large", "convnext_tiny", "convnext_small"),
)
LEARNING_RATES = {"fc": 1e-3, "layer4": 1e-4, "layer3": 1e-5}  # the published ones
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")
# Where in `model.features` the first five begin, by the number of blocks in it.
FIRST_BLOCKS = {
    8: (0, 1, 2, 4, 6),  # ConvNeXt
    13: (0, 1, 2, 4, 9),  # MobileNetV3, small: where the picture is halved
    17: (0, 2, 4, 7, 13),  # and large
}


def build(
    name: str,
    num_classes: int,
    state: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    keep_head: bool = False,
) -> nn.Module:
    """A float32, channels_last network: one of MODELS with the pretrained weights in `state`, or
    with random ones, and a new last layer, [features -> num_classes]. state: torchvision's keys,
    whose last layer is thrown away unless keep_head. seed: of everything random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained(name)
        last = last_layer(model)
        parent, _, own = last.rpartition(".")
        head = model.get_submodule(parent)
        features = getattr(head, own).in_features
        if state is not None:
            backbone = {key: state[key] for key in state if not key.startswith(f"{last}.")}
            setattr(head, own, nn.Identity())
            model.load_state_dict(backbone)
        setattr(head, own, nn.Linear(features, num_classes))
        if keep_head:
            model.load_state_dict(dict(state))
    return model.to(memory_format=torch.channels_last)


def untrained(name: str) -> nn.Module:
    """One of torchvision's networks, with random weights."""
    from torchvision.models import get_model  # here: to import it takes as long as torch itself

    return get_model(name, weights=None)


def last_layer(model: nn.Module) -> str:
    """The name of the layer that tells the classes apart: fc in a ResNet."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1]


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """By name, in the order they run; the pooling before the head, the last, belongs to none."""
    if hasattr(model, "layer4"):  # a ResNet
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        return {"stem": stem} | {name: getattr(model, name) for name in STAGES[1:]}
    begins = FIRST_BLOCKS[len(model.features)]
    parts = [model.features[a:b] for a, b in zip(begins, (*begins[1:], None))]
    return dict(zip(STAGES, [*parts, model.classifier]))


def stage_names(name: str) -> list[str]:
    """The stages of one of MODELS, in the order they run; the last one is the head."""
    with torch.device("meta"):
        return list(stages(untrained(name)))


def freeze(model: nn.Module, unfrozen: Collection[str]) -> None:
    """Let these stages learn, and no others. Raises ValueError for a name that is no stage's."""
    names = list(stages(model))
    if isinstance(unfrozen, str):
        raise ValueError(f'freeze takes a list of stages: freeze(model, ["{unfrozen}"])')
    if unknown := [name for name in unfrozen if name not in names]:
        raise ValueError(f"no such stage: {', '.join(unknown)}; there are {', '.join(names)}")
    if names[-1] not in unfrozen:
        warnings.warn(f"{names[-1]} is frozen: a new one stays random", stacklevel=2)
    for name, stage in stages(model).items():
        stage.requires_grad_(name in unfrozen)


def train_mode(model: nn.Module) -> None:
    """model.train() for any network in which something is frozen: a module that has parameters of
    which none learns is put into eval mode, with all that is inside it, so that BatchNorm keeps to
    the pretrained statistics. Dropout follows the module that it is in."""
    model.train()
    for module in model.modules():
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if learns and not any(learns):
            module.eval()


def param_groups(model: nn.Module, rates: Mapping[str, float]) -> list[dict]:
    """One optimizer group for each stage that learns, with its name and learning rate, the head
    first. rates: by stage, per step; KeyError for a stage that learns and has none."""
    groups = []
    for name, stage in reversed(stages(model).items()):
        parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        if parameters:
            groups.append({"name": name, "params": parameters, "lr": rates[name]})
    return groups


def split(model: nn.Module, first: str) -> tuple[nn.Module, nn.Module]:
    """Cut the model before the stage `first`, the earliest one that learns: model(x) equals
    tail(prefix(x)) in eval mode, but for rounding. The tail shares its modules with the model:
    training it trains the model. The prefix is a frozen copy in eval mode, where a convolution can
    take over the multiplication and addition of the BatchNorm after it, which is faster."""
    names, (*backbone, head) = list(stages(model)), stages(model).values()
    cut = names.index(first)
    prefix = nn.Sequential(*backbone[:cut])
    if first == names[-1]:  # the head needs a channel's average alone; the average of one is itself
        prefix.append(nn.AdaptiveAvgPool2d(1))
    prefix = copy.deepcopy(prefix).eval().requires_grad_(False)
    for parent in list(prefix.modules()):
        absorb_batchnorm(parent)
    pooling = Average()
    if type(model).__name__ == "ConvNeXt":  # its head normalizes and flattens
        pooling = model.avgpool
    tail = nn.Sequential(*backbone[cut:], pooling, head)
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
