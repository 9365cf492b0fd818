"""Class activation maps, their scores and their pictures. Do not name a module `cam`: it is a function."""

from effnet_fast.explain.maps import METHODS, cam

__all__ = ["METHODS", "cam"]
