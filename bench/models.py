"""Hugging Face transformers: small randomly initialised models with each attention implementation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.contenders import OURS, Bound, Contender
from fastattn.bench.workloads import Case, ModelCase, torch_dtype

IMPLEMENTATIONS = (OURS, "sdpa", "eager")
HEADS, VOCABULARY, PATCH = 4, 1000, 16
SWIN_PATCH, SWIN_WINDOW = 4, 7


def why_missing() -> str | None:
    """Why the suite cannot run and what to install, in one line; None when it can."""
    try:
        from fastattn.integrations.transformers import register

        register()
    except ImportError as error:
        return " ".join(str(error).split())
    return None


def _text(width: int, layers: int, length: int, **own: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    return {**sizes, "intermediate_size": 4 * width, "vocab_size": VOCABULARY, "max_position_embeddings": length, **own}


def _image(width: int, layers: int, size: int, **own: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    return {**sizes, "intermediate_size": 4 * width, "image_size": size, "patch_size": PATCH, **own}


def _gpt2(width: int, layers: int, length: int) -> dict[str, Any]:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": HEADS, "n_positions": length, "vocab_size": VOCABULARY}
    return {**sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}


def _t5(width: int, layers: int, length: int) -> dict[str, Any]:
    sizes = {"d_model": width, "d_kv": width // HEADS, "d_ff": 4 * width, "num_layers": layers, "num_heads": HEADS}
    return {**sizes, "vocab_size": VOCABULARY, "dropout_rate": 0.0}


def _swin(width: int, layers: int, size: int) -> dict[str, Any]:
    sizes = {"image_size": size, "patch_size": SWIN_PATCH, "window_size": SWIN_WINDOW, "encoder_stride": 2 * SWIN_PATCH}
    depth = {"embed_dim": width // 4, "depths": [layers, layers], "num_heads": [HEADS // 2, HEADS]}
    return {**sizes, **depth, "drop_path_rate": 0.0}


def _mae(width: int, layers: int, size: int) -> dict[str, Any]:
    decoder = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    decoder["intermediate_size"] = 4 * width
    return _image(width, layers, size, **{f"decoder_{name}": value for name, value in decoder.items()})


_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# model: its class, that of its configuration, and the configuration's options by width, layers, and length or size
MODELS: dict[str, tuple[str, str, Callable[[int, int, int], dict[str, Any]]]] = {
    "bert": ("BertForMaskedLM", "BertConfig", partial(_text, **_NO_DROPOUT)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", partial(_text, num_key_value_heads=HEADS // 2)),
    "t5": ("T5ForConditionalGeneration", "T5Config", _t5),
    "vit": ("ViTForMaskedImageModeling", "ViTConfig", partial(_image, encoder_stride=PATCH)),
    "swin": ("SwinForMaskedImageModeling", "SwinConfig", _swin),
    "mae": ("ViTMAEForPreTraining", "ViTMAEConfig", _mae),
}
PICTURES = ("vit", "swin", "mae")


def make_model(case: ModelCase, implementation: str) -> nn.Module:
    """The model; the same seed gives every implementation the same parameters."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    if implementation == OURS:
        from fastattn.integrations.transformers import register

        register()
    name, config_name, options = MODELS[case.model]
    # Room for what is generated beside the prompt.
    config = getattr(transformers, config_name)(
        **options(case.width, case.layers, case.length + case.new_tokens), attn_implementation=implementation
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, name)(config)
    return model.to(torch.device(case.device), torch_dtype(case.dtype)).train(case.backward)


def lengths_of(case: ModelCase) -> Tensor:
    """How many tokens of each sequence are there (B,): all of the first, a quarter of the last."""
    if not case.padded:
        return torch.full((case.batch,), case.length)
    return torch.linspace(case.length, max(1, case.length // 4), case.batch).long()


def row_length(case: ModelCase) -> int:
    """How many keys a query attends to, at most."""
    if case.model == "swin":
        return SWIN_WINDOW**2
    return (case.length // PATCH) ** 2 if case.model in PICTURES else case.length


def model_inputs(case: ModelCase, seed: int = 0) -> dict[str, Tensor]:
    """The keyword arguments of the model's forward: random tokens with their attention mask, or random pictures."""
    generator = torch.Generator().manual_seed(seed)
    device = torch.device(case.device)
    if case.model not in PICTURES:

        def tokens(length: int) -> Tensor:
            return torch.randint(3, VOCABULARY, (case.batch, length), generator=generator).to(device)

        inputs = {"input_ids": tokens(case.length)}
        if case.padded:
            inputs["attention_mask"] = (torch.arange(case.length) < lengths_of(case)[:, None]).long().to(device)
        if case.model == "t5":
            inputs["decoder_input_ids"] = tokens(max(1, case.length // 4))
        return inputs
    patch = SWIN_PATCH if case.model == "swin" else PATCH
    patches = (case.length // patch) ** 2
    pictures = torch.randn(case.batch, 3, case.length, case.length, generator=generator)
    chosen = torch.rand(case.batch, patches, generator=generator).to(device)
    inputs = {"pixel_values": pictures.to(device, torch_dtype(case.dtype))}
    return inputs | ({"noise": chosen} if case.model == "mae" else {"bool_masked_pos": chosen < 0.6})


def bind_model(case: ModelCase, model: nn.Module, inputs: dict[str, Tensor]) -> Bound:
    """The step of a model: logits or reconstruction (and the attention weights), with the gradient of every parameter;
    or the tokens that it generates."""
    if case.new_tokens:
        generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
        options = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "do_sample": False}
        mask = torch.ones_like(inputs["input_ids"])
        return Bound(
            lambda: generate(**inputs, attention_mask=mask, pad_token_id=0, **options)[:, case.length :].double()
        )
    options = {"output_attentions": True} if case.attentions else {}
    causal = {"use_cache": False} if case.model in ("gpt2", "llama", "t5") else {}

    def forward() -> Any:
        outputs = model(**inputs, **options, **causal)
        out = outputs["reconstruction" if case.model in ("vit", "swin") else "logits"]
        return (out, outputs["attentions"]) if case.attentions else out

    leaves: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad and case.backward}
    grad_out = None
    if case.backward:
        with torch.no_grad():
            result = forward()
        shape = (result[0] if case.attentions else result).shape
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        if case.padded and case.model != "t5":  # nobody trains on padding
            grad_out *= inputs["attention_mask"].cpu()[..., None]
        grad_out = grad_out.to(next(iter(leaves.values())))
    return Bound(forward, leaves, grad_out, allow_unused=True)


def real_positions(case: ModelCase, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results, without what a model says at the positions of padding."""
    if not case.padded or case.model == "t5":
        return results
    real = torch.arange(case.length) < lengths_of(case)[:, None]
    return {**results, "out": results["out"].cpu()[real]}


def model_contenders() -> list[Contender]:
    """Our implementation first, then those of transformers."""

    def bind(implementation: str, case: Case) -> Bound:
        assert isinstance(case, ModelCase)
        return bind_model(case, make_model(case, implementation), model_inputs(case))

    def why_not(implementation: str, case: Case) -> str | None:
        assert isinstance(case, ModelCase)
        if implementation == "sdpa" and case.attentions:
            return "SDPA gives no attention weights"
        return why_missing()

    return [Contender(name, partial(bind, name), partial(why_not, name)) for name in IMPLEMENTATIONS]
