"""SimMIM: masked image modelling with a learned mask token, a one-layer head and a loss over masked pixels only.

Source: "SimMIM: A Simple Framework for Masked Image Modeling", https://arxiv.org/abs/2111.09886, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.losses import (
    fuses_head,
    linear_masked_l1_loss,
    linear_masked_mse_loss,
    linear_masked_smooth_l1_loss,
    masked_l1_loss,
    masked_mse_loss,
    masked_smooth_l1_loss,
)

LossFunction = Callable[..., Tensor]
LOSSES: dict[str, LossFunction] = {
    "l1": masked_l1_loss,
    "l2": masked_mse_loss,
    "smooth_l1": masked_smooth_l1_loss,
}
_FUSED_LOSSES: dict[str, LossFunction] = {
    "l1": linear_masked_l1_loss,
    "l2": linear_masked_mse_loss,
    "smooth_l1": linear_masked_smooth_l1_loss,
}


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, int) and x > 0 for x in pair)):
        raise ValueError(f"{name} must be a positive int or a pair of them, got {value!r}")
    return pair[0], pair[1]


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    return value


class PatchMask:
    """Random patch-aligned masks, drawn as in SimMIM: each image hides the same number of mask patches.

    Args:
        input_size: height and width of the images in pixels, an int or a pair.
        mask_patch_size: side in pixels of the squares that are hidden whole.
        model_patch_size: side in pixels of the encoder's patches; divides `mask_patch_size`.
        mask_ratio: part of the mask patches to hide, in [0, 1].

    Attributes:
        grid_size: mask patches down and across.
        token_count: mask patches of an image.
        mask_count: mask patches hidden in every image, ``ceil(token_count * mask_ratio)``.

    Raises:
        ValueError: a size is not positive or does not divide, or the ratio is outside [0, 1].
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 192,
        mask_patch_size: int = 32,
        model_patch_size: int = 4,
        mask_ratio: float = 0.6,
    ) -> None:
        self.input_size = _pair("input_size", input_size)
        self.mask_patch_size = _positive("mask_patch_size", mask_patch_size)
        self.model_patch_size = _positive("model_patch_size", model_patch_size)
        if any(size % mask_patch_size for size in self.input_size):
            raise ValueError(f"mask_patch_size must divide input_size {self.input_size}, got {mask_patch_size}")
        if mask_patch_size % model_patch_size:
            raise ValueError(f"model_patch_size must divide mask_patch_size {mask_patch_size}, got {model_patch_size}")
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio must be in [0, 1], got {mask_ratio!r}")
        self.mask_ratio = mask_ratio
        self.grid_size = (self.input_size[0] // mask_patch_size, self.input_size[1] // mask_patch_size)
        self.token_count = self.grid_size[0] * self.grid_size[1]
        self.mask_count = math.ceil(self.token_count * mask_ratio)

    def __call__(
        self, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw a mask for each of `batch_size` images: bool (B, grid_size[0], grid_size[1]), True = hidden.

        Drawn on the generator's device (torch's default CPU generator without one, so that ``torch.manual_seed`` gives
        the same masks on every device), then moved to `device`.
        """
        if not isinstance(batch_size, int) or batch_size < 0:
            raise ValueError(f"batch_size must be a non-negative int, got {batch_size!r}")
        source = torch.device("cpu") if generator is None else generator.device
        order = torch.rand(batch_size, self.token_count, generator=generator, device=source).argsort(dim=1)
        mask = torch.zeros(batch_size, self.token_count, dtype=torch.bool, device=source)
        mask.scatter_(1, order[:, : self.mask_count], True)
        return mask.unflatten(1, self.grid_size).to(source if device is None else device)

    def to_model_grid(self, mask: Tensor) -> Tensor:
        """A mask on the grid of mask patches, repeated on the grid of the encoder's patches."""
        if mask.dim() != 3 or mask.shape[1:] != self.grid_size:
            raise ValueError(f"mask must have shape (B, {self.grid_size[0]}, {self.grid_size[1]}), got {mask.shape}")
        return _repeat(mask, self.mask_patch_size // self.model_patch_size)

    def __repr__(self) -> str:
        return (
            f"PatchMask(input_size={self.input_size}, mask_patch_size={self.mask_patch_size}, "
            f"model_patch_size={self.model_patch_size}, mask_ratio={self.mask_ratio})"
        )


def _repeat(mask: Tensor, times: int) -> Tensor:
    return mask.repeat_interleave(times, 1).repeat_interleave(times, 2)


class Encoder(Protocol):
    """What `SimMIM` asks of an encoder. `ViTEncoder` is one.

    An encoder whose output tokens stand for larger patches than its input tokens (Swin) also has `output_dim` and
    `output_patch_size`; otherwise these are `embed_dim` and `patch_size`.
    """

    embed_dim: int
    patch_size: int
    in_channels: int

    def patch_embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, H/p · W/p, embed_dim), without position."""

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens as `patch_embed` gives them, to features (B, H/q · W/q, output_dim)."""


class SimMIM(nn.Module):
    """Train an encoder to predict the raw pixels of hidden patches.

    The embedded tokens of hidden patches are replaced by one learned token; the encoder sees all tokens; one linear
    layer predicts the pixels of each patch; the loss counts hidden pixels only.

    Args:
        encoder: see `Encoder`.
        patch_mask: draws the masks when `forward` gets none.
        loss: "l1" (the published loss), "l2", "smooth_l1", or a callable
            ``loss(prediction, images, mask, patch_size=p)`` with prediction and images (B, C, H, W) and the bool mask
            (B, H/p, W/p) on the encoder's patch grid.
        normalize_target: predict the pixels of each encoder patch shifted and scaled to mean 0 and variance 1, as MAE
            does. Not with a callable.

    Raises:
        ValueError: `loss` is unknown, or the sizes of `patch_mask` and `encoder` differ.
    """

    def __init__(
        self,
        encoder: Encoder,
        patch_mask: PatchMask | None = None,
        *,
        loss: str | LossFunction = "l1",
        normalize_target: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(loss, str) and loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, or a callable; got {loss!r}")
        if not isinstance(loss, str) and not callable(loss):
            raise TypeError(f"loss must be a str or a callable, got {type(loss).__name__}")
        if normalize_target and not isinstance(loss, str):
            raise ValueError("normalize_target must be False with a callable loss, which gets the images as they are")
        for name in ("embed_dim", "patch_size", "in_channels", "patch_embed", "forward_tokens"):
            if not hasattr(encoder, name):
                raise TypeError(f"encoder must have {name} (see fastattn.nn.simmim.Encoder), {type(encoder)} has not")
        self.encoder = encoder
        self.patch_size = encoder.patch_size
        self.output_patch_size = getattr(encoder, "output_patch_size", self.patch_size)
        if patch_mask is not None and patch_mask.model_patch_size != self.patch_size:
            raise ValueError(
                f"patch_mask has model_patch_size {patch_mask.model_patch_size}, the encoder's is {self.patch_size}"
            )
        self.patch_mask = patch_mask
        self.loss = loss
        self.normalize_target = normalize_target
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        output_dim = getattr(encoder, "output_dim", encoder.embed_dim)
        self.head = nn.Linear(output_dim, encoder.in_channels * self.output_patch_size**2)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of predicting `images` (B, C, H, W) from what `mask` leaves of them.

        mask: bool (B, H/m, W/m), True = hidden, on the grid of mask patches or any grid whose cells are whole encoder
        patches; drawn from `patch_mask`, with `generator`, when None.
        """
        mask = self._model_mask(images, mask, generator)
        features = self._features(images, mask)
        if isinstance(self.loss, str) and self._is_plain_head() and fuses_head(features):
            return _FUSED_LOSSES[self.loss](
                *(features, self.head.weight, self.head.bias, images, mask),
                patch_size=self.patch_size,
                normalize_target=self.normalize_target,
            )
        prediction = self._pixels(features, images)
        if not isinstance(self.loss, str):
            return self.loss(prediction, images, mask, patch_size=self.patch_size)
        return LOSSES[self.loss](
            prediction, images, mask, patch_size=self.patch_size, normalize_target=self.normalize_target
        )

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures to look at: the images with hidden patches set to 0, with hidden patches filled in by the model, and
        the mask bool (B, 1, H, W). With `normalize_target`, predictions are put back into the range of the images.
        """
        mask = self._model_mask(images, mask, generator)
        prediction = self._pixels(self._features(images, mask), images)
        if self.normalize_target:
            target = F.pixel_unshuffle(images, self.patch_size)  # (B, C p², H/p, W/p)
            variance, mean = torch.var_mean(target, dim=1, keepdim=True)
            patches = F.pixel_unshuffle(prediction, self.patch_size) * (variance + 1e-6).sqrt() + mean
            prediction = F.pixel_shuffle(patches, self.patch_size)
        hidden = _repeat(mask, self.patch_size).unsqueeze(1)
        return images.masked_fill(hidden, 0.0), torch.where(hidden, prediction, images), hidden

    def _model_mask(self, images: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Check images and mask; the mask on the grid of the encoder's patches."""
        if images.dim() != 4 or images.shape[1] != self.encoder.in_channels:
            raise ValueError(f"images must have shape (B, {self.encoder.in_channels}, H, W), got {tuple(images.shape)}")
        batch, _, height, width = images.shape
        cell = max(self.patch_size, self.output_patch_size)
        if height % cell or width % cell:
            raise ValueError(f"images must have sides divisible by {cell}, got {height} x {width}")
        if mask is None:
            if self.patch_mask is None:
                raise ValueError("mask must be given: this SimMIM has no patch_mask to draw one from")
            if self.patch_mask.input_size != (height, width):
                raise ValueError(
                    f"images must be of patch_mask's input_size {self.patch_mask.input_size}, got {height} x {width}"
                )
            mask = self.patch_mask(batch, generator=generator, device=images.device)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = hidden), got {mask.dtype}")
        rows, columns = height // self.patch_size, width // self.patch_size
        times = rows // mask.shape[1] if mask.dim() == 3 and mask.shape[1] else 0  # encoder patches in a mask cell
        if not times or (mask.shape[0], mask.shape[1] * times, mask.shape[2] * times) != (batch, rows, columns):
            raise ValueError(
                f"mask must have shape ({batch}, {rows} / n, {columns} / n) for a whole n, got {tuple(mask.shape)}"
            )
        return _repeat(mask, times)

    def _is_plain_head(self) -> bool:
        """Whether the head is a linear layer, watched and replaced by nobody, and predicts the patches of the mask."""
        head = self.head
        return (
            self.output_patch_size == self.patch_size
            and type(head) is nn.Linear
            and "forward" not in vars(head)
            and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        )

    def _features(self, images: Tensor, mask: Tensor) -> Tensor:
        """What the head predicts from, (B, N', E')."""
        tokens = self.encoder.patch_embed(images)  # (B, N, E)
        tokens = torch.where(mask.flatten(1).unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.forward_tokens(tokens)

    def _pixels(self, features: Tensor, images: Tensor) -> Tensor:
        """Predicted pixels (B, C, H, W)."""
        pixels = self.head(features)  # (B, N', C q²)
        # As pixel_shuffle, which would hand the layout of the tokens on; the loss reads images row by row.
        side = self.output_patch_size
        grid = (images.shape[2] // side, images.shape[3] // side)
        patches = pixels.unflatten(2, (-1, side, side)).unflatten(1, grid)  # (B, H/q, W/q, C, q, q)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


class ViTBlock(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float, attention: Callable[..., nn.Module]) -> None:
        super().__init__()
        hidden = int(embed_dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attention = attention(embed_dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm1(tokens)
        tokens = tokens + self.attention(x, x, x, need_weights=False)[0]
        return tokens + self.mlp(self.norm2(tokens))


class ViTEncoder(nn.Module):
    """A small vision transformer without a class token, with fixed sine-cosine positions; an `Encoder` for `SimMIM`.

    Args:
        image_size: height and width in pixels, an int or a pair.
        patch_size: side of a patch in pixels; divides `image_size`.
        embed_dim: features of a token; divisible by 4 (positions) and by `num_heads`.
        depth: number of blocks.
        num_heads: heads of each attention.
        mlp_ratio: hidden features of the perceptron, over `embed_dim`.
        in_channels: channels of the images.
        attention: a class with the constructor and call of `torch.nn.MultiheadAttention`. The default is torch's own,
            which ``fastattn.replace_multihead_attention(model)`` swaps as it does in anybody's model.

    Source: "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
    """

    positions: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int] = 192,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 6,
        num_heads: int = 3,
        *,
        mlp_ratio: float = 4.0,
        in_channels: int = 3,
        attention: Callable[..., nn.Module] = nn.MultiheadAttention,
    ) -> None:
        super().__init__()
        self.image_size = _pair("image_size", image_size)
        self.patch_size = _positive("patch_size", patch_size)
        self.embed_dim = _positive("embed_dim", embed_dim)
        self.in_channels = _positive("in_channels", in_channels)
        if any(size % patch_size for size in self.image_size):
            raise ValueError(f"patch_size must divide image_size {self.image_size}, got {patch_size}")
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be divisible by 4, got {embed_dim}")
        self.projection = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        rows, columns = self.image_size[0] // patch_size, self.image_size[1] // patch_size
        self.register_buffer("positions", _sine_cosine(rows, columns, embed_dim), persistent=False)
        self.blocks = nn.ModuleList(ViTBlock(embed_dim, num_heads, mlp_ratio, attention) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)

    def patch_embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, N, E), without position."""
        return self.projection(images).flatten(2).transpose(1, 2)

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, E) to features (B, N, E)."""
        tokens = tokens + self.positions.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to features (B, N, E)."""
        return self.forward_tokens(self.patch_embed(images))


def _sine_cosine(rows: int, columns: int, dim: int) -> Tensor:
    """2-D positions (1, rows · columns, dim): a half for the row, a half for the column, each sines then cosines."""
    frequencies = torch.pow(10000.0, -torch.arange(dim // 4) / (dim // 4))

    def encode(positions: Tensor) -> Tensor:  # (n,) -> (n, dim / 2)
        angles = positions[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)

    row, column = encode(torch.arange(rows)), encode(torch.arange(columns))
    grid = (rows, columns, dim // 2)
    return torch.cat((row[:, None].expand(grid), column[None].expand(grid)), dim=-1).reshape(1, rows * columns, dim)
