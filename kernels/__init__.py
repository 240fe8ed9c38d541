"""Triton kernels of the ops, installed as t2v_fast.kernels."""
