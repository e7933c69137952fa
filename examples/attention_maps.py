"""Attention maps: what each head of a model's `fastattn.MultiheadAttention` looks at, and pictures of masks.

`recorded(model)` takes the weights of every `MultiheadAttention` in any model, per head, through forward hooks: the
module computes them beside its output (need_weights), and the model is not changed. Drawn are each head and their mean:
for pictures, where a hidden patch of a photograph looks; for text, which words hidden words look at. The models are
those of simmim_images.py, from its checkpoint or trained briefly here, and of simmim_dialogue.py, trained briefly. A
second picture is of masks with their empty, partial and full tiles, by `fastattn.Mask.plot`.

Criterion, at the defaults: the models have learnt to look at what is there. Hidden patches and hidden words give
visible ones more of their attention than if they looked everywhere alike.

    python examples/attention_maps.py --output attention_maps.png
    python examples/attention_maps.py --what text
    python examples/simmim_images.py --checkpoint run.pt && python examples/attention_maps.py --checkpoint run.pt

Source: SimMIM, https://arxiv.org/abs/2111.09886.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import common
import fastattn
import simmim_dialogue
import simmim_images

MASKED_LENGTH, TILE = 96, 16  # of the masks drawn
SHOWN_PICTURE = 1  # of the photographs


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, each call of the model leaves the weights (N, H, L, S) of its `fastattn.MultiheadAttention`s in the
    dict, by the name of the module. The modules return what they would have returned."""
    maps: dict[str, Tensor] = {}
    asked: dict[str, tuple[bool, bool]] = {}
    handles = []

    def record(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            call = inspect.signature(module.forward).bind(*args, **kwargs)
            call.apply_defaults()
            asked[name] = call.arguments["need_weights"], call.arguments["average_attn_weights"]
            return (), call.arguments | {"need_weights": True, "average_attn_weights": False}

        def after(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
            out, weights = output
            maps[name] = weights.detach().cpu()
            need_weights, average = asked[name]
            return out, (weights.mean(-3) if average else weights) if need_weights else None

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        if isinstance(module, fastattn.MultiheadAttention):
            record(name, module)
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def on_visible(weights: Tensor, hidden: Tensor, visible: Tensor) -> tuple[float, float]:
    """Of weights (N, H, L, L): the share that hidden tokens give visible ones, and which share of all those are.

    hidden, visible: bool (N, L).
    """
    given = (weights * visible[:, None, None, :]).sum(-1).mean(1)  # (N, L)
    return given[hidden].mean().item(), visible.float().mean().item()


def show_images(checkpoint: Path | None, steps: int, seed: int, path: Path) -> dict[str, tuple[float, float]]:
    """Draws where a hidden patch looks: a row for each attention, then its mean and its heads."""
    settings: dict[str, Any] = {"model": "vit", "loss": "l1", "normalize_target": False, "seed": seed}
    if checkpoint is not None:
        settings = simmim_images.read_checkpoint(checkpoint)["settings"]
        if settings["model"] != "vit":
            raise common.InputError(f"{checkpoint} is of --model {settings['model']}: no MultiheadAttention in it")
    pretraining, pictures = simmim_images.Pretraining(**settings), simmim_images.load_pictures(seed)
    if checkpoint is not None:
        pretraining.resume(checkpoint)
    else:
        with common.progress("pretraining", steps) as advance:
            while pretraining.done < steps:
                advance(f"loss {pretraining.step(pictures):.3f}")
    images = torch.cat((pictures.crops.centres(8), pictures.held_out[0][:56])).to(common.device())
    pretraining.model.eval()
    with torch.no_grad(), recorded(pretraining.model) as maps:
        masked, _, pixels = pretraining.model.reconstruct(images, generator=torch.Generator().manual_seed(seed))
    size = simmim_images.PATCH
    patches = pixels[:, 0, ::size, ::size].cpu()  # (N, G, G)
    hidden = patches.flatten(1)

    from matplotlib.figure import Figure

    shown, grid = SHOWN_PICTURE, patches.shape[-1]
    places = patches[shown].nonzero().float()
    query = places[(places - (grid - 1) / 2).square().sum(1).argmin()].long().tolist()  # hidden, the nearest the middle
    picture = pictures.crops.to_pixels(masked[shown : shown + 1])[0]
    heads = max(weights.shape[1] for weights in maps.values())
    figure = Figure(figsize=(1.9 * (heads + 2), 2.1 * len(maps)), layout="constrained")
    for row, (name, weights) in enumerate(maps.items()):
        given = weights[shown, :, query[0] * grid + query[1]].unflatten(-1, (grid, grid))  # (H, G, G)
        panels = [
            ("what it sees", None),
            ("mean", given.mean(0)),
            *((f"head {n}", head) for n, head in enumerate(given)),
        ]
        for column, (title, weight) in enumerate(panels):
            axes = figure.add_subplot(len(maps), heads + 2, row * (heads + 2) + column + 1)
            axes.imshow(picture, extent=(0, grid, grid, 0))
            if weight is not None:
                axes.imshow(weight.numpy(), cmap="magma", alpha=0.75, extent=(0, grid, grid, 0), vmin=0)
            corner = (query[1] + 0.5, query[0] + 0.5)
            axes.plot(*corner, marker="s", markersize=9, markerfacecolor="none", markeredgecolor="cyan")
            axes.set(xticks=[], yticks=[], title=title, ylabel=name if column == 0 else "")
    figure.savefig(path, dpi=80)
    return {name: on_visible(weights, hidden, ~hidden) for name, weights in maps.items()}


def show_text(text: Path, steps: int, seed: int, path: Path) -> dict[str, tuple[float, float]]:
    """Draws which words hidden words look at, in a dialogue that the training did not see: mean and heads."""
    dialogues = simmim_dialogue.read_dialogues(text)
    order = torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = [[dialogues[i] for i in part] for part in (order[: len(order) // 6], order[len(order) // 6 :])]
    words, device = simmim_dialogue.Words(training, seed), common.device()
    torch.manual_seed(seed)
    model = fastattn.SimMIM(simmim_dialogue.GridEncoder(), loss="l2").to(device)
    simmim_dialogue.train(model, words, torch.stack([words.encode(d) for d in training]).to(device), steps, seed)
    model.eval()
    numbers = torch.stack([words.encode(dialogue) for dialogue in held_out]).to(device)
    mask = simmim_dialogue.hide_words(numbers, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad(), recorded(model) as maps:
        filled = simmim_dialogue.fill(model, words, numbers, mask)
    hidden = mask.flatten(1).cpu()

    from matplotlib.figure import Figure

    (name, weights), *_ = maps.items()
    keys = (numbers[0] != 0).flatten().nonzero()[:, 0].cpu()  # empty cells are not drawn
    queries = keys[hidden[0][keys]]
    names = ["?" if hidden[0][key] else words.names[numbers[0].flatten()[key]] for key in keys]
    restored = [words.names[filled[0].flatten()[query]] for query in queries]
    given = weights[0][:, queries][..., keys]  # (H, hidden words, words)
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    rows = 2 + (len(given) + 3) // 4
    axes = figure.add_subplot(figure.add_gridspec(rows, 4)[:2, :])
    axes.imshow(given.mean(0).numpy(), cmap="magma", aspect="auto", vmin=0)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(restored)), restored)
    axes.set(title=f"{name}: mean of the heads", ylabel="? filled in")
    for number, head in enumerate(given):
        axes = figure.add_subplot(rows, 4, 9 + number)
        axes.imshow(head.numpy(), cmap="magma", aspect="auto", vmin=0)
        axes.set(xticks=[], yticks=[], title=f"head {number}")
    figure.savefig(path, dpi=80)
    visible = (numbers != 0).flatten(1).cpu() & ~hidden  # an empty cell says little
    return {name: on_visible(weights, hidden, visible) for name, weights in maps.items()}


def show_masks(path: Path) -> None:
    """Six masks and their tiles."""
    from matplotlib.figure import Figure

    documents = (torch.arange(MASKED_LENGTH)[None] >= torch.tensor([[20], [55]])).sum(0, keepdim=True)  # three
    random = torch.rand(MASKED_LENGTH, MASKED_LENGTH, generator=torch.Generator().manual_seed(0)) < 0.02
    causal = fastattn.Mask.causal()
    masks = {
        "causal": causal,
        "window(24, 8)": fastattn.Mask.window(24, 8),
        "prefix(40)": fastattn.Mask.prefix([40]),
        "key_lengths(70)": fastattn.Mask.key_lengths([70]),
        "segments & causal": fastattn.Mask.segments(documents, documents) & causal,
        "dense, causal": fastattn.Mask.dense(random) & causal,
    }
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    for number, (title, mask) in enumerate(masks.items()):
        axes = figure.add_subplot(2, 3, number + 1, title=title)
        mask.plot(MASKED_LENGTH, MASKED_LENGTH, block_m=TILE, block_n=TILE, ax=axes)
    figure.savefig(path, dpi=64)


@click.command(name="attention_maps")
@click.option("--what", type=click.Choice(["image", "text"]), default="image", show_default=True, help="To look at.")
@click.option("--checkpoint", type=Path, help="Of simmim_images.py: look at it instead of training.")
@click.option("--text", type=Path, help="Dialogues for --what text.  [default: the project's own]")
@click.option("--steps", default=200, show_default=True, type=click.IntRange(min=1), help="Of the brief training.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all that is random.")
@click.option("--output", type=Path, default=Path("attention_maps.png"), show_default=True, help="The maps.")
@click.option("--masks", type=Path, default=Path("masks.png"), show_default=True, help="The picture of masks.")
def main(
    what: str, checkpoint: Path | None, text: Path | None, steps: int, seed: int, output: Path, masks: Path
) -> None:
    """Draw the attention of a model, per head and averaged, and some masks."""
    for path in (output, masks):
        common.check_writable(path)
    if what == "image":
        if text is not None:
            raise common.InputError("--text is for --what text")
        shares = show_images(checkpoint, steps, seed, output)
    else:
        if checkpoint is not None:
            raise common.InputError("--checkpoint is for --what image")
        shares = show_text(text or simmim_dialogue.TEXT, steps, seed, output)
    show_masks(masks)
    console = common.console()
    for name, (share, alike) in shares.items():
        console.print(
            f"{name}: hidden tokens give visible ones {share:.1%} of their attention, if everywhere alike {alike:.1%}"
        )
    console.print(f"pictures: {output}, {masks}", soft_wrap=True)


if __name__ == "__main__":
    common.run(main)
