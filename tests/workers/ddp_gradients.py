"""Run under torchrun: one backward pass of EfficientNet-B0 on this rank's part of a fixed batch; rank 0 saves it."""

import sys

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from effnet_fast import create_model, distributed
from effnet_fast.model import batch_norms


def gradients(world: distributed.World, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = create_model("efficientnet-b0", 10, output_stride=32, dropout=0.0, drop_path=0.0).to(dtype)
    for norm in batch_norms(model):
        norm.synchronised = True
    images, labels = torch.randn(16, 3, 64, 64, dtype=dtype), torch.randint(0, 10, (16,))
    wrapped = model
    if world.size > 1:
        wrapped = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
    logits = wrapped(images.chunk(world.size)[world.rank])
    F.cross_entropy(logits, labels.chunk(world.size)[world.rank]).backward()
    return {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()} | dict(model.named_buffers())


torch.set_num_threads(1)
world = distributed.init("cpu")
result = {str(dtype).removeprefix("torch."): gradients(world, dtype) for dtype in (torch.float64, torch.float32)}
if world.is_main:
    torch.save(result, sys.argv[1])
distributed.shutdown()
