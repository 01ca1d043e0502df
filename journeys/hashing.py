"""Stable hashes: the same number for the same visitor on every machine and in every run.

They stand in for randomness wherever a choice must depend on one visitor alone (which touchpoint
is judged, who is held out), so that adding a visitor changes nothing for the others.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import polars as pl
import polars_hash  # noqa: F401  (registers the namespace `nchash`)


def hash_text(text: pl.Expr) -> pl.Expr:
    """The 64-bit wyhash (UInt64) of a String expression; null stays null.

    64 bits: among 10 million visitors two share a key with probability 3e-6. The hash has no
    secret, so it hides nobody: keys are as personal as the ids and stay at the site.
    """
    hashed: pl.Expr = text.nchash.wyhash()  # type: ignore[attr-defined]
    return hashed


def draw(visitors: npt.NDArray[np.uint64], purpose: str, seed: int = 0) -> npt.NDArray[np.uint64]:
    """One uniform 64-bit number a visitor, fixed by (visitor key, purpose, seed).

    Numbers of two purposes or seeds are independent. SplitMix64's finaliser (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
    """
    salt = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    mixed = visitors + np.uint64(int.from_bytes(salt, "little"))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def draw_fraction(
    visitors: npt.NDArray[np.uint64], purpose: str, seed: int = 0
) -> npt.NDArray[np.float64]:
    """`draw` as a number in [0, 1)."""
    return (draw(visitors, purpose, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
