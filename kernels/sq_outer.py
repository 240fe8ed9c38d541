"""Linear layers over tokens, as 1x1 convolutions of an image that is one row of tokens."""

from __future__ import annotations

from torch import Tensor

from .sq_conv import sq_conv, sq_conv_acc_
from .sq_conv_geometry import POINTWISE


def _image(tokens: Tensor) -> Tensor:
    """[N, S, I] -> [N, I, 1, S]."""
    return tokens.transpose(1, 2).unsqueeze(2)


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    """As :func:`t2v_fast.ops.sq_outer`."""
    return sq_conv(_image(x), _image(g), *POINTWISE, 1, path)


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """As :func:`t2v_fast.ops.sq_outer_acc_`."""
    sq_conv_acc_(out[:, :, None, None], _image(x), _image(g), weight, *POINTWISE[1:], 1)
