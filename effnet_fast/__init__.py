"""Train EfficientNets on small images, fast, and study how they scale.

Names are imported on first use (PEP 562), so that `import effnet_fast` does not import torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from effnet_fast import openmp

if TYPE_CHECKING:
    from effnet_fast import explain as explain
    from effnet_fast.config import EvalConfig as EvalConfig
    from effnet_fast.config import ExportConfig as ExportConfig
    from effnet_fast.config import SearchConfig as SearchConfig
    from effnet_fast.config import StudyConfig as StudyConfig
    from effnet_fast.config import TrainConfig as TrainConfig
    from effnet_fast.model import create_model as create_model
    from effnet_fast.model import list_models as list_models
    from effnet_fast.model.trained import load as load
    from effnet_fast.run.evaluation import evaluate as evaluate
    from effnet_fast.run.export import export as export
    from effnet_fast.run.search import search as search
    from effnet_fast.run.study import study as study
    from effnet_fast.run.training import train as train

__version__ = "0.1.0"
__all__ = [
    "EvalConfig",
    "ExportConfig",
    "SearchConfig",
    "StudyConfig",
    "TrainConfig",
    "__version__",
    "create_model",
    "evaluate",
    "explain",
    "export",
    "list_models",
    "load",
    "search",
    "study",
    "train",
]

openmp.limit_threads()
# cuBLAS reads it at its first product, and only with it sums in a fixed order, which --deterministic needs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Public name -> its module.
_HOMES = {
    **dict.fromkeys(("EvalConfig", "ExportConfig", "SearchConfig", "StudyConfig", "TrainConfig"), "effnet_fast.config"),
    **dict.fromkeys(("create_model", "list_models"), "effnet_fast.model"),
    "evaluate": "effnet_fast.run.evaluation",
    "export": "effnet_fast.run.export",
    "load": "effnet_fast.model.trained",
    "search": "effnet_fast.run.search",
    "study": "effnet_fast.run.study",
    "train": "effnet_fast.run.training",
}
_PACKAGES = {"explain", "search", "train"}


class CallablePackage(ModuleType):
    """A subpackage with the name of a verb; calling it runs the verb.

    `effnet_fast.train` is the package as soon as anything imports it, so the package itself has to be callable.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _public(self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Turn an imported subpackage, given by its full name, into a CallablePackage."""
    sys.modules[package].__class__ = CallablePackage


def _public(name: str) -> Any:
    return getattr(importlib.import_module(_HOMES[name]), name)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"effnet_fast.{name}")
    if name in _HOMES:
        return _public(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
