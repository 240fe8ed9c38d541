"""From a forward pass to squares of per-example gradients.

:mod:`~t2v_fast.gradients.recorder` is what callers use. The other modules, from the graph to the ops:

- :mod:`~t2v_fast.gradients.graph` finds where parameters are used, from the owners of activations
  (:mod:`~t2v_fast.gradients.ownership`, :mod:`~t2v_fast.gradients.transfers`, :mod:`~t2v_fast.gradients.owners`), and
  :mod:`~t2v_fast.gradients.refusals` raises where there is no exact answer;
- :mod:`~t2v_fast.gradients.routes` chooses how each parameter gets its squares, and
  :mod:`~t2v_fast.gradients.rules` and :mod:`~t2v_fast.gradients.factors` compute them;
- :mod:`~t2v_fast.gradients.fast_forward` and :mod:`~t2v_fast.gradients.fast_layers` speed up forward passes on a CPU.
"""
