"""`PatchMask`, `SimMIM` and `ViTEncoder`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn
from fastattn.nn import PatchMask, SimMIM, ViTEncoder

SIZE, MASK_PATCH, PATCH = 32, 8, 4


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    encoder = ViTEncoder(SIZE, PATCH, embed_dim=24, depth=2, num_heads=3)
    return SimMIM(encoder, PatchMask(SIZE, MASK_PATCH, PATCH), **options)


def published_loss(prediction, images, mask, patch_size):
    """The loss as SimMIM's authors write it."""
    mask = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2).unsqueeze(1).contiguous()
    loss = F.l1_loss(images, prediction, reduction="none")
    return (loss * mask).sum() / (mask.sum() + 1e-5) / images.shape[1]


# PatchMask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.6, 0.75, 1.0])
@pytest.mark.parametrize("size", [192, (64, 96)])
def test_every_image_hides_exactly_the_same_number(ratio, size):
    patch_mask = PatchMask(size, 32, 4, ratio)
    mask = patch_mask(16)
    height, width = (size, size) if isinstance(size, int) else size
    assert mask.dtype == torch.bool and mask.shape == (16, height // 32, width // 32)
    expected = math.ceil(height // 32 * (width // 32) * ratio)
    assert (mask.flatten(1).sum(1) == expected).all() and patch_mask.mask_count == expected


def test_defaults_are_those_of_the_paper():
    patch_mask = PatchMask()
    assert (patch_mask.input_size, patch_mask.mask_patch_size, patch_mask.model_patch_size) == ((192, 192), 32, 4)
    assert patch_mask.mask_ratio == 0.6 and patch_mask.mask_count == 22 and patch_mask(2).shape == (2, 6, 6)


def test_model_grid_repeats_whole_patches():
    patch_mask = PatchMask(96, 32, 4)
    mask = patch_mask(3)
    fine = patch_mask.to_model_grid(mask)
    assert fine.shape == (3, 24, 24)
    blocks = fine.unflatten(1, (3, 8)).unflatten(3, (3, 8))  # (B, 3, 8, 3, 8)
    assert torch.equal(blocks, mask[:, :, None, :, None].expand_as(blocks))


def test_masks_are_reproducible_and_differ():
    patch_mask = PatchMask()
    torch.manual_seed(1)
    first = patch_mask(8)
    torch.manual_seed(1)
    assert torch.equal(first, patch_mask(8))
    state = torch.get_rng_state()
    drawn = patch_mask(8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(drawn, patch_mask(8, generator=torch.Generator().manual_seed(2)))
    assert not torch.equal(first, drawn) and not torch.equal(first[0], first[1])


def test_every_patch_is_hidden_equally_often():
    frequency = PatchMask(64, 16, 4, 0.5)(4000).double().mean(0)
    assert (frequency - 0.5).abs().max() < 5 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"input_size": 0}, "input_size"),
        ({"input_size": "192"}, "input_size"),
        ({"input_size": (192, 192, 3)}, "input_size"),
        ({"input_size": 100}, "mask_patch_size"),
        ({"mask_patch_size": -1}, "mask_patch_size"),
        ({"model_patch_size": 0}, "model_patch_size"),
        ({"model_patch_size": 5}, "model_patch_size"),
        ({"mask_ratio": 1.5}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
    ],
)
def test_bad_patch_mask(arguments, name):
    with pytest.raises(ValueError, match=name):
        PatchMask(**arguments)


def test_bad_patch_mask_calls():
    with pytest.raises(ValueError, match="batch_size"):
        PatchMask()(-1)
    with pytest.raises(ValueError, match="mask must have shape"):
        PatchMask().to_model_grid(torch.zeros(2, 5, 6, dtype=torch.bool))


# SimMIM -------------------------------------------------------------------------------------------


def test_loss_is_the_published_one():
    ours, authors = make_model(), make_model(loss=published_loss)
    images = torch.randn(4, 3, SIZE, SIZE)
    mask = PatchMask(SIZE, MASK_PATCH, PATCH)(4)
    a, b = ours(images, mask), authors(images, mask)
    a.backward(), b.backward()
    torch.testing.assert_close(a, b)
    for (name, p), q in zip(ours.named_parameters(), authors.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("normalize_target", [False, True])
def test_loss_against_its_definition(loss, normalize_target):
    model = make_model(loss=loss, normalize_target=normalize_target).double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    mask = PatchMask(SIZE, MASK_PATCH, PATCH)(2)
    fine = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    # The same forward, step by step.
    tokens = model.encoder.patch_embed(images)
    tokens = torch.where(fine.flatten(1)[..., None], model.mask_token, tokens)
    patches = model.head(model.encoder.forward_tokens(tokens))  # (B, N, C p²)
    target = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
    if normalize_target:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    function = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[loss]
    expected = function(patches[fine.flatten(1)], target[fine.flatten(1)])
    torch.testing.assert_close(model(images, mask), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_only_hidden_pixels_count_and_only_visible_ones_are_seen(loss):
    model = make_model(loss=loss)
    images = torch.randn(2, 3, SIZE, SIZE)
    mask = PatchMask(SIZE, MASK_PATCH, PATCH)(2)
    hidden = mask.repeat_interleave(MASK_PATCH, 1).repeat_interleave(MASK_PATCH, 2)[:, None]
    prediction = model.reconstruct(images, mask)[1]
    noise = torch.where(hidden, torch.randn_like(images), images)
    # What stands under the mask does not change the prediction ...
    assert torch.equal(torch.where(hidden, prediction, 0), torch.where(hidden, model.reconstruct(noise, mask)[1], 0))
    # ... and the visible pixels are not part of the loss: it is zero when the hidden ones are predicted exactly.
    assert model(torch.where(hidden, prediction, images), mask) < 1e-5 < model(images, mask)


def test_prediction_has_the_layout_of_the_images():
    model = make_model()
    images, seen = torch.randn(2, 3, SIZE, SIZE), []
    model.loss = lambda prediction, *args, **kwargs: seen.append(prediction) or prediction.sum()
    model(images)
    assert seen[0].stride() == images.stride()
    mask = model.patch_mask.to_model_grid(model.patch_mask(2, generator=torch.Generator().manual_seed(4)))
    tokens = torch.where(mask.flatten(1)[..., None], model.mask_token, model.encoder.patch_embed(images))
    patches = model.head(model.encoder.forward_tokens(tokens)).transpose(1, 2)
    expected = F.pixel_shuffle(patches.unflatten(2, mask.shape[1:]), PATCH)
    model(images, mask)
    assert torch.equal(seen[1], expected)


def test_mask_on_either_grid_is_the_same():
    model = make_model()
    images = torch.randn(2, 3, SIZE, SIZE)
    mask = model.patch_mask(2)
    assert torch.equal(model(images, mask), model(images, model.patch_mask.to_model_grid(mask)))


def test_masks_are_drawn_when_none_is_given():
    model = make_model()
    images = torch.randn(2, 3, SIZE, SIZE)
    drawn = model(images, generator=torch.Generator().manual_seed(3))
    given = model(images, model.patch_mask(2, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("normalize_target", [False, True])
def test_reconstruct_draws_pictures(normalize_target):
    model = make_model(normalize_target=normalize_target)
    images = torch.rand(2, 3, SIZE, SIZE) + 1
    mask = model.patch_mask(2)
    masked, reconstructed, hidden = model.reconstruct(images, mask)
    assert hidden.shape == (2, 1, SIZE, SIZE) and not masked.masked_select(hidden).any()
    assert torch.equal(masked.masked_select(~hidden), images.masked_select(~hidden))
    assert torch.equal(reconstructed.masked_select(~hidden), images.masked_select(~hidden))
    assert not reconstructed.requires_grad and torch.isfinite(reconstructed).all()
    if normalize_target:  # back in the range of the images: patches of mean 1.5
        assert (reconstructed.masked_select(hidden).mean() - images.mean()).abs() < 0.5


def test_an_encoder_with_larger_output_patches():
    """As Swin: the output tokens stand for larger patches than the input tokens."""

    class Merging(ViTEncoder):
        output_dim, output_patch_size = 40, 2 * PATCH

        def __init__(self):
            super().__init__(SIZE, PATCH, embed_dim=24, depth=1, num_heads=3)
            self.merge = nn.Linear(4 * 24, 40)

        def forward_tokens(self, tokens):
            x = super().forward_tokens(tokens).unflatten(1, (SIZE // PATCH, SIZE // PATCH)).permute(0, 3, 1, 2)
            return self.merge(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2))

    model = SimMIM(Merging(), PatchMask(SIZE, MASK_PATCH, PATCH, 0.3))
    loss = model(torch.randn(2, 3, SIZE, SIZE))
    loss.backward()
    assert loss.isfinite() and model.head.weight.grad.any() and model.mask_token.grad.any()


def test_training_reduces_the_loss_alike_with_stock_attention_and_ours():
    images = F.interpolate(torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0)), SIZE, mode="bilinear")
    curves = []
    for swap in (False, True):
        model = make_model(loss="l1" if swap else published_loss)
        if swap:
            report = fastattn.replace_multihead_attention(model)
            assert len(report.replaced) == 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        torch.manual_seed(1)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = model(images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert (curves[1][-5:].mean() < 0.6 * curves[1][:2].mean()) and torch.isfinite(curves[1]).all()
    torch.testing.assert_close(curves[1][:20], curves[0][:20], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options, error, name",
    [
        ({"loss": "l3"}, ValueError, "loss"),
        ({"loss": 3}, TypeError, "loss"),
        ({"loss": published_loss, "normalize_target": True}, ValueError, "normalize_target"),
        ({"patch_mask": PatchMask(SIZE, 8, 2)}, ValueError, "patch_mask"),
        ({"encoder": nn.Linear(2, 2)}, TypeError, "encoder"),
    ],
)
def test_bad_construction(options, error, name):
    encoder = ViTEncoder(SIZE, PATCH, embed_dim=24, depth=1, num_heads=3)
    with pytest.raises(error, match=name):
        SimMIM(**({"encoder": encoder} | options))


def test_bad_calls():
    model, images = make_model(), torch.randn(2, 3, SIZE, SIZE)
    for bad_images in (images[0], images[:, :1], images[:, :, :30]):
        with pytest.raises(ValueError, match="images"):
            model(bad_images)
    for mask in (bools(1, 4, 4), bools(2, 3, 3), bools(2, 16, 16), bools(2, 4), bools(2, 4, 8), bools(2, 0, 0)):
        with pytest.raises(ValueError, match="mask"):
            model(images, mask)
    with pytest.raises(TypeError, match="mask"):
        model(images, bools(2, 4, 4).float())
    with pytest.raises(ValueError, match="input_size"):
        make_model()(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="patch_mask"):
        SimMIM(model.encoder)(images)


def bools(*shape):
    return torch.zeros(shape, dtype=torch.bool)


# ViTEncoder ---------------------------------------------------------------------------------------


def test_encoder_takes_either_attention():
    torch.manual_seed(0)
    stock = ViTEncoder((32, 64), 8, embed_dim=24, depth=2, num_heads=3)
    ours = ViTEncoder((32, 64), 8, embed_dim=24, depth=2, num_heads=3, attention=fastattn.MultiheadAttention)
    ours.load_state_dict(stock.state_dict())
    assert type(stock.blocks[0].attention) is nn.MultiheadAttention
    images = torch.randn(2, 3, 32, 64)
    assert ours(images).shape == (2, 32, 24)
    torch.testing.assert_close(ours(images), stock(images), rtol=1e-4, atol=1e-5)


def test_positions_are_distinct():
    positions = ViTEncoder(64, 8, embed_dim=16, depth=0, num_heads=2).positions[0]
    assert positions.shape == (64, 16) and positions.unique(dim=0).shape == (64, 16)


@pytest.mark.parametrize(
    "options, name",
    [({"image_size": 30}, "patch_size"), ({"embed_dim": 30}, "embed_dim"), ({"in_channels": 0}, "in_channels")],
)
def test_bad_encoder(options, name):
    with pytest.raises(ValueError, match=name):
        ViTEncoder(**({"image_size": 32, "patch_size": 4, "embed_dim": 24, "num_heads": 2} | options))


def test_a_head_whose_forward_was_replaced_is_called():
    model = make_model()
    model.head.forward = lambda features: F.linear(features, model.head.weight, model.head.bias) + 100.0
    assert model(torch.randn(2, 3, SIZE, SIZE)) > 50


def test_loss_on_the_meta_device():
    model = make_model().to("meta")
    mask = torch.empty(2, SIZE // PATCH, SIZE // PATCH, dtype=torch.bool, device="meta")
    assert model(torch.empty(2, 3, SIZE, SIZE, device="meta"), mask).is_meta
