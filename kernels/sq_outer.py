"""Linear layers over tokens, as 1x1 convolutions of an image that is one row of tokens."""

from __future__ import annotations

from torch import Tensor

from t2v_fast.ops.reference import accumulate_dtype

from .sq_conv import sq_conv, sq_conv_acc_
from .sq_conv_geometry import POINTWISE, conv_geometry
from .sq_conv_gram import linear_forms, linear_sums


def _image(tokens: Tensor) -> Tensor:
    """[N, S, I] -> [N, I, 1, S]."""
    return tokens.transpose(1, 2).unsqueeze(2)


def sq_outer(x: Tensor, g: Tensor, path: str = "explicit") -> Tensor:
    """As :func:`t2v_fast.ops.sq_outer`."""
    return sq_conv(_image(x), _image(g), *POINTWISE, 1, path)


def sq_linear(x: Tensor, g: Tensor, gram: Tensor | None = None) -> Tensor:
    """As :func:`t2v_fast.ops.sq_linear` by the path ``"gram"``."""
    if g.numel() == 0 or x.numel() == 0:
        return g.new_zeros((2, g.shape[0], g.shape[2]), dtype=accumulate_dtype(g.dtype))
    if gram is not None:
        return linear_forms(gram, _image(g))
    return linear_sums(conv_geometry(_image(x), *POINTWISE, 1), _image(g))


def sq_outer_acc_(out: Tensor, x: Tensor, g: Tensor, weight: Tensor) -> None:
    """As :func:`t2v_fast.ops.sq_outer_acc_`."""
    sq_conv_acc_(out[:, :, None, None], _image(x), _image(g), weight, *POINTWISE[1:], 1)
