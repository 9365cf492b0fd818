"""Models by name, their scaling arithmetic, and weights of other libraries."""

from effnet_fast.model.efficientnet import Architecture, EfficientNet, recompute_blocks
from effnet_fast.model.features import FeaturePyramid
from effnet_fast.model.network import Network, batch_norms
from effnet_fast.model.zoo import (
    ModelOptions,
    create_model,
    default_output_stride,
    from_description,
    list_models,
    model_from_options,
    model_name,
    variant,
)

__all__ = [
    "Architecture",
    "EfficientNet",
    "FeaturePyramid",
    "ModelOptions",
    "Network",
    "batch_norms",
    "create_model",
    "default_output_stride",
    "from_description",
    "list_models",
    "model_from_options",
    "model_name",
    "recompute_blocks",
    "variant",
]
