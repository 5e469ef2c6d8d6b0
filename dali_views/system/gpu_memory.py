"""How a full memory of the GPU shows: DALI and PyTorch raise RuntimeErrors that only words tell apart."""

from __future__ import annotations

__all__ = ["is_full"]

# Of CUDA and PyTorch; of DALI, whose pools say "Can't allocate 123 bytes on device 0."
_WORDS = "out of memory", "CUDA allocation failed", "cudaErrorMemoryAllocation", "bytes on device"


def is_full(error: Exception) -> bool:
    """Whether an error says that the memory of the GPU is full."""
    told = str(error)
    return any(words in told for words in _WORDS)
