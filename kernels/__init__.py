"""The ops in Triton, installed as ``t2v_fast.kernels``: one file per op, collected in ``t2v_fast.kernels.backend``."""
