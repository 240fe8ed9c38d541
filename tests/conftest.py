"""One thread per process, Triton's interpreter, and which parametrisations of a test are slow or weekly."""

import os
from collections.abc import Iterator

# Before anything imports torch or Triton. Several processes run the tests, each on a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

collect_ignore_glob = ["helpers/*"]  # no tests, nor examples
# What helpers assert is explained as what tests assert is.
pytest.register_assert_rewrite("cuda_checks", "mutations", "op_checks", "ownership_networks")


def pytest_configure() -> None:
    """Stop if torch is another version than the one that the tests are to run with."""
    if wanted := os.environ.get("T2V_FAST_REQUIRE_TORCH"):
        from importlib.metadata import version

        if (found := version("torch").split("+")[0]) != wanted:
            raise pytest.UsageError(f"the tests are to run with torch {wanted}, but torch {found} is installed")


@pytest.hookimpl(tryfirst=True)  # before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what ``slow_unless(parameter=(value, ...), ...)`` does not name: its values as in the test's id.

    ``weekly_unless`` does the same for weekly tests.
    """
    for item in items:
        for kind in ("slow", "weekly"):
            quick = [marker.kwargs for marker in item.iter_markers(f"{kind}_unless")]
            if quick and not any(all(str(item.callspec.params[k]) in map(str, v) for k, v in q.items()) for q in quick):
                item.add_marker(kind)


@pytest.fixture
def tf32_by_backend() -> Iterator[None]:
    """TF32 is allowed by the newer of torch's two settings, after which the older one cannot be read."""
    import torch

    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision("highest")
