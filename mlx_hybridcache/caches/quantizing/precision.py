"""What keys and values are quantized to, and from which position on."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import SettingError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
"""What `mx.quantize` takes."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Affine quantization: `bits` an element, a scale and a bias for each `group_size` of them.

    Up to position `start` a model reads in full precision; what it reads behind that looks at quantized
    rows only. Raises `SettingError` for what MLX cannot do.
    """

    bits: int
    group_size: int = 64
    start: int = 0

    def __post_init__(self) -> None:
        for name, found, known in (
            ("kv_bits", self.bits, BITS),
            ("kv_group_size", self.group_size, GROUP_SIZES),
        ):
            if isinstance(found, bool) or found not in known:
                choices = ", ".join(map(str, known))
                raise SettingError(f"{name} is {found!r}; MLX quantizes with one of {choices}.")
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise SettingError(
                f"quantized_kv_start is {self.start!r}; a whole number of tokens, 0 or more, is needed."
            )

    def fits(self, dim: int) -> bool:
        """Whether rows of `dim` elements are whole groups."""
        return dim > 0 and dim % self.group_size == 0

    def widths(self, dim: int) -> tuple[int, int, int]:
        """Of one quantized row of `dim` elements: words of 32 bits, scales, biases."""
        groups = dim // self.group_size
        return dim * self.bits // 32, groups, groups
