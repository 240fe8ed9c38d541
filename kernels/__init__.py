"""The ops in Triton, installed as t2v_fast.kernels: one file an op; :mod:`t2v_fast.kernels.backend` has them all."""
