"""Seeds from named parts, so that changing one part of a run leaves the others' randomness alone."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """A seed below 2**31 from named parts, the same on every machine.

    >>> derive_seed("order", 0) == derive_seed("order", 0) != derive_seed("order", 1)
    True
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31
