"""Weights files. The only server asked is one on this machine."""

import argparse
import functools
import hashlib
import os
import socket
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.models import get_model, resnet18

import freeze
from data import UserError
from plumbing import datasets, weights
from plumbing.settings import name_of_weights


def test_weights_from_a_file_whatever_its_classes_and_a_new_fc(tmp_path):
    state = resnet18(num_classes=1000).half().state_dict()
    torch.save(state, tmp_path / "weights.pth")
    loaded, _ = weights.load(str(tmp_path / "weights.pth"), "resnet18")
    model = freeze.build("resnet18", 7, loaded)
    assert model.fc.weight.shape == (7, 512)
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            assert tensor.dtype in (torch.float32, torch.int64)
            assert torch.equal(tensor, state[name].to(tensor.dtype))
    assert weights.load("none", "resnet18") == (None, False)


@functools.cache
def state(model: str = "resnet18") -> dict[str, torch.Tensor]:
    return get_model(model, num_classes=2).state_dict()


def load(content, model: str = "resnet18") -> dict[str, torch.Tensor]:
    """What is taken of a file with this content."""
    file = Path("weights.pth")
    network = freeze.untrained(model)
    return weights.checked(weights.unwrapped(content, file, network), file, model, network, False)


def refused(content, model: str = "resnet18") -> str:
    with pytest.raises(UserError, match="^weights.pth ") as failure:
        load(content, model)
    message = str(failure.value)
    assert "\n" not in message and len(message) < 500
    return message


def same(loaded: dict, before: dict) -> bool:
    """Whether this is the backbone of those weights, all of it and nothing else."""
    expected = [key for key in before if not key.startswith("fc.")]
    if set(loaded) != set(expected):
        return False
    return all(torch.equal(loaded[key], before[key]) for key in expected)


def prefixed(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def headless(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


# ---------------------------------------------------------------- weights as people have them


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "encoder.", "backbone.", "_orig_mod.", "model."),
        *("_orig_mod.module.", "model.backbone.", "net.", "layer1.", "student_"),
    ],
)
def test_a_prefix_is_taken_off_and_said(capsys, prefix):
    loaded = load(prefixed(prefix, state()))
    assert same(loaded, state())
    assert capsys.readouterr().out == f"weights  weights.pth: taken out of the prefix {prefix}\n"


@pytest.mark.parametrize("wrapping", ["state_dict", "model", "model_state_dict", "net"])
def test_a_wrapping_is_taken_off_and_said(capsys, wrapping):
    content = {"epoch": 90, wrapping: state(), "optimizer": {"state": {}}, "arch": "resnet18"}
    assert same(load(content), state())
    assert capsys.readouterr().out == f'weights  weights.pth: taken out of ["{wrapping}"]\n'


def test_several_wrappings_around_a_prefix(capsys):
    content = {"model": {"state_dict": prefixed("module.", state())}, "state_dict": "resnet18"}
    assert same(load(content), state())
    taken = 'taken out of ["model"], ["state_dict"], the prefix module.'
    assert taken in capsys.readouterr().out


def test_plain_weights_are_nothing_to_speak_of(capsys):
    for content in (state(), headless(state())):
        assert same(load(content), state())
    assert capsys.readouterr().out == ""


HEADS = {
    "none": {},
    "without bias": {"fc.weight": torch.zeros(5, 512)},
    "of another width": {"fc.weight": torch.zeros(5, 99), "fc.bias": torch.zeros(5)},
    "a Sequential": {"fc.0.weight": torch.zeros(9, 512), "fc.2.weight": torch.zeros(5, 9)},
    "no numbers": {"fc.weight": torch.full((5, 512), torch.nan), "fc.bias": torch.zeros(5)},
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("head", HEADS)
def test_fc_is_not_asked_for(prefix, head):
    content = prefixed(prefix, headless(state()) | HEADS[head])
    assert same(load(content), state())


def test_what_is_superfluous_is_named_by_key(capsys):
    content = headless(state()) | {"head.weight": torch.zeros(1), "lr": 0.1}
    assert same(load(content), state())
    assert capsys.readouterr().out == "weights  weights.pth: not used: head.weight\n"
    content = prefixed("backbone.", state()) | {f"neck.{i}": torch.zeros(1) for i in range(7)}
    assert same(load(content), state())
    named = "not used: neck.0, neck.1, neck.2, neck.3, neck.4 and 2 more"
    assert named in capsys.readouterr().out


def test_two_networks_in_a_file_the_first_is_taken_and_the_other_named(capsys):
    content = prefixed("encoder_q.", state()) | prefixed("encoder_k.", state())
    assert same(load(content), state())
    told = capsys.readouterr().out
    assert "taken out of the prefix encoder_q." in told
    assert "not used: encoder_k.conv1.weight" in told


def test_weights_from_before_batches_were_counted():
    content = {key: state()[key] for key in state() if "num_batches" not in key}
    assert same(load(content), state())


def test_a_checkpoint_of_train_py_is_weights_too_named_by_its_run(run, capsys):
    little = "--image-size", "32", "--epochs", "1", "--train-size", "20", "--batch-size", "10"
    first = run(*little, "--unfreeze", "layer4")
    file = first / "epoch1.pt"
    before = torch.load(file, weights_only=True)["model"]
    assert same(weights.load(str(file), "resnet18")[0], before)
    assert name_of_weights(str(file)) == f"{first.name}-epoch1"
    capsys.readouterr()
    second = run(*little, "--weights", str(file))
    assert 'weights  epoch1.pt: taken out of ["model"]' in capsys.readouterr().out
    assert second.name == f"synthetic-fc-fp32-s0-n20-b10-px32-{first.name}-epoch1"
    after = torch.load(second / "epoch1.pt", weights_only=True)["model"]
    assert same(headless(after), before)  # all but fc was frozen
    assert not torch.equal(after["fc.weight"], before["fc.weight"])


# ---------------------------------------------------------------- what does not fit


def without(state: dict, *names: str) -> dict:
    return {key: tensor for key, tensor in state.items() if key not in names}


def test_what_is_missing_is_named_by_key():
    content = without(state(), "layer3.0.conv1.weight", "bn1.running_var")
    lacks = "is no resnet18: it lacks bn1.running_var, layer3.0.conv1.weight"
    assert lacks in refused(content)
    assert "it lacks conv1.weight, bn1.weight" in refused({"fc.bias": torch.zeros(2)})
    assert " and 95 more" in refused({})


def test_another_shape_is_named_by_key():
    message = refused(state() | {"conv1.weight": torch.zeros(64, 1, 7, 7)})
    assert "its conv1.weight is [64, 1, 7, 7] and not [64, 3, 7, 7]" in message


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "there, wanted",
    [
        *(("resnet50", "resnet18"), ("resnet34", "resnet18"), ("resnet18", "resnet34")),
        *(("resnet18", "resnet50"), ("squeezenet1_1", "resnet18")),
    ],
)
def test_weights_of_another_network(there, wanted, prefix):
    """resnet34 holds all of resnet18, and more."""
    message = refused(prefixed(prefix, state(there)), wanted)
    assert f"is no {wanted}: it" in message


@pytest.mark.parametrize(
    "key, value", [("conv1.weight", torch.nan), ("layer4.1.bn2.running_var", -torch.inf)]
)
def test_values_that_are_no_numbers_are_refused_before_training(key, value):
    content = {name: tensor.clone() for name, tensor in state().items()}
    content[key].view(-1)[1] = value
    message = refused(content)
    assert f"is broken: {key} holds values that are no finite numbers" in message
    assert "rates" not in message


@pytest.mark.parametrize("content", [["conv1.weight"], torch.zeros(3), 5, "resnet18", None])
def test_a_file_that_holds_something_else(content):
    assert f"holds no weights but a {type(content).__name__}" in refused(content)


def test_a_dictionary_with_keys_that_are_no_names():
    assert "is no resnet18: it lacks conv1.weight" in refused({0: torch.zeros(3)})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("model.pth", torch.nn.Linear(2, 2), "holds a torch.nn.modules.linear.Linear, and only"),
        ("a.pt", {"state_dict": {}, "args": argparse.Namespace(lr=1)}, "a argparse.Namespace, "),
        ("b.pt", {"state_dict": {}, "best": np.float64(0.5)}, "holds a numpy.*scalar, and only"),
        ("c.pt", {"path": Path("a")}, "holds a pathlib.*Path, and only"),
        ("net.onnx", b"\x08\x07\x12\x07pytorch", "holds no PyTorch state_dict: it is ONNX"),
        ("net.h5", b"\x89HDF\r\n\x1a\n rest", "it is HDF5, which Keras writes"),
        ("net.weights", b"\x89HDF\r\n\x1a\n rest", "it is HDF5, which Keras writes"),
        ("net.safetensors", b"\x08\0\0\0\0\0\0\0{}      ", "it is safetensors: .*load_file"),
        (
            "script.pt",
            torch.jit.script(torch.nn.Linear(2, 2)),
            "it is TorchScript: .*jit.load|RecursiveScriptModule",
        ),
        (
            "text.pt",
            b"not a file of torch's",
            "is damaged, or no file of weights: save model",
        ),
        ("empty.pt", b"", "is damaged, or no file of weights"),
    ],
)
def test_what_holds_more_than_weights_is_named_with_what_to_do(tmp_path, name, content, said):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, torch.jit.ScriptModule):
        torch.jit.save(content, file)
    else:
        torch.save(content, file)
    with pytest.raises(UserError, match=said) as failure:
        weights.load(str(file), "resnet18")
    assert str(failure.value).startswith(f"{file} ") and len(str(failure.value)) < 350
    assert "\n" not in str(failure.value) and "\x1b" not in str(failure.value)


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
    assert same(weights.load("imagenet", "resnet18")[0], state())
    assert same(weights.load("imagenet", "resnet18")[0], state())
    assert imagenet.asked == [f"/{imagenet.name}"]
    imagenet.file.write_bytes(imagenet.file.read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged.*delete it and put .* from http"):
        weights.load("imagenet", "resnet18")


@pytest.mark.parametrize("fault", ["missing", "wrong bytes", "cut", "silent"])
def test_imagenet_weights_that_cannot_be_had(imagenet, monkeypatch, fault):
    monkeypatch.setattr(datasets, "TIMEOUT_SECONDS", 0.5)
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
    assert [path.name for path in imagenet.file.parent.iterdir()] == [".locks"]


def through(proxy: str, monkeypatch) -> None:
    """Downloads go through this proxy. urllib asks only once which it is."""
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setenv("http_proxy", proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "proxy", ["http://bad host:port", "http://[::1", "http://127.0.0.1:notaport", "nonsense"]
)
def test_a_proxy_setting_that_is_no_url_is_a_sentence(imagenet, monkeypatch, proxy):
    through(proxy, monkeypatch)
    with pytest.raises(UserError, match="could not download the ImageNet weights"):
        weights.load("imagenet", "resnet18")
    assert not imagenet.asked


def test_a_proxy_that_answers_rubbish_is_a_sentence(imagenet, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer():
            connection, _ = proxy.accept()
            with connection:
                connection.recv(9999)
                connection.sendall(b"\x00\xffrubbish\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        through(f"http://127.0.0.1:{proxy.getsockname()[1]}", monkeypatch)
        with pytest.raises(UserError, match="could not download the ImageNet weights"):
            weights.load("imagenet", "resnet18")
    assert not imagenet.asked


def test_every_model_has_published_weights_whose_name_holds_their_hash():
    for model in freeze.MODELS:
        url = weights.get_model_weights(model)["IMAGENET1K_V1"].url
        name = url.rsplit("/", 1)[1]
        int(name.removesuffix(".pth").rsplit("-", 1)[1], 16)
        assert url.startswith("https://") and name.startswith(model.split("_")[0])
