"""`fastattn.integrations.timm` and torchvision's vision transformer, each beside the library's own attention.

Run in a process of its own: the two libraries may lie outside the path (in "vision" below sys.prefix), since a
torchvision built for CUDA does not load beside a torch for the CPU, and on the path would break transformers.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

VISION = Path(sys.prefix) / "vision"


def path_of_timm():
    """Where timm and torchvision are to be imported from: "" for the ordinary path; None when they are nowhere."""
    if importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"):
        return ""
    return str(VISION) if (VISION / "timm").is_dir() and (VISION / "torchvision").is_dir() else None


pytestmark = pytest.mark.skipif(
    path_of_timm() is None, reason=f"timm and torchvision are neither on the path nor in {VISION}"
)

# Where torchvision's own extension does not load, importing it fails for want of two operators.
PREAMBLE = """
import copy, importlib.util, os, sys, warnings
import torch
warnings.simplefilter("ignore")
try:
    torch.ops.load_library(os.path.join(os.path.dirname(importlib.util.find_spec("torchvision").origin), "_C.so"))
except OSError:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm, torchvision
import fastattn
from fastattn import ops
from fastattn.integrations.timm import Attention, register
from timm.models.vision_transformer import VisionTransformer

class Doubled(Attention):
    def forward(self, x, *args, **kwargs):
        return super().forward(2 * x, *args, **kwargs)

torch.manual_seed(0)
calls = [0]
def counted(function):
    def count(*args, **kwargs):
        result = function(*args, **kwargs)
        calls[0] += result is not None  # the direct way did not fit: the operator follows
        return result
    return count
for name in ("attention", "attention_packed", "direct_attention"):
    setattr(ops, name, counted(getattr(ops, name)))

def pair(**options):
    kind = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, **options)
    stock = VisionTransformer(**kind).double()
    for parameter in stock.parameters():  # the biases and gates too
        torch.nn.init.normal_(parameter, std=0.3)
    ours = VisionTransformer(attn_layer=Attention, **kind).double()
    assert [*ours.state_dict()] == [*stock.state_dict()]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    ours.load_state_dict(stock.state_dict())
    assert all(type(block.attn) is Attention for block in ours.blocks)
    return stock, ours

def results(model, x, **options):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x, **options)
    out.square().sum().backward()
    return out, x.grad, *(parameter.grad for parameter in model.parameters())

def agree(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
tokens = torch.randn(2, 17, 32, dtype=torch.float64)
"""


# One process for all of it: importing timm takes seconds.
BODY = """
def models():
    for options in ({}, {"qk_norm": True, "qkv_bias": False}, {"scale_attn_norm": True}):
        stock, ours = pair(**options)
        for training in (True, False):
            stock.train(training), ours.train(training)
            calls[0] = 0
            found, expected = results(ours, images), results(stock, images)
            assert calls[0] == 2
            agree(found, expected)
        with torch.no_grad():
            agree(ours(images), stock(images))

def masks():
    keep = torch.rand(2, 1, 17, 17) > 0.4
    keep[..., 0] = True
    dead = torch.ones(17, 17, dtype=torch.bool)
    dead[3] = False
    for options in ({}, {"gated": True, "qkv_bias": True}, {"qk_norm": True, "norm_layer": torch.nn.LayerNorm}):
        stock = timm.layers.Attention(32, 2, **options).double()
        ours = Attention(32, 2, **options).double()
        ours.load_state_dict(stock.state_dict())
        for mask in (keep, torch.where(keep, 0.0, float("-inf")).double(), torch.randn(2, 17, 17).double()):
            agree(results(ours, tokens, attn_mask=mask), results(stock, tokens, attn_mask=mask))
        agree(results(ours, tokens, is_causal=True), results(stock, tokens, is_causal=True))
        biases = [torch.zeros(2, 17, 17, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        for model, bias in zip((ours, stock), biases):
            model(tokens, attn_mask=bias).square().sum().backward()
        agree(biases[0].grad, biases[1].grad)
        alone = ours(tokens, attn_mask=dead)[:, 3]
        # zero attention: what is left is the projection's bias
        agree(alone, ours.proj.bias.expand_as(alone))
        for wrong in ({"attn_mask": keep, "is_causal": True}, {"attn_mask": keep[..., :5]}):
            try:
                ours(tokens, **wrong)
            except (RuntimeError, ValueError) as error:
                assert "mask" in str(error)
            else:
                raise AssertionError("a wrong mask was taken")

def settings():
    stock = timm.layers.Attention(32, 2).double()
    stock.fused_attn = False
    expected = results(stock, tokens)
    converted = copy.deepcopy(stock)
    converted.__class__ = Attention
    agree(results(converted, tokens), expected)
    dropped = Attention(32, 2, attn_drop=0.5, proj_drop=0.5).double()
    torch.manual_seed(1)
    first = dropped(tokens)
    torch.manual_seed(1)
    assert torch.equal(dropped(tokens), first) and not torch.equal(dropped(tokens), first)
    dropped.eval()
    assert torch.equal(dropped(tokens), dropped(tokens))
    everything = Attention(32, 2, attn_drop=1.0).double()
    agree(everything(tokens), everything.proj.bias.expand(2, 17, 32))
    half = Attention(32, 2, dtype=torch.bfloat16)
    assert half(tokens.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Attention(32, 2, qk_norm=True, norm_layer=torch.nn.LayerNorm)
        assert mixed(tokens.float()).dtype == torch.bfloat16

def registered():
    register()
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_layer="fastattn")
    assert type(model.blocks[0].attn) is Attention
    register("another")
    assert timm.models.vision_transformer.ATTN_LAYERS["another"] is Attention
    table = timm.models.vision_transformer.__dict__.pop("ATTN_LAYERS")
    try:
        register()
    except RuntimeError as error:
        assert "attn_layer=" in str(error)
    else:
        raise AssertionError("registered in no table")
    timm.models.vision_transformer.ATTN_LAYERS = table

def tracers():
    stock, ours = pair()
    expected = stock.eval()(images)
    compiled = torch.compile(ours.eval(), backend="eager", fullgraph=True)
    agree(compiled(images), expected)
    agree(torch.jit.script(ours)(images), expected)
    calls[0] = 0
    agree(ours(images), expected)  # scripting has left the model as it was
    assert calls[0] == 2 and all(type(block.attn) is Attention for block in ours.blocks)
    graph = torch.fx.symbolic_trace(ours)
    calls[0] = 0
    agree(graph(images), expected)
    assert calls[0] == 2
    for block in ours.blocks:
        block.attn.__class__ = Doubled
    expected = ours(images)
    for trace, error in (torch.jit.script, Exception), (torch.fx.symbolic_trace, torch.fx.proxy.TraceError):
        try:
            trace(ours)
        except error:
            pass
        else:
            raise AssertionError("a forward of the user's would be left out, or run twice")
    assert torch.equal(ours(images), expected)

def context():
    from fastattn.integrations import sdpa
    stock, _ = pair()
    expected = stock(images)
    calls[0] = 0
    with sdpa.replace_scaled_dot_product_attention():
        agree(stock(images), expected)
    assert calls[0] == 2

def vision():
    stock = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5).double()
    torch.nn.init.normal_(stock.heads.head.weight)
    ours = copy.deepcopy(stock)
    report = fastattn.replace_multihead_attention(ours)
    assert len(report.replaced) == 2 and not report.left
    for training in (True, False):
        stock.train(training), ours.train(training)
        calls[0] = 0
        found, expected = results(ours, images), results(stock, images)
        assert calls[0] == 2
        agree(found, expected)

for part in (models, masks, settings, registered, tracers, context, vision):
    part()
    print(part.__name__, "holds")
"""


def test_timm_and_torchvision():
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path_of_timm(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", PREAMBLE + BODY], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds") == 7
