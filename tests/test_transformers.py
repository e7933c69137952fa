"""transformers with ``attn_implementation="fastattn"``: outputs, gradients, weights and generated tokens as eager's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402
from fastattn.integrations.transformers import AttentionMask, mae_loss, simmim_loss  # noqa: E402
from fastattn.testing.compare import compare  # noqa: E402

integration.register()

B, L, VOCAB = 3, 21, 100
REAL = torch.tensor([16, 21, 11])  # tokens of each sequence that are not padding
TEXT = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "initializer_range": 0.15}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**TEXT, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4, "num_channels": 3, "initializer_range": 0.15}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def padding(side: str | None) -> Tensor | None:
    """The attention mask (B, L) of a batch padded on one side."""
    if side is None:
        return None
    before = torch.arange(L) < REAL[:, None]
    return (before.flip(1) if side == "left" else before).long()


def token_ids(side: str | None, low: int = 3) -> Tensor:
    ids = torch.randint(low, VOCAB, (B, L), generator=torch.Generator().manual_seed(5))
    mask = padding(side)
    return ids if mask is None else torch.where(mask.bool(), ids, 0)


def text_inputs(side: str | None) -> dict[str, Tensor]:
    mask = padding(side)
    return {"input_ids": token_ids(side)} if mask is None else {"input_ids": token_ids(side), "attention_mask": mask}


def seq2seq_inputs(side: str | None) -> dict[str, Tensor]:
    return {**text_inputs(side), "decoder_input_ids": token_ids(None)[:, :13]}


def image_inputs(size: int, patches: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    masked = torch.rand(B, patches, generator=generator) < 0.6
    return {"pixel_values": torch.randn(B, 3, size, size, generator=generator), "bool_masked_pos": masked}


def mae_inputs(side: str | None) -> dict[str, Tensor]:
    noise = torch.rand(B, 16, generator=torch.Generator().manual_seed(8))
    return {"pixel_values": image_inputs(16, 16)["pixel_values"], "noise": noise}


def siglip_inputs(side: str | None) -> dict[str, Tensor]:
    return {**text_inputs(side), "pixel_values": image_inputs(16, 16)["pixel_values"]}


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any]
    inputs: Callable[[str | None], dict[str, Tensor]]
    output: str
    layers: int  # attention layers
    weights: int  # of these, ones that give weights when asked
    empty_rows: bool = False  # rows of padding may attend to nothing: only real tokens are compared


GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BUCKETS = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
SLIDING = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
LATENT |= {"qk_nope_head_dim": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}

CASES = {
    "bert": Case(
        "BertForMaskedLM", {**TEXT, **SIZES, **NO_DROPOUT, "max_position_embeddings": 64}, text_inputs, "logits", 2, 2
    ),
    "vit": Case(
        "ViTForMaskedImageModeling",
        {**IMAGE, **NO_DROPOUT, "encoder_stride": 4},
        lambda side: image_inputs(16, 16),
        "reconstruction",
        2,
        2,
    ),
    "swin": Case(
        "SwinForMaskedImageModeling",
        {**SWIN, **NO_DROPOUT, "encoder_stride": 4, "drop_path_rate": 0.0, "initializer_range": 0.15},
        lambda side: image_inputs(32, 256),
        "reconstruction",
        4,
        4,
    ),
    "mae": Case(
        "ViTMAEForPreTraining",
        {**IMAGE, **NO_DROPOUT, **MAE, "decoder_intermediate_size": 48, "mask_ratio": 0.5},
        mae_inputs,
        "logits",
        4,
        2,  # the decoder is not asked
    ),
    "llama": Case("LlamaForCausalLM", DECODER, text_inputs, "logits", 2, 2, empty_rows=True),
    "gpt2": Case("GPT2LMHeadModel", {**TEXT, **GPT2, "embd_pdrop": 0.0}, text_inputs, "logits", 2, 2, empty_rows=True),
    "t5": Case(
        "T5ForConditionalGeneration",
        {**TEXT, **T5, **BUCKETS, "decoder_start_token_id": 0, "initializer_factor": 0.7},
        seq2seq_inputs,
        "logits",
        6,
        6,
    ),
    "siglip": Case(
        "SiglipModel",
        {"text_config": {**TEXT, **SIZES, "max_position_embeddings": 64}, "vision_config": IMAGE},
        siglip_inputs,
        "logits_per_image",
        5,  # one is the pooling head, a MultiheadAttention
        5,
    ),
    "mistral": Case(
        "MistralForCausalLM", {**DECODER, "sliding_window": 7}, text_inputs, "logits", 2, 2, empty_rows=True
    ),
    "qwen2": Case("Qwen2ForCausalLM", {**DECODER, **SLIDING}, text_inputs, "logits", 2, 2, empty_rows=True),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        {**DECODER, **EXPERTS, "sliding_window": 7, "head_dim": 16, "intermediate_size": 32},
        text_inputs,
        "logits",
        2,
        2,
        empty_rows=True,
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {**DECODER, "sliding_window": 7, "head_dim": 16, "attn_logit_softcapping": None},
        text_inputs,
        "logits",
        2,
        2,
        empty_rows=True,
    ),
    "modernbert": Case(  # a window on both sides
        "ModernBertForMaskedLM",
        {**TEXT, **SIZES, "max_position_embeddings": 64, "local_attention": 8, "global_attn_every_n_layers": 2},
        text_inputs,
        "logits",
        2,
        2,
        empty_rows=True,
    ),
    "deepseek_v3": Case(  # values narrower than queries and keys
        "DeepseekV3ForCausalLM",
        {**DECODER, **LATENT, "experts_implementation": "eager", "n_routed_experts": 4, "num_experts_per_tok": 2},
        text_inputs,
        "logits",
        2,
        2,
        empty_rows=True,
    ),
}
TEXT_CASES = [name for name, case in CASES.items() if "input_ids" in case.inputs(None)]


def make(name: str, implementation: str = "fastattn", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a case in training mode; its random weights are the same for each implementation."""
    model_class = getattr(transformers, CASES[name].name)
    torch.manual_seed(3)
    model = model_class(model_class.config_class(attn_implementation=implementation, **CASES[name].options)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and tables that start at zero would hide what is done with them.
            if not parameter.any():
                parameter.normal_(std=0.1)
    if implementation == "fastattn":
        fastattn.replace_multihead_attention(model)
    return model.to(dtype)


def run(model: torch.nn.Module, inputs: dict[str, Tensor], key: str, real: Tensor | None) -> dict[str, Tensor]:
    """The outputs of a model that are compared, of its real tokens, and the gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    outputs = model(**inputs, output_attentions=True)
    out = outputs[key]
    if real is not None:
        out = out[real]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype) / 8
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((out * upstream).sum(), list(parameters.values()), allow_unused=True)
    results = {key: out.detach()}
    results |= {f"d {n}": g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    for kind in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for number, weights in enumerate(outputs.get(kind) or ()):
            weights = weights.detach().transpose(1, 2)  # (B, L, H, S)
            results[f"{kind} {number}"] = weights if real is None else weights[real]
    return results


def exactly(name: str, dtype: torch.dtype, *args: Any) -> dict[str, Tensor]:
    """`run` of the eager model of parameters in `dtype`, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        # Models ask for a softmax or a norm in torch.float32, whatever they compute in.
        patch.setattr(torch, "float32", torch.float64)
        return run(make(name, "eager", dtype).double(), *args)


# Forward and backward through two layers round some 40 times; independent roundings add as the root.
NOISE = 40**0.5 / 2


def worst_ratio(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest error over its bound by contract 11; fails where one is above 1."""
    assert ours.keys() == eager.keys() == exact.keys()
    ratios = {}
    for name, expected in exact.items():
        # The parameters of one module share a scale: the gradient of a key's bias is 0 but for rounding.
        module = name.rpartition(".")[0].rpartition(".")[0]
        group = [x for other, x in exact.items() if other == name or (module and other.startswith(module))]
        eps = torch.finfo(ours[name].dtype).eps
        noise = torch.full_like(expected, NOISE * eps * float(max(x.abs().max() for x in group)))
        result = compare(name, ours[name], expected, noise, eager[name])
        assert result.ok, f"{name}: {result.message}"
        ratios[name] = result.ratio
    return max(ratios.values())


class Watch(TorchDispatchMode):
    """Counts our operators and looks for masks of L x S elements."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest  # elements that a bool tensor may have
        self.calls: dict[str, int] = {}
        self.dense: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn":
            name = func._schema.name.partition("::")[2]
            self.calls[name] = self.calls.get(name, 0) + 1
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.dtype == torch.bool
            and result.untyped_storage().nbytes() > self.largest
        ):
            self.dense.append(f"{func} {tuple(result.shape)}")
        return result


@pytest.mark.parametrize(
    ("name", "side", "dtype"),
    [
        *((name, side, torch.float32) for name in TEXT_CASES for side in (None, "right", "left")),
        *((name, None, torch.float32) for name in CASES if name not in TEXT_CASES),
        *((name, "left", torch.bfloat16) for name in ("bert", "llama", "t5")),
    ],
)
def test_outputs_gradients_and_weights(name, side, dtype):
    case = CASES[name]
    inputs = case.inputs(side)
    mask = padding(side)
    real = mask.bool() if mask is not None and case.empty_rows else None
    arguments = (inputs, case.output, real)
    exact, eager = exactly(name, dtype, *arguments), run(make(name, "eager", dtype), *arguments)
    with Watch(largest=10**9) as watch:
        ours = run(make(name, dtype=dtype), *arguments)
    assert watch.calls["attention"] == case.layers
    assert watch.calls["attention_weights"] == case.weights
    assert len([n for n in ours if n.startswith("d ")]) > 10
    print(f"{name} {side} {dtype}: {worst_ratio(ours, eager, exact):.2f} of the bound")


# What reaches the kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_CASES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_mask_of_queries_by_keys_is_made(name, side):
    case, model = CASES[name], make(name)
    with Watch(largest=L * L) as watch, torch.no_grad():
        model(**case.inputs(side))
    assert watch.calls["attention"] == case.layers
    assert "mask_tiles" not in watch.calls
    assert not watch.dense


def test_a_dense_mask_would_be_noticed():
    model = make("llama")
    custom = (torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(2)) < 0.5) | torch.eye(L).bool()
    with Watch(largest=L * L) as watch, torch.no_grad():
        model(input_ids=token_ids(None), attention_mask=custom.logical_not())
    assert watch.calls["mask_tiles"] == 2 and watch.dense


def patterns() -> dict[str, Callable]:
    from transformers import masking_utils as utils

    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3]])
    packed = utils.find_packed_sequence_indices(positions)
    window = utils.sliding_window_causal_mask_function(4)
    return {
        "causal": utils.causal_mask_function,
        "bidirectional": utils.bidirectional_mask_function,
        "window": window,
        "both": utils.sliding_window_bidirectional_mask_function(2),
        "chunked": utils.chunked_causal_mask_function(5, torch.tensor([0, 3])),
        "packed": utils.packed_sequence_compatibility_function(utils.causal_mask_function, positions, packed),
        "packed window": utils.packed_sequence_compatibility_function(window, positions, packed),
        "or": utils.or_masks(window, utils.blockwise_overlay(torch.tensor([[0] * 3 + [-1] * 6 + [1] * 3] * 2))),
        "custom": utils.and_masks(utils.causal_mask_function, lambda b, h, q, k: (q + k + b) % 3 != 0),
        # Positions that jump where no sequence begins: the distance in positions is not the one in indices.
        "jumping": utils.packed_sequence_compatibility_function(window, positions * 2, torch.zeros_like(packed)),
    }


PLAIN = ("or", "custom", "jumping")


@pytest.mark.parametrize("name", patterns())
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "sizes", [(12, 12, 0, 0), (5, 12, 7, 0), (4, 7, 8, 5), (3, 12, 4, 0), (1, 8, 6, 0), (12, 9, 0, 3)]
)
def test_masks_are_those_of_sdpa(name, padded, sizes):
    q_length, kv_length, q_offset, kv_offset = sizes
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, :3] = keep[1, 7:] = False
    arguments = {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": patterns()[name],
        "attention_mask": keep if padded else None,
        "allow_is_causal_skip": False,
    }
    mask = integration.attention_mask(**arguments)
    expected = transformers.masking_utils.sdpa_mask(**arguments).expand(2, 1, q_length, kv_length)
    assert mask.shape == expected.shape and mask.dtype == torch.bool
    assert torch.equal(mask & True, expected)
    assert isinstance(mask, AttentionMask) == (q_length > 1 and name not in (*PLAIN, "bidirectional"))
    if not isinstance(mask, AttentionMask):
        return
    assert "Mask" in repr(mask)
    for part in ((..., slice(2, 6)), (slice(None), slice(None), slice(-2, None)), (slice(1, 2),), (slice(0, 2), 0)):
        assert torch.equal(mask[part] & True, expected[part])
    assert isinstance(mask[:, :, -2:, 1:5], AttentionMask)
    for kept in (mask.to("cpu", copy=True), mask.detach(), mask.clone(), mask.to(torch.bool)):
        assert isinstance(kept, AttentionMask) and torch.equal(kept & True, expected)
    assert torch.equal(mask.to(torch.float32), expected.to(torch.float32))
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([expected, expected], dim=-1))


def test_padding_alone_is_expanded_and_no_padding_is_no_mask():
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    keep = padding("left").bool()
    mask = integration.attention_mask(B, 7, L, mask_function=bidirectional, attention_mask=keep)
    assert mask.shape == (B, 1, 7, L) and mask.stride(2) == 0
    form = fastattn.Mask.dense(mask).kernel_form(B, 4, 7, L, mask.device)
    assert form.tile_map is None and torch.equal(form.key_keep, keep)
    everything = {"attention_mask": torch.ones(B, L, dtype=torch.bool), "allow_is_bidirectional_skip": True}
    assert integration.attention_mask(B, 7, L, mask_function=bidirectional, **everything) is None
    with pytest.raises(ValueError, match="attention_mask"):
        integration.attention_mask(B, L, L, attention_mask=torch.ones(B, 1, L, dtype=torch.bool))


def test_while_tracing_masks_are_plain_tensors_and_values_are_not_read(monkeypatch):
    monkeypatch.setattr(integration, "is_tracing", lambda tensor=None: True)
    bidirectional = transformers.masking_utils.bidirectional_mask_function
    causal = integration.attention_mask(B, L, L)
    assert type(causal) is Tensor and torch.equal(causal, torch.ones(B, 1, L, L).tril().bool())
    keep = torch.ones(B, L, dtype=torch.bool)
    options = {"mask_function": bidirectional, "allow_is_bidirectional_skip": True}
    mask = integration.attention_mask(B, L, L, attention_mask=keep, **options)
    assert type(mask) is Tensor and mask.stride(2) == 0 and mask.all()
    assert integration.attention_mask(B, L, L, **options) is None


# Generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mistral", "qwen2", "gpt_oss", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("cache", ["dynamic", pytest.param("static", marks=pytest.mark.slow)])
def test_generates_the_tokens_of_eager(name, cache):
    inputs = text_inputs("left")
    # A model with random weights repeats itself, and would hide a wrong cache.
    options = {"max_new_tokens": 64, "no_repeat_ngram_size": 1, "do_sample": False, "cache_implementation": cache}
    eager = make(name, "eager").eval().generate(**inputs, **options)
    with Watch(largest=10**9) as watch:
        ours = make(name).eval().generate(**inputs, **options)
    assert eager.shape[1] == 64 + (1 if name == "t5" else L)
    assert all(len(tokens.unique()) == 64 for tokens in eager[:, -64:])
    assert torch.equal(ours, eager)
    assert watch.calls["attention"] >= 2 * 64


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("side", [None, "left"])
def test_several_tokens_after_a_cache(name, side):
    model, inputs = make(name).eval(), text_inputs(side)
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        whole = model(**inputs).logits
        for cache in (transformers.DynamicCache(config=model.config), static_cache(model)):
            parts, seen = [], 0
            for upto in (9, 14, 15, L):
                part = {"input_ids": inputs["input_ids"][:, seen:upto], "past_key_values": cache}
                if mask is not None:
                    part["attention_mask"] = mask[:, :upto]
                    part["position_ids"] = torch.arange(seen, upto)[None]
                parts.append(model(**part).logits)
                seen = upto
            if mask is not None:
                whole = model(**inputs, position_ids=torch.arange(L)[None]).logits
            real = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], rtol=1e-4, atol=1e-5)


def static_cache(model: torch.nn.Module) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=L + 6)


def test_packed_sequences_do_not_see_each_other():
    model, ids = make("llama").eval(), token_ids(None)[:1]
    position_ids = torch.cat([torch.arange(8), torch.arange(L - 8)])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in (ids[:, :8], ids[:, 8:])], dim=1)
        packed = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
        starts = torch.tensor([0, 8, L], dtype=torch.int32)
        told = model(input_ids=ids, position_ids=position_ids, cu_seq_lens_q=starts, cu_seq_lens_k=starts).logits
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told, alone, rtol=1e-5, atol=1e-5)


def test_prepared_masks_of_the_user():
    model, eager, ids = make("llama"), make("llama", "eager"), token_ids(None)
    keep = (torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(2)) < 0.5) | torch.eye(L).bool()
    added = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    expected = eager(input_ids=ids, attention_mask=added).logits
    for mask in (keep, added):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        model(input_ids=ids, attention_mask=keep.long())


# The attention function ----------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    is_causal = True


def qkv(heads: int = 4, len_q: int = 6, len_k: int = 6) -> list[Tensor]:
    shapes = ((2, heads, len_q, 8), (2, 2, len_k, 8), (2, 2, len_k, 5))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.repeat_interleave(2, dim=1).mT / 8**0.5


def test_sinks_with_gradients():
    query, key, value = qkv()
    for shape, argument in (((4,), "s_aux"), ((2, 4, 6, 1), "sinks")):
        sinks = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        causal = torch.ones(6, 6, dtype=torch.bool).tril()
        scores = scores_of(query, key).masked_fill(~causal, float("-inf"))
        extra = (sinks.view(1, 4, 1, 1) if len(shape) == 1 else sinks).expand(2, 4, 6, 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
        expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
        out, given = integration.attention_forward(
            Layer(), query, key, value, None, **{argument: sinks}, output_attentions=True
        )
        assert out.is_contiguous()
        torch.testing.assert_close((out, given), (expected, weights))
        upstream = [torch.randn_like(out), torch.randn_like(given)]
        inputs = [query, key, value, sinks]
        torch.testing.assert_close(
            torch.autograd.grad([out, given], inputs, upstream),
            torch.autograd.grad([expected, weights], inputs, upstream),
        )


def test_weights_are_those_after_dropout():
    query, key, value = qkv()
    out, weights = integration.attention_forward(
        Layer(), query, key, value, None, dropout=0.4, is_causal=False, output_attentions=True
    )
    assert 20 < int((weights == 0).sum()) < 200  # of 288
    torch.testing.assert_close((weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2), out)
    torch.manual_seed(1)
    first = integration.attention_forward(Layer(), query, key, value, None, dropout=0.4)[0]
    torch.manual_seed(1)
    assert torch.equal(first, integration.attention_forward(Layer(), query, key, value, None, dropout=0.4)[0])


def test_dropout_of_everything():
    query, key, value = (x.requires_grad_() for x in qkv(len_q=5, len_k=5))
    out, weights = integration.attention_forward(Layer(), query, key, value, None, dropout=1.0, output_attentions=True)
    assert not out.any() and not weights.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), (query, key, value)))


def test_causal_only_for_several_queries_of_a_causal_module_without_a_mask():
    query, key, value = qkv(len_q=4, len_k=7)

    def out(*args: Any, **kwargs: Any) -> Tensor:
        return integration.attention_forward(*args, **kwargs)[0]

    def expected(keep: Tensor, rows: int = 4) -> Tensor:
        scores = scores_of(query[:, :, :rows], key).masked_fill(~keep, float("-inf"))
        return (scores.softmax(-1) @ value.repeat_interleave(2, dim=1)).transpose(1, 2)

    lower, full = torch.ones(4, 7, dtype=torch.bool).tril(), torch.ones(4, 7, dtype=torch.bool)
    other = Layer()
    other.is_causal = False
    torch.testing.assert_close(out(Layer(), query, key, value, None), expected(lower))
    torch.testing.assert_close(out(torch.nn.Module(), query, key, value, None), expected(lower))
    torch.testing.assert_close(out(other, query, key, value, None), expected(full))
    torch.testing.assert_close(out(other, query, key, value, None, is_causal=True), expected(lower))
    torch.testing.assert_close(out(Layer(), query, key, value, full), expected(full))
    torch.testing.assert_close(out(Layer(), query[:, :, :1], key, value, None), expected(full[:1], rows=1))
    banded = lower & lower.logical_not().triu(-1).logical_or(torch.ones(4, 7, dtype=torch.bool).triu(-1))
    torch.testing.assert_close(out(Layer(), query, key, value, None, sliding_window=2), expected(banded))


def test_queries_that_the_batch_shares():
    query, key, value = qkv()
    out, _ = integration.attention_forward(Layer(), query[:1], key, value, None, is_causal=False)
    weights = scores_of(query[:1].expand(2, -1, -1, -1), key).softmax(-1)
    torch.testing.assert_close(out, (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2))


def test_position_bias_and_a_float_mask_are_added_with_gradients():
    query, key, value = qkv()
    bias = torch.randn(6, 6, 4, dtype=torch.float64).permute(2, 0, 1)[None].requires_grad_()
    added = torch.randn(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    keep = torch.rand(2, 1, 6, 6) < 0.7
    keep[..., 0] = True
    for mask, scores in (
        (added, scores_of(query, key) + bias + added),
        (keep, (scores_of(query, key) + bias).masked_fill(~keep, float("-inf"))),
    ):
        expected = (scores.softmax(-1) @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
        out, weights = integration.attention_forward(Layer(), query, key, value, mask, position_bias=bias)
        assert weights is None
        torch.testing.assert_close(out, expected)
        inputs = [query, key, value, bias, *([added] if mask is added else [])]
        upstream = torch.randn_like(out)
        torch.testing.assert_close(
            torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
        )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"softcap": 50.0}, "softcap.*'eager'"),
        ({"cache": object()}, "cache.*'sdpa'"),
        ({"head_mask": torch.ones(4)}, "head_mask.*'eager'"),
        ({"indices": torch.ones(2, 6, 3)}, "indices.*'sdpa'"),
        ({"block_indices": torch.ones(2, 6, 3)}, "block_indices.*'sdpa'"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q"),
    ],
)
def test_what_would_be_ignored_is_refused(options, named):
    query, key, value = qkv(len_k=7)
    with pytest.raises(ValueError, match=named):
        integration.attention_forward(Layer(), query, key, value, None, **options)


def test_soft_capping_of_a_model_is_refused():
    config = transformers.Gemma2Config(**DECODER, head_dim=16, attn_implementation="fastattn")
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        transformers.Gemma2ForCausalLM(config)(input_ids=token_ids(None))


def test_models_with_an_attention_of_their_own_are_refused():
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4, "attn_implementation": "fastattn"}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    with pytest.raises(ValueError, match="modeling_bloom.*'eager'"):
        model(input_ids=token_ids(None))
    mask, scores = integration.attention_mask(B, L, L), torch.zeros(B, 4, L, L)
    for misread in (lambda: scores + mask, lambda: scores.add_(mask), lambda: scores.masked_fill(mask, -1.0)):
        with pytest.raises(ValueError, match="AttentionInterface"):
            misread()
    assert (scores.masked_fill(~mask, -1.0)[0, 0] == torch.ones(L, L).tril() - 1).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.__setitem__((slice(None), slice(None), slice(None), 0), False),
        lambda mask: mask.fill_(False),
        lambda mask: mask.logical_and_(torch.zeros(L, L, dtype=torch.bool)),
        lambda mask: mask.copy_(torch.zeros(B, 1, L, L, dtype=torch.bool)),
        lambda mask: mask.__iand__(torch.zeros(L, L, dtype=torch.bool)),
    ],
    ids=["index", "fill", "logical_and", "copy", "and"],
)
def test_writing_into_a_mask_is_refused(write):
    """It would be lost: the elements are made for each operation."""
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        write(integration.attention_mask(B, L, L))


def test_a_mask_for_other_sizes_is_refused():
    query, key, value = qkv(len_q=4, len_k=7)
    mask = integration.attention_mask(2, 4, 6, 2)
    with pytest.raises(ValueError, match="attention_mask is for 4 queries and 6 keys"):
        integration.attention_forward(Layer(), query, key, value, mask)


# Registering ---------------------------------------------------------------------------------------------------------


def test_register_is_idempotent_and_says_what_is_missing(monkeypatch):
    integration.register()
    integration.register()
    assert transformers.AttentionInterface()["fastattn"] is integration.attention_forward
    assert transformers.AttentionMaskInterface()["fastattn"] is integration.attention_mask
    monkeypatch.setattr(integration, "_MISSING", ImportError("No module named 'transformers'"))
    with pytest.raises(ImportError, match="pip install -U transformers.*No module named"):
        integration.register()


@pytest.mark.parametrize(
    "regional", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole model", "each layer"]
)
def test_compiled_without_graph_breaks(regional):
    model, inputs = make("llama").eval(), text_inputs("left")
    expected = model(**inputs).logits
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    for module in compiled.model.layers if regional else [compiled]:
        module.compile(backend="aot_eager", fullgraph=True)
    logits = compiled(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real])
    gradient = torch.autograd.grad(logits[real].sum(), compiled.model.embed_tokens.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected[real].sum(), model.model.embed_tokens.weight))
    if regional:  # a mask without tensors
        ids = token_ids(None)
        torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing():
    model, inputs = make("llama"), text_inputs("left")
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(**inputs).logits.sum(), parameters)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs, use_cache=False).logits.sum().backward()
        torch.testing.assert_close([p.grad for p in parameters], list(plain))


def test_what_transformers_keeps_to_itself():
    """Rows of the README's table."""
    config = transformers.BertConfig(attn_implementation="fastattn")
    with pytest.raises(ValueError, match="output_attentions.*fastattn"):
        config.output_attentions = True
        transformers.BertModel(config)
    model = make("mae", "sdpa")
    model.set_attn_implementation("fastattn")
    layers = {name: module.config for name, module in model.named_modules() if name.endswith("layers.0.attention")}
    found = {name.split(".")[0]: config._attn_implementation for name, config in layers.items()}
    assert found == {"vit": "fastattn", "decoder": "sdpa"}


# The losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_simmim_loss_is_the_models(name, dtype):
    inputs = CASES[name].inputs(None)
    pixels = inputs["pixel_values"].to(dtype)
    model = make(name, dtype=dtype)
    outputs = model(pixels, bool_masked_pos=inputs["bool_masked_pos"])
    size = model.config.patch_size
    loss = simmim_loss(outputs, pixels, inputs["bool_masked_pos"], size)
    torch.testing.assert_close(loss, outputs.loss)
    ours, theirs = (torch.autograd.grad(x, outputs.reconstruction, retain_graph=True) for x in (loss, outputs.loss))
    torch.testing.assert_close(ours, theirs)
    side = pixels.shape[-1] // size
    grid = inputs["bool_masked_pos"].view(B, side, side)
    assert torch.equal(simmim_loss(outputs.reconstruction, pixels, grid, size), loss)
    assert simmim_loss(outputs, pixels, torch.zeros_like(grid), size) == 0


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mae_loss_is_the_models(norm_pix_loss, dtype):
    inputs = mae_inputs(None)
    pixels = inputs["pixel_values"].to(dtype)
    model = make("mae", dtype=dtype)
    model.config.norm_pix_loss = norm_pix_loss
    outputs = model(pixels, noise=inputs["noise"])
    loss = mae_loss(outputs, pixels, 4, norm_pix_loss=norm_pix_loss)
    torch.testing.assert_close(loss, outputs.loss)
    ours, theirs = (torch.autograd.grad(x, outputs.logits, retain_graph=True) for x in (loss, outputs.loss))
    torch.testing.assert_close(ours, theirs)


def test_losses_refuse_what_does_not_fit():
    pixels, masked = torch.randn(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.bool)
    with pytest.raises(TypeError, match="bool_masked_pos"):
        simmim_loss(pixels, pixels, masked.long(), 4)
    with pytest.raises(ValueError, match="bool_masked_pos"):
        simmim_loss(pixels, pixels, masked[:, :3], 4)
    with pytest.raises(ValueError, match="pixel_values"):
        simmim_loss(pixels, pixels, masked, 3)
    with pytest.raises(TypeError, match="patch_size"):
        simmim_loss(pixels, pixels, masked, 4.0)
    with pytest.raises(ValueError, match="input"):
        simmim_loss(pixels[:, :2], pixels, masked, 4)
    with pytest.raises(ValueError, match="pixel_values"):
        mae_loss(None, pixels[0], 4)
