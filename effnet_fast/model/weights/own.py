"""The layout of this project's own models."""

from effnet_fast.model.weights.layout import Layout


def _bn_eps(model: str) -> float:
    """The eps that `create_model` uses; reference models have torch's default."""
    return 1e-3 if model.startswith("efficientnet") else 1e-5


LAYOUT = Layout("effnet_fast's", "stem.conv.weight", bn_eps=_bn_eps)
