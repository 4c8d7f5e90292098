"""Trained token fusion for LLaVA-1.5, 576 -> 144 tokens: LLaVA-STF's projector and a LLaVA that has it.

Multi-Block Token Fusion joins what several blocks of the vision tower know of a patch, Spatial Token Fusion makes one
token of each window of 2x2 patches (arXiv 2506.07138). It stands where LLaVA's projector stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from visionselector_eval.baselines.contract.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = (-2, 21, 18, 15, 12, 9, 6, 3)
"""Hidden states that the published model reads, in the order of their channels; 0 is the embeddings."""
WINDOW = 2
"""Patches along one side of a window, as published."""


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of the four linear layers; `LlavaConfig.token_fusion` holds them as plain data.

    Attributes:
        layers: hidden states of the vision tower, in the order in which their channels are joined.
        fusion_hidden: size inside the fusion of blocks, 4 w for a tower of width w.
        spatial_hidden: size inside the fusion of windows, 16 w.
        window: patches along one side of a window.
    """

    layers: tuple[int, ...]
    fusion_hidden: int
    spatial_hidden: int
    window: int = WINDOW

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        sizes = (self.fusion_hidden, self.spatial_hidden, self.window)
        if not self.layers or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise InputError(f"token fusion needs layers and sizes of at least 1, got {asdict(self)}")

    @classmethod
    def published(cls, width: int, layers: Sequence[int] = LAYERS) -> FusionConfig:
        """The published sizes for a vision tower of `width`; LLaVA-1.5's 1024 gives 4096 and 16384."""
        return cls(tuple(layers), 4 * width, WINDOW * WINDOW * 4 * width)

    @classmethod
    def of(cls, config: Any) -> FusionConfig:
        """What a `LlavaConfig` with `token_fusion` says, checked against its vision tower.

        Sizes that are left out are the published ones.

        Raises:
            InputError: an unknown field, hidden states that the tower does not have, a grid of patches that windows do
                not divide.
        """
        said, tower = config.token_fusion, config.vision_config
        if not isinstance(said, Mapping):
            raise InputError(f"token_fusion of a LLaVA configuration must be a mapping, got {said!r}")
        if unknown := sorted(set(said) - {field.name for field in fields(cls)}):
            raise InputError(f"token_fusion of a LLaVA configuration has no field '{unknown[0]}'")
        standard = cls.published(tower.hidden_size, said.get("layers", LAYERS))
        made = cls(**{**asdict(standard), **said})
        made.check(config)
        return made

    def check(self, config: Any) -> None:
        """See `of`."""
        tower = config.vision_config
        depth = tower.num_hidden_layers
        if outside := [layer for layer in self.layers if not -depth - 1 <= layer <= depth]:
            raise InputError(
                f"token fusion reads hidden state {outside[0]} of the vision tower, which has 0 to {depth}: "
                "give other layers"
            )
        side = tower.image_size // tower.patch_size
        if side % self.window:
            raise InputError(
                f"token fusion joins windows of {self.window}x{self.window} patches, but images of this vision tower "
                f"have {side}x{side}: the sides must be multiples of {self.window}"
            )
        read = config.vision_feature_layer
        if list(self.layers) != (read if isinstance(read, list) else [read]):
            raise InputError(
                f"token fusion reads layers {list(self.layers)}, but vision_feature_layer of its configuration is "
                f"{read}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `LlavaConfig.token_fusion`."""
        return {**asdict(self), "layers": list(self.layers)}


def square_grid(count: int) -> tuple[int, int]:
    """(h, w) of a square image of `count` patches.

    Raises:
        InputError: no square number.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(
            f"token fusion got {count} patches, which are no square: pad images to a square, or give the grid"
        )
    return side, side


def to_windows(features: Tensor, grid: tuple[int, int], window: int = WINDOW) -> Tensor:
    """The channels of each window's patches side by side, channel by channel.

    Args:
        features: (B, h * w, C), patches in raster order.
        grid: (h, w), both multiples of `window`.

    Returns:
        (B, h * w / window^2, C * window^2): windows in raster order; channels of a window of 2 as c0 of the patches (0,
        0), (0, 1), (1, 0), (1, 1), then c1 of the same, and so on. A linear layer on this is a convolution of that
        stride.

    Raises:
        InputError: another number of patches than the grid has, or sides that are no multiples of `window`.
    """
    batch, count, channels = features.shape
    h, w = grid
    if count != h * w:
        raise InputError(f"token fusion got {count} patches for a grid of {h}x{w}")
    if h % window or w % window:
        raise InputError(
            f"token fusion joins windows of {window}x{window} patches, but the image has {h}x{w}: both sides must be "
            f"multiples of {window}"
        )
    split = features.view(batch, h // window, window, w // window, window, channels)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(batch, count // window**2, channels * window**2)


class TokenFusion(nn.Module):
    """From hidden states of several blocks to one token for each window of patches, in the LLM's width.

    Args:
        config: sizes.
        width: of the vision tower, w.
        out: of the LLM, d.

        Source: LLaVA-STF, arXiv 2506.07138. Each fusion is linear, GELU, linear, without a residual path, as in the
            code published with it; the paper's figure draws one more 1x1 convolution, and a GELU after each.
    """

    def __init__(self, config: FusionConfig, width: int, out: int) -> None:
        super().__init__()
        self.config, self.width, self.out = config, width, out
        self.window = config.window
        self.multi_block = nn.Sequential(
            nn.Linear(len(config.layers) * width, config.fusion_hidden),
            nn.GELU(),
            nn.Linear(config.fusion_hidden, width),
        )
        self.spatial = nn.Sequential(
            nn.Linear(config.window**2 * width, config.spatial_hidden),
            nn.GELU(),
            nn.Linear(config.spatial_hidden, out),
        )

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Tokens for the LLM.

        Args:
            features: (B, N, L * w) hidden states of `config.layers`, joined along channels in that order, without CLS;
                patches in raster order.
            grid: (h, w) of the patches, N = h * w; a square by default.

        Returns:
            (B, N / window^2, d), windows in raster order.

        Raises:
            InputError: N that is no square (without `grid`), sides that windows do not divide.
        """
        grid = square_grid(features.shape[1]) if grid is None else grid
        return self.spatial(to_windows(self.multi_block(features), grid, self.window))

    def fit(self, config: Any, name: str) -> None:
        """Refuse a `LlavaConfig` whose vision tower or LLM has another width; `name` says where the fusion is from.

        Raises:
            InputError: another width.
        """
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        if (self.width, self.out) != (width, out):
            raise InputError(
                f"token fusion '{name}' is for a vision tower of width {self.width} and an LLM of width {self.out}, "
                f"but the backbone has {width} and {out}"
            )


class FusedLlava(LlavaForConditionalGeneration):
    """transformers' LLaVA with `TokenFusion` as its projector; `config.token_fusion` says the sizes."""

    def __init__(self, config: Any) -> None:
        fusion = FusionConfig.of(config)
        super().__init__(config)
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.model.multi_modal_projector = TokenFusion(fusion, width, out)
        self.post_init()


def fuse(plain: Any, fusion: TokenFusion) -> FusedLlava:
    """A LLaVA with `fusion` for a projector, made of the parts of a plain one, which is used up.

    Args:
        plain: LlavaForConditionalGeneration.
        fusion: of the plain one's widths.

    Raises:
        InputError: widths, layers or a grid of patches that do not fit.
    """
    config = plain.config
    fusion.fit(config, "given")
    config.vision_feature_layer = list(fusion.config.layers)
    config.token_fusion = fusion.config.as_dict()
    side = config.vision_config.image_size // config.vision_config.patch_size
    config.image_seq_length = (side // fusion.window) ** 2
    with torch.device("meta"):  # every part is replaced
        made = FusedLlava(config)
    made.model.vision_tower = plain.model.vision_tower
    made.model.language_model = plain.model.language_model
    made.model.multi_modal_projector = fusion
    made.lm_head = plain.lm_head
    made.generation_config = plain.generation_config
    return made.eval()
