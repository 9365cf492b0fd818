"""The ops in C++ for the CPU, on channels-last tensors: ATen's `Vectorized` vectors, `at::parallel_for` threads.

`build.py` compiles and loads the library; `block.py` runs a whole MBConv block as one op.
"""
