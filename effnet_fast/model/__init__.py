"""Models by name, the arithmetic that scales them, and weights from elsewhere."""

from effnet_fast.model.efficientnet import Architecture, EfficientNet, recompute_blocks
from effnet_fast.model.network import Network, batch_norms
from effnet_fast.model.zoo import (
    create_model,
    default_output_stride,
    from_description,
    list_models,
    model_name,
    variant,
)

__all__ = [
    "Architecture",
    "EfficientNet",
    "Network",
    "batch_norms",
    "create_model",
    "default_output_stride",
    "from_description",
    "list_models",
    "model_name",
    "recompute_blocks",
    "variant",
]
