"""Fused Triton kernels for the MBConv block, each beside its plain PyTorch reference; imports nothing of effnet_fast.

An op is imported from the file of its name, `from effnet_kernels.silu import silu`: a face here would have to choose
between the function and the module. Without Triton every file still imports, and its reference serves.
"""
