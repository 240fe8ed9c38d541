"""What the main loops of the GPU kernels are made of, on two GPUs."""

from __future__ import annotations

import functools
from typing import Any

import machine_code
import pytest
import resources
import torch
from resources import NVCC

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed: the CUDA sources were not compiled")
TILED = ("squares", "gradient", "gram", "form")


@functools.cache
def cuda_rows() -> list[dict[str, Any]]:
    return resources.of_cuda_kernels()


@pytest.mark.weekly
@needs_nvcc
def test_no_cuda_kernel_uses_generic_or_local_memory() -> None:
    for row in cuda_rows():
        found = machine_code.counts(row["code"])
        assert not found["local"], row["name"]
        if resources.instance(row)[0] in TILED:
            assert not found["generic"] + found["transposes"], row["name"]


@pytest.mark.weekly
@needs_nvcc
def test_main_loops_of_the_cuda_kernels() -> None:
    seen = set()
    for row in cuda_rows():
        kernel, instance = resources.instance(row)
        if kernel not in TILED or resources.reads_single_values(instance):
            continue
        math, vector, *others = instance.split(", ")
        seen.add((kernel, math, row["arch"]))
        loop = machine_code.main_loop(row["code"])
        found = machine_code.counts(loop)
        assert not sum(found[f"global loads {n}"] for n in (1, 2, 4, 8, 16)), (kernel, instance)
        if math == "Exact<float>":  # copies are in the loop around this one
            assert found["multiply-adds"] > 0.85 * len(loop), (kernel, instance)
            continue
        assert found["copies 8" if vector == "4" and "float" not in math else "copies 16"], (kernel, instance)
        assert not found["copies 4"], (kernel, instance)
        if math == "Exact<double>":
            assert found["multiply-adds"] >= 128, (kernel, instance)
            continue
        assert found["tensor"], (kernel, instance)
        assert not found["multiply-adds"], (kernel, instance)
        if "float" in math:
            assert machine_code.multiply_adds(loop) > 140, (kernel, instance)
        else:
            # The terms of a Gram matrix are multiplied with the same fragments of cotangents.
            terms = int(others[0]) if kernel == "form" else 1
            assert found["matrix loads"] == 8 + 4 * terms, (kernel, instance)
            assert machine_code.multiply_adds(loop) > (200 if terms == 1 else 600), (kernel, instance)
    types = {"Exact<float>", "Exact<double>", "TensorCores<float>", "TensorCores<BFloat16>"}
    for arch in map(str, resources.CARD):
        for kernel in TILED:
            assert types <= {instance for name, instance, on in seen if (name, on) == (kernel, arch)}


@pytest.mark.weekly
def test_main_loops_of_the_triton_kernels() -> None:
    pytest.importorskip("triton", reason="this torch comes without Triton")
    rows = resources.of_triton_kernels()
    assert not [row for row in rows if row["code"].get("local") or row["code"].get("generic")]
    tensor = [r for r in rows if r["dtype"] in ("bfloat16", "float16", "tf32") and r["loop"].get("tensor")]
    kinds = {(r["kernel"], r["case"], r["arch"]) for r in tensor if r["dtype"] == "bfloat16"}
    for arch in resources.CARD:
        assert ("explicit_kernel", "3x3 explicit", arch) in kinds
        for case in ("3x3 gram", "linear gram", "linear gram, with bias", "sq_gram"):
            assert ("quadratic_kernel", case, arch) in kinds
    boxes = [row for row in rows if row["kernel"] == "boxes_kernel"]
    assert {(r["case"], r["dtype"]) for r in boxes} == {
        (case, dtype) for case in ("3x3 boxes", "linear boxes") for dtype in ("bfloat16", "float16", "tf32")
    }
    for row in boxes:
        assert row["loop"]["box copies"] == 2, row
        assert row["loop"]["tensor"], row
        assert not [kind for kind in row["loop"] if kind.startswith(("copies", "global"))], row
    for row in tensor:
        if row["kernel"] == "quadratic_kernel" and row["case"].startswith("linear gram") and row["dtype"] != "tf32":
            assert row["loop"]["copies 16"], row
            # What is left weights the products with the cotangents of the other position (fewer from Triton 3.8 on).
            assert row["loop"]["multiply-adds"] <= 32, row


def test_kernels_of_earlier_commits_may_have_fewer_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="this torch comes without Triton")
    import ahead

    every = ahead.cases(torch.bfloat16)
    assert ahead.NEWER.keys() < every.keys()
    assert ahead.cases(torch.bfloat16, earlier=True).keys() == every.keys()
    for op in ahead.NEWER.values():
        monkeypatch.delattr(ahead.backend, op)
    assert ahead.cases(torch.bfloat16, earlier=True).keys() == every.keys() - ahead.NEWER.keys()
    assert ahead.cases(torch.bfloat16).keys() == every.keys()  # and the present kernels must have them


def test_kernels_of_earlier_commits_may_have_fewer_template_arguments() -> None:
    before = {("CUDA", "gram", "Exact<double>, 2"): "567", ("CUDA", "form", "Exact<double>, 2"): "218"}
    assert resources.cell_before(before, ("CUDA", "gram", "Exact<double>, 2, double, 1, 1")) == "567"
    assert resources.cell_before(before, ("CUDA", "form", "Exact<double>, 2")) == "218"
    assert resources.cell_before(before, ("CUDA", "gram", "Exact<double>, 21, double")) == "-"
    assert resources.cell_before(before, ("Triton", "gram", "Exact<double>, 2")) == "-"
