"""GELU as the library of `fastvlm.native` computes it: by a polynomial, in place of an error function."""

import ctypes
from functools import cache
from typing import Final

import numpy as np
import torch

_TERMS: Final = 13  # of the polynomial, as in native/gelu.h
_END: Final = 5.0  # of what it stands for: beyond, GELU is 0 or the identity to 1.4e-6
_POINTS: Final = 4096


class Gelu(ctypes.Structure):
    """What the kernels are given."""

    _fields_ = [("end", ctypes.c_float), ("terms", ctypes.c_float * _TERMS)]


@cache
def fit() -> Gelu:
    """GELU is relu(x) - t Phi(-t), t = |x|: fit the latter, to 7e-6."""
    at = np.cos((np.arange(_POINTS) + 0.5) * np.pi / _POINTS)
    size = torch.from_numpy((at + 1) / 2 * _END)
    wanted = (size * torch.special.ndtr(-size)).numpy()
    fitted = np.polynomial.chebyshev.Chebyshev.fit(at, wanted, _TERMS - 1, domain=[-1, 1])
    terms = fitted.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    return Gelu(_END, (ctypes.c_float * _TERMS)(*terms[::-1]))
