"""Faults of the machine that torch reports as a RuntimeError, explained in one line each."""

from __future__ import annotations

# Of torch's allocators on the GPU and the CPU, of the CUDA driver, also through Triton, and of cuBLAS.
_OUT_OF_MEMORY = ("out of memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the memory of a device or of the machine is full."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; without importing torch
        return True
    says_so = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return says_so or isinstance(error, MemoryError)


def explanation(error: BaseException) -> str | None:
    """One line that says what to do about a full memory or a lost worker process; None for other errors."""
    if is_out_of_memory(error):
        return "the memory is full: free some, or use a smaller --batch_size"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        reason = str(error).partition("\n")[0].strip().rstrip(".")
        return f"{reason}: memory or /dev/shm may be short, so use fewer --num_workers, or free some"
    return None
