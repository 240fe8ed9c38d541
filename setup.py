"""Build the libraries t2v_fast/libt2v_*.so with CMake. The settings of the build are optional:

T2V_FAST_CUDA=0|1          leave the CUDA sources out, or insist on them (default: build them where torch finds a GPU
                           and nvcc is there)
T2V_FAST_REUSE=1           take the CPU library that is in t2v_fast/ already: it serves every torch
T2V_FAST_REQUIRE_EXT=1     fail instead of installing without the extension where it cannot be compiled
T2V_FAST_BUILD_DIR=FOLDER  where CMake works (default: build/cmake); kept, so that a second build compiles only changes
T2V_FAST_SANITIZE=LIST     sanitizers, such as address,undefined
T2V_FAST_CMAKE=PROGRAM     the cmake to use (default: the environment's own, or the first in PATH)
CMAKE_ARGS=OPTIONS         more options for CMake, such as those of a cross-compiler
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def say(message: str) -> None:
    print(f"t2v-fast: {message}", file=sys.stderr, flush=True)


def cuda_choice() -> tuple[bool, str]:
    """Whether to build the CUDA sources, and why not."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    asked = os.environ.get("T2V_FAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"T2V_FAST_CUDA is {asked!r}, expected 0 or 1")
    if asked == "0":
        return False, "T2V_FAST_CUDA=0"
    missing = []
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
    if torch.version.cuda is None:
        missing.append("this torch is a CPU build")
    if not nvcc:
        missing.append("nvcc was not found")
    if not missing:
        found = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        if not found or found[1] != torch.version.cuda.split(".")[0]:
            release = f"of CUDA {found[1]}" if found else "of an unknown release"
            missing.append(f"{nvcc} is {release} but torch was built with CUDA {torch.version.cuda}")
    if missing and asked == "1":
        raise SystemExit(f"T2V_FAST_CUDA=1, but {' and '.join(missing)}")
    if asked == "" and not missing and not torch.cuda.is_available():
        missing.append("there is no GPU here; T2V_FAST_CUDA=1 builds them all the same")
    return not missing, " and ".join(missing)


class CMakeBuild(build_ext):
    def get_ext_filename(self, name: str) -> str:
        """The libraries know nothing of Python, so that their names don't either."""
        return f"{name.replace('.', '/')}.so"

    def run(self) -> None:
        # Setuptools forgets --inplace while it builds, and then copies only the file that the extension is named after.
        self.into_source = self.inplace or self.editable_mode
        super().run()

    def build_extension(self, extension: Extension) -> None:
        there = ROOT / "t2v_fast" / "libt2v_cpu.so"
        if os.environ.get("T2V_FAST_REUSE") == "1" and there.exists():
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != there:
                shutil.copyfile(there, target)
            return say(f"{there} is used as it is")
        try:
            cuda, why_not = cuda_choice()
            try:
                self.compile(extension, cuda, why_not)
            except subprocess.CalledProcessError:
                if not cuda or os.environ.get("T2V_FAST_CUDA") == "1":
                    raise
                say("the CUDA sources were not compiled: building without them")
                self.compile(extension, False, "it did not compile")
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("T2V_FAST_REQUIRE_EXT") == "1":
                raise
            say(f"built backends: none, the plain torch reference will be used ({error})")

    def compile(self, extension: Extension, cuda: bool, why_not: str) -> None:
        import torch

        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = ROOT / os.environ.get("T2V_FAST_BUILD_DIR", "build/cmake")
        folder.mkdir(parents=True, exist_ok=True)
        cmake = os.environ.get("T2V_FAST_CMAKE", "cmake")
        configure = [
            cmake,
            "-GNinja",
            f"-S{ROOT}",
            f"-B{folder}",
            f"-DT2V_PYTHON={sys.executable}",
            f"-DT2V_CUDA={'ON' if cuda else 'OFF'}",
            f"-DT2V_SANITIZE={os.environ.get('T2V_FAST_SANITIZE', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if cuda:
            architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace("+PTX", "").replace(" ", ";")
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures.replace('.', '')}")
        environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        subprocess.run(configure, check=True, env=environment, stdout=sys.stderr)
        subprocess.run([cmake, "--build", str(folder)], check=True, env=environment, stdout=sys.stderr)
        major = (torch.version.cuda or "").split(".")[0]
        names = ["libt2v_cpu.so", *([f"libt2v_cuda{major}.so"] if cuda else [])]
        places = {target.parent, *([ROOT / "t2v_fast"] if self.into_source else [])}
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                # Replace the file instead of its contents, because a running process may have the old file mapped.
                temporary = place / f"{name}.new"
                shutil.copyfile(folder / name, temporary)
                os.replace(temporary, place / name)
        cuda_part = f"cuda for CUDA {major}" if cuda else f"not cuda ({why_not})"
        say(f"built backends, for torch 2.10 and later: cpu, {cuda_part}")


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """One wheel for every Python: the libraries are loaded with ctypes."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["t2v_fast", "t2v_fast.*"]), "t2v_fast.kernels"],
    package_dir={"t2v_fast.kernels": "kernels"},
    package_data={"t2v_fast": ["py.typed"]},
    # Optional, so that the installation continues where CMakeBuild has reported that it could not compile.
    ext_modules=[Extension("t2v_fast.libt2v_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
