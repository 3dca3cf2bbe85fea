"""Weights files: torchvision's own, downloaded once and checked, or anybody's state_dict."""

import hashlib
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.models import get_model, get_model_weights

from data import UserError
from plumbing.datasets import download


def load(weights: str, model: str) -> dict[str, torch.Tensor] | None:
    """The state_dict to start from: "imagenet" (torchvision's IMAGENET1K_V1), a path
    (torchvision's keys, any number of classes), or "none", which gives None. Raises UserError."""
    if weights == "none":
        return None
    file = Path(weights)
    if weights == "imagenet":
        file = imagenet_file(model)
    if not file.is_file():
        takes = "--weights takes imagenet, none or the path of a state_dict"
        raise UserError(f"no weights file {file}: {takes}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        get_model(model, num_classes=len(state["fc.bias"])).load_state_dict(state)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror})") from error
    except Exception as error:  # torch meets a foreign file with many kinds of errors, some long
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        what = f"{file} holds no state_dict of torchvision's {model}"
        raise UserError(f"{what} ({reason[:160]})") from error
    return state


def imagenet_file(model: str) -> Path:
    """torchvision's file in torch.hub's folder; its hash is checked always, not only once."""
    url = get_model_weights(model)["IMAGENET1K_V1"].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    expected = file.stem.rsplit("-", 1)[1]  # resnet18-f37072fd.pth: the beginning of its sha256
    place = f"put {file.name} from {url} into {file.parent}"
    by_hand = f"{place}, or use --weights PATH or --weights none"
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            download(url, file, sha256=expected)
        except (OSError, ValueError, HTTPException, UserError) as error:
            what = f"could not download the ImageNet weights ({error})"
            raise UserError(f"{what}: {by_hand}") from error
    if not hashlib.sha256(file.read_bytes()).hexdigest().startswith(expected):
        what = f"{file} is damaged (its sha256 does not begin with {expected})"
        raise UserError(f"{what}: delete it and {by_hand}")
    return file
