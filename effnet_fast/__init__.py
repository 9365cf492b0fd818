"""Train EfficientNets on small images, fast, and study how they scale.

Names are imported on first use (PEP 562), so that `import effnet_fast` does not import torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from effnet_fast import openmp

if TYPE_CHECKING:
    from effnet_fast import explain as explain
    from effnet_fast.model import create_model as create_model
    from effnet_fast.model import list_models as list_models
    from effnet_fast.model.trained import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "explain", "list_models", "load", "search", "study"]

openmp.limit_threads()

_HOMES = {
    "create_model": "effnet_fast.model",
    "list_models": "effnet_fast.model",
    "load": "effnet_fast.model.trained",
}
_ROOMS = {"explain", "search"}
# Verbs that Python can call, as module and function: `effnet_fast.search(SearchConfig(...))` returns a result.
_VERBS = {"search": ("effnet_fast.run.search", "run_search"), "study": ("effnet_fast.run.study", "run_study")}


class CallableRoom(ModuleType):
    """A subpackage with the same name as a verb; calling the module runs the verb."""

    def __call__(self, config: Any) -> Any:
        return _verb(self.__name__.rpartition(".")[2])(config)


def _verb(name: str) -> Any:
    module, function = _VERBS[name]
    return getattr(importlib.import_module(module), function)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"effnet_fast.{name}")
    if name in _VERBS:
        return _verb(name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
