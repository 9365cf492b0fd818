"""Fused Triton kernels for the MBConv block, each beside its plain PyTorch reference. Imports nothing of effnet_fast.

Import an op from the file of its name, `from effnet_kernels.silu import silu`: re-exports here would shadow the
modules. Without Triton every file still imports: the C++ ops run on a CPU, the references on a GPU.
"""
