"""Run on each rank with a path and some of `torch`, `cpp` and `triton`: a backward pass on this rank's part of a batch.

Rank 0 saves gradients, statistics, and statistics re-estimated on four batches, which the ranks share: of
EfficientNet-B0 on PyTorch's operators in two types, or of a narrow model on the kernels in float32, which Triton's
interpreter can do in a minute.
"""

import sys

import torch
import torch.nn.functional as F

from effnet_fast import distributed
from effnet_fast.model import Architecture, EfficientNet, batch_norms
from effnet_fast.run.build import data_parallel
from effnet_fast.train.precise_bn import precise_bn

B0 = Architecture(num_classes=10, output_stride=32, dropout=0.0, drop_path=0.0)
NARROW = Architecture(width=0.25, depth=0.3, num_classes=10, output_stride=16, dropout=0.0, drop_path=0.0)


def gradients(
    world: distributed.World, architecture: Architecture, kernels: str, size: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = EfficientNet(architecture, kernels).to(dtype)
    for norm in batch_norms(model):
        norm.synchronised = True
    images, labels = torch.randn(16, 3, size, size, dtype=dtype), torch.randint(0, 10, (16,))
    wrapped = model
    if world.size > 1:
        wrapped = data_parallel(model, static_graph=True)
    logits = wrapped(images.chunk(world.size)[world.rank])
    F.cross_entropy(logits, labels.chunk(world.size)[world.rank]).backward()
    result = {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
    result |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    for norm in batch_norms(model):
        norm.synchronised = False
    batches = [(batch, None) for batch in images.chunk(4)][world.rank :: world.size]
    precise_bn(model, batches, precision="no", device=world.device)
    return result | {f"precise.{name}": buffer for name, buffer in model.named_buffers()}


torch.set_num_threads(1)
world = distributed.init("cpu")
result = {}
for kernels in sys.argv[2:]:
    types, architecture, size = ([torch.float32], NARROW, 16)
    if kernels == "torch":
        types, architecture, size = ([torch.float64, torch.float32], B0, 64)
    result |= {f"{kernels} {dtype}": gradients(world, architecture, kernels, size, dtype) for dtype in types}
if world.is_main:
    torch.save(result, sys.argv[1])
distributed.shutdown()
