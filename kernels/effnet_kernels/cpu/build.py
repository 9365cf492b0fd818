"""Build the C++ kernels with PyTorch's extension builder, and load them as `torch.ops.effnet_cpu`.

The first use builds the library under a file lock. Its folder is named after a hash of the sources, the flags, the C
library's and PyTorch's version, so a change of any of them triggers a new build. If the build fails, one line on stderr
gives the reason, and the PyTorch references run instead.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

NAME = "effnet_cpu"
FOLDER = Path(__file__).parent
SOURCES = ("ops.cpp", "depthwise_ops.cpp")

# Instruction sets supported by ATen's Vectorized, with the flags that PyTorch itself is compiled with.
CAPABILITIES = {
    "AVX512": "-DCPU_CAPABILITY_AVX512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
    "DEFAULT": "-DCPU_CAPABILITY_DEFAULT",
}


def flags() -> list[str]:
    """Compiler flags for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in CAPABILITIES else "DEFAULT"
    options = ["-std=c++20", "-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}", *CAPABILITIES[capability].split()]
    return [*options, *os.environ.get("EFFNET_KERNELS_CXXFLAGS", "").split()]


def folder(options: list[str]) -> Path:
    """The folder of the library for these sources and flags; it need not exist yet."""
    digest = hashlib.sha256(repr((torch.__version__, platform.libc_ver(), options)).encode())
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"{NAME}-{digest.hexdigest()[:16]}"


@contextmanager
def _ninja_on_path():
    """Add this interpreter's folder to PATH: ninja is there if the virtual environment is not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def load(target: Path, options: list[str]) -> None:
    """Load the library from `target`; compile it first if it is missing.

    Raises:
        RuntimeError: there is no compiler or no ninja, or compiling failed, now or in an earlier process.
        OSError: `target` cannot be written.
    """
    library, failure = target / f"{NAME}.so", target / "failed.log"
    if not library.exists():
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / "build.lock"):
            if not library.exists():  # another process may have built it meanwhile
                if failure.exists():
                    raise RuntimeError(f"compiling failed before, see {failure}; delete it to try again")
                _compile(target / "build", options, failure)
                # Rename when complete, so that the half-written library of a killed build is never loaded.
                (target / "build" / f"{NAME}.so").replace(library)
                return  # the builder loads what it builds
    torch.ops.load_library(library)


def _compile(work: Path, options: list[str], failure: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no C++ compiler ({compiler})")
    from torch.utils import cpp_extension  # importing it takes a second

    shutil.rmtree(work, ignore_errors=True)  # with the lock file of a killed build
    work.mkdir()
    print("effnet_kernels: building the C++ kernels for this CPU, once (a minute)", file=sys.stderr, flush=True)
    with _ninja_on_path():
        if not cpp_extension.is_ninja_available():
            raise RuntimeError("there is no ninja (pip install ninja)")
        try:
            cpp_extension.load(
                NAME,
                [str(FOLDER / source) for source in SOURCES],
                extra_cflags=options,
                extra_ldflags=["-fopenmp"],
                build_directory=str(work),
                is_python_module=False,
            )
        except RuntimeError as error:
            failure.write_text(str(error))
            raise RuntimeError(f"the compiler failed, see {failure}") from None


@functools.cache
def library() -> Any | None:
    """`torch.ops.effnet_cpu`, built if necessary; if that fails, prints the reason in one line and returns None."""
    try:
        options = flags()
        load(folder(options), options)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"effnet_kernels: no C++ kernels, PyTorch's operators serve: {reason}", file=sys.stderr, flush=True)
        return None
    return torch.ops.effnet_cpu
