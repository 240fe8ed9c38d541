"""The ops of the Triton backend, each under its own name."""

from .launch import interpreted
from .sq_conv import sq_conv, sq_conv_acc_
from .sq_conv_gram import conv_gram, sq_gram
from .sq_grouped import sq_grouped, sq_grouped_acc_
from .sq_outer import sq_linear, sq_outer, sq_outer_acc_
from .sq_prod import sq_norm, sq_prod, sq_prod_acc_
from .sq_scatter import sq_scatter, sq_scatter_acc_

__all__ = [
    "conv_gram",
    "interpreted",
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
]
