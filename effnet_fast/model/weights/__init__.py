"""Weights of other libraries: one file for each library's layout, a reader of files, and a loader into models.

A layout fixes more than tensor names: weights trained with TensorFlow's SAME padding or with eps 1e-3 give wrong logits
with another padding or eps, and nothing else shows the mistake.
"""

from effnet_fast.model.weights.hub import find_weights
from effnet_fast.model.weights.layout import IMAGENET_MEAN, IMAGENET_STD, Layout, Weights
from effnet_fast.model.weights.load import load_weights
from effnet_fast.model.weights.read import read_safetensors, read_weights

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Layout",
    "Weights",
    "find_weights",
    "load_weights",
    "read_safetensors",
    "read_weights",
]
