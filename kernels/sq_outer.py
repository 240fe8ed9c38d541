"""Linear layers over tokens: convolutions with a kernel of one pixel, of an image that is one row of tokens."""

from __future__ import annotations

from torch import Tensor

from . import sq_conv as conv

_POINTWISE = ((1, 1), (0, 0), (1, 1), 1)


def _image(tokens: Tensor) -> Tensor:
    """[N, S, I] -> [N, I, 1, S]."""
    return tokens.transpose(1, 2).unsqueeze(2)


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    """As :func:`t2v_fast.ops.sq_outer`."""
    return conv.sq_conv(_image(x), _image(g), (1, 1), *_POINTWISE, path)


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """As :func:`t2v_fast.ops.sq_outer_acc_`."""
    conv.sq_conv_acc_(out[:, :, None, None], _image(x), _image(g), weight, *_POINTWISE)
