"""The room freeze.py: the network, what learns, train mode, the cut in two."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import freeze

STRATEGIES = [["fc"], ["fc", "layer4"], ["fc", "layer4", "layer3"]]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_experiment_s_learning_rates():
    assert freeze.LEARNING_RATES == {"layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert freeze.stage_names("resnet18") == names == freeze.stage_names("convnext_tiny")


@pytest.mark.parametrize("unfrozen", STRATEGIES)
def test_what_learns_is_torchvision_s_stages_and_a_new_fc(unfrozen):
    reference = resnet18(num_classes=10)
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, unfrozen)
    found = []
    for group in freeze.param_groups(model, freeze.LEARNING_RATES):
        found.append((group["name"], sum(map(torch.numel, group["params"])), group["lr"]))
    rates = freeze.LEARNING_RATES
    assert found == [(name, count(getattr(reference, name)), rates[name]) for name in unfrozen]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, learning)) == sum(numbers for _, numbers, _ in found)
    assert sum(map(count, freeze.stages(model).values())) == count(reference) == 11_181_642


def test_a_stage_that_learns_without_a_rate_is_an_error():
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, ["layer2", "fc"])
    with pytest.raises(KeyError, match="layer2"):
        freeze.param_groups(model, freeze.LEARNING_RATES)


@pytest.mark.parametrize("state", [None, resnet18(num_classes=1000).state_dict()])
def test_everything_random_comes_from_the_seed(state):
    torch.manual_seed(1)
    one = freeze.build("resnet18", 10, state, seed=5)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two = freeze.build("resnet18", 10, state, seed=5).state_dict()
    other = freeze.build("resnet18", 10, state, seed=6).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.state_dict().items())
    assert not torch.equal(two["fc.weight"], other["fc.weight"])
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's numbers are touched
    assert torch.equal(two["conv1.weight"], other["conv1.weight"]) == bool(state)
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


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Dropout())


class Nested(nn.Module):
    """Someone's own network: a block in a module in a module."""

    def __init__(self):
        super().__init__()
        self.early = nn.ModuleDict({"one": block(), "two": block()})
        self.late = nn.Module()
        self.late.body, self.late.dropout = block(), nn.Dropout()
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize(
    "frozen, in_eval_mode",
    [
        (["early", "late.body.1"], ["early", "late.body.1"]),  # all that is inside early, too
        (["early.one"], ["early.one"]),
        (["late.body.1.weight"], []),  # its bias learns
        ([""], [""]),
    ],
)
def test_train_mode_goes_by_what_learns_in_any_network(frozen, in_eval_mode):
    model = Nested()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    expected = set()
    for name, _ in model.named_modules():
        if not name.startswith(tuple(in_eval_mode)):
            expected.add(name)
    freeze.train_mode(model.eval())
    assert {name for name, child in model.named_modules() if child.training} == expected
    model.requires_grad_(True)
    freeze.train_mode(model)
    assert all(module.training for module in model.modules())


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
CUTS += [("resnet50", "fc"), ("resnet50", "layer3"), ("mobilenet_v3_large", "layer4")]
for network in ("mobilenet_v3_small", "convnext_tiny"):
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
