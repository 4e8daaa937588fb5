"""The proof for any model on any device: every restore point against a cold run.

First the device is probed: the same prompt read cold with different slices. Where all of them give
the same bits, hot must equal cold bit for bit everywhere. Where the shape of a slice changes the last
bits (Metal), the probe's largest difference is the bound in the default mode, and exact mode must
still be bit-equal.

With quantized keys and values the cold runs are mlx-lm's own: its caches, which it quantizes itself when
they have read up to the start.
"""

from .one_machine import verify
from .proof import GREEDY_TOKENS, Comparison, Point, Proof
from .ranks import verify_on_ranks
from .reader import MARGIN, Reader, probe

__all__ = [
    "GREEDY_TOKENS",
    "MARGIN",
    "Comparison",
    "Point",
    "Proof",
    "Reader",
    "probe",
    "verify",
    "verify_on_ranks",
]
