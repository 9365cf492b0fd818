"""Triton's interpreter, in which the tests run the kernels without a GPU."""

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def faithful_interpreter():
    """Round to bfloat16 as a GPU does, to nearest even (the interpreter truncates); skip its slow overflow checks.

    Products of bfloat16 tiles are those of their values: the interpreter multiplies their bits as integers. A broadcast
    comparison stays a mask: the interpreter makes it integers, which Triton 3.9 refuses as a mask.
    """
    if find_spec("triton") is None:
        yield
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    dot, splat = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.create_splat

    def rounded(values, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
            nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        return convert(values, source, target, mode)

    def widened(tile):
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        bits = rounded(tile.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def product(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def broadcast(self, kind, scalar):
        tile = splat(self, kind, scalar)
        return interpreter.TensorHandle(tile.data.astype(bool), tl.int1) if scalar.data.dtype == bool else tile

    builder = interpreter.interpreter_builder
    options = builder.options
    interpreter._convert_float = rounded
    interpreter.InterpreterBuilder.create_dot = product
    interpreter.InterpreterBuilder.create_splat = broadcast
    builder.options = dataclasses.replace(options, sanitize_overflow=False)
    yield
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.create_splat = splat
    builder.options = options
