"""Pictures to train on: the photographs that scikit-image carries, or a directory of the user's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg")
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as SimMIM normalises
SMALLEST_CROP = 0.5  # side of the smallest crop over the shorter side of the picture


def read_image(path: Path) -> Tensor:
    """One picture as uint8 (3, H, W) RGB. A ValueError names a file that is not a picture."""
    try:
        with Image.open(path) as picture:
            array = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture") from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1).contiguous()


def read_directory(directory: str | Path) -> list[Tensor]:
    """Every .png and .jpg picture of a directory, by name. A ValueError tells what is wrong with the directory."""
    directory = Path(directory)
    accepted = "expected a directory with .png or .jpg pictures"
    if not directory.exists():
        raise ValueError(f"{directory} does not exist; {accepted}")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; {accepted}")
    files = sorted(p for p in directory.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{directory} holds no .png or .jpg picture; {accepted}")
    return [read_image(path) for path in files]


def photographs() -> list[Tensor]:
    """The photographs inside the installed scikit-image package; nothing is fetched.

    scikit-image's own loaders would download what a release does not carry, so the files are read directly.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("scikit-image, which carries the photographs, is not installed; name your own with --images")
    data = Path(next(iter(spec.submodule_search_locations))) / "data"
    found = [read_image(data / name) for name in PHOTOGRAPHS if (data / name).is_file()]
    if not found:
        raise ValueError(f"the installed scikit-image carries no photographs in {data}; name your own with --images")
    return found


class Crops:
    """Random square crops: random place, scale and mirror image. Batch ``i`` depends on the seed and on ``i`` alone."""

    def __init__(self, images: Sequence[Tensor], size: int, batch_size: int, seed: int) -> None:
        if not images:
            raise ValueError("images is empty")
        self.images, self.size, self.batch_size, self.seed = list(images), size, batch_size, seed
        self._mean = torch.tensor(MEAN).view(3, 1, 1)
        self._std = torch.tensor(STD).view(3, 1, 1)

    def batch(self, index: int) -> Tensor:
        """Normalised float32 (batch_size, 3, size, size)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.stack([self._crop(generator) for _ in range(self.batch_size)])

    def centres(self, count: int) -> Tensor:
        """The middle squares of the first ``count`` pictures (repeated when there are fewer), normalised."""
        chosen = [self.images[i % len(self.images)] for i in range(count)]
        return torch.stack([self._resize(_square(image, min(image.shape[1:]), 0.5, 0.5)) for image in chosen])

    def to_pixels(self, batch: Tensor) -> np.ndarray:
        """Back to uint8 (B, H, W, 3)."""
        pixels = (batch.detach().float().cpu() * self._std + self._mean).clamp(0, 1) * 255
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def _crop(self, generator: torch.Generator) -> Tensor:
        which = int(torch.randint(len(self.images), (), generator=generator))
        scale, top, left, mirror = torch.rand(4, generator=generator).tolist()
        image = self.images[which]
        side = max(1, round(min(image.shape[1:]) * (SMALLEST_CROP + (1 - SMALLEST_CROP) * scale)))
        crop = self._resize(_square(image, side, top, left))
        return crop.flip(-1) if mirror < 0.5 else crop

    def _resize(self, square: Tensor) -> Tensor:
        pixels = square.unsqueeze(0).float() / 255
        pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return (pixels[0] - self._mean) / self._std


def _square(image: Tensor, side: int, top: float, left: float) -> Tensor:
    height, width = image.shape[1:]
    i, j = round((height - side) * top), round((width - side) * left)
    return image[:, i : i + side, j : j + side]
