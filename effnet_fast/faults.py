"""Faults of the machine that torch reports as a RuntimeError, explained in one line each."""

from __future__ import annotations


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that the memory of a device or of the machine is full."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; without importing torch
        return True
    allocator = isinstance(error, RuntimeError) and "not enough memory" in str(error)  # torch's, on the CPU
    return allocator or isinstance(error, MemoryError)


def explanation(error: BaseException) -> str | None:
    """One line that says what to do about a full memory or a killed worker process; None for other errors."""
    if is_out_of_memory(error):
        return "the memory is full: use a smaller --batch_size"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            "a worker process that loads images was killed, as Linux does when memory is short: use fewer "
            "--num_workers, or free some memory"
        )
    return None
