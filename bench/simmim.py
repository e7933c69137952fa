"""The main job on real pictures: SimMIM trained twice from the same seed, with stock modules and with ours swapped in.

Both models see the same crops and the same masks, step by step in turn, so that their losses can be compared one by one
and their times are taken side by side.

Source: "SimMIM: A Simple Framework for Masked Image Modeling", https://arxiv.org/abs/2111.09886.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastattn
from fastattn.bench import memory
from fastattn.bench.contenders import OURS, authors_l1_loss
from fastattn.bench.images import Crops
from fastattn.bench.records import Record
from fastattn.bench.timing import Sentinel, Timing, keep_samples, percentile, round_ratios

STOCK = "stock"
VARIANTS = (STOCK, OURS)
MASK_PATCH = 32
MASK_RATIO = 0.6
COMPARED_STEPS = 20
# Largest relative difference of the losses over the compared steps. Training amplifies every rounding: moving the stock
# parameters by one rounding each, which is done beside, changes the losses of these steps by up to 1e-5 as well.
AGREEMENT = 1e-4
SETTLING_STEPS = 3  # not timed: first calls allocate and load
AUTHORS_EPS = 1e-5  # what the authors add to the number of masked pixels


@dataclass(frozen=True)
class Settings:
    """The model and its training. ``size``: side of the crops in pixels, a multiple of 32."""

    steps: int = 200
    size: int = 192
    seed: int = 0
    batch_size: int = 4
    patch: int = 8
    embed_dim: int = 96
    depth: int = 3
    heads: int = 3
    learning_rate: float = 2e-3
    warmup_steps: int = 40


@dataclass
class Outcome:
    """``losses`` and ``timings`` by variant; ``pictures`` are uint8 (n, size, size, 3): original, masked and
    reconstructed by our variant."""

    record: Record
    losses: dict[str, list[float]]
    timings: dict[str, Timing]
    pictures: dict[str, np.ndarray]


def stock_loss(prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    """The authors' loss with the arguments that `fastattn.SimMIM` passes."""
    return authors_l1_loss(prediction, images, mask, patch_size)


def make_model(settings: Settings, variant: str) -> nn.Module:
    """SimMIM over a small ViT. The seed gives both variants the same parameters."""
    torch.manual_seed(settings.seed)
    encoder = fastattn.ViTEncoder(settings.size, settings.patch, settings.embed_dim, settings.depth, settings.heads)
    patch_mask = make_patch_mask(settings)
    if variant == STOCK:
        return fastattn.SimMIM(encoder, patch_mask, loss=stock_loss)
    model = fastattn.SimMIM(encoder, patch_mask, loss="l1")
    fastattn.replace_multihead_attention(model)
    return model


def make_patch_mask(settings: Settings) -> fastattn.PatchMask:
    return fastattn.PatchMask(settings.size, MASK_PATCH, settings.patch, MASK_RATIO)


def moved_by_a_rounding(trainer: Trainer) -> Trainer:
    """Moves every parameter by about half a unit in the last place: the training that follows shows what float32 noise
    alone does to the losses."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.mul_(torch.where(up, 1 + 2.0**-23, 1 - 2.0**-24))
    return trainer


class Trainer:
    """One variant with its optimizer."""

    def __init__(self, settings: Settings, variant: str) -> None:
        self.model = make_model(settings, variant)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_share(settings, step))

    def step(self, images: Tensor, mask: Tensor) -> Tensor:
        """One training step; returns the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(images, mask)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def rate_share(settings: Settings, step: int) -> float:
    """The learning rate of a step over the largest: a linear rise, then half a cosine down to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def mask_of_step(settings: Settings, step: int) -> Tensor:
    """The mask of a step depends on the seed and the step alone."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000_000 + step)
    return make_patch_mask(settings)(settings.batch_size, generator=generator)


def memory_step(variant: str, **settings: Any) -> Callable[[], object]:
    """A training step of a variant on random pictures, for a fresh process to measure."""
    chosen = Settings(**settings)
    trainer = Trainer(chosen, variant)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(chosen.batch_size, 3, chosen.size, chosen.size, generator=generator)
    mask = mask_of_step(chosen, 0)
    return lambda: trainer.step(images, mask)


def run(
    settings: Settings,
    pictures: Sequence[Tensor],
    with_memory: bool = True,
    on_step: Callable[[int, Mapping[str, float]], None] | None = None,
) -> Outcome:
    """Trains both variants and compares them.

    pictures: uint8 (3, H, W) each. on_step gets the number of the finished step and the losses by variant.
    """
    crops = Crops(pictures, settings.size, settings.batch_size, settings.seed)
    trainers = {variant: Trainer(settings, variant) for variant in VARIANTS}
    moved = moved_by_a_rounding(Trainer(settings, STOCK))
    moved_losses: list[float] = []
    sentinel = Sentinel(torch.device("cpu"))
    losses: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for step in range(settings.steps):
        images, mask = crops.batch(step), mask_of_step(settings, step)
        before = sentinel.rate()
        for variant in VARIANTS if step % 2 else reversed(VARIANTS):
            start = time.perf_counter()
            loss = trainers[variant].step(images, mask)
            taken = time.perf_counter() - start
            after = sentinel.rate()
            losses[variant].append(float(loss))
            if step >= min(SETTLING_STEPS, settings.steps - 1):
                seconds[variant].append(taken)
                rates[variant].append(min(before, after))
            before = after
        if step < COMPARED_STEPS:
            moved_losses.append(float(moved.step(images, mask)))
        if on_step is not None:
            on_step(step + 1, {variant: series[-1] for variant, series in losses.items()})

    kept = dict(zip(VARIANTS, keep_samples([rates[v] for v in VARIANTS]), strict=True))
    timings = {v: Timing(tuple(seconds[v]), tuple(rates[v]), tuple(kept[v])) for v in VARIANTS}
    peaks: dict[str, memory.PeakMemory | str] = {}
    if with_memory:
        for variant in VARIANTS:
            peaks[variant] = memory.measure_fresh(
                {"kind": "SimMIM", "settings": {"variant": variant, **asdict(settings)}}
            )
    shown = reconstruct(trainers[OURS].model, crops, settings)
    return Outcome(_record(settings, losses, moved_losses, timings, peaks), losses, timings, shown)


def reconstruct(model: nn.Module, crops: Crops, settings: Settings, count: int = 4) -> dict[str, np.ndarray]:
    """The middle of the first pictures: original, masked and with the hidden part predicted."""
    images = crops.centres(count)
    generator = torch.Generator().manual_seed(settings.seed)
    mask = make_patch_mask(settings)(count, generator=generator)
    assert isinstance(model, fastattn.SimMIM)
    model.eval()
    hidden_as_mean, filled, _ = model.reconstruct(images, mask)
    return {
        "original": crops.to_pixels(images),
        "masked": crops.to_pixels(hidden_as_mean),
        "reconstructed": crops.to_pixels(filled),
    }


def agreement(stock: Sequence[float], ours: Sequence[float], steps: int = COMPARED_STEPS) -> float:
    """Largest relative difference of the losses over the first ``steps``."""
    pairs = list(zip(stock, ours, strict=True))[:steps]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def _record(
    settings: Settings,
    losses: dict[str, list[float]],
    moved_losses: list[float],
    timings: dict[str, Timing],
    peaks: dict[str, memory.PeakMemory | str],
) -> Record:
    difference = agreement(losses[STOCK], losses[OURS])
    ratios = round_ratios(timings[STOCK], timings[OURS])
    hidden_pixels = settings.batch_size * make_patch_mask(settings).mask_count * MASK_PATCH**2
    return {
        "record": "simmim",
        "suite": "simmim",
        "settings": asdict(settings),
        "losses": losses,
        "agreement": {
            "compared_steps": min(COMPARED_STEPS, settings.steps),
            "largest_relative_difference": difference,
            "criterion": AGREEMENT,
            "noise": agreement(losses[STOCK][: len(moved_losses)], moved_losses),
            # The authors divide by the number of hidden pixels plus 1e-5: a relative offset of the loss, not of ours.
            "authors_denominator_offset": AUTHORS_EPS / hidden_pixels,
            "pass": difference < AGREEMENT,
        },
        "time_per_step": {variant: timing.summary() for variant, timing in timings.items()},
        "ratio": {
            "median": percentile(ratios, 50),
            "p20": percentile(ratios, 20),
            "p80": percentile(ratios, 80),
        },
        "memory": {v: asdict(p) if isinstance(p, memory.PeakMemory) else {"reason": p} for v, p in peaks.items()},
    }
