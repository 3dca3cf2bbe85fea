"""The room freeze.py: the network, what learns, train mode, the cut in two."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import freeze

STRATEGIES = [["fc"], ["layer4", "fc"], ["layer3", "layer4", "fc"]]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def in_train_mode(module: nn.Module) -> set[str]:
    """Names of the modules that are in train mode."""
    return {name for name, child in module.named_modules() if child.training}


def test_the_experiment_s_learning_rates():
    assert freeze.LEARNING_RATES == {"layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert freeze.stage_names("resnet18") == names == freeze.stage_names("convnext_tiny")


@pytest.mark.parametrize("unfrozen", STRATEGIES)
def test_what_learns_is_torchvision_s_stages_and_a_new_fc(unfrozen):
    reference = resnet18(num_classes=10)
    expected = {}
    for name in reversed(unfrozen):
        expected[name] = count(getattr(reference, name)), freeze.LEARNING_RATES[name]
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, unfrozen)
    groups = {}
    for group in freeze.param_groups(model, freeze.LEARNING_RATES):
        numbers = sum(parameter.numel() for parameter in group["params"])
        groups[group["name"]] = numbers, group["lr"]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert groups == expected and list(groups) == list(expected)
    assert sum(p.numel() for p in learning) == sum(numbers for numbers, _ in expected.values())
    assert sum(map(count, freeze.stages(model).values())) == count(reference) == 11_181_642


def test_a_stage_that_learns_without_a_rate_is_an_error():
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, ["layer2", "fc"])
    with pytest.raises(KeyError, match="layer2"):
        freeze.param_groups(model, freeze.LEARNING_RATES)


def test_everything_random_comes_from_the_seed():
    torch.manual_seed(1)
    one = freeze.build("resnet18", 10, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = freeze.build("resnet18", 10, seed=5).state_dict()
    other = freeze.build("resnet18", 10, seed=6).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["fc.weight"], other["fc.weight"])
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are touched


def test_a_new_fc_comes_from_the_seed_whatever_the_weights():
    state = resnet18(num_classes=1000).state_dict()
    one = freeze.build("resnet18", 10, state, seed=5)
    two = freeze.build("resnet18", 10, state, seed=5)
    other = freeze.build("resnet18", 10, state, seed=6)
    assert torch.equal(one.fc.weight, two.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(one.conv1.weight, state["conv1.weight"])
    assert one.conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("unfrozen", ["layer4", ["layer_4", "fc"], ["conv1"]])
def test_a_stage_that_is_none_is_refused(unfrozen):
    with pytest.raises(ValueError, match="takes a list of stages|no such stage: .*there are stem"):
        freeze.freeze(freeze.build("resnet18", 10), unfrozen)


def test_a_frozen_new_fc_gets_a_warning():
    with pytest.warns(UserWarning, match="fc is frozen: a new one stays random"):
        freeze.freeze(freeze.build("resnet18", 10), ["layer4"])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_the_last_layer_is_new_unless_it_is_to_be_kept(name):
    before = freeze.build(name, 7, seed=1).state_dict()
    last = f"{freeze.last_layer(freeze.untrained(name))}.weight"
    kept = freeze.build(name, 7, before, seed=2, keep_head=True).state_dict()
    new = freeze.build(name, 7, before, seed=2).state_dict()
    assert all(torch.equal(before[key], kept[key]) for key in before)
    assert [key for key in before if not torch.equal(before[key], new[key])] == [
        *(last, last.replace("weight", "bias"))
    ]


# ---------------------------------------------------------------- train mode


def test_in_training_only_what_learns_is_in_train_mode():
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, ["layer4", "fc"])
    freeze.train_mode(model)
    assert all(module.training for module in (*model.layer4.modules(), model.fc))
    for name in ("bn1", "layer1", "layer2", "layer3"):
        assert not in_train_mode(getattr(model, name))


def block(channels: int = 4) -> nn.Sequential:
    layers = [nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.Dropout()]
    return nn.Sequential(*layers)


class Nested(nn.Module):
    """Someone's own network: a block in a module in a module."""

    def __init__(self):
        super().__init__()
        self.early = nn.ModuleDict({"one": block(), "two": block()})
        self.late = nn.Module()
        self.late.body, self.late.dropout = block(), nn.Dropout()
        self.head = nn.Linear(4, 2)


def test_train_mode_goes_by_what_learns_in_any_network():
    model = Nested()
    model.early.requires_grad_(False)
    model.late.body[1].requires_grad_(False)  # a frozen BatchNorm in a module that learns
    freeze.train_mode(model)
    assert not in_train_mode(model.early)  # its Dropout and all that is inside it
    frozen = {name for name, _ in model.named_modules() if name.startswith("early")}
    everything = {name for name, _ in model.named_modules()}
    assert in_train_mode(model) == everything - frozen - {"late.body.1"}


def test_half_frozen_modules_learn_and_their_frozen_parts_do_not():
    model = Nested()
    model.early["one"].requires_grad_(False)
    freeze.train_mode(model)
    assert model.early.training and model.early["two"][1].training
    assert model.early["two"][2].training  # Dropout follows the module it is in
    assert not in_train_mode(model.early["one"])


def test_train_mode_can_be_called_again_when_more_learns_and_after_eval():
    model = Nested().requires_grad_(False)
    freeze.train_mode(model)
    assert not in_train_mode(model)
    model.requires_grad_(True)
    model.eval()
    freeze.train_mode(model)
    assert all(module.training for module in model.modules())


def test_one_parameter_that_learns_is_enough():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout())
    model[0].weight.requires_grad_(False)  # its bias learns
    freeze.train_mode(model)
    assert model[0].training and model[1].training


# ---------------------------------------------------------------- the cut


@functools.cache
def trained(name: str) -> nn.Module:
    """With statistics and weights as of a trained network, so that folding them shows."""
    torch.manual_seed(0)
    model = freeze.build(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-1, 1)
    if name != "resnet18":
        model.double()  # float32's rounding grows in so many layers
    return model.eval()


CUTS = [("resnet18", first) for first in freeze.stage_names("resnet18")]
CUTS += [("resnet34", "fc"), ("resnet34", "layer4"), ("resnet34", "layer2")]
CUTS += [("resnet50", "fc"), ("resnet50", "layer4"), ("resnet50", "layer3")]
for network in ("mobilenet_v3_small", "mobilenet_v3_large", "convnext_tiny"):
    CUTS += [(network, "fc"), (network, "layer4"), (network, "layer1")]


@pytest.mark.parametrize("name, first", CUTS)
def test_the_tail_of_the_prefix_is_the_model(name, first):
    model = trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prefix, tail = freeze.split(model, first)
    x = torch.rand(2, 3, 64, 64, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(tail(prefix(x)), expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in prefix.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prefix.modules())
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in tail.parameters()} <= shared  # it trains the model
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_comes_before_fc_is_one_number_a_channel():
    prefix, _ = freeze.split(trained("resnet18"), "fc")
    with torch.no_grad():
        assert prefix(torch.rand(2, 3, 64, 64)).shape == (2, 512, 1, 1)
