"""Masked words: a BERT-like encoder of transformers, on `attn_implementation="fastattn"`, learns to fill in words.

The encoder is a small ModernBERT, randomly initialised, in which a word attends to the few before and behind it: a
sliding window and padding, which `fastattn.integrations.transformers` gives the kernels without a matrix. It reads the
prose of the Python documentation that comes with the standard library. Some of its words and punctuation marks are
hidden, and it learns to tell which they were, by cross-entropy. Words that the training text holds less than three
times are unknown: they are read as such and never hidden.

Criterion, at the defaults: of the words of paragraphs that the training did not see, each hidden once together with one
in seven of its text, at least a fifth is restored, and at least twice as many as by always guessing the commonest word.

    python examples/masked_words.py --output masked_words.png
    python examples/masked_words.py --text FILE   (prose, a blank line between paragraphs)

Sources: BERT, https://arxiv.org/abs/1810.04805; ModernBERT, https://arxiv.org/abs/2412.13663.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from rich.markup import escape
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

import common
from fastattn.integrations.transformers import register

LENGTH = 40  # words of a piece of text; a longer paragraph is several
WINDOW = 4  # words before and behind that a word attends to
CHANNELS, HEADS = 128, 8
BATCH = 32
MASK_RATIO = 0.3  # in training
ROUNDS = 7  # in which a text held out is hidden, a part in each
RATE, WARMUP_STEPS = 4e-3, 30
FEWEST_PARAGRAPHS, FEWEST_USES = 20, 3  # of a text; of a word that is learnt
PADDING, UNKNOWN, HIDDEN = 0, 1, 2
IGNORED = -100  # the label of what is not to be predicted
POINTS = 8  # of the curve drawn
SHOWN_PIECES, SHOWN_WORDS, GUESSES = 5, 8, 5
COLUMNS = 4  # of the picture


def words_of(paragraph: str) -> list[str]:
    """Words and punctuation marks, in lower case."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*|[.,;:?!()]", paragraph.lower())


def pieces(paragraphs: list[str]) -> list[list[str]]:
    """Paragraphs as words, at most `LENGTH` in a piece."""
    split = map(words_of, paragraphs)
    return [words[i : i + LENGTH] for words in split for i in range(0, len(words), LENGTH)]


class Vocabulary:
    """The words of the training text, numbered by their frequency."""

    def __init__(self, training: list[list[str]]) -> None:
        counts = Counter(word for words in training for word in words)
        known = [word for word, uses in counts.most_common() if uses >= FEWEST_USES]
        if len(known) < GUESSES or not any(map(self.is_word, known)):
            raise common.InputError(
                f"the text to learn must hold {GUESSES} words {FEWEST_USES} times or more, got {len(known)}"
            )
        self.names = ["", "<unknown>", "<hidden>", *known]
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.commonest = self.numbers[next(filter(self.is_word, known))]

    @staticmethod
    def is_word(name: str) -> bool:
        """Punctuation marks are easy: they do not count as restored words."""
        return name[:1].isalnum()

    def encode(self, text: list[list[str]]) -> Tensor:
        """Pieces as numbers (N, LENGTH), with padding behind."""
        numbers = torch.full((len(text), LENGTH), PADDING)
        for row, words in enumerate(text):
            numbers[row, : len(words)] = torch.tensor([self.numbers.get(word, UNKNOWN) for word in words])
        return numbers


def make_model(training: Tensor, words: int) -> ModernBertForMaskedLM:
    """The encoder, for that many words, with what is known before training: how frequent each one is in the text."""
    register()
    rope = {"rope_type": "default", "rope_theta": 100.0}  # for texts of LENGTH words
    config = ModernBertConfig(
        vocab_size=words,
        hidden_size=CHANNELS,
        intermediate_size=2 * CHANNELS,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        layer_types=["sliding_attention"],
        local_attention=2 * WINDOW,
        rope_parameters={"sliding_attention": rope, "full_attention": rope},
        hidden_activation="relu",
        classifier_activation="relu",
        initializer_range=CHANNELS**-0.5,
        attention_bias=True,
        norm_bias=True,
        sparse_prediction=True,  # scores of the hidden words only
        pad_token_id=PADDING,
        eos_token_id=None,
        bos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    model = ModernBertForMaskedLM._from_config(config, attn_implementation="fastattn")
    counts = training.flatten().bincount(minlength=words).float()
    counts[: HIDDEN + 1] = 0
    with torch.no_grad():
        model.decoder.bias.copy_(((counts + 0.1) / counts.sum()).log())
        # So that from the first step on each head prefers some places, whichever words stand there.
        model.model.layers[0].attn.Wqkv.bias[: 2 * CHANNELS].normal_(std=1.5)
    return model


def known(numbers: Tensor) -> Tensor:
    """Of pieces (B, L): what may be hidden, bool of the same shape."""
    return numbers > UNKNOWN


def predict(model: ModernBertForMaskedLM, numbers: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of pieces (B, L) and what is hidden of them, bool (B, L): the loss, a mean, and the scores of each of the words
    hidden, (hidden, V)."""
    labels = numbers.masked_fill(~mask, IGNORED)
    hidden = mask.sum().clamp(min=1)  # there may be nothing to hide
    words, real = numbers.masked_fill(mask, HIDDEN), (numbers != PADDING).long()
    out = model(words, real, labels=labels, num_items_in_batch=hidden)
    return out.loss, out.logits


def train(model: ModernBertForMaskedLM, numbers: Tensor, steps: int, seed: int) -> Iterator[int]:
    """Yields the number of steps done, after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = common.schedule(optimizer, WARMUP_STEPS, steps)
    generator = torch.Generator().manual_seed(seed)
    with common.progress("training", steps) as advance:
        for step in range(steps):
            batch = numbers[torch.randint(len(numbers), (BATCH,), generator=generator)]
            chosen = torch.rand(batch.shape, generator=generator) < MASK_RATIO
            loss, _ = predict(model, batch, chosen.to(batch.device) & known(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")
            yield step + 1


@torch.no_grad()
def fill(model: ModernBertForMaskedLM, numbers: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor]:
    """Hides each known word of pieces (N, L) once, in the round that `rounds` (N, L) says.

    Its likeliest words, the likeliest first, with their probabilities, (N, L, GUESSES) each; what cannot be hidden is
    its own.
    """
    guesses = numbers[..., None].repeat(1, 1, GUESSES)
    probabilities = torch.ones(guesses.shape, device=numbers.device)
    for start in range(0, len(numbers), BATCH):
        part = slice(start, start + BATCH)
        for which in range(ROUNDS):
            mask = (rounds[part] == which) & known(numbers[part])
            _, scores = predict(model, numbers[part], mask)
            scores[:, : HIDDEN + 1] = -torch.inf  # no answers
            probabilities[part][mask], guesses[part][mask] = scores.softmax(-1).topk(GUESSES)
    return guesses, probabilities


def draw(curve: dict[int, float], commonest: float, shown: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Above the share restored by steps, below it what was thought of some words: the hidden word in brackets amid its
    context, and the probabilities of the likeliest words."""
    from matplotlib.figure import Figure

    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(10, 2.6 + 2.2 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, COLUMNS)
    axes = figure.add_subplot(grid[0, :])
    axes.plot(list(curve), [100 * share for share in curve.values()], marker="o", label="the model")
    axes.axhline(100 * commonest, color="grey", linestyle="--", label="always the commonest word")
    axes.set(xlabel="steps", ylabel="restored, %", title="words of held-out text", ylim=(0, None), xlim=(0, None))
    axes.legend(loc="lower right")
    for number, (context, guesses) in enumerate(shown):
        axes = figure.add_subplot(grid[1 + number // COLUMNS, number % COLUMNS])
        colours = ["tab:green" if f"[{name}]" in context else "tab:grey" for name in guesses]
        axes.barh(range(len(guesses)), [100 * value for value in guesses.values()], color=colours)
        axes.set_yticks(range(len(guesses)), list(guesses))
        axes.invert_yaxis()
        axes.set(xlabel="probability, %")
        axes.set_title(context, fontsize="small", parse_math=False)
    figure.savefig(path, dpi=80)


@click.command(name="masked_words")
@click.option("--text", "path", type=Path, help="Prose to learn.  [default: the Python documentation]")
@click.option("--steps", default=1000, show_default=True, type=click.IntRange(min=1), help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all that is random.")
@click.option("--output", type=Path, default=Path("masked_words.png"), show_default=True, help="The picture.")
def main(path: Path | None, steps: int, seed: int, output: Path) -> None:
    """Learn prose by filling in hidden words; fill in those of text that was held out."""
    common.check_writable(output)
    paragraphs = common.read_prose(path, FEWEST_PARAGRAPHS)
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out, training = [
        pieces([paragraphs[i] for i in part]) for part in (order[: len(order) // 10], order[len(order) // 10 :])
    ]
    vocabulary, device, console = Vocabulary(training), common.device(), common.console()
    learnt, unseen = vocabulary.encode(training).to(device), vocabulary.encode(held_out).to(device)
    counted = known(unseen) & torch.tensor(list(map(vocabulary.is_word, vocabulary.names)), device=device)[unseen]
    different = len(vocabulary.names) - HIDDEN - 1
    if not counted.any():
        raise common.InputError(f"none of the words held out is among the {different} of the text to learn")
    torch.manual_seed(seed)
    model = make_model(learnt, len(vocabulary.names))
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    console.print(
        f"{sum(map(len, training))} words to learn from, {sum(map(len, held_out))} held out, {different} different"
    )

    rounds = torch.randint(ROUNDS, unseen.shape, generator=torch.Generator().manual_seed(seed + 1)).to(device)
    curve = {}
    for step in train(model, learnt, steps, seed):
        if step == steps or step % max(1, steps // POINTS) == 0:
            guesses, probabilities = fill(model, unseen, rounds)
            right = guesses[..., 0] == unseen
            curve[step] = right[counted].float().mean().item()
    guessed = (unseen == vocabulary.commonest)[counted].float().mean().item()
    console.print(
        f"words restored in held-out text: {curve[steps]:.1%} of {int(counted.sum())}; "
        f"always guessing {vocabulary.names[vocabulary.commonest]!r}: {guessed:.1%}"
    )
    console.print("\n[bold]held-out text[/]   (hidden -> filled in, ! = another word stood there: which)")
    hidden = (rounds == 0) & known(unseen)
    for which, words in enumerate(held_out[:SHOWN_PIECES]):
        said = []
        for column, word in enumerate(words):
            name = vocabulary.names[guesses[which, column, 0]]
            said.append(word if not hidden[which, column] else f"[{name}]" if name == word else f"[{name}! {word}]")
        console.print(f"  {escape(' '.join(said))}")

    places = counted.nonzero().cpu()
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:SHOWN_WORDS]
    shown = []
    for which, column in places[chosen].tolist():
        words = held_out[which]
        before, behind = words[max(0, column - 3) : column], words[column + 1 : column + 4]
        context = f"{' '.join(before)}\n[{words[column]}] {' '.join(behind)}"
        names = [vocabulary.names[guess] for guess in guesses[which, column]]
        shown.append((context, dict(zip(names, probabilities[which, column].tolist(), strict=True))))
    draw(curve, guessed, shown, output)
    console.print(f"\npicture: {output}", soft_wrap=True)


if __name__ == "__main__":
    common.run(main)
