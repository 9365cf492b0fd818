"""Models also run on the Triton kernels here."""

from interpreter import faithful_interpreter as faithful_interpreter
