"""The memory and the formats in which networks run on a CPU. The tests of fisher() check that results stay the same."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from t2v_fast import fisher, ops
from t2v_fast.gradients import fast_forward
from t2v_fast.gradients.fast_forward import FastNetwork, kept_memory

# This runs in a process of its own, because memory that other tests have freed may be resident or not.
MEMORY = """
from pathlib import Path
import torch
from t2v_fast.gradients import fast_forward
from t2v_fast.gradients.fast_forward import kept_memory, lingering_memory

BLOCK = 24 << 20  # bytes

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

def use_memory():
    blocks = [torch.ones(BLOCK // 4) for _ in range(8)]

use_memory()
before = resident()
with kept_memory():
    with kept_memory():
        use_memory()
    assert resident() - before > 7 * BLOCK, "the outer context goes on"
assert resident() - before < BLOCK, "given back"
try:
    with kept_memory():
        use_memory()
        raise KeyError
except KeyError:
    pass
assert resident() - before < BLOCK, "given back after an error"

import os, time

def until(given_back):
    end = time.monotonic() + 30
    while (resident() - before < BLOCK) != given_back and time.monotonic() < end:
        time.sleep(0.02)
    return (resident() - before < BLOCK) == given_back

fast_forward.LINGER = 1000
with lingering_memory():
    use_memory()
assert resident() - before > 7 * BLOCK, "kept for the next context"
if not os.fork():
    use_memory()
    os._exit(resident() - before > BLOCK)  # a child keeps no memory
assert os.wait()[1] == 0
fast_forward.LINGER = 0.1
with lingering_memory():
    assert resident() - before > 7 * BLOCK, "the next context has the memory"
assert until(given_back=True), "given back after the time"
fast_forward.LINGER = 1000
with lingering_memory():
    use_memory()
with kept_memory():
    pass
assert resident() - before < BLOCK, "a context that keeps nothing ends the time"
"""


@pytest.mark.skipif(not ops.keep_freed_memory(False), reason="this allocator cannot be told to keep memory")
def test_memory_is_kept_and_given_back() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    subprocess.run([sys.executable, "-c", MEMORY], check=True, env=environment)


@pytest.mark.parametrize(("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")])
def test_settings_of_the_user_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(keep: bool) -> bool:
        raise AssertionError(f"the allocator was told {keep}")

    monkeypatch.setattr(ops, "keep_freed_memory", refuse)
    monkeypatch.setenv(name, value)
    with kept_memory():
        pass


def test_weights_are_channels_last_within() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    standardised = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(shared, nn.Conv2d(4, 4, 1), shared, nn.ConvTranspose2d(4, 6, 2), nn.Conv1d(6, 2, 3))
    own = {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    x, rest = torch.rand(2, 4, 9, 9), torch.arange(3)
    whole = nn.Sequential(model[:4], standardised)
    want = model[:4](x), standardised(x)
    with FastNetwork(whole, lambda whole, given: (whole[0](given["image"]), whole[1](given["image"])) and given) as run:
        seen = run(whole, {"image": x, "rest": rest})
        for k in (0, 3):
            weight = model[k].weight
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert not weight.is_contiguous()
        torch.testing.assert_close((model[:4](x), standardised(x)), want)
        assert seen["image"].is_contiguous(memory_format=torch.channels_last)
        assert seen["rest"] is rest
    assert {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()} == own


def test_the_weight_of_a_layer_with_a_matrix_is_not_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten())
    own = [layer.weight.data_ptr() for layer in model[:2]]
    x = torch.randn(2, 3, 4, 4)
    want = model(x)
    with FastNetwork(model, lambda model, x: model(x)) as run:
        got = run(model, x)
        assert [layer.weight.data_ptr() == p for layer, p in zip(model[:2], own, strict=True)] == [False, True]
        torch.testing.assert_close(got, want)
    assert [layer.weight.data_ptr() for layer in model[:2]] == own


class FlatWeights(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.view(len(self.weight), -1)
        return super().forward(x).flatten(1) * (1 + 0 * flat.detach().sum())


def test_a_network_that_refuses_gets_its_own_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(FlatWeights(3, 4, 3), nn.Linear(36, 3))
    own = model[0].weight.data_ptr()
    x = torch.randn(4, 3, 5, 5)
    with caplog.at_level(logging.INFO, logger=fast_forward.log.name):
        found = fisher(model, [x, x])
    assert "does not take channels-last" in caplog.text
    plain = fisher(model, [x, x], channels_last=False)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9)
    assert model[0].weight.data_ptr() == own


def test_a_network_that_torch_crashes_on_gets_images_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_forward, "CRASHING", frozenset({"NativeGroupNormBackward0"}))
    seen: list[bool] = []
    model = nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 3))
    model.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    own, x = model[1].weight.data_ptr(), torch.randn(4, 3, 5, 5)
    fisher(model, [x, x], self_check=False)
    assert seen == [True, False, False]
    assert model[1].weight.data_ptr() == own
