"""What tests of several rooms share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# No verdict depends on the machine's speed. `repeatable` draws the same examples every time; run with
# `--hypothesis-profile explore` to try new ones.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", patient, derandomize=True)
settings.register_profile("explore", patient, max_examples=2000)
settings.load_profile("repeatable")

if "OMP_NUM_THREADS" not in os.environ:  # runs in this process and in others then have the same bits
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter where there is no GPU; it must be known before the first one is decorated,
    # which importing the model does.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels(request: pytest.FixtureRequest):
    """CPU tensors run on the C++ kernels, as a user's do, except in op_tests and in modules marked `interpreted`."""
    interpreted = "op_tests" in request.path.parts or request.node.get_closest_marker("interpreted")
    if interpreted or torch.cuda.is_available():
        yield
        return
    from effnet_kernels import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "INTERPRETED", False)
        patch.setenv("TRITON_INTERPRET", "0")  # of processes that the tests start
        yield


@pytest.fixture(scope="session", autouse=True)
def cached_costs():
    """Searches and studies of all tests count the cost of a model once."""
    from effnet_fast.search import family

    counted = {}
    complexity = family.complexity

    def cached(model, image_size):
        key = repr(model), image_size
        if key not in counted:
            counted[key] = complexity(model, image_size)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "complexity", cached)
        yield


@pytest.fixture(scope="session")
def cifar100_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the real cifar-100-python/: EFFNET_FAST_CIFAR100, or unpacked from beside the repository."""
    named = os.environ.get("EFFNET_FAST_CIFAR100")
    if named:
        return Path(named)
    script = Path(__file__).parents[2] / "shared" / "data" / "unpack_cifar100.py"
    if not script.is_file():
        pytest.skip("needs CIFAR-100: set EFFNET_FAST_CIFAR100 to a folder that holds cifar-100-python/")
    folder = tmp_path_factory.mktemp("cifar100")
    subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
    return folder
