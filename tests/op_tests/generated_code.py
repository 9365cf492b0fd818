"""Print the kernel launches in the code that Inductor generates for a training step on an H100. Needs no GPU.

torch.compile traces the step on CPU tensors; the ops take their Triton path but launch nothing. The forward and
backward graphs are then moved to fake CUDA tensors, and Inductor generates CUDA code for them, which never runs.

Prints one JSON object with the keys `forward` and `backward`. Each holds `inductor`, a list of [kernel, number of
elements], and `extern`, the number of calls of each library function and op.
"""

import collections
import json
import os
import re
import sys
import types

os.environ |= {"TRITON_INTERPRET": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import compile_fx, scheduler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map

import effnet_fast
from effnet_kernels.launch import launches_go_to

H100 = types.SimpleNamespace(
    type="cuda",
    index=0,
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="",
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
)


def pretend() -> None:
    """Replace every query that Inductor makes of a CUDA device while it generates code."""
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    answers = {
        torch.cuda: {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_properties": H100,
            "get_device_capability": (9, 0),
            "synchronize": None,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": None,
            "_exchange_device": 0,
            "_maybe_exchange_device": 0,
            "_lazy_init": None,
            "is_bf16_supported": True,
        },
        CudaInterface: {
            "is_available": True,
            "get_compute_capability": 90,
            "current_device": 0,
            "get_device_properties": H100,
        },
        CudaInterface.Worker: {"get_device_properties": H100, "current_device": 0},
        scheduler: {"has_triton": True},
        # cuDNN's answer for channels-last input; a CPU build of PyTorch has none
        torch._C: {"_conv_determine_backend_memory_format": torch.channels_last},
    }
    for owner, functions in answers.items():
        for name, answer in functions.items():
            setattr(owner, name, lambda *_, _answer=answer, **__: _answer)
    FakeTensor.__getitem__ = lambda self, i: torch.ops.aten.slice.Tensor(self, 0, i.start, i.stop)


def trace(name: str, image_size: int, output_stride: int, depth: float) -> dict[str, tuple]:
    """{"forward", "backward"} -> (graph, inputs) of a bf16 training step on 8 images."""
    graphs = {}

    def keep(name):
        def compiler(graph, inputs):
            graphs[name] = graph, inputs
            return graph

        return compiler

    def partition(graph, joint_inputs, **kwargs):
        values = [n.meta["val"] for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        with V.set_fake_mode(detect_fake_mode(values)):
            compile_fx._recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, joint_inputs, **kwargs)

    # No dropout or stochastic depth: they index a tensor of seeds, which fails on fake CUDA tensors.
    options = {"image_size": image_size, "output_stride": output_stride, "depth": depth, "dropout": 0, "drop_path": 0}
    model = effnet_fast.create_model(name, kernels="triton", **options).to(memory_format=torch.channels_last)
    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=partition,
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    images = torch.randn(8, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    with launches_go_to(lambda *_, **__: None):
        with torch.autocast("cpu", torch.bfloat16):
            logits = torch.compile(model.train(), backend=backend, fullgraph=True)(images)
        logits.float().sum().backward()
    return graphs


def generate(graph: torch.fx.GraphModule, inputs: list, mode: FakeTensorMode, *, backward: bool) -> str:
    """The code that Inductor generates for `graph` on CUDA."""

    def to_cuda(value):
        return torch.device("cuda", 0) if isinstance(value, torch.device) else value

    with mode:
        fakes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if isinstance(t, torch.Tensor) else t
            for t in inputs
        ]
    for node in graph.graph.nodes:
        node.args, node.kwargs = tree_map(to_cuda, node.args), tree_map(to_cuda, node.kwargs)
        node.meta.pop("val", None)
    graph.recompile()
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*fakes)
    with tracing(TracingContext(mode)), mode, V.set_fake_mode(mode):
        compile_fx.compile_fx_inner(graph, fakes, is_backward=backward)
    return CODE.pop()


CODE: list[str] = []


def keep_code(self: GraphLowering) -> types.SimpleNamespace:
    """Replaces `GraphLowering.compile_to_module`, which would load the code."""
    CODE.append(self.codegen()[0].value)
    return types.SimpleNamespace(call=list, __file__="")


def launches(code: str) -> dict:
    """Count the calls in generated code. A launch's elements are the product of the integers among its arguments."""
    runs = re.findall(r"(triton_\w+?)(?:_\d+)?\.run\((.*), stream=", code)
    calls = re.findall(r"\b(extern_kernels\.\w+|torch\.ops\.\w+\.\w+)(?:\.default)?\(", code)
    elements = [[name, _product(re.findall(r"\b\d+\b", arguments))] for name, arguments in runs]
    return {"inductor": elements, "extern": collections.Counter(calls)}


def _product(numbers: list[str]) -> int:
    total = 1
    for number in numbers:
        total *= int(number)
    return total


def main() -> None:
    graphs = trace(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    pretend()
    GraphLowering.compile_to_module = keep_code
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    torch._inductor.config.force_disable_caches = True
    counts = {name: launches(generate(*graphs[name], mode, backward=name == "backward")) for name in graphs}
    print(json.dumps(counts))


main()
