"""The examples, run briefly: each learns what its docstring says, and bad input is an error of one line."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

import fastattn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))  # as `python examples/NAME.py` does

import common  # noqa: E402
import simmim_dialogue  # noqa: E402
import text_generation  # noqa: E402


def _run(capsys: pytest.CaptureFixture[str], command: click.Command, *arguments: object) -> str:
    common.run(command, [str(argument) for argument in arguments])
    return capsys.readouterr().out


def _error(capsys: pytest.CaptureFixture[str], command: click.Command, *arguments: object) -> str:
    """The one line of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        common.run(command, [str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def _numbers(pattern: str, text: str) -> list[float]:
    found = re.search(pattern, text)
    assert found, text
    return [float(number) for number in found.groups()]


SIMPLE = click.command(name="simple")(click.argument("path")(lambda path: print(len(common.read_text(path)))))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe", "not a text file")]
)
def test_bad_text_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str) -> None:
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    line = _error(capsys, SIMPLE, path)
    assert message in line and str(path) in line


# ------------------------------------------------------------------------------------------------------- simmim_images


@pytest.fixture
def simmim_images() -> ModuleType:
    pytest.importorskip("sklearn", reason="scikit-learn carries the digits")
    pytest.importorskip("skimage", reason="scikit-image carries the photographs")
    pytest.importorskip("matplotlib", reason="draws the picture")
    return importlib.import_module("simmim_images")


LOSSES_LINE = r"held-out digits: ([\d.]+); with one colour: ([\d.]+)"
ACCURACY_LINE = r"pretrained ([\d.]+)%, from scratch ([\d.]+)%"


def test_images_learns_to_paint_in_hidden_pixels(
    simmim_images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    output = _run(capsys, simmim_images.main, "--steps", 80, "--tune-steps", 2, "--output", picture)
    loss, constant = _numbers(LOSSES_LINE, output)
    assert loss < 0.7 * constant
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "swin"])
def test_images_meets_its_criterion(
    simmim_images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    output = _run(capsys, simmim_images.main, "--model", model, "--output", tmp_path / "picture.png")
    loss, constant = _numbers(LOSSES_LINE, output)
    assert loss <= 0.5 * constant
    pretrained, scratch = _numbers(ACCURACY_LINE, output)
    assert pretrained >= scratch + 5


@pytest.mark.parametrize(("model", "loss", "normalize"), [("vit", "l1", False), ("swin", "l2", True)])
def test_images_resumes_bit_for_bit(
    simmim_images: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    loss: str,
    normalize: bool,
) -> None:
    # On a GPU the convolutions of torch need not give the same bits twice.
    monkeypatch.setattr(common, "device", lambda: torch.device("cpu"))
    pictures = simmim_images.load_pictures(0)
    whole, first, second = (simmim_images.Pretraining(model, loss, normalize, 0) for _ in range(3))
    expected = [whole.step(pictures) for _ in range(4)]
    seen = [first.step(pictures) for _ in range(2)]
    first.save(tmp_path / "run.pt")
    second.resume(tmp_path / "run.pt")
    assert seen + [second.step(pictures) for _ in range(2)] == expected
    assert second.done == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_images_window_attention_keeps_to_its_windows(simmim_images: ModuleType) -> None:
    """A token has an effect in its own window only; in shifted windows not beyond the edge of the picture either."""
    for shift, reached in ((0, [0, 1, 2, 3]), (2, [0, 1])):
        attention = simmim_images.WindowAttention(16, 2, grid=8, window=4, shift=shift)
        x = torch.randn(1, 8, 8, 16, requires_grad=True)
        attention(x)[0, 0, 0].sum().backward()
        touched = x.grad[0].abs().sum(-1) > 0
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[reached[0] : reached[-1] + 1, reached[0] : reached[-1] + 1] = True
        assert torch.equal(touched, expected)
        assert attention.bias_table.grad.abs().sum() > 0


def test_images_bad_checkpoints(simmim_images: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, good = simmim_images.main, tmp_path / "good.pt"
    pretraining = simmim_images.Pretraining("vit", "l1", False, 0)
    pretraining.done = 7
    pretraining.save(good)
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:1000])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    assert "cannot be read" in _error(capsys, main, "--resume", tmp_path / "missing.pt")
    for name in ("empty.pt", "text.pt", "cut.pt", "other.pt"):
        line = _error(capsys, main, "--resume", tmp_path / name)
        assert "is not a checkpoint" in line and name in line
    assert "--model vit, not swin" in _error(capsys, main, "--resume", good, "--model", "swin")
    assert "--steps must be at least the 7" in _error(capsys, main, "--resume", good, "--steps", 3)
    assert "no folder" in _error(capsys, main, "--output", tmp_path / "nowhere" / "picture.png")
    assert "is a directory" in _error(capsys, main, "--checkpoint", tmp_path)
    assert "--loss" in _error(capsys, main, "--loss", "l3")


# ----------------------------------------------------------------------------------------------------- simmim_dialogue

RESTORED_LINE = r"restored in held-out dialogues: ([\d.]+)% of \d+; always guessing '\w+': ([\d.]+)%"


def test_dialogue_learns_missing_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two kinds of dialogue, which take fewer steps than all of the file."""
    blocks = simmim_dialogue.TEXT.read_text().split("\n\n")
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(block for block in blocks if block.startswith(("Excuse me", "Hello. A ticket"))))
    arguments = ("--text", path, "--steps", 120, "--turn", "Hello. A ticket to _, please.")
    output = _run(capsys, simmim_dialogue.main, *arguments)
    restored, guessed = _numbers(RESTORED_LINE, output)
    assert restored > 2 * guessed
    assert re.search(r"yours\n  Hello\. A ticket to .*, please\.\n    proposed: \w", output), output


@pytest.mark.slow
def test_dialogue_meets_its_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    restored, guessed = _numbers(RESTORED_LINE, _run(capsys, simmim_dialogue.main))
    assert restored >= 50
    assert restored > 4 * guessed


def test_dialogue_words_survive_the_picture(tmp_path: Path) -> None:
    """What was encoded is found again by the nearest vector, and only hidden cells are filled in."""
    dialogues = simmim_dialogue.read_dialogues(simmim_dialogue.TEXT)
    words = simmim_dialogue.Words(dialogues, seed=0)
    numbers = torch.stack([words.encode(turns) for turns in dialogues[:5]])
    assert torch.equal(words.nearest(words.images(numbers)), numbers)
    assert [words.names[n] for n in numbers[0, 0] if n] == dialogues[0][0]


def test_dialogue_takes_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Où est le chat ?\nIl est [là].\n\n" * 12, encoding="utf-8")
    output = _run(capsys, simmim_dialogue.main, "--text", path, "--steps", 2)
    assert "10 dialogues to learn from, 2 held out" in output


def test_dialogue_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "few.txt"
    path.write_text("Hello.\nHello.\n")
    assert "at least 10 dialogues" in _error(capsys, simmim_dialogue.main, "--text", path)
    assert "cannot be read" in _error(capsys, simmim_dialogue.main, "--text", tmp_path / "missing.txt")
    assert "--turn" in _error(capsys, simmim_dialogue.main, "--turn", "")


# -------------------------------------------------------------------------------------------------------- translation

EXACT_LINE = r"without a mistake: ([\d.]+)% of 1000; before training: ([\d.]+)%"
ALIGNED_LINE = r"year (\d+)% \((\d+)%\), month (\d+)% \((\d+)%\), day (\d+)% \((\d+)%\)"


@pytest.fixture
def translation() -> ModuleType:
    pytest.importorskip("matplotlib", reason="draws the picture")
    return importlib.import_module("translation")


def test_translation_learns_and_aligns(
    translation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    output = _run(capsys, translation.main, "--steps", 140, "--output", picture)
    after, before = _numbers(EXACT_LINE, output)
    assert before < 1
    assert after >= 40
    numbers = _numbers(ALIGNED_LINE, output)
    assert all(share > 1.5 * everywhere for share, everywhere in zip(numbers[::2], numbers[1::2], strict=True)), numbers
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_translation_meets_its_criterion(
    translation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    date = "Sunday, the 1st of March 1970"
    output = _run(capsys, translation.main, "--output", tmp_path / "picture.png", "--date", date)
    after, before = _numbers(EXACT_LINE, output)
    assert after >= 95
    assert before < 1
    assert min(_numbers(ALIGNED_LINE, output)[::2]) >= 50
    assert f"{date} -> 1970-03-01" in output


def test_translation_dates_say_what_they_mean(translation: ModuleType) -> None:
    ordinal = translation.datetime.date(2026, 11, 21).toordinal()
    texts = [translation.Date(ordinal, form) for form in translation.FORMATS]
    assert {date.iso for date in texts} == {"2026-11-21"}
    assert texts[6].text == "Saturday, the 21st of November 2026"
    assert texts[7].text == "21/11/2026"
    for date in texts:
        assert date.text[date.spans["year"]] == "2026"
        assert date.text[date.spans["month"]] in ("November", "Nov", "11")
        assert date.text[date.spans["day"]] in ("21", "21st")
    endings = {day: translation.Date(translation.FIRST_DAY + day - 1, "{dayth}").text for day in range(1, 32)}
    assert [endings[day] for day in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)] == (
        "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 31st".split()
    )


def test_translation_leaves_out_padding(translation: ModuleType) -> None:
    """A date is read alike beside a longer one."""
    torch.manual_seed(0)
    model = translation.Translator()
    short, long = "1.2.1903", "Wednesday, the 13th of September 2023"
    alone, together = model.translate([short])[1], model.translate([short, long])[1]
    assert (together[0, :, len(short) :] == 0).all()
    torch.testing.assert_close(together[:1, :, : len(short)], alone)
    torch.testing.assert_close(together.sum(-1), torch.ones(2, translation.LENGTH))


def test_translation_bad_input(translation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no folder" in _error(capsys, translation.main, "--output", tmp_path / "nowhere" / "picture.png")
    assert "is a directory" in _error(capsys, translation.main, "--output", tmp_path)
    assert "--date must be a date" in _error(capsys, translation.main, "--date", " ")
    assert "--steps" in _error(capsys, translation.main, "--steps", 0)


# ----------------------------------------------------------------------------------------------------- attention_maps

VISIBLE_LINE = r"attention: hidden tokens give visible ones ([\d.]+)% of their attention, if everywhere alike ([\d.]+)%"


@pytest.fixture
def attention_maps(simmim_images: ModuleType) -> ModuleType:
    return importlib.import_module("attention_maps")


@pytest.mark.parametrize(
    ("what", "steps", "attentions"), [("image", 60, 2), pytest.param("text", 130, 1, marks=pytest.mark.slow)]
)
def test_maps_show_attention_to_what_is_there(
    attention_maps: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    steps: int,
    attentions: int,
) -> None:
    output, masks = tmp_path / "maps.png", tmp_path / "masks.png"
    arguments = ("--what", what, "--steps", steps, "--output", output, "--masks", masks)
    found = re.findall(VISIBLE_LINE, _run(capsys, attention_maps.main, *arguments))
    assert len(found) == attentions
    assert all(float(share) > float(alike) + 5 for share, alike in found), found
    for picture in (output, masks):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "attentions"), [("image", 2), ("text", 1)])
def test_maps_meet_their_criterion(
    attention_maps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, attentions: int
) -> None:
    arguments = ("--what", what, "--output", tmp_path / "maps.png", "--masks", tmp_path / "masks.png")
    found = re.findall(VISIBLE_LINE, _run(capsys, attention_maps.main, *arguments))
    assert len(found) == attentions
    assert all(float(share) > float(alike) for share, alike in found), found


def test_maps_of_text(attention_maps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--output", tmp_path / "maps.png", "--masks", tmp_path / "masks.png")
    assert len(re.findall(VISIBLE_LINE, _run(capsys, attention_maps.main, "--what", "text", "--steps", 2, *files))) == 1


def test_maps_are_the_weights_and_leave_the_model_alone(attention_maps: ModuleType) -> None:
    torch.manual_seed(0)
    attention = fastattn.MultiheadAttention(16, 4, batch_first=True)
    model = torch.nn.ModuleDict({"first": attention})
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    _, expected = attention(x, x, x, padding, average_attn_weights=False)
    for arguments in ((x, x, x, padding, False), (x, x, x, padding), (x, x, x, padding, True, None, False)):
        out, weights = attention(*arguments)
        with attention_maps.recorded(model) as maps:
            recorded_out, recorded_weights = model["first"](*arguments)
        assert list(maps) == ["first"]
        assert torch.equal(maps["first"], expected)
        assert torch.equal(recorded_out, out)
        assert (weights is None) == (recorded_weights is None)
        if weights is not None:
            torch.testing.assert_close(recorded_weights, weights)
    assert (maps["first"][1, :, :, 3:] == 0).all()
    maps.clear()
    model["first"](x, x, x)
    assert not maps


def test_maps_of_a_checkpoint(attention_maps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken as it is: the same maps as from the same steps."""
    simmim_images, path = attention_maps.simmim_images, tmp_path / "run.pt"
    pretraining, pictures = simmim_images.Pretraining("vit", "l1", False, 0), simmim_images.load_pictures(0)
    for _ in range(3):
        pretraining.step(pictures)
    pretraining.save(path)
    files = ("--output", tmp_path / "maps.png", "--masks", tmp_path / "masks.png")
    output = _run(capsys, attention_maps.main, "--checkpoint", path, *files)
    assert output == _run(capsys, attention_maps.main, "--steps", 3, *files)


def test_maps_bad_input(attention_maps: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main, path = attention_maps.main, tmp_path / "swin.pt"
    attention_maps.simmim_images.Pretraining("swin", "l1", False, 0).save(path)
    files = ("--output", tmp_path / "maps.png", "--masks", tmp_path / "masks.png")
    assert "no MultiheadAttention" in _error(capsys, main, "--checkpoint", path, *files)
    path.write_text("no checkpoint")
    assert "is not a checkpoint" in _error(capsys, main, "--checkpoint", path, *files)
    assert "--what image" in _error(capsys, main, "--what", "text", "--checkpoint", path, *files)
    assert "--what text" in _error(capsys, main, "--text", path, *files)
    assert "at least 10 dialogues" in _error(capsys, main, "--what", "text", "--text", path, *files)
    assert "no folder" in _error(capsys, main, "--masks", tmp_path / "nowhere" / "masks.png")


# ----------------------------------------------------------------------------------------------------- text_generation

PERPLEXITY_LINE = r"([\d.]+) before, ([\d.]+) after training; by the frequencies of characters ([\d.]+)"


def test_generation_learns_prose(capsys: pytest.CaptureFixture[str]) -> None:
    output = _run(capsys, text_generation.main, "--steps", 30, "--prompt", "A class")
    before, after, guessed = _numbers(PERPLEXITY_LINE, output)
    assert after < 0.75 * guessed < guessed < before
    assert "written\n  A class" in output


@pytest.mark.slow
def test_generation_meets_its_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    output = _run(capsys, text_generation.main)
    _, after, guessed = _numbers(PERPLEXITY_LINE, output)
    assert after <= 0.25 * guessed
    assert "; the same text\n" in output


def test_generation_with_a_cache_is_that_without() -> None:
    """In pieces of one character and more, on our attention and on torch's; in float64 to its rounding."""
    torch.manual_seed(0)
    model = text_generation.LanguageModel(20).double().eval()
    numbers = torch.randint(20, (2, 33))
    expected, _ = model(numbers)
    for one in (model, text_generation.stock(model)):
        scores, cache = [], None
        for part in numbers.split([20, 1, 1, 7, 4], 1):
            some, cache = one(part, cache)
            scores.append(some)
        torch.testing.assert_close(torch.cat(scores, 1), expected, rtol=1e-10, atol=1e-10)
    changed = numbers.clone()
    changed[:, 20:] = 0
    torch.testing.assert_close(
        model(changed)[0][:, :20], expected[:, :20], rtol=1e-10, atol=1e-10
    )  # the future: unseen


def test_generation_takes_any_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"Où est le chat {i} ? Il est [là]." for i in range(20)), encoding="utf-8")
    output = _run(capsys, text_generation.main, "--text", path, "--steps", 1, "--prompt", "Où")
    assert "written\n  Où" in output


def test_generation_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "few.txt"
    path.write_text("Hello.\n\nHello.\n\nHello again.\n")
    assert "20 different paragraphs" in _error(capsys, text_generation.main, "--text", path)
    path.write_text("\n\n".join(map(str, range(20))))
    assert "more than 256 characters" in _error(capsys, text_generation.main, "--text", path)
    assert "cannot be read" in _error(capsys, text_generation.main, "--text", tmp_path / "missing.txt")
    assert "--prompt" in _error(capsys, text_generation.main, "--prompt", "")


# ------------------------------------------------------------------------------------------------------- masked_words

FILLED_LINE = r"words restored in held-out text: ([\d.]+)% of \d+; always guessing '\w+': ([\d.]+)%"


@pytest.fixture
def masked_words() -> ModuleType:
    pytest.importorskip("matplotlib", reason="draws the picture")
    pytest.importorskip("transformers", reason="carries the encoder")
    return importlib.import_module("masked_words")


def test_words_are_filled_in(masked_words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the dialogues, whose words are few and take few steps."""
    picture = tmp_path / "picture.png"
    output = _run(capsys, masked_words.main, "--text", simmim_dialogue.TEXT, "--steps", 60, "--output", picture)
    restored, guessed = _numbers(FILLED_LINE, output)
    assert restored > 3 * guessed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_words_meet_their_criterion(
    masked_words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restored, guessed = _numbers(FILLED_LINE, _run(capsys, masked_words.main, "--output", tmp_path / "picture.png"))
    assert restored >= 20
    assert restored >= 2 * guessed


def test_words_attend_within_the_window_as_with_sdpa(masked_words: ModuleType) -> None:
    """The same scores as on torch's attention; no effect beyond the window, nor of padding."""
    torch.manual_seed(0)
    words, length = 30, masked_words.LENGTH
    numbers = torch.randint(3, words, (4, length))
    numbers[1:, 25:] = masked_words.PADDING
    model = masked_words.make_model(numbers, words).eval()
    mask = torch.rand(numbers.shape) < 0.3
    mask &= masked_words.known(numbers)
    loss, scores = masked_words.predict(model, numbers, mask)
    assert scores.shape == (int(mask.sum()), words)
    model.set_attn_implementation("sdpa")
    expected_loss, expected = masked_words.predict(model, numbers, mask)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected_loss)

    model.set_attn_implementation("fastattn")
    place = torch.zeros_like(mask)
    place[:, 10] = True
    _, before = masked_words.predict(model, numbers, place)
    for distance, seen in ((masked_words.WINDOW, True), (masked_words.WINDOW + 1, False)):
        for column in (10 - distance, 10 + distance):
            changed = numbers.clone()
            changed[:, column] = 3 + (changed[:, column] - 2) % (words - 3)
            assert torch.equal(masked_words.predict(model, changed, place)[1], before) != seen, column


def test_words_are_hidden_once(masked_words: ModuleType) -> None:
    """Unknown words and padding never; where nothing is hidden, the loss is 0."""
    torch.manual_seed(0)
    numbers = torch.randint(3, 30, (40, masked_words.LENGTH))
    numbers[:, 20:] = masked_words.PADDING
    numbers[:, 5] = masked_words.UNKNOWN
    model = masked_words.make_model(numbers, 30)
    rounds = torch.randint(masked_words.ROUNDS, numbers.shape)
    guesses, probabilities = masked_words.fill(model, numbers, rounds)
    may = masked_words.known(numbers)
    assert int(may.sum()) == 40 * 19
    assert (guesses[may] > masked_words.HIDDEN).all()
    assert (probabilities[may].diff(dim=-1) <= 0).all() and (probabilities[may] < 1).all()
    assert torch.equal(guesses[~may], numbers[~may][:, None].expand(-1, masked_words.GUESSES))
    # Each with the others of its round hidden.
    mask = may[:1] & (rounds[:1] == rounds[0, 7])
    _, scores = masked_words.predict(model, numbers[:1], mask)
    assert torch.equal(scores[:, 3:].argmax(-1) + 3, guesses[:1][mask][:, 0])
    loss, scores = masked_words.predict(model, numbers, torch.zeros_like(may))
    assert loss.item() == 0 and scores.shape == (0, 30)


def test_words_bad_input(masked_words: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, main = tmp_path / "few.txt", masked_words.main
    path.write_text("Hello.\n\nHello.\n\nHello again.\n")
    assert "20 different paragraphs" in _error(capsys, main, "--text", path, "--output", tmp_path / "a.png")
    path.write_text("\n\n".join(f"Word{i}" for i in range(20)))
    assert "must hold 5 words 3 times" in _error(capsys, main, "--text", path, "--output", tmp_path / "a.png")
    path.write_text("\n\n".join(f"{'a b c d e ' * 3 if i == 7 else i}" for i in range(20)))
    assert "none of the words held out" in _error(capsys, main, "--text", path, "--output", tmp_path / "a.png")
    assert "cannot be read" in _error(capsys, main, "--text", tmp_path / "missing.txt", "--output", tmp_path / "a.png")
    assert "no folder" in _error(capsys, main, "--output", tmp_path / "nowhere" / "picture.png")
