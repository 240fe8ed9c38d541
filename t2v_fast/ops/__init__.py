"""The primitives behind every weighted layer, as registered torch operators.

===============  ===========================================================  ======================================
op               per-example gradient G_m                                     layers
===============  ===========================================================  ======================================
``sq_outer``     sum_s g[m, s, :] x[n, s, :]^T, shape [O, I]                  linear
``sq_conv``      the same over the patches of x, which is never unfolded      convolution
``sq_prod``      sum_s g[m, s, :] (x[n, s, :] - shift) scale, shape [C]       norm weights; biases (without x)
``sq_scatter``   sum of g[m, s, :] over the s with index[n, s] = v, [V, O]    embedding tables
``sq_grouped``   sum of g[r, :] x[r, :]^T over a segment of rows, [O, I]      linear, ragged: mixtures of experts
===============  ===========================================================  ======================================

``name(...)`` returns ``q[M, O]``, the sum of squares over each filter (a row of G_m) for every cotangent row.
``name_acc_(out, ..., weight)`` adds ``sum_m weight[m] G_m^2`` to ``out``, elementwise, and returns nothing.
``sq_grouped`` has a gradient for each segment of rows, and ``sq_grouped_acc_`` a sum for each group of segments.

M = K * N: K cotangents of a batch of N examples share one ``x``. The rows are ordered cotangent by cotangent, so row m
belongs to example n = m % N. Inputs are float64, float32, bfloat16 or float16, and may be contiguous, channels-last or
strided. Sums are accumulated in float32, or in float64 for float64 inputs, which is also the dtype of ``q``. Results
are deterministic.

Three more ops serve special cases. ``conv_gram`` and ``sq_gram`` are the two halves of the gram path of ``sq_conv`` and
``sq_outer``, for callers who have several cotangents of one input. ``sq_norm`` computes ``sq_prod`` with and without x
in one pass. ``sq_linear`` computes the squares of a linear layer's weight and bias, in one pass on GPUs.
``winograd_conv`` is a layer of the network itself, for the CPU (:mod:`t2v_fast.gradients.fast_layers`).

Calls go through the torch dispatcher. The compiled extension implements the operators for the devices that it was built
for, the Triton kernels of ``t2v_fast.kernels`` run on CUDA tensors where the extension has no CUDA kernels, and
:mod:`t2v_fast.ops.reference` runs everywhere else. :func:`use_backend` forces one of them.
"""

from . import reference
from .checks import CONV_ACC_PATHS, CONV_PATHS, OUTER_PATHS, WINOGRAD_DTYPES
from .dispatch import (
    BACKENDS,
    SCHEMAS,
    TRITON_ONLY,
    WINOGRAD_CONV,
    backend_for,
    backend_status,
    build_id,
    cpu_capability,
    gpu_backend,
    keep_freed_memory,
    use_backend,
    uses_cpu_extension,
    vector_width,
)
from .geometry import conv_output_size, winograd_fits
from .primitives import (
    conv_gram,
    fuses_bias,
    sq_conv,
    sq_conv_acc_,
    sq_gram,
    sq_grouped,
    sq_grouped_acc_,
    sq_linear,
    sq_norm,
    sq_outer,
    sq_outer_acc_,
    sq_prod,
    sq_prod_acc_,
    sq_scatter,
    sq_scatter_acc_,
    winograd_conv,
)
from .processor import multiplies_bfloat16

__all__ = [
    "BACKENDS",
    "CONV_ACC_PATHS",
    "CONV_PATHS",
    "OUTER_PATHS",
    "SCHEMAS",
    "TRITON_ONLY",
    "WINOGRAD_CONV",
    "WINOGRAD_DTYPES",
    "backend_for",
    "backend_status",
    "build_id",
    "conv_gram",
    "conv_output_size",
    "cpu_capability",
    "fuses_bias",
    "gpu_backend",
    "keep_freed_memory",
    "multiplies_bfloat16",
    "reference",
    "sq_conv",
    "sq_conv_acc_",
    "sq_gram",
    "sq_grouped",
    "sq_grouped_acc_",
    "sq_linear",
    "sq_norm",
    "sq_outer",
    "sq_outer_acc_",
    "sq_prod",
    "sq_prod_acc_",
    "sq_scatter",
    "sq_scatter_acc_",
    "use_backend",
    "uses_cpu_extension",
    "vector_width",
    "winograd_conv",
    "winograd_fits",
]
