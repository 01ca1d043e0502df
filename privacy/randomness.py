"""Where the draws come from that privacy rests on: the operating system, or a seed in simulations.

Normals are whole multiples of a public grid, not floating-point numbers of whatever precision.
What is added to a number on the same grid then hides it as the mathematics says: the low bits of
the sum tell nothing of what was hidden (they do of a plain floating-point sum: Mironov, "On
Significance of the Least Significant Bits for Differential Privacy", 2012; Jin et al., "Are We
There Yet? Timing and Floating-Point Attacks on Differential Privacy Systems", 2022), and rounding
a real Gaussian to the grid is post-processing, which costs nothing.
"""

from __future__ import annotations

import hashlib
from os import urandom
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from mpmath import mp
from numpy.random.bit_generator import ISeedSequence
from scipy.special import ndtri

NORMAL_GRID = 2.0**-20
"""Protected standard normals are whole multiples of this."""

LARGEST_DEVIATION = 2.0**32
"""Of rounded normals."""

# The fast computation of a normal below _FAST knows it to within ±_ERROR: the bits not yet drawn
# leave 2^-45.6 open there, and rounding in float64 less than 2^-48.
_FAST = 5.0
_ERROR = 2.0**-44
_MORE_BITS = 192

Floats64 = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
Ints64 = npt.NDArray[np.int64]


class Randomness(Protocol):
    """A source of independent draws. No draw is ever given twice."""

    @property
    def repeatable(self) -> bool:
        """Whether someone who knows a seed can draw the same again, and take the noise off."""

    def uniform(self, n: int) -> Floats64:
        """(n,) uniform on the multiples of 2^-53 in [0, 1)."""

    def normal(self, n: int) -> Floats32:
        """(n,) standard normals."""

    def rounded_normal(self, deviation: float, n: int) -> Ints64:
        """(n,) normals of mean 0 and `deviation`, each rounded to the nearest whole number.

        Raises:
            ValueError: `deviation` is not from 0 to `LARGEST_DEVIATION`.
        """


class SystemRandomness:
    """Draws that nobody can repeat or foresee.

    Each call encrypts zeros with AES-256 in counter mode under a key of its own from the operating
    system, which does not outlive the call. So no keystream is used twice, by other objects,
    threads or forked processes neither, and a call of 2^32 draws is still far below where the
    cipher could be told from randomness (2^64 blocks).

    `rounded_normal` has the distribution P(k) = Phi((k + 1/2) / s) - Phi((k - 1/2) / s), s the
    deviation, to within 2^-180 in total variation a draw. It inverts Phi in float64 and takes the
    answer only where no error within a tested bound could change the rounding; elsewhere, and
    beyond 5 deviations, it draws more bits and computes with 320 (interval refining: Haney et al.,
    "Precision-based Attacks and Interval Refining: How to Break, Then Fix, Differential Privacy on
    Finite Computers", 2022). Time is not constant: a draw beyond 5 deviations, one in two million,
    takes milliseconds.
    """

    repeatable = False

    def uniform(self, n: int) -> Floats64:
        """(n,) uniform on the multiples of 2^-53 in [0, 1)."""
        return (_keystream(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, n: int) -> Floats32:
        """(n,) standard normals rounded to multiples of `NORMAL_GRID`, exact in float32.

        To protect x with them, x must be on the grid too: x in units of the noise's deviation,
        rounded to a multiple of `NORMAL_GRID`, which moves d coordinates by at most
        `NORMAL_GRID` x sqrt(d) further apart (L2). What is done to the sum is post-processing,
        the rounding of the float addition included.
        """
        return self.rounded_normal(1 / NORMAL_GRID, n).astype(np.float32) * np.float32(NORMAL_GRID)

    def rounded_normal(self, deviation: float, n: int) -> Ints64:
        """(n,) normals of mean 0 and `deviation`, each rounded to the nearest whole number.

        Raises:
            ValueError: `deviation` is not from 0 to `LARGEST_DEVIATION`.
        """
        _check(deviation)
        bits = _keystream(n)
        # One bit is the sign (0 or -1), 63 say in which tail of at most 1/2 the normal lies.
        sign = bits.view(np.int64) >> 63
        tail = (bits & np.uint64(2**63 - 1)).view(np.int64)
        size = -ndtri((tail.astype(np.float64) + 0.5) * 2.0**-64)
        scaled = size * deviation
        rounded = np.rint(scaled)
        unsure = np.abs(scaled - rounded) > 0.5 - deviation * _ERROR
        unsure |= size > _FAST
        whole: Ints64 = rounded.astype(np.int64)
        for i in np.flatnonzero(unsure):
            more = int.from_bytes(urandom(_MORE_BITS // 8))
            whole[i] = _refined(deviation, int(tail[i]), more)
        return (whole ^ sign) - sign


class SeededRandomness:
    """Draws that the same seed repeats: for simulations, no protection.

    Who knows the seed knows who was drawn and can take the noise off. Normals are numpy's, in
    floating point, with none of `SystemRandomness`'s defences.
    """

    repeatable = True

    def __init__(self, *seed: int) -> None:
        """Start from `seed`: numbers of which each other combination gives other draws."""
        self._seed = seed
        self._streams: dict[int, np.random.Generator] = {}

    def uniform(self, n: int) -> Floats64:
        """(n,) uniform on the multiples of 2^-53 in [0, 1)."""
        return self._stream(0).random(n)

    def normal(self, n: int) -> Floats32:
        """(n,) standard normals."""
        return self._stream(1).standard_normal(n, dtype=np.float32)

    def rounded_normal(self, deviation: float, n: int) -> Ints64:
        """(n,) normals of mean 0 and `deviation`, each rounded to the nearest whole number.

        Raises:
            ValueError: `deviation` is not from 0 to `LARGEST_DEVIATION`.
        """
        _check(deviation)
        return np.rint(self._stream(2).standard_normal(n) * deviation).astype(np.int64)

    def _stream(self, kind: int) -> np.random.Generator:
        """Of one kind of draw, begun when it is first asked for."""
        if kind not in self._streams:
            seed: Any = _Seed(*self._seed, kind)
            self._streams[kind] = np.random.Generator(np.random.PCG64(seed))
        return self._streams[kind]


class _Seed(ISeedSequence):
    """Numbers, hashed: numpy's own `SeedSequence` takes five times as long."""

    def __init__(self, *numbers: int) -> None:
        self._hash = hashlib.shake_256(",".join(map(str, numbers)).encode())

    def generate_state(
        self, n_words: int, dtype: npt.DTypeLike = np.uint32
    ) -> npt.NDArray[np.uint32 | np.uint64]:
        """(n_words,) what a generator starts from."""
        kind = np.dtype(dtype)
        return np.frombuffer(self._hash.digest(n_words * kind.itemsize), dtype=kind)


def _check(deviation: float) -> None:
    if not 0 <= deviation <= LARGEST_DEVIATION:
        raise ValueError(f"deviation={deviation}: must be from 0 to {LARGEST_DEVIATION:.0f}")


def _keystream(n: int) -> npt.NDArray[np.uint64]:
    """(n,) uniform numbers of 64 bits."""
    encryptor = Cipher(AES(urandom(32)), CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * n)), dtype=np.uint64)


def _refined(deviation: float, tail: int, more: int) -> int:
    """|normal| x deviation, rounded; its tail is `tail`, then the bits of `more`, x 2^-64."""
    exact = mp.clone()  # of its own: threads would change one another's precision
    exact.prec = 320
    # Half a last bit keeps a tail of 0 finite.
    chance = exact.ldexp(2 * ((tail << _MORE_BITS) + more) + 1, -_MORE_BITS - 65)
    size = exact.sqrt(2) * exact.erfinv(1 - 2 * chance)
    return int(exact.floor(size * deviation + exact.mpf(0.5)))
