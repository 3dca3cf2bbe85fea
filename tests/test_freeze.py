"""The room freeze.py: the network, what learns, train mode, the cut in two."""

import functools

import pytest
import torch
from conftest import slow
from torch import nn
from torchvision.models import resnet18

import freeze

STRATEGIES = [["fc"], ["fc", "layer4"], ["fc", "layer4", "layer3"]]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("unfrozen", STRATEGIES)
def test_what_learns_is_torchvision_s_stages_and_a_new_fc(unfrozen):
    reference = resnet18(num_classes=10)
    model = freeze.build("resnet18", 10)
    freeze.freeze(model, unfrozen)
    found = []
    for group in freeze.param_groups(model, freeze.LEARNING_RATES):
        found.append((group["name"], sum(map(torch.numel, group["params"])), group["lr"]))
    rates = {"layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}  # the published ones
    assert found == [(name, count(getattr(reference, name)), rates[name]) for name in unfrozen]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, learning)) == sum(numbers for _, numbers, _ in found)
    assert sum(map(count, freeze.stages(model).values())) == count(reference) == 11_181_642
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert list(freeze.stages(model)) == names == freeze.stage_names("convnext_tiny")


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


@pytest.mark.parametrize(
    "unfrozen, said",
    [
        ("layer4", "takes a list of stages"),
        (["layer_4", "fc"], "no such stage: layer_4; there are stem, layer1"),
        (["conv1"], "no such stage: conv1"),
    ],
)
def test_a_stage_that_is_none_or_has_no_rate_or_a_random_fc_is_told(unfrozen, said):
    model = freeze.build("resnet18", 10)
    with pytest.raises(ValueError, match=said):
        freeze.freeze(model, unfrozen)
    with pytest.warns(UserWarning, match="fc is frozen: a new one stays random"):
        freeze.freeze(model, ["layer2"])
    with pytest.raises(KeyError, match="layer2"):
        freeze.param_groups(model, freeze.LEARNING_RATES)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", slow("convnext_tiny")])
def test_the_last_layer_is_new_unless_it_is_to_be_kept(name):
    before = freeze.build(name, 7, seed=1).state_dict()
    last = f"{freeze.last_layer(freeze.untrained(name))}.weight"
    kept = freeze.build(name, 7, before, seed=2, keep_head=True).state_dict()
    new = freeze.build(name, 7, before, seed=2).state_dict()
    assert all(torch.equal(before[key], kept[key]) for key in before)
    changed = [key for key in before if not torch.equal(before[key], new[key])]
    assert changed == [last, last.replace("weight", "bias")]


@pytest.mark.parametrize(
    "frozen, in_eval_mode",
    [
        (["features.0", "features.3.block.0.1"], ["features.0", "features.3.block.0.1"]),
        (["classifier"], ["classifier"]),  # with the Dropout in it
        (["features.0.1.weight"], []),  # its bias learns
        ([""], [""]),
    ],
)
def test_train_mode_goes_by_what_learns_in_any_network(frozen, in_eval_mode):
    model = freeze.untrained("mobilenet_v3_small")
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


@functools.cache
def trained(name: str) -> nn.Module:
    """With statistics and weights as of a trained network, so that folding them shows."""
    model = freeze.build(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var, module.running_mean):
                tensor.uniform_(0.5, 2)
            module.bias.data.uniform_(-1, 1)
    if name != "resnet18":
        model.double()  # float32's rounding grows in so many layers
    return model.eval()


CUTS = [("resnet18", first) for first in freeze.STAGES]
CUTS += [slow("resnet50", "layer3"), slow("mobilenet_v3_large", "layer4")]
for network in ("mobilenet_v3_small", "convnext_tiny"):
    CUTS += [slow(network, "fc"), slow(network, "layer4"), slow(network, "layer1")]


@pytest.mark.parametrize("name, first", CUTS)
def test_the_tail_of_the_prefix_is_the_model(name, first):
    model = trained(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prefix, tail = freeze.split(model, first)
    x = torch.rand(1, 3, 48, 48, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        features, expected = prefix(x), model(x)
        torch.testing.assert_close(tail(features), expected, rtol=1e-4, atol=1e-4)
    assert first != "fc" or features.shape[2:] == (1, 1)  # one number a channel
    assert not any(parameter.requires_grad for parameter in prefix.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prefix.modules())
    shared = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in tail.parameters()} <= shared  # it trains the model
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
