"""Convolutions on a CPU: the same numbers as F.conv2d, whichever way is taken."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import freeze
from plumbing import convolution
from plumbing.convolution import Conv2d, Convolution, use_fast_convolutions

WIDE = 128, 128, 3, 1, 3, 1, "winograd"
# in, out, height, width, kernel, stride, and the way that is taken
CASES = [
    WIDE,
    (129, 128, 5, 9, 3, 1, "winograd"),  # no multiples of a tile
    (128, 128, 2, 2, 3, 1, "product"),
    (6, 4, 8, 7, 3, 2, "product"),
    (6, 4, 2, 2, 1, 2, "product"),
    (4, 3, 7, 6, 3, 1, "oneDNN"),  # its weights' gradient is a product
    (4, 3, 14, 13, 3, 2, "oneDNN"),
    (3, 4, 21, 17, 7, 2, "oneDNN"),
]


def tensors(case: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    channels, out, height, width, size, _, _ = case
    torch.manual_seed(0)
    x = torch.randn(2, channels, height, width).double()
    weight = torch.randn(out, channels, size, size).double() / (channels * size**2) ** 0.5
    memory = torch.channels_last
    x, weight = x.to(memory_format=memory), weight.to(memory_format=memory)
    return x.requires_grad_(), weight.requires_grad_()


def fast_copy(layer: nn.Module) -> nn.Module:
    fast = copy.deepcopy(layer)
    use_fast_convolutions(fast)
    return fast


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_outputs_and_gradients_as_conv2d(case):
    *_, size, stride, way = case
    x, weight = tensors(case)
    assert convolution.fastest_method(x, weight, stride) == way
    found = Convolution.apply(x, weight, stride)
    expected = F.conv2d(x, weight, None, stride, size // 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(expected)
    of_found = torch.autograd.grad(found, (x, weight), gradient)
    of_expected = torch.autograd.grad(expected, (x, weight), gradient)
    torch.testing.assert_close(of_found, of_expected, rtol=0, atol=1e-11)


def test_winograd_is_nearly_as_exact_as_conv2d():
    x, weight = tensors((256, 256, 14, 14, 3, 1, ""))
    exact = F.conv2d(x, weight, None, 1, 1)
    found, _ = convolution.winograd(x.float(), weight.float())
    assert (found - exact).norm() / exact.norm() < 5e-6


@pytest.mark.parametrize("unneeded", ["input_gradient", "winograd_weight_gradient"])
def test_a_gradient_that_nobody_needs_is_not_computed(monkeypatch, unneeded):
    monkeypatch.setattr(convolution, unneeded, lambda *_: 1 / 0)
    x, weight = tensors(WIDE)
    {"input_gradient": x, "winograd_weight_gradient": weight}[unneeded].requires_grad_(False)
    Convolution.apply(x, weight, 1).sum().backward()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_under_autocast_everything_is_in_its_type(size):
    layer = nn.Conv2d(128, 128, 3, padding=1, bias=False)
    fast = fast_copy(layer)
    x = torch.randn(8, 128, size, size)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert fast.weight.grad.dtype == torch.float32
    difference = fast.weight.grad - layer.weight.grad
    assert difference.norm() <= 0.02 * layer.weight.grad.norm()


@pytest.mark.parametrize(
    "size, settings",
    [
        (3, {"padding": 1}),
        (3, {"padding": 1, "groups": 4, "bias": False}),
        (3, {"padding": 2, "dilation": 2}),
        (3, {}),
        (2, {"padding": 1}),
        ((3, 1), {"padding": (1, 0)}),
        (3, {"padding": 1, "stride": (1, 2)}),
        (3, {"padding": "same"}),
        (3, {"padding": 1, "padding_mode": "reflect"}),
    ],
    ids=str,
)
def test_any_layer_gives_what_it_gave(size, settings):
    layer = nn.Conv2d(8, 8, size, **settings)
    fast, x = fast_copy(layer), torch.randn(2, 8, 3, 3)
    assert isinstance(fast, Conv2d)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-5, atol=1e-6)


class Own(nn.Conv2d):
    """A user's own kind of convolution, which is left alone."""


def test_a_network_keeps_its_parameters_and_its_answers():
    model = freeze.build("resnet18", 10).eval()
    model.fc.own = Own(3, 3, 3)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    fast = fast_copy(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    state = model.state_dict()
    assert list(fast.state_dict()) == list(state)
    assert all(map(torch.equal, fast.state_dict().values(), state.values()))
    taken = {type(module) for module in fast.modules() if isinstance(module, nn.Conv2d)}
    assert taken == {Conv2d, Own}
