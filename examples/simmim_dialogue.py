"""SimMIM on dialogues: a dialogue is an image whose pixels are words; hidden words are painted in from the rest.

Row r, column c of the image is the embedding of word c of turn r, a fixed random vector of each word. Cells are hidden
and `fastattn.SimMIM` learns to predict their vectors with its loss over hidden cells: in one half of a batch words here
and there, in the other half the end of a turn, after which the dialogue has not gone on. The squared error makes
the prediction the mean of the vectors of the words that are possible there, by their probability; the nearest vector in
the table is the word. So the model fills in missing words, and hiding the next turn makes it propose a reply, which is
decoded word by word.

Criterion, at the defaults: of the words hidden in dialogues that the training did not see, at least half are restored,
and more than four times as many as by always guessing the commonest word.

    python examples/simmim_dialogue.py
    python examples/simmim_dialogue.py --turn "Hello. A ticket to _, please." --turn "A single or a return?"
    python examples/simmim_dialogue.py --text FILE   (a turn a line, a blank line between dialogues)

Source: SimMIM, https://arxiv.org/abs/2111.09886.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import click
import torch
from rich.markup import escape
from torch import Tensor, nn

import common
import fastattn

ROWS, COLUMNS = 6, 12  # turns of a dialogue, words of a turn; what is longer is cut
CHANNELS = 64  # of a word's vector
BATCH = 16
MASK_RATIO = 0.3
WARMUP_STEPS = 20
FEWEST_DIALOGUES = 10
BLANK, UNKNOWN, MISSING = "", "<unknown>", "_"  # an empty cell, a word that the training did not see, a word to fill in
TEXT = Path(__file__).parent / "data" / "dialogue.txt"


def words_of(turn: str) -> list[str]:
    """Words and punctuation marks, in lower case; `_` is a missing word."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|_|[.,?!]", turn.lower())[:COLUMNS]


def read_dialogues(path: Path) -> list[list[list[str]]]:
    """The dialogues of a file, as turns of words; a dialogue of more than `ROWS` turns is several."""
    dialogues = []
    for block in re.split(r"\n\s*\n", common.read_text(path)):
        turns = [words for words in map(words_of, block.splitlines()) if words]
        dialogues += [turns[i : i + ROWS] for i in range(0, len(turns), ROWS)]
    dialogues = [turns for turns in dialogues if len(turns) > 1]
    if len(dialogues) < FEWEST_DIALOGUES:
        raise common.InputError(
            f"{path} must hold at least {FEWEST_DIALOGUES} dialogues of two turns or more, got {len(dialogues)}: "
            "a turn a line, a blank line between dialogues"
        )
    return dialogues


class Words:
    """The words of the training dialogues, each with its vector: `table` (V, CHANNELS)."""

    def __init__(self, dialogues: list[list[list[str]]], seed: int) -> None:
        counts = Counter(word for turns in dialogues for words in turns for word in words)
        self.names = [BLANK, UNKNOWN, *sorted(counts)]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.commonest = self.numbers[max((name for name in counts if self.is_word(name)), key=counts.__getitem__)]
        vectors = torch.randn(len(self.names), CHANNELS, generator=torch.Generator().manual_seed(seed))
        # Of one length, so that the nearest vector to a mean of several is that of the likeliest word.
        self.table = vectors / vectors.square().mean(1, keepdim=True).sqrt()

    @staticmethod
    def is_word(name: str) -> bool:
        """Punctuation and empty cells are easy: they do not count as restored words."""
        return name[:1].isalnum()

    def encode(self, turns: list[list[str]]) -> Tensor:
        """A dialogue as numbers (ROWS, COLUMNS)."""
        numbers = torch.zeros(ROWS, COLUMNS, dtype=torch.long)
        for row, words in enumerate(turns):
            for column, word in enumerate(words):
                numbers[row, column] = self.numbers.get(word, self.numbers[UNKNOWN])
        return numbers

    def images(self, numbers: Tensor) -> Tensor:
        """Numbers (B, ROWS, COLUMNS) to images (B, CHANNELS, ROWS, COLUMNS)."""
        return self.table.to(numbers.device)[numbers].permute(0, 3, 1, 2).contiguous()

    def nearest(self, images: Tensor) -> Tensor:
        """The reverse: the word with the nearest vector in each cell; never the unknown one."""
        distance = torch.cdist(images.permute(0, 2, 3, 1), self.table.to(images.device)[None])
        distance[..., self.numbers[UNKNOWN]] = torch.inf
        return distance.argmin(-1)


class GridEncoder(fastattn.ViTEncoder):
    """A ViT with learned rows and columns: `ViTEncoder`'s sines, for larger pictures, hardly tell neighbours apart."""

    def __init__(self, embed_dim: int = 128, depth: int = 1, num_heads: int = 8) -> None:
        attention = fastattn.MultiheadAttention
        super().__init__((ROWS, COLUMNS), 1, embed_dim, depth, num_heads, in_channels=CHANNELS, attention=attention)
        nn.init.normal_(self.projection.weight, std=CHANNELS**-0.5)  # words as large as their places, or larger
        self.rows = nn.Parameter(0.5 * torch.randn(ROWS, 1, embed_dim))
        self.columns = nn.Parameter(0.5 * torch.randn(1, COLUMNS, embed_dim))

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        return super().forward_tokens(tokens + (self.rows + self.columns).flatten(0, 1))


def hide_words(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """Words here and there of dialogues (B, ROWS, COLUMNS): bool of the same shape, True = hidden."""
    mask = fastattn.PatchMask((ROWS, COLUMNS), 1, 1, MASK_RATIO)(len(numbers), generator=generator)
    return mask.to(numbers.device) & (numbers != 0)


def hide_turn(numbers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The dialogues up to some turn, the rest empty; and what to hide of it: all of that turn from some word on."""
    turns = (numbers[:, :, 0] != 0).sum(1)
    last, first = torch.rand(2, len(numbers), generator=generator).to(numbers.device)
    last = (last * turns).long()[:, None, None]
    first = (first * COLUMNS).long()[:, None, None]
    rows = torch.arange(ROWS, device=numbers.device)[:, None]
    columns = torch.arange(COLUMNS, device=numbers.device)
    return numbers.masked_fill(rows > last, 0), (rows == last) & (columns >= first)


def train(model: fastattn.SimMIM, words: Words, numbers: Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = common.schedule(optimizer, WARMUP_STEPS, steps)
    generator = torch.Generator().manual_seed(seed)
    with common.progress("training", steps) as advance:
        for _ in range(steps):
            whole, ended = numbers[torch.randint(len(numbers), (BATCH,), generator=generator)].chunk(2)
            ended, mask = hide_turn(ended, generator)
            mask = torch.cat((hide_words(whole, generator), mask))
            loss = model(words.images(torch.cat((whole, ended))), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")


def fill(model: fastattn.SimMIM, words: Words, numbers: Tensor, mask: Tensor) -> Tensor:
    """Numbers (B, ROWS, COLUMNS) with the hidden cells filled in; what stands in them is not looked at."""
    _, filled, _ = model.reconstruct(words.images(numbers.masked_fill(mask, 0)), mask)
    return torch.where(mask, words.nearest(filled), numbers)


def propose(model: fastattn.SimMIM, words: Words, numbers: Tensor, row: int) -> list[str]:
    """A turn `row` for a dialogue (ROWS, COLUMNS), word by word, each seeing those before."""
    numbers = numbers.clone()
    numbers[row:] = 0
    mask = (torch.arange(ROWS, device=numbers.device) == row)[:, None].repeat(1, COLUMNS)
    for column in range(COLUMNS):
        numbers[row, column] = fill(model, words, numbers[None], mask[None])[0, row, column]
        mask[row, column] = False
    return [words.names[number] for number in numbers[row]]


def text(names: list[str]) -> str:
    """Words to a readable turn."""
    joined = re.sub(r" (?=[.,?!])", "", " ".join(filter(None, names)))
    return re.sub(r"(?:^|(?<=[.?!] ))[a-z]|\bi\b", lambda found: found.group().upper(), joined)


@click.command(name="simmim_dialogue")
@click.option("--text", "path", type=Path, default=TEXT, help="Dialogues to learn.  [default: the project's own]")
@click.option(
    "--turn", "turns", multiple=True, help="Say this, turn by turn, `_` for a missing word; asks for a reply."
)
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all that is random.")
def main(path: Path, turns: tuple[str, ...], steps: int, seed: int) -> None:
    """Learn dialogues by painting in hidden words; fill in missing words and propose replies."""
    said = [words_of(turn) for turn in turns]
    if len(said) >= ROWS or not all(said):
        raise common.InputError(f"--turn: at most {ROWS - 1} turns, each with a word; got {list(turns)}")
    dialogues = read_dialogues(path)
    order = torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = [[dialogues[i] for i in part] for part in (order[: len(order) // 6], order[len(order) // 6 :])]
    words, device, console = Words(training, seed), common.device(), common.console()
    torch.manual_seed(seed)
    model = fastattn.SimMIM(GridEncoder(), loss="l2").to(device)
    console.print(f"{len(training)} dialogues to learn from, {len(held_out)} held out, {len(words.names)} words")
    train(model, words, torch.stack([words.encode(turns) for turns in training]).to(device), steps, seed)

    model.eval()
    numbers = torch.stack([words.encode(turns) for turns in held_out]).to(device)
    mask = hide_words(numbers, torch.Generator().manual_seed(seed + 1))
    filled = fill(model, words, numbers, mask)
    is_word = torch.tensor([words.is_word(name) or name == UNKNOWN for name in words.names], device=device)
    counted = mask & is_word[numbers]
    restored = (filled == numbers)[counted].float().mean().item()
    guessed = (numbers == words.commonest)[counted].float().mean().item()
    console.print(
        f"words restored in held-out dialogues: {restored:.1%} of {int(counted.sum())}; "
        f"always guessing {words.names[words.commonest]!r}: {guessed:.1%}"
    )
    console.print("\n[bold]missing words[/]   (hidden -> filled in, ! = another word stood there)")
    for which in range(min(2, len(held_out))):
        for row in range(len(held_out[which])):
            shown = [
                f"[{name}{'' if filled[which, row, column] == numbers[which, row, column] else '!'}]"
                if mask[which, row, column]
                else name
                for column, name in enumerate(words.names[number] for number in filled[which, row])
            ]
            console.print(f"  {escape(' '.join(filter(None, shown)))}")
        console.print()
    console.print("[bold]proposed replies[/]")
    for which in range(min(3, len(held_out))):
        row = min(len(held_out[which]) - 1, 1 + 2 * which)
        console.print(f"  {escape(text(held_out[which][row - 1]))}")
        console.print(f"    proposed: {escape(text(propose(model, words, numbers[which], row)))}")
        console.print(f"    was said: {escape(text(held_out[which][row]))}")
    if said:
        given = words.encode(said).to(device)
        missing = torch.zeros(ROWS, COLUMNS, dtype=torch.bool, device=device)
        missing[len(said) :] = True
        for row, names in enumerate(said):
            for column, name in enumerate(names):
                missing[row, column] = name == MISSING
        given = torch.where(missing, fill(model, words, given[None], missing[None])[0], given)
        console.print("\n[bold]yours[/]")
        for row in range(len(said)):
            console.print(f"  {escape(text([words.names[number] for number in given[row]]))}")
        console.print(f"    proposed: {escape(text(propose(model, words, given, len(said))))}")


if __name__ == "__main__":
    common.run(main)
