"""The model, its weights, what learns, and the cut."""

import hashlib
import os
import types

import pytest
import torch
from torchvision.models import resnet18, resnet50

import freeze

STRATEGIES = [["fc"], ["layer4", "fc"], ["layer3", "layer4", "fc"]]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_experiment_s_learning_rates():
    assert freeze.LEARNING_RATES == {"stem": 1e-8, "layer1": 1e-7, "layer2": 1e-6, "layer3": 1e-5, "layer4": 1e-4, "fc": 1e-3}
    assert freeze.STAGES == ("stem", "layer1", "layer2", "layer3", "layer4", "fc")


@pytest.mark.parametrize("unfrozen", STRATEGIES)
def test_what_learns_is_torchvision_s_stages_and_a_new_fc(unfrozen):
    reference = resnet18(num_classes=10)
    expected = sum(count(getattr(reference, name)) for name in unfrozen)
    model = freeze.build(10)
    freeze.freeze(model, unfrozen)
    groups = freeze.param_groups(model, unfrozen)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert {group["name"]: (sum(p.numel() for p in group["params"]), group["lr"]) for group in groups} == {
        name: (count(getattr(reference, name)), freeze.LEARNING_RATES[name]) for name in unfrozen}
    assert sum(map(count, freeze.stages(model).values())) == count(reference) == 11_181_642


@pytest.mark.parametrize("unfrozen", [*STRATEGIES, ["layer1", "fc"], ["stem", "fc"]])
def test_the_tail_of_the_prefix_is_the_model(unfrozen):
    model = freeze.build(10)
    for module in model.modules():  # statistics and weights as of a trained network, so that folding shows
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-1, 1)
    model.eval()
    prefix, tail = freeze.split(model, unfrozen)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(tail(prefix(x)), model(x), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in prefix.parameters())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in prefix.modules())
    assert {id(p) for p in tail.parameters()} <= {id(p) for p in model.parameters()}  # training it trains the model


def test_in_training_only_what_learns_is_in_train_mode():
    model = freeze.build(10)
    freeze.train_mode(model, ["layer4", "fc"])
    assert model.layer4.training and all(m.training for m in model.layer4.modules()) and model.fc.training
    assert not any(m.training for name in ("bn1", "layer1", "layer2", "layer3") for m in getattr(model, name).modules())


def test_everything_random_comes_from_the_seed():
    torch.manual_seed(1)
    one = freeze.build(10, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    two, other = freeze.build(10, seed=5).state_dict(), freeze.build(10, seed=6)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(two["fc.weight"], other.fc.weight)
    assert torch.equal(before, torch.random.get_rng_state())  # nobody else's random numbers are touched


# ---------------------------------------------------------------- weights


def test_weights_from_a_file_whatever_its_classes_and_a_new_fc(tmp_path):
    state = resnet18(num_classes=1000).half().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    model = freeze.build(7, freeze.load_weights(str(tmp_path / "weights.pth")))
    assert model.fc.weight.shape == (7, 512)
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert tensor.dtype in (torch.float32, torch.int64) and torch.equal(tensor, state[name].to(tensor.dtype))
    assert freeze.load_weights("none") is None


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize("change, complaint", [
    (lambda state: without(state, "layer3.0.conv1.weight"), "layer3.0.conv1.weight"),
    (lambda state: state | {"layer5.weight": torch.zeros(1)}, "layer5.weight"),
    (lambda state: state | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "size mismatch for conv1.weight"),
    (lambda state: without(state, "fc.bias"), "KeyError: 'fc.bias'"),
    (lambda state: {"model": state}, "KeyError: 'fc.bias'"),
    (lambda state: list(state), "TypeError"),
    (lambda state: resnet50(num_classes=2).state_dict(), "RuntimeError"),
])
def test_weights_of_another_network(tmp_path, change, complaint):
    file = tmp_path / "weights.pth"
    torch.save(change(resnet18(num_classes=2).state_dict()), file)
    with pytest.raises(ValueError, match=complaint) as failure:
        freeze.load_weights(str(file))
    message = str(failure.value)
    assert f"{file} holds no state_dict of torchvision's resnet18" in message and "\n" not in message and len(message) < 400


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("content", ["missing", "text", "truncated", "malicious"])
def test_a_file_that_is_no_weights_file(tmp_path, content):
    file = tmp_path / "weights.pth"
    if content == "text":
        file.write_text("hello")
    elif content == "truncated":
        torch.save(resnet18(num_classes=2).state_dict(), file)
        file.write_bytes(file.read_bytes()[:1_000_000])
    elif content == "malicious":
        Malicious.victim = str(tmp_path / "ran")
        torch.save({"fc.bias": Malicious()}, file)
    with pytest.raises((ValueError, OSError), match=str(file)):
        freeze.load_weights(str(file))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def imagenet(monkeypatch, server, tmp_path):
    """The server as the host of torchvision's weights, and an empty torch.hub folder."""
    torch.save(resnet18(num_classes=1000).state_dict(), tmp_path / "published.pth")
    content = (tmp_path / "published.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content
    weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url=f"{server.url}/{name}"))
    monkeypatch.setattr(freeze, "ResNet18_Weights", weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server.name, server.file = name, tmp_path / "hub/checkpoints" / name
    return server


def test_imagenet_weights_are_downloaded_once_and_checked(imagenet):
    assert len(freeze.load_weights("imagenet")["fc.bias"]) == 1000
    assert len(freeze.load_weights("imagenet")["fc.bias"]) == 1000
    assert imagenet.asked == [f"/{imagenet.name}"]
    imagenet.file.write_bytes(imagenet.file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged.*delete it and put .* from http"):
        freeze.load_weights("imagenet")


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut"])
def test_imagenet_weights_that_cannot_be_had(imagenet, fault):
    path = f"/{imagenet.name}"
    if fault == "missing":
        del imagenet.files[path]
    elif fault == "cut":
        imagenet.cut.add(path)
    else:
        imagenet.files[path] = b"<html>a login page</html>"
    with pytest.raises(OSError, match="could not download the ImageNet weights") as failure:
        freeze.load_weights("imagenet")
    for part in (imagenet.name, str(imagenet.file.parent), "--weights"):
        assert part in str(failure.value)
    assert not list(imagenet.file.parent.parent.rglob("*.pth*"))


def test_the_distance_is_relative_and_counts_every_parameter():
    stage = freeze.stages(freeze.build(10))["layer3"]
    start = freeze.vector(stage)
    assert len(start) == 2_099_712 and freeze.distance(stage, start) == 0
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter *= 1.1
    assert freeze.distance(stage, start) == pytest.approx(0.1, rel=1e-4)
