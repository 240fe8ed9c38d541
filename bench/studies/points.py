"""Why Winograd's F(4x4, 3x3) is evaluated at 0, 2/3, -2/3, 3/2, -3/2 and infinity, and bfloat16 in fixed point.

    python -m bench.studies.points [--channels 64] [--tiles 100]

Simulates in float64 the error of 4x4 outputs whose transformed operands are rounded: to float32, to bfloat16, and to
16-bit integers with a unit for each tile and each filter. The units come from norms before the transforms
("untransformed") or after the transform along one axis ("half"). Errors are root mean squares over those of the
results. Images are white noise cut off at zero, kernels are white noise. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from bench.report import table

POINTS = ((1, 2), (1, 0.5), (2**-0.5, 2**0.5), (0.5, 1.5), (2 / 3, 3 / 2), (0.7, 1.5), (0.65, 1.55), (3 / 4, 4 / 3))
LARGEST = 32767
Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]  # what a matrix makes of values, the norms of its rows given


def transforms(a: float, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """Toom and Cook's matrices for the input [6, 6], the kernel [6, 3] and the output [4, 6]."""
    points = torch.tensor([0, a, -a, b, -b], dtype=torch.float64)

    def powers(count: int) -> Tensor:
        infinity = torch.eye(count, dtype=torch.float64)[-1:]
        return torch.cat([points[:, None] ** torch.arange(count), infinity])

    return torch.linalg.inv(powers(6)).T, powers(3), powers(4).T


def along(matrix: Tensor, values: Tensor) -> Tensor:
    """[positions, positions, rows, channels] to [frequencies, frequencies, rows, channels]."""
    return torch.einsum("ia,jb,abrc->ijrc", matrix, matrix, values)


def rounded(dtype: torch.dtype) -> Rounding:
    return lambda matrix, values, norms: along(matrix, values).to(dtype).double()


def fixed(half: bool) -> Rounding:
    """To integers, whose norm over channels is at most LARGEST at every frequency, in units of the rows."""

    def to_integers(matrix: Tensor, values: Tensor, norms: Tensor) -> Tensor:
        if half:
            once = torch.einsum("ia,abrc->ibrc", matrix, values).square().sum((1, 3)).sqrt() / norms[:, None]
            unit = once.amax(0)
        else:
            unit = values.square().sum((0, 1, 3)).sqrt()
        unit = (unit / LARGEST * norms[:, None, None] * norms[None, :, None])[..., None]
        found = (along(matrix, values) / unit).round()
        assert float(found.square().sum(3).sqrt().max()) <= LARGEST + values.shape[3] ** 0.5
        return found * unit

    return to_integers


ROUNDINGS = {
    "float32": rounded(torch.float32),
    "bfloat16": rounded(torch.bfloat16),
    "integers, untransformed": fixed(half=False),
    "integers, half": fixed(half=True),
}


def error(a: float, b: float, x: Tensor, w: Tensor, rounding: Rounding) -> float:
    """Of tiles x [6, 6, tiles, channels] and kernels w [3, 3, outputs, channels]."""
    of_input, of_kernel, of_output = transforms(a, b)

    def outputs(u: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("yi,xj,ijrc,ijoc->yxro", of_output, of_output, u, v)

    exact = outputs(along(of_input, x), along(of_kernel, w))
    u, v = (rounding(m, t, torch.linalg.vector_norm(m, dim=1)) for m, t in ((of_input, x), (of_kernel, w)))
    return float((outputs(u, v) - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--tiles", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(6, 6, arguments.tiles, arguments.channels, dtype=torch.float64).relu()
    w = torch.randn(3, 3, 32, arguments.channels, dtype=torch.float64)
    rows = [
        (f"{a:.3g}, {b:.3g}", *(f"{error(a, b, x, w, rounding):.1e}" for rounding in ROUNDINGS.values()))
        for a, b in POINTS
    ]
    table(["points", *ROUNDINGS], rows)


if __name__ == "__main__":
    main()
