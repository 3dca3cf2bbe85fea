"""Weights files. The only server asked is one on this machine."""

import argparse
import copy
import hashlib
import os
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import Weights, WeightsEnum, get_model

import freeze
from data import UserError
from plumbing import files, weights
from plumbing.settings import name_of_weights

STATE = get_model("resnet18", num_classes=2).state_dict()
NETWORK = freeze.untrained("resnet18")


def load(content) -> dict[str, torch.Tensor]:
    """What is taken of a file with this content."""
    file, network = Path("weights.pth"), copy.deepcopy(NETWORK)
    state = weights.unwrapped(content, file, network)
    return weights.fitted(state, file, "resnet18", network, False)


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def is_backbone(loaded: dict) -> bool:
    """Whether this is STATE without its last layer, all of it and nothing else."""
    expected = headless(STATE)
    same = loaded.keys() == expected.keys()
    return same and all(torch.equal(loaded[key], expected[key]) for key in expected)


def prefixed(prefix: str, state: dict = STATE) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def without(*names: str) -> dict:
    return {key: value for key, value in STATE.items() if not key.endswith(names)}


TAKEN = "weights  weights.pth: taken out of "
SAID = "weights  weights.pth: "
NAN = STATE["conv1.weight"].clone()
NAN[1, 1, 1, 1] = torch.nan
INFINITE = torch.full((64,), -torch.inf)


@pytest.mark.parametrize(
    "content, said",
    [
        (without("num_batches_tracked"), ""),  # from before PyTorch 0.4.1
        (headless(STATE) | {"fc.0.weight": NAN, "fc.2.weight": torch.zeros(5, 9)}, ""),
        (prefixed("module."), f"{TAKEN}the prefix module.\n"),
        (prefixed("_orig_mod.module."), f"{TAKEN}the prefix _orig_mod.module.\n"),
        (prefixed("layer1."), f"{TAKEN}the prefix layer1.\n"),
        ({"epoch": 90, "state_dict": STATE, "optimizer": {}}, f'{TAKEN}["state_dict"]\n'),
        (
            {"net": {"state_dict": prefixed("module."), "model": "resnet18"}},
            f'{TAKEN}["net"], ["state_dict"], the prefix module.\n',
        ),
        (STATE | {"head.weight": torch.zeros(1), "lr": 0.1}, f"{SAID}1 not used: head.weight\n"),
        (
            prefixed("encoder_q.") | prefixed("encoder_k.", {"bn1.weight": torch.zeros(1)}),
            f"{TAKEN}the prefix encoder_q.\n{SAID}1 not used: encoder_k.bn1.weight\n",
        ),
    ],
)
def test_what_is_around_the_weights_is_taken_off_and_said(capsys, content, said):
    assert is_backbone(load(content))
    assert capsys.readouterr().out == said


def test_weights_from_a_file_whatever_its_classes_and_precision_and_a_new_fc(tmp_path):
    torch.save({key: value.half() for key, value in STATE.items()}, tmp_path / "weights.pth")
    loaded, _ = weights.load(str(tmp_path / "weights.pth"), "resnet18")
    model = freeze.build("resnet18", 7, loaded)
    assert model.fc.weight.shape == (7, 512)
    for name, tensor in headless(model.state_dict()).items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, STATE[name].half().to(tensor.dtype))
    assert weights.load("none", "resnet18") == (None, False)


def test_a_checkpoint_of_train_py_is_weights_too_named_by_its_run(tmp_path):
    file = tmp_path / "a-run/epoch1.pt"
    file.parent.mkdir()
    (file.parent / "history.csv").touch()
    torch.save({"model": STATE, "settings": {"classes": ("cat", "dog")}}, file)
    assert name_of_weights(str(file)) == "a-run-epoch1"
    assert name_of_weights(str(tmp_path / "imagenet.pth")) == "imagenet.pth"
    args = argparse.Namespace(weights=str(file), model="resnet18", seed=0)
    model = weights.pretrained(args, ("cat", "dog"))
    assert torch.equal(model.fc.weight, STATE["fc.weight"])
    loaded, keep_head = weights.load(str(file), "resnet18", ("cat", "horse"))
    assert not keep_head and is_backbone(loaded)
    torch.save({"state_dict": STATE, "settings": {"lr": 0.1}}, file)  # of another program
    assert is_backbone(weights.load(str(file), "resnet18")[0])


NO_NUMBERS = "holds values that are no finite numbers"


@pytest.mark.parametrize(
    "content, said",
    [
        (without("conv1.weight", "running_var"), "is no resnet18: it lacks conv1.weight, bn1.runn"),
        (get_model("squeezenet1_1").state_dict(), "is no resnet18: it lacks conv1.weight"),
        (get_model("resnet34").state_dict(), "is no resnet18: it has layer1.2.conv1.weight"),
        (STATE | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "is no .*conv1.weight.*64, 1, 7"),
        (STATE | {"conv1.weight": NAN}, f"is broken: conv1.weight {NO_NUMBERS}"),
        (STATE | {"bn1.bias": INFINITE}, f"is broken: bn1.bias {NO_NUMBERS}"),
        (["conv1.weight"], "holds no weights but a list"),
        (None, "holds no weights but a NoneType"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(content, said):
    with pytest.raises(UserError, match=f"^weights.pth {said}") as failure:
        load(content)
    assert "\n" not in str(failure.value) and len(str(failure.value)) < 500


class Malicious:
    """Makes the folder `ran` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


WITH_FLAGS = {"state_dict": STATE, "args": argparse.Namespace(lr=1)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [b"", b"hello", Malicious(), torch.nn.Linear(2, 2), WITH_FLAGS])
def test_a_file_that_torch_does_not_read_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError) as failure:
        weights.load(str(file), "resnet18")
    meant = "is damaged, or no file of weights: save model.state_dict() with torch.save"
    assert str(failure.value) == f"{file} {meant}"
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def imagenet(monkeypatch, server, tmp_path):
    """The server as the host of torchvision's weights, and an empty torch.hub folder."""
    torch.save(STATE, tmp_path / "published.pth")
    content = (tmp_path / "published.pth").read_bytes()
    server.name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[f"/{server.name}"] = content

    class Published(WeightsEnum):
        IMAGENET1K_V1 = Weights(f"{server.url}/{server.name}", transforms=None, meta={})

    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda model: Published)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    server.file = tmp_path / "hub/checkpoints" / server.name
    return server


def test_imagenet_weights_are_downloaded_once_and_what_is_damaged_is_named(imagenet):
    for _ in range(2):
        assert is_backbone(weights.load("imagenet", "resnet18")[0])
    assert imagenet.asked == [f"/{imagenet.name}"]
    imagenet.file.write_bytes(imagenet.file.read_bytes()[:-9000])
    with pytest.raises(UserError, match="cannot download or read the ImageNet weights"):
        weights.load("imagenet", "resnet18")


@pytest.mark.parametrize("fault", ["cut", "silent", "proxy"])
def test_imagenet_weights_that_cannot_be_had(imagenet, monkeypatch, fault):
    monkeypatch.setattr(files, "TIMEOUT_SECONDS", 0.5)
    if fault == "cut":
        imagenet.cut.add(f"/{imagenet.name}")
    elif fault == "silent":
        imagenet.silent.add(f"/{imagenet.name}")
    else:
        monkeypatch.setattr(urllib.request, "_opener", None)  # which knows the proxy of before
        monkeypatch.setenv("http_proxy", "http://bad host:port")
        monkeypatch.setenv("no_proxy", "")
    with pytest.raises(UserError, match="cannot download .* the ImageNet weights") as failure:
        weights.load("imagenet", "resnet18")
    for part in (imagenet.name, str(imagenet.file.parent), "--weights PATH or none"):
        assert part in str(failure.value)
    assert not list(imagenet.file.parent.iterdir())
