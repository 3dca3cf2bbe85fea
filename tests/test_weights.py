"""Weights files. The only server asked is one on this machine."""

import functools
import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import resnet18, resnet50

import freeze
from data import UserError
from plumbing import datasets, weights


def test_weights_from_a_file_whatever_its_classes_and_a_new_fc(tmp_path):
    state = resnet18(num_classes=1000).half().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    loaded = weights.load(str(tmp_path / "weights.pth"), "resnet18")
    model = freeze.build("resnet18", 7, loaded)
    assert model.fc.weight.shape == (7, 512)
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert tensor.dtype in (torch.float32, torch.int64)
            assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert weights.load("none", "resnet18") is None


def without(state: dict, name: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key != name}


WRONG = {
    "a tensor is missing": (
        lambda state: without(state, "layer3.0.conv1.weight"),
        "layer3.0.conv1.weight",
    ),
    "one too many": (lambda state: state | {"layer5.weight": torch.zeros(1)}, "layer5.weight"),
    "another shape": (
        lambda state: state | {"conv1.weight": torch.zeros(64, 1, 7, 7)},
        "size mismatch for conv1.weight",
    ),
    "no last layer": (lambda state: without(state, "fc.bias"), "KeyError: 'fc.bias'"),
    "a checkpoint": (lambda state: {"model": state}, "KeyError: 'fc.bias'"),
    "a list": (lambda state: list(state), "TypeError"),
    "resnet50": (lambda state: resnet50(num_classes=2).state_dict(), "RuntimeError"),
}


@functools.cache
def state() -> dict[str, torch.Tensor]:
    return resnet18(num_classes=2).state_dict()


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_of_another_network(tmp_path, wrong):
    change, reason = WRONG[wrong]
    file = tmp_path / "weights.pth"
    torch.save(change(state()), file)
    with pytest.raises(UserError, match=reason) as failure:
        weights.load(str(file), "resnet18")
    message = str(failure.value)
    assert f"{file} holds no state_dict of torchvision's resnet18" in message
    assert "\n" not in message and len(message) < 400


def test_weights_of_the_model_that_was_asked_for(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(state(), file)
    with pytest.raises(UserError, match="no state_dict of torchvision's resnet34"):
        weights.load(str(file), "resnet34")


class Malicious:
    """Runs something when it is unpickled."""

    victim = None

    def __reduce__(self):
        return os.mkdir, (self.victim,)


@pytest.mark.parametrize("content", ["missing", "a folder", "text", "truncated", "malicious"])
def test_a_file_that_is_no_weights_file(tmp_path, content):
    file = tmp_path / "weights.pth"
    if content == "a folder":
        file.mkdir()
    if content == "text":
        file.write_text("hello")
    if content == "truncated":
        torch.save(state(), file)
        file.write_bytes(file.read_bytes()[:1_000_000])
    if content == "malicious":
        Malicious.victim = str(tmp_path / "ran")
        torch.save({"fc.bias": Malicious()}, file)
    with pytest.raises(UserError, match=str(file)):
        weights.load(str(file), "resnet18")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def imagenet(monkeypatch, server, tmp_path):
    """The server as the host of torchvision's weights, and an empty torch.hub folder."""
    torch.save(state(), tmp_path / "published.pth")
    content = (tmp_path / "published.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{name}"] = content
    published = {"IMAGENET1K_V1": SimpleNamespace(url=f"{server.url}/{name}")}
    monkeypatch.setattr(weights, "get_model_weights", lambda model: published)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server.name, server.file = name, tmp_path / "hub/checkpoints" / name
    return server


def test_imagenet_weights_are_downloaded_once_and_checked(imagenet):
    assert len(weights.load("imagenet", "resnet18")["fc.bias"]) == 2
    assert len(weights.load("imagenet", "resnet18")["fc.bias"]) == 2
    assert imagenet.asked == [f"/{imagenet.name}"]
    imagenet.file.write_bytes(imagenet.file.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged.*delete it and put .* from http"):
        weights.load("imagenet", "resnet18")


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut", "silent"])
def test_imagenet_weights_that_cannot_be_had(imagenet, monkeypatch, fault):
    monkeypatch.setattr(datasets, "SILENCE", 0.5)
    path = f"/{imagenet.name}"
    if fault == "missing":
        del imagenet.files[path]
    if fault == "wrong bytes":
        imagenet.files[path] = b"<html>a login page</html>"
    if fault == "cut":
        imagenet.cut.add(path)
    if fault == "silent":
        imagenet.silent.add(path)
    with pytest.raises(UserError, match="could not download the ImageNet weights") as failure:
        weights.load("imagenet", "resnet18")
    for part in (imagenet.name, str(imagenet.file.parent), "--weights"):
        assert part in str(failure.value)
    assert not list(imagenet.file.parent.iterdir())


def test_every_model_has_published_weights_whose_name_holds_their_hash():
    for model in freeze.MODELS:
        url = weights.get_model_weights(model)["IMAGENET1K_V1"].url
        name = url.rsplit("/", 1)[1]
        int(name.removesuffix(".pth").rsplit("-", 1)[1], 16)
        assert url.startswith("https://") and name.startswith(model.split("_")[0])
