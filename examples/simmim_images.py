"""SimMIM on pictures: hide parts of photographs and of handwritten digits, learn to paint them in, then read digits.

An encoder, a ViT or one with Swin's shifted windows, is trained to predict hidden pixels from the others. The pictures
are scikit-image's photographs and one half of scikit-learn's digits, without their labels. Then it is fine-tuned with
100 labelled digits and compared with the same encoder from random parameters: the same labels, batches, learning rates
and number of labelled steps. So the comparison is about labels: the pretrained encoder has seen more pictures and has
had more steps in all.

Criterion, at the defaults and with --model swin: on digits that no training saw, the loss on hidden pixels is at most
half that of filling in one colour, the middle of the visible pixels; and of these digits the pretrained encoder reads
more than the one from scratch, by at least 5 points of accuracy.

    python examples/simmim_images.py --output simmim_images.png
    python examples/simmim_images.py --model swin --loss l2 --normalize-target
    python examples/simmim_images.py --steps 200 --checkpoint run.pt
    python examples/simmim_images.py --steps 400 --resume run.pt

Sources: SimMIM, https://arxiv.org/abs/2111.09886; Swin, https://arxiv.org/abs/2103.14030.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fastattn
from fastattn.bench.images import MEAN, STD, Crops, photographs
from fastattn.nn.simmim import LOSSES

SIZE, PATCH = 32, 4  # of the pictures and the encoders' patches, in pixels
MASK_PATCH, MASK_RATIO = 8, 0.5
PHOTOGRAPHS, DIGITS = 8, 24  # of a batch
FEATURES = 64  # of what both encoders give for a token
PRETRAINING_RATE, TUNING_RATE, HEAD_RATE, WARMUP_STEPS = 3e-3, 1e-3, 1e-2, 20
CLASSES, LABELS_OF_A_CLASS, TUNING_BATCH = 10, 10, 32
SAVE_EVERY = 50
FORMAT = "fastattn example simmim_images 1"


class WindowAttention(nn.Module):
    """Attention among the tokens of each window x window square, with a learned bias for each relative position.

    With `shift` the windows are moved by that many tokens down and right, around the edges; tokens that are no
    neighbours in the picture do not attend to each other.
    """

    bias_index: Tensor
    regions: Tensor

    def __init__(self, dim: int, heads: int, grid: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.zeros(heads, (2 * window - 1) ** 2))
        nn.init.trunc_normal_(self.bias_table, std=0.02)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[:, None] - place + window - 1  # (w², w², 2)
        self.register_buffer("bias_index", offset[..., 0] * (2 * window - 1) + offset[..., 1], persistent=False)
        side = torch.arange(grid)
        side = (side >= grid - window).long() + (side >= grid - shift)  # which tokens were neighbours before the roll
        self.register_buffer(
            "regions", self.split((side[:, None] * 3 + side)[None, ..., None])[..., 0], persistent=False
        )

    def split(self, x: Tensor) -> Tensor:
        """(B, G, G, C) to windows (B · (G/w)², w², C)."""
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))  # (B, G/w, w, G/w, w, C)
        return x.transpose(2, 3).reshape(-1, self.window**2, x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, G, G, C) to the same."""
        batch, grid = x.shape[:2]
        windows = self.split(x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B · (G/w)², H, w², D)
        regions = self.regions.repeat(batch, 1)
        mask = fastattn.Mask.segments(regions, regions) if self.shift else None
        out = fastattn.attention(q, k, v, mask=mask, bias=self.bias_table[None, :, self.bias_index])
        assert isinstance(out, Tensor)  # no lse beside it
        out = self.out(out.transpose(1, 2).flatten(2))
        out = out.view(batch, grid // self.window, grid // self.window, self.window, self.window, -1).transpose(2, 3)
        out = out.reshape(x.shape)
        return out.roll((self.shift, self.shift), (1, 2)) if self.shift else out


class SwinBlock(nn.Module):
    """Attention in windows, then a two-layer perceptron."""

    def __init__(self, dim: int, heads: int, grid: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, heads, grid, window, shift)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SwinEncoder(nn.Module):
    """Two stages of two blocks; between them each 2 x 2 tokens become one of twice the features. For `SimMIM`."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.patch_size, self.output_patch_size, self.in_channels = PATCH, 2 * PATCH, 3
        self.embed_dim, self.output_dim = FEATURES // 2, FEATURES
        self.grid = SIZE // PATCH
        self.projection = nn.Conv2d(3, self.embed_dim, PATCH, PATCH)
        self.positions = nn.Parameter(torch.zeros(1, self.grid**2, self.embed_dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.stage1 = nn.Sequential(
            SwinBlock(self.embed_dim, 1, self.grid, window, shift=0),
            SwinBlock(self.embed_dim, 1, self.grid, window, shift=window // 2),
        )
        self.merge = nn.Sequential(nn.LayerNorm(4 * self.embed_dim), nn.Linear(4 * self.embed_dim, FEATURES))
        # One window is all of this stage's picture: nothing to shift.
        self.stage2 = nn.Sequential(
            SwinBlock(FEATURES, 2, self.grid // 2, window, shift=0),
            SwinBlock(FEATURES, 2, self.grid // 2, window, shift=0),
            nn.LayerNorm(FEATURES),
        )

    def patch_embed(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        x = self.stage1((tokens + self.positions).unflatten(1, (self.grid, self.grid)))  # (B, G, G, C)
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)  # (B, G/2, G/2, 4 C)
        return self.stage2(self.merge(x)).flatten(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_tokens(self.patch_embed(images))


def make_encoder(model: str) -> SwinEncoder | fastattn.ViTEncoder:
    if model == "swin":
        return SwinEncoder()
    return fastattn.ViTEncoder(SIZE, PATCH, FEATURES, depth=2, num_heads=2, attention=fastattn.MultiheadAttention)


@dataclass
class Pictures:
    """Crops of photographs, and digits (n, 3, SIZE, SIZE) in three parts, two of them with labels (n,)."""

    crops: Crops
    unlabelled: Tensor
    labelled: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def load_pictures(seed: int) -> Pictures:
    """One half of the digits is held out, and of the other half ten of each digit keep their labels."""
    from sklearn.datasets import load_digits

    small = []  # smaller photographs, so that cropping takes no time
    for picture in photographs():
        scale = 3 * SIZE / min(picture.shape[1:])
        small.append(F.interpolate(picture[None].float(), scale_factor=scale, mode="bilinear", antialias=True)[0])
    digits = load_digits()
    images = F.interpolate(torch.from_numpy(digits.images).float()[:, None] / 16, size=SIZE, mode="bilinear")
    images = (images.expand(-1, 3, -1, -1) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    labels = torch.from_numpy(digits.target)
    training, held_out = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).chunk(2)
    chosen = torch.cat([training[labels[training] == digit][:LABELS_OF_A_CLASS] for digit in range(CLASSES)])
    return Pictures(
        Crops(small, SIZE, PHOTOGRAPHS, seed),
        images[training],
        (images[chosen], labels[chosen]),
        (images[held_out], labels[held_out]),
    )


class Pretraining:
    """A model with its optimizer; each step depends on the state, the seed and its number alone."""

    def __init__(self, model: str, loss: str, normalize_target: bool, seed: int) -> None:
        self.settings: dict[str, Any] = {
            "model": model,
            "loss": loss,
            "normalize_target": normalize_target,
            "seed": seed,
        }
        torch.manual_seed(seed)
        self.patch_mask = fastattn.PatchMask(SIZE, MASK_PATCH, PATCH, MASK_RATIO)
        self.encoder = make_encoder(model)
        masked = fastattn.SimMIM(self.encoder, self.patch_mask, loss=loss, normalize_target=normalize_target)
        self.model = masked.to(common.device())
        parameters = [{"params": self.model.parameters(), "initial_lr": PRETRAINING_RATE}]
        self.optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.05)
        self.done = 0

    def step(self, pictures: Pictures) -> float:
        generator = torch.Generator().manual_seed(self.settings["seed"] * 1_000_003 + self.done)
        chosen = torch.randint(len(pictures.unlabelled), (DIGITS,), generator=generator)
        images = torch.cat((pictures.crops.batch(self.done), pictures.unlabelled[chosen])).to(common.device())
        loss = self.model(images, generator=generator)
        update(self.optimizer, loss, self.done)
        self.done += 1
        return loss.item()

    def save(self, path: Path) -> None:
        state = {"format": FORMAT, "settings": self.settings, "done": self.done}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        # Whole or not at all: the process may end in the middle of writing.
        unfinished = path.with_name(path.name + ".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def resume(self, path: Path) -> None:
        state = read_checkpoint(path)
        for name, value in self.settings.items():
            if state["settings"][name] != value:
                option = name.replace("_", "-")
                raise common.InputError(f"{path} was made with --{option} {state['settings'][name]}, not {value}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `Pretraining.save` has written; an `InputError` names any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise common.InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # what torch.load raises for other files differs with their first bytes
        raise common.InputError(f"{path} is not a checkpoint") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise common.InputError(f"{path} is not a checkpoint of this example")
    return state


def update(optimizer: torch.optim.Optimizer, loss: Tensor, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / WARMUP_STEPS)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fine_tune(encoder: nn.Module, pictures: Pictures, steps: int, seed: int, title: str) -> float:
    """Train the encoder with a linear layer over its mean feature; the share of held-out digits that it then reads.

    Features are normalised first, as MAE's linear probe does: pretraining and random parameters give them other scales.
    """
    torch.manual_seed(seed)
    encoder.to(common.device())
    head = nn.Sequential(nn.BatchNorm1d(FEATURES, affine=False), nn.Linear(FEATURES, CLASSES)).to(common.device())
    parameters = [
        {"params": encoder.parameters(), "initial_lr": TUNING_RATE},
        {"params": head.parameters(), "initial_lr": HEAD_RATE},
    ]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)

    def scores(images: Tensor) -> Tensor:
        return head(encoder(images.to(common.device())).mean(1))

    images, labels = pictures.labelled
    with common.progress(title, steps) as advance:
        for step in range(steps):
            chosen = torch.randperm(len(labels), generator=generator)[:TUNING_BATCH]
            loss = F.cross_entropy(scores(images[chosen]), labels[chosen].to(common.device()))
            update(optimizer, loss, step)
            advance(f"loss {loss.item():.3f}")
    images, labels = pictures.held_out
    head.eval()
    with torch.no_grad():
        return (scores(images).argmax(1).cpu() == labels).float().mean().item()


@torch.no_grad()
def hidden_losses(pretraining: Pretraining, images: Tensor) -> tuple[float, float]:
    """The loss on hidden pixels of `images`, and that of filling them in with one value for each image."""
    model, settings = pretraining.model, pretraining.settings
    mask = pretraining.patch_mask(len(images), generator=torch.Generator().manual_seed(settings["seed"]))
    own = model(images.to(common.device()), mask.to(common.device())).item()
    if settings["normalize_target"]:
        constant = torch.zeros_like(images)  # each target patch has mean 0
    else:
        middle = torch.median if settings["loss"] == "l1" else torch.mean
        pixels = pretraining.patch_mask.to_model_grid(mask).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
        values = [middle(image[:, ~hidden]) for image, hidden in zip(images, pixels, strict=True)]
        constant = torch.stack(values).view(-1, 1, 1, 1).expand_as(images)
    options = {"patch_size": PATCH, "normalize_target": settings["normalize_target"]}
    loss = LOSSES[settings["loss"]](constant, images, pretraining.patch_mask.to_model_grid(mask), **options)
    return own, loss.item()


def draw(pretraining: Pretraining, pictures: Pictures, path: Path) -> None:
    """Held-out digits and photographs: masked, reconstructed, original."""
    from matplotlib.figure import Figure

    images = torch.cat((pictures.crops.centres(3), pictures.held_out[0][:3])).to(common.device())
    generator = torch.Generator().manual_seed(pretraining.settings["seed"])
    masked, filled, _ = pretraining.model.reconstruct(images, generator=generator)
    rows = {"masked": masked, "reconstructed": filled, "original": images}
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    for row, (name, batch) in enumerate(rows.items()):
        for column, pixels in enumerate(pictures.crops.to_pixels(batch)):
            axes = figure.add_subplot(len(rows), len(images), row * len(images) + column + 1)
            axes.imshow(pixels, interpolation="nearest")
            axes.set(xticks=[], yticks=[], ylabel=name if column == 0 else "")
    figure.savefig(path, dpi=80)


@click.command(name="simmim_images")
@click.option("--model", type=click.Choice(["vit", "swin"]), default="vit", show_default=True, help="The encoder.")
@click.option("--loss", type=click.Choice(["l1", "l2"]), default="l1", show_default=True, help="Over hidden pixels.")
@click.option("--normalize-target", is_flag=True, help="Predict pixels relative to their patch.")
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="Of pretraining.")
@click.option("--tune-steps", default=60, show_default=True, type=click.IntRange(min=1), help="With labels.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all that is random.")
@click.option("--checkpoint", type=Path, help=f"Save the pretraining there, every {SAVE_EVERY} steps and at the end.")
@click.option("--resume", type=Path, help="Go on from this checkpoint, up to --steps.")
@click.option("--output", type=Path, default=Path("simmim_images.png"), show_default=True, help="The picture.")
def main(
    model: str,
    loss: str,
    normalize_target: bool,
    steps: int,
    tune_steps: int,
    seed: int,
    checkpoint: Path | None,
    resume: Path | None,
    output: Path,
) -> None:
    """Pretrain an encoder by painting in hidden pixels, then read digits with few labels."""
    for path in filter(None, (checkpoint, output)):
        common.check_writable(path)
    pretraining = Pretraining(model, loss, normalize_target, seed)
    if resume is not None:
        pretraining.resume(resume)
        if pretraining.done > steps:
            raise common.InputError(f"--steps must be at least the {pretraining.done} of {resume}, got {steps}")
    console, pictures = common.console(), load_pictures(seed)
    images = pictures.held_out[0]
    with common.progress("pretraining", steps, pretraining.done) as advance:
        while pretraining.done < steps:
            advance(f"loss {pretraining.step(pictures):.3f}")
            if checkpoint is not None and (pretraining.done % SAVE_EVERY == 0 or pretraining.done == steps):
                pretraining.save(checkpoint)
    own, constant = hidden_losses(pretraining, images)
    console.print(f"loss on hidden pixels of {len(images)} held-out digits: {own:.3f}; with one colour: {constant:.3f}")
    draw(pretraining, pictures, output)
    scratch = Pretraining(**pretraining.settings).encoder
    accuracy = {
        "pretrained": fine_tune(pretraining.encoder, pictures, tune_steps, seed, "fine-tuning"),
        "from scratch": fine_tune(scratch, pictures, tune_steps, seed, "from scratch"),
    }
    results = ", ".join(f"{name} {share:.1%}" for name, share in accuracy.items())
    console.print(f"held-out digits read after {tune_steps} steps on {len(pictures.labelled[1])} labels: {results}")
    console.print(f"picture: {output}", soft_wrap=True)


if __name__ == "__main__":
    common.run(main)
