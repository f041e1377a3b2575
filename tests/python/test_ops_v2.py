"""Swin-V2's own ops on every instruction set and on a GPU, against the golden reference; rules as in test_ops.py."""

from __future__ import annotations

import math

import pytest
import torch
from engine_buffers import GuardedOutput, guarded_copy
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from test_ops import MERGED, WINDOWS, assert_same_to_ties, f32, geometry, normal, s8

from pyharness import engine, reference, reference_v2

engine.load()
ops = torch.ops.swin_int8


@pytest.fixture(params=[*CPU_VARIANTS, *CUDA_PARAMS])
def on(request):
    """Runs the test on one instruction set, or on the GPU with one type of residual stream."""
    with target(request.param) as found:
        yield found


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


@WINDOWS
def test_shift_partition(on: Target, rng, record_ties, batch, size, window, shift, pad_first, c):
    residual = normal(rng, batch * size[0] * size[1], c, scale=3).to(on.real)
    residual[-1, 0] = math.nan
    residual[0, -1] = math.inf if c > 1 else 1.0
    numbers, order = geometry(batch, *size, window, shift, pad_first)
    quant = f32(127 / 4.5)
    out = GuardedOutput((batch * len(order), c), torch.int8)
    on.ops.shift_partition(residual, numbers, quant, out.tensor)
    golden = reference_v2.shift_partition(residual.view(batch, *size, c), order, quant)
    assert_same_to_ties(out.check(), golden, record_ties)


@pytest.mark.parametrize("bw,heads,n,d", [(4, 3, 49, 32), (1, 1, 64, 16), (3, 2, 5, 7), (1, 2, 256, 32), (1, 1, 1, 1)])
def test_cosine_attention_ops(on: Target, rng, record_ties, bw, heads, n, d):
    c, m, pitch = heads * d, bw * n, (n + 15) // 16 * 16 + (16 if n == 5 else 0)
    qkv, bias = s8(rng, m, 3 * c), normal(rng, 3 * c).to(on.real)
    dequant, quants = f32(3.1 / 127), tuple(f32(127 / a) for a in (0.9, 0.7, 4.2))
    split = GuardedOutput((3, bw, heads, n, d), torch.int8)
    on.ops.qkv_bias_normalize(qkv, bias, dequant, *quants, split.tensor)
    golden = reference_v2.qkv_bias_normalize(qkv, dequant, bias, quants, heads, n)
    assert_same_to_ties(split.check(), golden, record_ties)

    scores = s8(rng, bw, heads, n, pitch)
    bias, scale = (8 + normal(rng, heads, n, n, scale=2)).to(on.real), (2 + 9 * torch.rand(heads, generator=rng)).to(on.real)
    for mask in (None, torch.where(normal(rng, bw, n, n) > 0.5, -100.0, 0.0).to(on.real)):
        args = (f32(0.9 / 127), f32(127 / 0.9))
        p = GuardedOutput((bw, heads, n, pitch), torch.int8)
        on.ops.head_scale_softmax(scores, scale, bias, mask, *args, p.tensor)
        golden = reference_v2.softmax(scores[..., :n], args[0], scale, bias, mask, args[1])
        assert_same_to_ties(p.check()[..., :n], golden, record_ties)
        assert (p.tensor[..., n:] == 0).all()


def test_queries_and_keys_of_length_zero_stay_zero(on: Target, rng):
    """And a NaN takes its own head along, nobody else's."""
    heads, d = 2, 12
    qkv, bias = s8(rng, 3, 3 * heads * d), torch.zeros(3 * heads * d, dtype=on.real)
    qkv[1] = 0
    bias[d] = math.nan  # the second head's q
    out = GuardedOutput((3, 1, heads, 3, d), torch.int8)
    on.ops.qkv_bias_normalize(qkv, bias, 0.01, 127.0, 127.0, 50.0, out.tensor)
    assert (out.check()[:, 0, :, 1] == 0).all()
    assert (out.tensor[0, 0, 1] == 0).all()
    assert (out.tensor[0, 0, 0, 0] != 0).any() and (out.tensor[1, 0, 1, 0] != 0).any()


def test_the_mask_of_cosine_attention_repeats_for_every_image(on: Target, rng, record_ties):
    batch, windows, heads, n = 3, 4, 2, 9
    scores, bias = s8(rng, batch * windows, heads, n, 16), normal(rng, heads, n, n).to(on.real)
    scale = torch.tensor([3.0, 14.0]).to(on.real)
    mask = torch.where(normal(rng, windows, n, n) > 0, -100.0, 0.0).to(on.real)
    out = GuardedOutput((batch * windows, heads, n, 16), torch.int8)
    on.ops.head_scale_softmax(scores, scale, bias, mask, f32(0.008), 127.0, out.tensor)
    golden = reference_v2.softmax(scores[..., :n], f32(0.008), scale, bias, mask, 127.0)
    assert_same_to_ties(out.check()[..., :n], golden, record_ties)


@WINDOWS
def test_norms_behind_a_branch(on: Target, rng, record_ties, batch, size, window, shift, pad_first, c):
    m = batch * size[0] * size[1]
    x, bias, residual = s8(rng, m, c), normal(rng, c).to(on.real), normal(rng, m, c, scale=2).to(on.real)
    gamma, beta = (1 + normal(rng, c, scale=0.3)).to(on.real), normal(rng, c).to(on.real)
    numbers, order = geometry(batch, *size, window, shift, pad_first)
    proj = s8(rng, batch * len(order), c)
    dequant, quant = f32(1.7 / 127), f32(127 / 4.2)
    image = residual.view(batch, *size, c)

    stream, out = guarded_copy(residual), GuardedOutput((m, c), torch.int8)
    on.ops.proj_bias_norm_residual(proj, bias, gamma, beta, stream.tensor, numbers, dequant, quant, out.tensor)
    golden = reference_v2.proj_bias_norm1_residual(proj, dequant, bias, gamma, beta, image, order, quant)
    on.close(stream.check(), golden.residual.view(m, c), atol=5e-6)
    # What is quantized is the residual stream as it is stored.
    assert_same_to_ties(out.check(), golden.quantized if on.is_cpu else reference.quantize(stream.tensor, quant), record_ties)

    stream = guarded_copy(residual)
    on.ops.bias_norm_residual(x, bias, gamma, beta, stream.tensor, dequant)
    golden = reference_v2.fc2_bias_norm2_residual(x, dequant, bias, gamma, beta, image)
    on.close(stream.check(), golden.view(m, c), atol=5e-6)

    normed = GuardedOutput((m, c), on.real)
    on.ops.dequantize_norm(x, gamma, beta, dequant, normed.tensor)
    on.close(normed.check(), reference_v2.reduction_norm(x, dequant, gamma, beta, (1, 1, m, c)).view(m, c), atol=5e-6)


@MERGED
def test_patch_merge(on: Target, rng, record_ties, batch, height, width, c):
    residual = (normal(rng, batch * height * width, c) + torch.arange(c) / c).to(on.real)
    quant = f32(127 / 2.8)
    out = GuardedOutput((batch * ((height + 1) // 2) * ((width + 1) // 2), 4 * c), torch.int8)
    on.ops.patch_merge(residual, [batch, height, width], quant, out.tensor)
    golden = reference_v2.patch_merge(residual.view(batch, height, width, c), quant)
    assert_same_to_ties(out.check(), golden, record_ties)


def int8(*shape):
    return torch.zeros(shape, dtype=torch.int8)


BAD_CALLS = {
    "a scale for every head": (r"head_scale_softmax .*head_scale is float32 \[3\]; float32 \[2\] is needed",
        lambda: ops.head_scale_softmax(int8(1, 2, 4, 16), torch.ones(3), torch.zeros(2, 4, 4), None, 1.0, 1.0, int8(1, 2, 4, 16))),
    "pitch below the window": (r"head_scale_softmax .*pitch 3 is less than the window's 4",
        lambda: ops.head_scale_softmax(int8(1, 2, 4, 3), torch.ones(2), torch.zeros(2, 4, 4), None, 1.0, 1.0, int8(1, 2, 4, 3))),
    "mask that does not divide": (r"head_scale_softmax .*4 windows are not a multiple of the mask's 3",
        lambda: ops.head_scale_softmax(int8(4, 1, 4, 16), torch.ones(1), torch.zeros(1, 4, 4), torch.zeros(3, 4, 4), 1.0, 1.0, int8(4, 1, 4, 16))),
    "bias of q alone": (r"qkv_bias_normalize .*bias is float32 \[8\]; float32 \[24\] is needed",
        lambda: ops.qkv_bias_normalize(int8(4, 24), torch.zeros(8), 1.0, 1.0, 1.0, 1.0, int8(3, 1, 2, 4, 4))),
    "no room for padding": (r"shift_partition .*out is int8 \[16, 4\]; int8 \[36, 4\] is needed",
        lambda: ops.shift_partition(torch.zeros(16, 4), [1, 4, 4, 3, 3, 0, 0], 1.0, int8(16, 4))),
    "no padding to undo": (r"proj_bias_norm_residual .*proj is int8 \[16, 4\]; int8 \[36, 4\] is needed",
        lambda: ops.proj_bias_norm_residual(int8(16, 4), torch.zeros(4), torch.ones(4), torch.zeros(4), torch.zeros(16, 4), [1, 4, 4, 3, 3, 0, 0], 1.0, 1.0, int8(16, 4))),
    "shift outside": (r"proj_bias_norm_residual .*shift 4,0 is outside",
        lambda: ops.proj_bias_norm_residual(int8(16, 4), torch.zeros(4), torch.ones(4), torch.zeros(4), torch.zeros(16, 4), [1, 4, 4, 2, 2, 4, 0], 1.0, 1.0, int8(16, 4))),
    "residual of another size": (r"bias_norm_residual .*x is int8 \[4, 8\]; int8 \[5, 8\] is needed",
        lambda: ops.bias_norm_residual(int8(4, 8), torch.zeros(8), torch.ones(8), torch.zeros(8), torch.zeros(5, 8), 1.0)),
    "odd side merged short": (r"patch_merge .*out is int8 \[2, 16\]; int8 \[4, 16\] is needed",
        lambda: ops.patch_merge(torch.zeros(12, 4), [1, 3, 4], 1.0, int8(2, 16))),
    "gamma of the input's size": (r"dequantize_norm .*gamma is float32 \[32\]; float32 \[16\] is needed",
        lambda: ops.dequantize_norm(int8(3, 16), torch.ones(32), torch.zeros(16), 1.0, torch.zeros(3, 16))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    message, call = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()
