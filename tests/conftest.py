"""Triton's kernels run in its interpreter here: set before anything imports Triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
