"""Text generation: a causal language model over characters, on `fastattn.attention`, writes text with a KV cache.

The model is a small Transformer decoder. In training every character attends to those before it, `Mask.causal()`; in
generation the keys and values of the text so far are kept, and a new character attends to all of them: the same mask,
aligned to the bottom right. It learns the prose of the Python documentation that comes with the standard library. Then
the same weights write the same text with torch.nn.MultiheadAttention. That module takes no projected keys, so what is
kept for it is the features of the text so far, which it projects again for each character.

Criterion, at the defaults: on text that the training did not see, the perplexity of a character is at most a quarter of
that of guessing by the frequencies of characters; and both modules write the same text, character for character.

    python examples/text_generation.py
    python examples/text_generation.py --prompt "The function" --seed 1
    python examples/text_generation.py --text FILE   (prose, a blank line between paragraphs)

Sources: "Attention Is All You Need", https://arxiv.org/abs/1706.03762; the bias by distance, ALiBi,
https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.markup import escape
from torch import Tensor, nn

import common
import fastattn

LENGTH = 256  # characters that the model sees at most
CHANNELS, HEADS, LAYERS = 128, 4, 2
SLOPES = torch.tensor([2, 1 / 2, 1 / 8, 1 / 32])  # of the bias of each head, for each character of distance
BATCH = 8
RATE, WARMUP_STEPS = 3e-3, 30
FEWEST_PARAGRAPHS, FEWEST_USES = 20, 5  # of a text; of a character that is learnt
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
JUDGED = 40 * LENGTH  # characters of the text held out that the perplexity is of
TEMPERATURE = 0.6
ROUNDS = 3  # of each measurement of speed; the best counts


def alibi(length_q: int, length_k: int, device: torch.device) -> Tensor:
    """What is added to the scores of the last queries of a text: less for distant keys, each head with its own slope.

    It is all that tells the model where a character stands. (1, H, L, S)
    """
    places = torch.arange(length_k, device=device)
    return SLOPES.to(device)[:, None, None] * (places - places[length_k - length_q :, None])[None, None]


class CachedAttention(nn.Module):
    """Causal self-attention; it keeps the keys and values of the text so far, (B, H, S, D) each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Features (B, L, C) behind what is kept of those before; what attention gives and what to keep."""
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, L, D)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        # The queries stand at the end of the keys.
        bias = alibi(q.shape[2], k.shape[2], x.device)
        out = fastattn.attention(q, k, v, mask=fastattn.Mask.causal("bottom_right"), bias=bias)
        assert isinstance(out, Tensor)  # no lse beside it
        return self.out(out.transpose(1, 2).flatten(2)), (k, v)


class StockAttention(nn.Module):
    """The same with torch's module; it keeps the features (B, S, C) of the text so far."""

    def __init__(self, other: CachedAttention) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        names = {"in_proj_weight": other.qkv.weight, "in_proj_bias": other.qkv.bias}
        names |= {"out_proj.weight": other.out.weight, "out_proj.bias": other.out.bias}
        self.attention.load_state_dict(names)

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        kept = x if past is None else torch.cat((past, x), 1)
        bias = alibi(x.shape[1], kept.shape[1], x.device)
        future = torch.ones_like(bias, dtype=torch.bool).triu(1 + kept.shape[1] - x.shape[1])
        mask = bias.masked_fill(future, -torch.inf).to(x.dtype).expand(len(x), -1, -1, -1).flatten(0, 1)
        return self.attention(x, kept, kept, attn_mask=mask, need_weights=False)[0], kept


class Block(nn.Module):
    """Attention to what came before, then a two-layer perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.attention: CachedAttention | StockAttention = CachedAttention()
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU(), nn.Linear(4 * CHANNELS, CHANNELS))

    def forward(self, x: Tensor, past: Any) -> tuple[Tensor, Any]:
        out, kept = self.attention(self.norm1(x), past)
        x = x + out
        return x + self.mlp(self.norm2(x)), kept


class LanguageModel(nn.Module):
    """Scores of the next character, from those so far."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, CHANNELS)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, characters)

    def forward(self, numbers: Tensor, cache: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """Characters (B, L), `cache` being of those before; scores (B, L, V) and the cache for what follows."""
        x = self.embedding(numbers)
        kept = []
        for layer, block in enumerate(self.blocks):
            x, keep = block(x, None if cache is None else cache[layer])
            kept.append(keep)
        return self.head(self.norm(x)), kept


class Characters:
    """The characters of the training text, numbered by their frequency; 0 stands for every other one."""

    def __init__(self, training: str) -> None:
        counts = Counter(training)
        self.names = [UNKNOWN, *(name for name, uses in counts.most_common() if uses >= FEWEST_USES)]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        if len(training) <= LENGTH:
            raise common.InputError(f"the text must have more than {LENGTH} characters to learn, got {len(training)}")

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.numbers.get(character, 0) for character in text])

    def frequencies(self, numbers: Tensor) -> Tensor:
        """Of each character, with one added to each count."""
        counts = numbers.bincount(minlength=len(self.names)) + 1
        return counts / counts.sum()


def train(model: LanguageModel, numbers: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = common.schedule(optimizer, WARMUP_STEPS, steps)
    generator = torch.Generator().manual_seed(seed)
    with common.progress("training", steps) as advance:
        for _ in range(steps):
            starts = torch.randint(len(numbers) - LENGTH, (BATCH, 1), generator=generator)
            batch = numbers[(starts + torch.arange(LENGTH + 1)).to(numbers.device)]
            scores, _ = model(batch[:, :-1])
            loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")


@torch.no_grad()
def perplexity(model: LanguageModel, numbers: Tensor) -> float:
    """Of each character of a text but the first, given at most LENGTH before it; 1 is certainty."""
    total = 0.0
    for start in range(0, len(numbers) - 1, LENGTH):
        part = numbers[start : start + LENGTH + 1]
        total += F.cross_entropy(model(part[None, :-1])[0][0], part[1:], reduction="sum").item()
    return math.exp(total / (len(numbers) - 1))


@torch.no_grad()
def write(model: LanguageModel, prompt: Tensor, seed: int) -> Tensor:
    """The prompt (P,) continued to LENGTH characters, sampled one by one; never an unknown one."""
    generator = torch.Generator().manual_seed(seed)
    text, cache = prompt[None], None
    new = text
    while text.shape[1] < LENGTH:
        scores, cache = model(new, cache)
        likely = (scores[0, -1, 1:].double().cpu() / TEMPERATURE).softmax(0)
        new = (torch.multinomial(likely, 1, generator=generator) + 1).to(text.device)[None]
        text = torch.cat((text, new), 1)
    return text[0]


def stock(model: LanguageModel) -> LanguageModel:
    """The same model on torch.nn.MultiheadAttention."""
    other = LanguageModel(model.embedding.num_embeddings).to(model.head.weight)
    other.load_state_dict(model.state_dict())
    for block in other.blocks:
        assert isinstance(block, Block) and isinstance(block.attention, CachedAttention)
        block.attention = StockAttention(block.attention).to(model.head.weight)
    return other.eval()


@click.command(name="text_generation")
@click.option("--text", "path", type=Path, help="Prose to learn.  [default: the Python documentation]")
@click.option("--prompt", default="The ", show_default=True, help="What the text written begins with.")
@click.option("--steps", default=260, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all that is random.")
def main(path: Path | None, prompt: str, steps: int, seed: int) -> None:
    """Learn prose character by character; write some, with a KV cache."""
    if not 1 <= len(prompt) < LENGTH:
        raise common.InputError(f"--prompt must have 1 to {LENGTH - 1} characters, got {len(prompt)}")
    paragraphs = common.read_prose(path, FEWEST_PARAGRAPHS)
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = [
        "\n".join(paragraphs[i] for i in part) for part in (order[: len(order) // 10], order[len(order) // 10 :])
    ]
    characters, device, console = Characters(training), common.device(), common.console()
    torch.manual_seed(seed)
    model = LanguageModel(len(characters.names)).to(device)
    console.print(
        f"{len(training)} characters to learn from, {len(held_out)} held out, {len(characters.names)} different"
    )
    learnt, unseen = characters.encode(training).to(device), characters.encode(held_out[:JUDGED]).to(device)
    before = perplexity(model, unseen)
    train(model, learnt, steps, seed)
    model.eval()
    guessed = math.exp(-characters.frequencies(learnt)[unseen[1:]].log().mean().item())
    console.print(
        f"perplexity of a held-out character: {before:.1f} before, {perplexity(model, unseen):.2f} after training; "
        f"by the frequencies of characters {guessed:.2f}"
    )
    models, given = {"fastattn.attention": model, "torch's module": stock(model)}, characters.encode(prompt).to(device)
    texts, seconds = {}, dict.fromkeys(models, math.inf)
    for _ in range(ROUNDS):
        for name, one in models.items():
            start = time.perf_counter()
            texts[name] = write(one, given, seed).tolist()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    new = LENGTH - len(prompt)
    rates = ", ".join(f"{name} {new / taken:.0f}" for name, taken in seconds.items())
    same = "the same text" if len(set(map(tuple, texts.values()))) == 1 else "texts that differ"
    console.print(f"characters written per second: {rates}; {same}")
    console.print("\n[bold]written[/]")
    for line in "".join(characters.names[number] for number in texts["fastattn.attention"]).splitlines():
        console.print(f"  {escape(line)}")


if __name__ == "__main__":
    common.run(main)
