"""Seeds that follow from the request's: the same request draws the same tokens, and no two jobs of it draw the same."""

from __future__ import annotations

from hashlib import blake2b

# Indices of derived seeds: from 0 on those of chains, nodes and jobs in parts, from -1 down those of `tree_write`.
CONTINUED, SEGMENTS = -1_000, -1_001


def chain_seed(seed: int, index: int) -> int:
    """Seed of chain `index`, in [0, 2**63): depends on nothing but the request's seed and the index."""
    digest = blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def successor(seed: int | None, index: int = CONTINUED) -> int | None:
    """The seed of what goes on with a job of this one: the same would draw the same random numbers again."""
    return None if seed is None else chain_seed(seed, index)
