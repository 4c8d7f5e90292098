"""`downsample`: the control that every method has to beat: the same image at fewer pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from visionselector_eval.baselines.contract.base import PixelCompressor


@dataclass(frozen=True, kw_only=True)
class Downsample(PixelCompressor):
    """Lowers the pixels instead of choosing tokens (the control of VTC-Bench).

    Acts before the vision encoder, on the pixels that the backbone's processor made: bicubic, anti-aliased, frame by
    frame. The token count that results is measured, never assumed: grids are whole numbers of tokens, so it is at most
    the budget's (canonical) or what the integer factor gives (`upstream_exact`).

    Source: VTC-Bench, arXiv 2510.07143. Upstream shrinks the original file by an integer factor s with
    retention 1/s^2 and resizes once more to the processor's grid; here one resize starts from the full row's pixels, so
    that min_pixels can never scale a small image up again and void the control.
    """

    name = "downsample"
    paper = "VTC-Bench, arXiv 2510.07143"
    deviations = (
        "one resize from the full row's pixels to the largest grid within K, where the paper shrinks the "
        "file by whole factors"
    )
    cost = "one resize; the vision encoder gets fewer pixels, too"

    def size(self, height: int, width: int, count: int) -> tuple[int, int]:
        """The lowered size of an image, in merged tokens.

        Args:
            height, width: tokens of one frame at full size.
            count: tokens that this frame may have, 1 <= count.

        Returns:
            (h, w), at least (1, 1). Canonical: the largest size of nearly the same aspect ratio with h*w <= count.
            `upstream_exact`: each side divided by the integer s nearest to 1/sqrt(r), rounded to whole tokens.
        """
        ratio = min(1.0, count / (height * width))
        if self.upstream_exact:
            s = max(1, round(1 / math.sqrt(ratio)))
            return max(1, round(height / s)), max(1, round(width / s))
        factor = math.sqrt(ratio)
        h, w = max(1, math.floor(height * factor)), max(1, math.floor(width * factor))
        if h * w > count:  # a very long image: the short side is already one token
            return (1, count) if w > h else (count, 1)
        # Both sides were rounded down: give the one that lost more its token back where the budget has room.
        for grow_h, grow_w in sorted(((1, 0), (0, 1)), key=lambda g: (h / height, w / width)[g[1]]):
            if h + grow_h <= height and w + grow_w <= width and (h + grow_h) * (w + grow_w) <= count:
                h, w = h + grow_h, w + grow_w
        return h, w
