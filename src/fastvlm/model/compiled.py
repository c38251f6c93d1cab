"""What the library of `fastvlm.native` can do on this processor, and whose threads it takes."""

import ctypes


def can_multiply_bytes(library: ctypes.CDLL) -> bool:
    """Whether it was built for a processor that multiplies bytes (AVX512-VNNI)."""
    return bool(library.fastvlm_multiplies_bytes())


def has_tiles(library: ctypes.CDLL) -> bool:
    """Whether it was built for a processor with AMX's tiles of bfloat16, and the system lets this program use them."""
    return bool(library.fastvlm_has_tiles())


def has_depthwise(library: ctypes.CDLL) -> bool:
    """Whether it was built for a processor with AVX-512, and convolves each channel by itself."""
    return bool(library.fastvlm_has_depthwise())


def openmp() -> ctypes.c_void_p | None:
    """How PyTorch's own threads are called upon; where that is not found, the library starts threads of its own."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError, TypeError):
        return None
