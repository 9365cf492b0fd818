"""Build the C++ kernels with PyTorch's extension builder, once, and load them as `torch.ops.effnet_cpu`.

The library is built at first use, under a lock, in a folder of its own named after a hash of the sources, the flags
and PyTorch's version: a change of any of them builds anew. Where it cannot be built, one line says why and the
reference serves.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

NAME = "effnet_cpu"
FOLDER = Path(__file__).parent
SOURCES = ("ops.cpp", "depthwise_ops.cpp")

# The instruction sets that ATen's Vectorized is written for, as PyTorch itself compiles them.
CAPABILITIES = {
    "AVX512": "-DCPU_CAPABILITY_AVX512 -mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
    "DEFAULT": "-DCPU_CAPABILITY_DEFAULT",
}


def flags() -> list[str]:
    """The compiler's flags for this CPU."""
    capability = torch.backends.cpu.get_cpu_capability()
    capability = capability if capability in CAPABILITIES else "DEFAULT"
    options = ["-std=c++20", "-O3", "-fopenmp", f"-DCPU_CAPABILITY={capability}", *CAPABILITIES[capability].split()]
    return [*options, *os.environ.get("EFFNET_KERNELS_CXXFLAGS", "").split()]


def folder(options: list[str]) -> Path:
    """Where the library of these sources and flags lies, or will lie."""
    digest = hashlib.sha256(repr((torch.__version__, options)).encode())
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"{NAME}-{digest.hexdigest()[:16]}"


@contextmanager
def _ninja_on_path():
    """A virtual environment's own programs are found although it was not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((before, str(Path(sys.executable).parent)))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def load(target: Path, options: list[str]) -> None:
    """Load the library from `target`, after compiling it where it is missing.

    Raises:
        RuntimeError: there is no compiler, or it failed, now or before.
        OSError: `target` cannot be written.
    """
    library, failure = target / f"{NAME}.so", target / "failed.log"
    if not library.exists():
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / "build.lock"):
            if not library.exists():  # else another process built it while this one waited
                if failure.exists():
                    raise RuntimeError(f"compiling failed before, see {failure}; delete it to try again")
                _compile(target / "build", options, failure)
                # Renamed when complete: a library that a killed build left half-written is never loaded.
                (target / "build" / f"{NAME}.so").replace(library)
                return  # the builder loads what it builds
    torch.ops.load_library(library)


def _compile(work: Path, options: list[str], failure: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"there is no C++ compiler ({compiler})")
    from torch.utils import cpp_extension  # a second to import

    shutil.rmtree(work, ignore_errors=True)  # and with it the lock file of a build that was killed
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
    """`torch.ops.effnet_cpu`, built if need be; None where it cannot be, which one line says once."""
    try:
        options = flags()
        load(folder(options), options)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"effnet_kernels: no C++ kernels, PyTorch's operators serve: {reason}", file=sys.stderr, flush=True)
        return None
    return torch.ops.effnet_cpu
