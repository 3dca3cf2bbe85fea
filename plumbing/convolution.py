"""Convolutions on a CPU, in fewer operations or in faster ones than oneDNN takes.

    use_fast_convolutions(network)    # every nn.Conv2d in it, in place; its state_dict stays

Without AMX convolutions take 96% of a training step, and oneDNN multiplies as fast as the processor
can: only fewer multiplications help. With AMX (bf16) fetching the numbers takes longer than
multiplying them, and for the weights' gradient oneDNN fetches them slowly.

* 3x3 with stride 1, in fp32: Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv:1509.09308), which
  PyTorch never takes. A tile of 4 x 4 outputs takes 6 x 6 multiplications in place of 4 x 4 x 9. A
  training step of fc+layer4 is 1.8 times as fast (2 cores held to AVX2, batch 128).
* The weights' gradient of maps up to 7x7, and all of those up to 4x4: one matrix product with the
  patches that the kernel meets. A step of fc+layer4 is 1.4 times as fast at 224 pixels, 2.4 times
  at 64 (2 cores with AMX, bf16).
* Everything else, and everything on other devices: F.conv2d.

Imports torch only: copy it into yours.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

WINOGRAD_CHANNELS = 128  # from which it pays: with 64 its transforms take what it saves
PRODUCT_SIDE = 4  # outputs a side up to which a product pays
WEIGHT_PRODUCT_SIDE = 7  # outputs a side up to which it pays for the weights' gradient


def both_sides(matrix: list[list[float]]) -> torch.Tensor:
    """Applies a matrix along both sides of a tile that is written as one column: float64."""
    square = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(square, square)


# Along one side of a tile, for a row of 6 inputs and 3 weights: the 4 outputs are
# A @ ((G @ weights) * (B @ inputs)). Interpolation at the points 0, 1, -1, 2, -2 and infinity.
# fmt: off
B = both_sides([[4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1]])
G = both_sides([[1 / 4, 0, 0],
                [-1 / 6, -1 / 6, -1 / 6],
                [-1 / 6, 1 / 6, -1 / 6],
                [1 / 24, 1 / 12, 1 / 6],
                [1 / 24, -1 / 12, 1 / 6],
                [0, 0, 1]])
A = both_sides([[1, 1, 1, 1, 1, 0],
                [0, 1, -1, 2, -2, 0],
                [0, 1, 1, 4, 4, 0],
                [0, 1, -1, 8, -8, 1]])
# fmt: on


def use_fast_convolutions(network: nn.Module) -> None:
    """Has every nn.Conv2d of a network compute as is fastest on a CPU. To rounding the results
    are the same: in float32 a relative error of 2e-6 where F.conv2d has 1e-6."""
    for module in network.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d


class Conv2d(nn.Conv2d):
    """An nn.Conv2d that computes as this file does, where it can, and else as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, stride, middle = self.kernel_size[0], self.stride[0], self.kernel_size[0] // 2
        usual = (size, size), (stride, stride), (middle, middle), (1, 1), 1, "zeros"
        own = self.kernel_size, self.stride, self.padding, self.dilation, self.groups
        if x.device.type != "cpu" or size % 2 == 0 or (*own, self.padding_mode) != usual:
            return super().forward(x)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight = x.to(dtype), weight.to(dtype)
        if x.shape[2:] == (1, 1):  # all of the kernel but its middle meets the padding
            weight = weight[:, :, middle, middle, None, None]
        out = Convolution.apply(x, weight, stride)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype).view(1, -1, 1, 1)
        return out


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
        out, tiles = convolve(x, weight, stride)
        ctx.save_for_backward(x, weight, tiles)
        ctx.stride = stride
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, tiles = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = input_gradient(gradient, x, weight, ctx.stride)
        if ctx.needs_input_grad[1] and tiles is not None:
            of_weight = winograd_weight_gradient(gradient, tiles)
        elif ctx.needs_input_grad[1]:
            of_weight = weight_gradient(gradient, x, weight, ctx.stride)
        return of_x, of_weight, None


def fastest_method(x: torch.Tensor, weight: torch.Tensor, stride: int) -> str:
    """The fastest of "winograd", "product" and "oneDNN"; x or the gradient of a stride of 1."""
    outputs = [-(-side // stride) for side in x.shape[2:]]
    exact = x.dtype in (torch.float32, torch.float64)
    wide = min(weight.shape[:2]) >= WINOGRAD_CHANNELS
    if exact and wide and stride == 1 and weight.shape[-1] == 3 and max(outputs) > 2:
        return "winograd"
    return "product" if max(outputs) <= PRODUCT_SIDE else "oneDNN"


def convolve(
    x: torch.Tensor, weight: torch.Tensor, stride: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B, C, H, W] and weight [K, C, k, k], k odd, padded by k // 2 a side: the outputs [B, K,
    H / stride, W / stride], rounded up, in channels_last memory; and Winograd's tiles of x."""
    size, taken = weight.shape[-1], fastest_method(x, weight, stride)
    if taken == "winograd":
        return winograd(x, weight)
    if taken == "oneDNN":
        return F.conv2d(x, weight, None, stride, size // 2), None
    height, width = (-(-side // stride) for side in x.shape[2:])
    out = patches(x, size, stride) @ weight.permute(0, 2, 3, 1).flatten(1).T
    return out.view(len(x), height, width, -1).permute(0, 3, 1, 2), None


def input_gradient(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int
) -> torch.Tensor:
    if stride == 1 and fastest_method(gradient, weight, 1) != "oneDNN":
        turned_round = weight.flip(2, 3).transpose(0, 1)
        return convolve(gradient, turned_round, 1)[0]
    return conv2d_input(x.shape, weight, gradient, stride, weight.shape[-1] // 2)


def weight_gradient(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: int
) -> torch.Tensor:
    size = weight.shape[-1]
    if max(gradient.shape[2:]) > WEIGHT_PRODUCT_SIDE:
        return conv2d_weight(x, weight.shape, gradient, stride, size // 2)
    by_channel = gradient.transpose(0, 1).reshape(gradient.shape[1], -1)  # in one piece for AMX
    out = by_channel @ patches(x, size, stride)
    return out.view(len(weight), size, size, -1).permute(0, 3, 1, 2)


def patches(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """What a kernel meets of x, a row an output: [B * H / stride * W / stride, size * size * C]."""
    border = size // 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, border, border, border, border))
    windows = padded.unfold(1, size, stride).unfold(2, size, stride)  # [B, H, W, C, size, size]
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


def winograd(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs, and the transformed tiles of x, [36, tiles, C]."""
    batch, channels, height, width = x.shape
    down, across = -(-height // 4), -(-width // 4)  # tiles
    border = 0, 0, 1, 4 * across + 1 - width, 1, 4 * down + 1 - height
    padded = F.pad(x.permute(0, 2, 3, 1), border)
    windows = padded.unfold(1, 6, 4).unfold(2, 6, 4)  # [B, down, across, C, 6, 6]
    columns = windows.permute(4, 5, 0, 1, 2, 3).reshape(36, -1)
    tiles = (B.to(x) @ columns).view(36, -1, channels)
    kernels = G.to(x) @ weight.permute(2, 3, 0, 1).reshape(9, -1)
    products = tiles @ kernels.view(36, len(weight), channels).transpose(1, 2)
    out = (A.to(x) @ products.flatten(1)).view(4, 4, batch, down, across, len(weight))
    out = out.permute(2, 3, 0, 4, 1, 5).reshape(batch, 4 * down, 4 * across, len(weight))
    return out[:, :height, :width].contiguous().permute(0, 3, 1, 2), tiles


def winograd_weight_gradient(gradient: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """[K, C, 3, 3]; gradient: of the outputs, [B, K, H, W]; tiles: what `winograd` gave."""
    batch, out_channels, height, width = gradient.shape
    down, across = -(-height // 4), -(-width // 4)
    border = 0, 0, 0, 4 * across - width, 0, 4 * down - height
    padded = F.pad(gradient.permute(0, 2, 3, 1), border)
    blocks = padded.view(batch, down, 4, across, 4, out_channels)
    columns = blocks.permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
    products = (A.to(tiles).T @ columns).view(36, -1, out_channels)
    kernels = products.transpose(1, 2) @ tiles
    out = G.to(tiles).T @ kernels.flatten(1)
    return out.view(3, 3, out_channels, -1).permute(2, 3, 0, 1)
