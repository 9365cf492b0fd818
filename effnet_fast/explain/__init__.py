"""Class activation maps, their scores and their pictures. Do not name a module `cam`: it is a function.

>>> import effnet_fast, torch
>>> model = effnet_fast.create_model("efficientnet-b0", width=0.25, depth=0.3, kernels="torch")
>>> effnet_fast.explain.cam(model, torch.randn(2, 3, 32, 32), target=7).shape
torch.Size([2, 32, 32])
"""

from effnet_fast.explain.maps import METHODS, cam

__all__ = ["METHODS", "cam"]
