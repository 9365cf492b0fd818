"""Names of torch and Optuna that are not part of their public interfaces, so that a new version may lack them.

They are looked up here; a version without one gives a line that says so.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from effnet_fast import provenance

# Operators on lists of tensors, and the update of the fp16 loss scale: torch.optim and torch.amp use them too. They are
# called by these names, and looked up once before a training.
OPERATORS = (
    "_amp_update_scale_",
    "_foreach_add",
    "_foreach_add_",
    "_foreach_copy_",
    "_foreach_div_",
    "_foreach_lerp_",
    "_foreach_mul",
    "_foreach_mul_",
    "_foreach_sqrt_",
    "_foreach_sub_",
)


def internal(name: str) -> Any:
    """Import `PACKAGE.MODULE.NAME`.

    Raises:
        ValueError: this version of the package lacks it.
        ModuleNotFoundError: the package is not installed.
    """
    package = name.partition(".")[0]
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise
        raise ValueError(
            f"{package} {provenance.version(package)} has no {name}, which effnet_fast uses: "
            f"pip install {package}=={provenance.TESTED[package]}, the tested version"
        ) from error


def check_operators() -> None:
    """Check that torch has all operators.

    Raises:
        ValueError: it lacks one.
    """
    for name in OPERATORS:
        internal(f"torch.{name}")
