"""Why a model decides as it does: class activation maps, their scores and their pictures."""

from effnet_fast.explain.maps import METHODS, cam

__all__ = ["METHODS", "cam"]
