"""The ops' C++ forms for the CPU: channels-last, vectorised by ATen's `Vectorized`, threaded by `at::parallel_for`.

`build.py` compiles and loads them; `block.py` is a whole MBConv block as one op.
"""
