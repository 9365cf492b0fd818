"""Models by name, and the arithmetic that scales them."""

from effnet_fast.model.efficientnet import (
    Architecture,
    EfficientNet,
    batch_norms,
    create_model,
    from_description,
    list_models,
    recompute_blocks,
    variant,
)

__all__ = [
    "Architecture",
    "EfficientNet",
    "batch_norms",
    "create_model",
    "from_description",
    "list_models",
    "recompute_blocks",
    "variant",
]
