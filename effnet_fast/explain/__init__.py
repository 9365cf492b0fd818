"""Class activation maps, their scores and their pictures. No module here may be called `cam`: it is a function."""

from effnet_fast.explain.maps import METHODS, cam

__all__ = ["METHODS", "cam"]
