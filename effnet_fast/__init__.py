"""Train EfficientNets on small images, fast, and study how they scale.

Names are imported on first use (PEP 562), so that `import effnet_fast` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effnet_fast import explain as explain
    from effnet_fast.model import create_model as create_model
    from effnet_fast.model import list_models as list_models
    from effnet_fast.model.trained import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "explain", "list_models", "load"]

_HOMES = {
    "create_model": "effnet_fast.model",
    "list_models": "effnet_fast.model",
    "load": "effnet_fast.model.trained",
}
_ROOMS = {"explain"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"effnet_fast.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
