"""Train EfficientNets on small images, fast, and study how they scale.

The face is lazy (PEP 562): importing effnet_fast imports no torch until a model is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effnet_fast.model import create_model as create_model
    from effnet_fast.model import list_models as list_models
    from effnet_fast.run.prediction import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models", "load"]

_HOMES = {
    "create_model": "effnet_fast.model",
    "list_models": "effnet_fast.model",
    "load": "effnet_fast.run.prediction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
