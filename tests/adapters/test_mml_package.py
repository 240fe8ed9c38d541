"""The Fisher of mml-similarity against the package itself, in its own call path.

mml-core brings a plugin for pytest, so the package is in a folder of its own (``requirements/mml.txt``).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from t2v_fast.adapters.mml import fim_diag

pytest.importorskip("mml_similarity", reason="compares with it: PYTHONPATH=FOLDER, see requirements/mml.txt")
from bench.studies.frontends.mml import distance, embedding, estimates, flat, network, package

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SETTINGS = [{}, {"ignore_bias": False, "final_fraction": 1.0, "average_filters": False}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_package_gets_its_own_embedding(settings: dict) -> None:
    """With the labels of the data, mml-similarity draws images alone."""
    with package(None) as (module, task_type):
        model = network(task_type, torch.float64)
        want = embedding(module, model, task_type, module.fim_diag, empirical=True, **settings)
        model = network(task_type, torch.float64)
        own = partial(fim_diag, gradient="logit")
        got = embedding(module, model, task_type, own, empirical=True, **settings)
        assert list(got) == list(want)
        for name, value in want.items():
            assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape)
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-15)


def test_drawn_labels_approach_the_expectation() -> None:
    """The error of a mean of 16 passes is about a quarter of a pass's."""
    with package(None) as (module, task_type):
        model = network(task_type)
        names = module.select_embedding_params(module.FimConfig(), model)
        drawn = estimates(module, model, task_type, 16)
        loader = [{"image": torch.stack([row["image"] for row in module_images()])}]
        exact = flat(fim_diag(model, loader, names, task_type.CLASSIFICATION, gradient="logit"))
        alone = sum(distance(t, exact) for t in drawn) / len(drawn)
        assert distance(torch.stack(drawn).mean(0), exact) < 0.4 * alone


def module_images() -> list[dict]:
    from bench.studies.frontends.mml import IMAGES, Images

    data = Images(IMAGES, torch.float32)
    return [data[k] for k in range(len(data))]
