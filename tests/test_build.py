"""The build: a wheel that runs elsewhere, and clear messages when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import op_checks
import pytest
import symbols
import torch

from t2v_fast.ops import extension

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_build_info() -> None:
    """The library has the instruction sets of this architecture, and uses the best one that this processor has."""
    assert extension.build_info()["cpu"].split() == op_checks.INSTRUCTION_SETS
    assert extension.cpu_capability() == op_checks.best_instruction_set()
    with pytest.raises(ValueError, match="instruction set 'mmx' is not in this build"):
        extension.set_cpu_capability("mmx")


def test_a_missing_extension_is_explained(tmp_path: Path) -> None:
    """Without the extension everything runs on the reference ops, and `info` says why."""
    shutil.copytree(ROOT / "t2v_fast", tmp_path / "t2v_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable install would find the extension all the same.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import t2v_fast.cli; "
    code += "raise SystemExit(t2v_fast.cli.main(['info']))"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "reference: available" in found.stdout
    assert "cpu: the compiled extension did not load: there is no libt2v_cpu.so in" in " ".join(found.stdout.split())


def test_a_checkout_without_an_install_finds_the_triton_kernels(tmp_path: Path) -> None:
    """There they are beside the package, and not in it."""
    for folder in ("t2v_fast", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    code += "from t2v_fast.ops import dispatch; print(dispatch._load_triton(), dispatch._triton().__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["None", str(tmp_path / "kernels" / "backend.py")]


def test_a_broken_library_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libt2v_cpu.so").write_text("no library")
    monkeypatch.setattr(extension, "CPU_LIBRARY", tmp_path / "libt2v_cpu.so")
    extension._cpu.cache_clear()
    try:
        assert "libt2v_cpu.so" in str(extension.why_no_cpu())
    finally:
        extension._cpu.cache_clear()


@pytest.mark.parametrize(
    ("cuda", "there", "expected"),
    [
        (None, ["libt2v_cuda13.so"], "this torch was built without CUDA"),
        (
            "12.8",
            ["libt2v_cuda13.so"],
            "there is no libt2v_cuda12.so for torch with CUDA 12.8, but libt2v_cuda13.so",
        ),
        ("13.2", [], "there is no libt2v_cuda13.so in {folder}: it was not compiled"),
        ("13.2", ["libt2v_cuda13.so"], "{folder}/libt2v_cuda13.so: file too short"),
    ],
    ids=str,
)
def test_the_cuda_library_is_chosen_by_the_major_release_of_cuda(
    cuda: str | None, there: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library for another CUDA is not loaded, and every torch of one CUDA takes the same library."""
    for name in there:
        (tmp_path / name).write_text("kernels")
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert extension.why_no_cuda.__wrapped__() == expected.format(folder=tmp_path)


def test_the_library_needs_only_the_stable_interface() -> None:
    assert {"torch_parallel_for", "aoti_torch_get_sizes"} <= symbols.taken(extension.CPU_LIBRARY)


def setup_py(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        tmp_path,
        "--build-temp",
        tmp_path,
        cwd=ROOT,
        **environment,
    )


@pytest.mark.slow
def test_cuda_that_cannot_be_built_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    found = setup_py(tmp_path, T2V_FAST_CUDA="maybe")
    assert found.returncode != 0
    assert "T2V_FAST_CUDA is 'maybe', expected 0 or 1" in found.stderr
    # A toolkit of another release would give an extension that does not load.
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release 9.1\n")
    (tmp_path / "nvcc").chmod(0o755)
    found = setup_py(tmp_path, T2V_FAST_CUDA="1", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert found.returncode != 0
    why = (
        "this torch is a CPU build"
        if torch.version.cuda is None
        else f"{tmp_path}/nvcc is of CUDA 9 but torch was built"
    )
    assert f"T2V_FAST_CUDA=1, but {why}" in found.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is a CPU build: no CUDA library is built for it")
def test_both_libraries_are_built_in_place(tmp_path: Path) -> None:
    """`python -m bench.gpu --build` compiles in place, and then runs what lies in the package."""
    source, major = tmp_path / "source", torch.version.cuda.split(".")[0]
    for folder in ("t2v_fast", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, release {major}.0\n")
    built = f'"$2/libt2v_cpu.so" "$2/libt2v_cuda{major}.so"'
    (tmp_path / "cmake").write_text(f'#!/bin/sh\n[ "$1" != --build ] || touch {built}\n')
    for name in ("nvcc", "cmake"):
        (tmp_path / name).chmod(0o755)
    settings = {"T2V_FAST_CUDA": "1", "T2V_FAST_REUSE": "0", "T2V_FAST_BUILD_DIR": str(tmp_path / "build")}
    settings |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "T2V_FAST_CMAKE": str(tmp_path / "cmake")}
    found = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, **settings)
    assert found.returncode == 0, found.stderr
    assert {path.name for path in (source / "t2v_fast").glob("*.so")} == {"libt2v_cpu.so", f"libt2v_cuda{major}.so"}


@pytest.mark.slow
def test_no_compiler(tmp_path: Path) -> None:
    (tmp_path / "cmake").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cmake").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    broken = {"T2V_FAST_CMAKE": str(tmp_path / "cmake"), "PATH": path, "T2V_FAST_BUILD_DIR": str(tmp_path / "build")}
    found = setup_py(tmp_path / "out", **broken, T2V_FAST_REQUIRE_EXT="0")
    assert found.returncode == 0, found.stderr
    assert "built backends: none, the plain torch reference will be used" in found.stderr
    if torch.cuda.is_available() and shutil.which("nvcc"):  # then the rest is tried without what only a GPU needs
        assert "the CUDA sources were not compiled: building without them" in found.stderr
    assert setup_py(tmp_path / "out", **broken, T2V_FAST_REQUIRE_EXT="1").returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_an_install_without_a_compiler_works(editable: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns("*.so", "build", ".git", ".venv*", "demo", "*.egg-info", "__pycache__"),
    )
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", tmp_path / "site"]
    command = [*pip, *(["--editable"] if editable else []), "."]
    broken = {"T2V_FAST_CMAKE": "false", "T2V_FAST_BUILD_DIR": str(tmp_path / "build"), "T2V_FAST_REQUIRE_EXT": "0"}
    found = run(*command, cwd=source, **broken)
    assert found.returncode == 0, found.stdout + found.stderr
    assert not list((source if editable else tmp_path / "site").rglob("*.so"))


@pytest.mark.slow
def test_a_wheel_from_the_source_distribution_has_the_library(tmp_path: Path) -> None:
    """What the source distribution lacks, such as a header, would be missed here."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    built = run(sys.executable, "-c", code, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, archive]
    settings = {"T2V_FAST_CUDA": "0", "T2V_FAST_REQUIRE_EXT": "1", "T2V_FAST_BUILD_DIR": str(tmp_path / "build")}
    settings["T2V_FAST_REUSE"] = "0"  # the library comes from the archive's sources
    # To optimise takes most of the time to compile, and has no part in what is missed.
    (tmp_path / "compiler").write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    (tmp_path / "compiler").chmod(0o755)
    settings["CXX"] = str(tmp_path / "compiler")
    built = run(*pip, cwd=tmp_path, **settings)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as contents:
        contents.extractall(tmp_path / "site")
    names = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*.py")}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "t2v_fast").rglob("*.py")}
    assert sources <= names
    assert len([name for name in names if name.startswith("t2v_fast/kernels/")]) > 5
    code = "import torch, t2v_fast; from t2v_fast import ops; print(t2v_fast.__file__, ops.backend_status()['cpu']); "
    code += "ops.sq_outer(torch.ones(2, 3, 4), torch.ones(2, 3, 5)).sum()"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert found.stdout.split() == [str(tmp_path / "site" / "t2v_fast" / "__init__.py"), "available"], found.stderr


@pytest.mark.slow
def test_a_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    built = run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ".", cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("t2v_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"t2v_fast/kernels/__init__.py", "t2v_fast/py.typed"} <= set(names)
    assert "t2v_fast/libt2v_cpu.so" in names
    assert wheel.name.startswith("t2v_fast-0.2.0-py3-none-linux_")
    assert not any(name.startswith(("tests/", "bench/", "csrc/")) for name in names)
    target = tmp_path / "site"
    assert run(*pip, "install", "--no-deps", "--target", target, wheel, cwd=tmp_path).returncode == 0
    code = "import t2v_fast, t2v_fast.kernels; print(t2v_fast.__file__, t2v_fast.ops.backend_status()['cpu'])"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert found.stdout.split() == [str(target / "t2v_fast" / "__init__.py"), "available"], found.stderr
