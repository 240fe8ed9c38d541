"""Triton's kernels run in its interpreter here: set before anything imports Triton."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")

# What helpers assert is explained as what tests assert is.
pytest.register_assert_rewrite("cuda_checks", "mutations", "op_checks", "ownership_networks")
