"""Every op of the table, on every instruction set this machine has and on its GPU, against the golden reference.

Integer results are equal. An int8 result behind floating-point work may be off by one only where the reference's exact
value lies within 1e-3 of a rounding tie; how often that happened is printed at the end of the run. Residual stream and
parameters are of the target's own type on both sides; a result in it may be off by that type's rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from engine_buffers import GuardedOutput, guarded_copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_targets import CPU_VARIANTS, CUDA_PARAMS, OpsOn, Target, target

from pyharness import engine, reference
from pyharness.config import StageGeometry

engine.load()
ops = torch.ops.swin_int8


@pytest.fixture(params=[*CPU_VARIANTS, *CUDA_PARAMS])
def on(request):
    """Runs the test on one instruction set, or on the GPU with one type of residual stream."""
    with target(request.param) as found:
        yield found


@pytest.fixture(params=CPU_VARIANTS)
def on_cpu(request):
    """Runs the test on one instruction set."""
    with target(request.param) as found:
        yield found


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


def f32(x: float) -> float:
    """`x` as the float32 the engine will compute with."""
    return torch.tensor(x, dtype=torch.float32).item()


def s8(rng, *shape):
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


def normal(rng, *shape, scale=1.0):
    return torch.randn(shape, generator=rng) * scale


def geometry(batch, height, width, window, shift, pad_first=False):
    """The op's eight numbers, and the reference's window order, -1 for padding."""
    stage = StageGeometry(0, 0, 2, 1, (height, width), window, shift, False, pad_first)
    return [batch, height, width, *window, *shift, int(pad_first)], reference.window_order(stage, shift)


WINDOWS = pytest.mark.parametrize(
    "batch,size,window,shift,pad_first,c",
    [
        (2, (14, 14), (7, 7), (3, 3), False, 96),
        (1, (8, 12), (4, 6), (2, 3), False, 33),
        (3, (7, 7), (7, 7), (0, 0), False, 32),
        (1, (5, 3), (1, 1), (0, 0), False, 1),
        # Padded: both sides or one of them, by less than the shift or more, windows that hold nothing but padding.
        (2, (10, 13), (7, 7), (3, 3), False, 96),
        (2, (10, 13), (7, 7), (3, 3), True, 96),
        (3, (9, 12), (4, 6), (2, 3), False, 33),
        (3, (9, 12), (4, 6), (2, 3), True, 33),
        (2, (8, 13), (8, 12), (0, 6), True, 32),
        (1, (5, 7), (4, 4), (0, 0), True, 1),
        (2, (5, 22), (4, 7), (2, 3), False, 8),
    ],
)


MERGED = pytest.mark.parametrize(
    "batch,height,width,c",
    [(2, 14, 14, 32), (1, 4, 6, 9), (3, 2, 2, 1), (3, 13, 8, 16), (2, 4, 7, 24), (2, 5, 3, 9), (1, 1, 1, 8)],
)


def assert_same_to_ties(out: torch.Tensor, expected: reference.Quantized, record_ties) -> None:
    difference = (out.int() - expected.q.reshape(out.shape).int()).abs()
    off = difference > 0
    exact = expected.exact.reshape(out.shape)
    assert difference.max() <= 1, f"off by {difference.max()}"
    assert reference.near_tie(exact)[off].all(), f"off by one away from a tie: {exact[off & ~reference.near_tie(exact)][:5]}"
    record_ties(int(off.sum()), out.numel())


GEMM_SHAPES = [(1, 1, 1), (3, 5, 7), (49, 32, 96), (50, 33, 17), (12, 64, 31), (97, 129, 50), (130, 96, 384), (7, 288, 1537)]


@pytest.mark.parametrize("m,n,k", GEMM_SHAPES)
def test_gemm_s8(on: Target, rng, record_ties, m, n, k):
    x, w, factor = s8(rng, m, k), s8(rng, n, k), f32(0.9 / (74 * 74 * math.sqrt(k)) * 40)
    for relu, golden in ((False, reference.gemm_s8), (True, reference.gemm_relu_s8)):
        out = GuardedOutput((m, n), torch.int8)
        on.ops.gemm_s8(x, w, factor, relu, out.tensor)
        assert_same_to_ties(out.check(), golden(x, w, factor), record_ties)
    out = GuardedOutput((m, n), torch.int32)
    on.ops.gemm_s8(x, w, 0.0, False, out.tensor)
    assert torch.equal(out.check(), reference.gemm_s32(x, w))


@pytest.mark.parametrize("x_value,w_value", [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_gemm_s8_saturating_operands_stay_exact(on: Target, x_value, w_value):
    m, n, k = 13, 37, 1000
    x = torch.full((m, k), x_value, dtype=torch.int8)
    w = torch.full((n, k), w_value, dtype=torch.int8)
    out = GuardedOutput((m, n), torch.int32)
    on.ops.gemm_s8(x, w, 0.0, False, out.tensor)
    assert (out.check() == x_value * w_value * k).all()
    for factor in (1.0, 120.0, 1e3, 1e30):  # times the sum below and beyond int32
        clamped = GuardedOutput((m, n), torch.int8)
        on.ops.gemm_s8(x, w, factor, False, clamped.tensor)
        assert (clamped.check() == (127 if x_value * w_value > 0 else -128)).all()
        relu = GuardedOutput((m, n), torch.int8)
        on.ops.gemm_s8(x, w, factor, True, relu.tensor)
        assert (relu.check() == (127 if x_value * w_value > 0 else 0)).all()


def test_gemm_s8_rounds_half_to_even(on: Target):
    x = torch.arange(-9, 10, dtype=torch.int8).reshape(-1, 1)
    out = GuardedOutput((19, 1), torch.int8)
    on.ops.gemm_s8(x, torch.ones(1, 1, dtype=torch.int8), 0.5, False, out.tensor)
    assert torch.equal(out.check().flatten().int(), (x.flatten().double() / 2).round().int())


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 140), st.integers(1, 3))
def test_gemm_s8_any_shape_any_threads(on: Target, m, n, k, threads):
    rng = torch.Generator().manual_seed(m * 10007 + n * 101 + k)
    x, w = s8(rng, m, k), s8(rng, n, k)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = GuardedOutput((m, n), torch.int32)
        on.ops.gemm_s8(x, w, 0.0, False, out.tensor)
        assert torch.equal(out.check(), reference.gemm_s32(x, w))
    finally:
        torch.set_num_threads(before)


@WINDOWS
def test_norm_shift_partition(on: Target, rng, record_ties, batch, size, window, shift, pad_first, c):
    residual = (normal(rng, batch * size[0] * size[1], c, scale=3) + 1).to(on.real)
    gamma, beta = (1 + normal(rng, c)).to(on.real), normal(rng, c).to(on.real)
    numbers, order = geometry(batch, *size, window, shift, pad_first)
    quant = f32(127 / 2.5)
    out = GuardedOutput((batch * len(order), c), torch.int8)
    on.ops.norm_shift_partition(residual, gamma, beta, numbers, quant, out.tensor)
    golden = reference.norm1_shift_partition(residual.view(batch, *size, c), gamma, beta, order, quant)
    assert_same_to_ties(out.check(), golden, record_ties)


def test_norm_shift_partition_of_nan_and_inf_gives_zeros(on: Target, rng):
    residual = normal(rng, 16, 40).to(on.real)
    residual[3, 5], residual[7, 0], residual[9, 39] = math.nan, math.inf, -math.inf
    numbers, order = geometry(1, 4, 4, (2, 2), (1, 1))
    out = GuardedOutput((16, 40), torch.int8)
    on.ops.norm_shift_partition(residual, torch.ones(40, dtype=on.real), torch.zeros(40, dtype=on.real), numbers, 50.0, out.tensor)
    rows = torch.tensor([(order == token).nonzero().item() for token in (3, 7, 9)])
    assert (out.check()[rows] == 0).all()
    others = [r for r in range(16) if r not in rows]
    assert (out.tensor[others] != 0).any(dim=1).all()


def test_norm_of_a_constant_row_is_beta(on: Target):
    out = GuardedOutput((4, 48), torch.int8)
    beta, gamma = torch.linspace(-2, 2, 48).to(on.real), torch.ones(48, dtype=on.real)
    numbers, _ = geometry(1, 2, 2, (2, 2), (0, 0))
    on.ops.norm_shift_partition(torch.full((4, 48), 1e4, dtype=on.real), gamma, beta, numbers, 63.5, out.tensor)
    assert torch.equal(out.check(), reference.quantize(beta, 63.5).q.expand(4, 48))


@pytest.mark.parametrize("bw,heads,n,d", [(4, 3, 49, 32), (1, 1, 64, 16), (3, 2, 5, 7), (2, 4, 144, 24), (1, 1, 1, 1), (2, 2, 17, 8), (1, 1, 169, 4)])
def test_attention_ops(on: Target, rng, record_ties, bw, heads, n, d):
    c, m, pitch = heads * d, bw * n, (n + 15) // 16 * 16 + (16 if n == 5 else 0)
    qkv, bias = s8(rng, m, 3 * c), normal(rng, 3 * c).to(on.real)
    dequant, quants = f32(3.1 / 127), tuple(f32(127 / a) for a in (3.0, 2.6, 4.2))
    split = GuardedOutput((3, bw, heads, n, d), torch.int8)
    on.ops.qkv_bias(qkv, bias, dequant, *quants, split.tensor)
    assert_same_to_ties(split.check(), reference.qkv_bias(qkv, dequant, bias, quants, heads, n), record_ties)

    q, k, v = (t.contiguous() for t in split.tensor)
    factor = f32(1.5 / (74 * math.sqrt(d)))
    scores = GuardedOutput((bw, heads, n, pitch), torch.int8)
    on.ops.qk_gemm(q, k, factor, scores.tensor)
    assert_same_to_ties(scores.check()[..., :n], reference.qk_gemm(q, k, factor), record_ties)
    assert (scores.tensor[..., n:] == 0).all()

    bias = normal(rng, heads, n, n).to(on.real)
    for mask in (None, torch.where(normal(rng, bw, n, n) > 0.5, -100.0, 0.0).to(on.real)):
        args = (f32(20 / 127), f32(0.3), f32(127 / 0.9))
        p = GuardedOutput((bw, heads, n, pitch), torch.int8)
        on.ops.softmax(scores.tensor, bias, mask, *args, p.tensor)
        golden = reference.softmax(scores.tensor[..., :n], args[0], args[1], bias, mask, args[2])
        assert_same_to_ties(p.check()[..., :n], golden, record_ties)
        assert (p.tensor[..., n:] == 0).all()

    p = s8(rng, bw, heads, n, pitch)
    p[..., :n] &= 127  # probabilities are never negative; the padding may be anything and must not be read
    factor = f32(1.2 / (74 * math.sqrt(n)))
    out = GuardedOutput((m, c), torch.int8)
    on.ops.pv_gemm(p, v, factor, out.tensor)
    assert_same_to_ties(out.check(), reference.pv_gemm(p[..., :n], v, factor), record_ties)


@pytest.mark.parametrize("n,column", [(20, 19), (49, 48), (49, 5)], ids=["last", "beyond whole vectors", "within them"])
def test_softmax_of_a_nan_bias_gives_zeros(on: Target, rng, n, column):
    pitch = (n + 15) // 16 * 16
    scores, bias = s8(rng, 1, 1, n, pitch), normal(rng, 1, n, n).to(on.real)
    bias[0, 3, column] = math.nan
    out = GuardedOutput((1, 1, n, pitch), torch.int8)
    on.ops.softmax(scores, bias, None, 0.1, 0.5, 127.0, out.tensor)
    assert (out.check()[0, 0, 3] == 0).all() and (out.tensor[0, 0, :3] != 0).any(dim=1).all()


def test_softmax_mask_repeats_for_every_image(on: Target, rng, record_ties):
    batch, windows, heads, n = 3, 4, 2, 9
    scores, bias = s8(rng, batch * windows, heads, n, 16), normal(rng, heads, n, n).to(on.real)
    mask = torch.where(normal(rng, windows, n, n) > 0, -100.0, 0.0).to(on.real)
    args = (f32(0.1), f32(0.5), 127.0)
    out = GuardedOutput((batch * windows, heads, n, 16), torch.int8)
    on.ops.softmax(scores, bias, mask, *args, out.tensor)
    golden = reference.softmax(scores[..., :n], args[0], args[1], bias, mask, args[2])
    assert_same_to_ties(out.check()[..., :n], golden, record_ties)


@WINDOWS
def test_proj_bias_residual_norm(on: Target, rng, record_ties, batch, size, window, shift, pad_first, c):
    m = batch * size[0] * size[1]
    numbers, order = geometry(batch, *size, window, shift, pad_first)
    proj, bias, residual = s8(rng, batch * len(order), c), normal(rng, c).to(on.real), normal(rng, m, c, scale=2).to(on.real)
    gamma, beta = (1 + normal(rng, c, scale=0.3)).to(on.real), normal(rng, c).to(on.real)
    dequant, quant = f32(1.7 / 127), f32(127 / 2.2)
    stream, out = guarded_copy(residual), GuardedOutput((m, c), torch.int8)
    on.ops.proj_bias_residual_norm(proj, bias, stream.tensor, gamma, beta, numbers, dequant, quant, out.tensor)
    golden = reference.proj_bias_residual_norm2(
        proj, dequant, bias, residual.view(batch, *size, c), order, gamma, beta, quant
    )
    on.close(stream.check(), golden.residual.view(m, c))
    # What is normalized is the residual stream as it is stored.
    normed = golden.quantized if on.is_cpu else reference.quantize(reference.layer_norm(stream.tensor, gamma, beta), quant)
    assert_same_to_ties(out.check(), normed, record_ties)


@pytest.mark.parametrize("m,f", [(5, 384), (3, 77), (1, 1)])
def test_bias_gelu(on: Target, rng, record_ties, m, f):
    x, bias = s8(rng, m, f), normal(rng, f, scale=2).to(on.real)
    dequant, quant = f32(8 / 127), f32(127 / 6.5)
    out = GuardedOutput((m, f), torch.int8)
    on.ops.bias_gelu(x, bias, dequant, quant, out.tensor)
    assert_same_to_ties(out.check(), reference.fc1_bias_gelu(x, dequant, bias, quant), record_ties)


def test_gelu_over_its_whole_range(on: Target):
    """A fine scale (127 steps per 0.02) shows the function's own error: less than 4e-7 * max(1, |x|) for the CPU's
    polynomial; CUDA's erff and a fused multiply-add may add some units in the last place."""
    worst = 0.0
    for centre in torch.linspace(-6, 6, 97).tolist():
        x = torch.arange(-128, 128, dtype=torch.int8).reshape(1, -1)
        dequant, bias = f32(0.06 / 128), torch.full((256,), centre, dtype=on.real)
        value = reference.gelu(reference.dequantize(x, dequant) + bias.double())
        quant = f32(120 / value.abs().max().item())
        out = GuardedOutput((1, 256), torch.int8)
        on.ops.bias_gelu(x, bias, dequant, quant, out.tensor)
        exact = value * quant
        off = (out.check().double() - exact).abs() - 0.5  # beyond half a step: the function's own error
        worst = max(worst, (off / quant / value.abs().clamp(min=1)).max().item())
    assert worst < (4e-7 if on.is_cpu else 1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
@pytest.mark.parametrize("m,c", [(7, 96), (3, 13)])
def test_bias_residual_and_dequantize(on: Target, rng, dtype, m, c):
    low, high = (-128, 128) if dtype == torch.int8 else (-(2**30), 2**30)
    x = torch.randint(low, high, (m, c), generator=rng, dtype=dtype)
    bias, residual, dequant = normal(rng, c).to(on.real), normal(rng, m, c).to(on.real), f32(3.0 / high)
    stream = guarded_copy(residual)
    on.ops.bias_residual(x, bias, stream.tensor, dequant)
    golden = reference.fc2_bias_residual(x, dequant, bias, residual)
    on.close(stream.check(), golden)
    out = GuardedOutput((m, c), on.real)
    on.ops.dequantize(x, dequant, out.tensor)
    on.close(out.check(), reference.dequantize(x, dequant), rtol=3e-7, atol=0 if on.is_cpu else 1e-7)


@MERGED
def test_patch_merge_norm(on: Target, rng, record_ties, batch, height, width, c):
    residual = (normal(rng, batch * height * width, c) + torch.arange(c)).to(on.real)
    gamma, beta = (1 + normal(rng, 4 * c, scale=0.2)).to(on.real), normal(rng, 4 * c).to(on.real)
    quant = f32(127 / 2.8)
    out = GuardedOutput((batch * ((height + 1) // 2) * ((width + 1) // 2), 4 * c), torch.int8)
    on.ops.patch_merge_norm(residual, gamma, beta, [batch, height, width], quant, out.tensor)
    golden = reference.patch_merge_norm(residual.view(batch, height, width, c), gamma, beta, quant)
    assert_same_to_ties(out.check(), golden, record_ties)


@pytest.mark.parametrize("batch,chans,size,patch,c", [(2, 3, (16, 8), 4, 96), (1, 1, (6, 10), 2, 37), (3, 2, (3, 3), 1, 5)])
def test_patch_embed_and_its_norm(on: Target, rng, batch, chans, size, patch, c):
    image, weight = normal(rng, batch, chans, *size), normal(rng, c, chans * patch * patch).to(on.real)
    bias, gamma, beta = (t.to(on.real) for t in (normal(rng, c), 1 + normal(rng, c), normal(rng, c)))
    tokens = batch * size[0] * size[1] // patch**2
    out = GuardedOutput((tokens, c), on.real)
    on.ops.patch_embed(image, weight, patch, out.tensor)
    golden = reference.patch_embed(image, weight, patch)
    on.close(out.check(), golden.reshape(tokens, c), rtol=1e-5, atol=1e-5)
    embedded = out.tensor.clone()
    for norm in ((gamma, beta), (None, None)):
        x = guarded_copy(embedded)
        on.ops.patch_embed_norm(x.tensor, bias, *norm)
        empty = torch.empty(0)
        golden = reference.patch_embed_norm(embedded.double(), bias, *(empty if t is None else t for t in norm))
        on.close(x.check(), golden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch,tokens,c,classes", [(2, 49, 768, 1000), (3, 1, 9, 1), (1, 7, 65, 10)])
def test_final_norm_pool_and_head(on: Target, rng, batch, tokens, c, classes):
    residual = normal(rng, batch * tokens, c).to(on.real)
    gamma, beta = (1 + normal(rng, c)).to(on.real), normal(rng, c).to(on.real)
    features = GuardedOutput((batch, c), torch.float32)
    on.ops.final_norm_pool(residual, gamma, beta, features.tensor)
    golden = reference.final_norm_pool(residual.view(batch, tokens, 1, c), gamma, beta)
    on.close(features.check(), golden, rtol=1e-5, atol=1e-5)
    weight, bias = normal(rng, classes, c, scale=c**-0.5).to(on.real), normal(rng, classes).to(on.real)
    logits = GuardedOutput((batch, classes), torch.float32)
    on.ops.head(features.tensor, weight, bias, logits.tensor)
    golden = reference.head(features.tensor.double(), weight, bias)
    on.close(logits.check(), golden, rtol=1e-5, atol=1e-5)


def test_every_variant_gives_the_same_integers(rng):
    x, w = s8(rng, 61, 130), s8(rng, 45, 130)
    results = []
    for name in engine.cpu_variants():
        engine.select_cpu_variant(name)
        out = torch.empty(61, 45, dtype=torch.int32)
        ops.gemm_s8(x, w, 0.0, False, out)
        results.append(out)
    engine.select_cpu_variant("")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_travelling_storages_carry_poison_and_guard_bytes(rng):
    """What runs a test's ops on a GPU, here with the CPU as the device at the other end."""
    x, w = s8(rng, 5, 16), s8(rng, 3, 16)
    out = GuardedOutput((5, 3), torch.int32)
    OpsOn("cpu").gemm_s8(x[1:], w, 0.0, False, out.tensor[1:])
    assert torch.equal(out.check()[1:], reference.gemm_s32(x[1:], w))
    assert (out.tensor[0] == 0x7D7D7D7D).all(), "the row before the output came back as it went"
    with pytest.raises(ValueError, match="K|x is int8"):
        OpsOn("cpu").gemm_s8(x, w[:, :8].contiguous(), 0.0, False, out.tensor)


BAD_CALLS = {
    "K does not fit": (ValueError, r"gemm_s8 .*x is int8 \[4, 8\]; int8 \[4, 9\] is needed",
        lambda: ops.gemm_s8(torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3, 9, dtype=torch.int8), 1.0, False, torch.zeros(4, 3, dtype=torch.int8))),
    "float activations": (TypeError, r"gemm_s8 .*x is float32 \[4, 8\]; int8 is needed",
        lambda: ops.gemm_s8(torch.zeros(4, 8), torch.zeros(3, 8, dtype=torch.int8), 1.0, False, torch.zeros(4, 3, dtype=torch.int8))),
    "ReLU on accumulators": (ValueError, r"ReLU epilogue needs an int8 output",
        lambda: ops.gemm_s8(torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8), 1.0, True, torch.zeros(4, 3, dtype=torch.int32))),
    "odd side merged short": (ValueError, r"patch_merge_norm .*out is int8 \[2, 16\]; int8 \[4, 16\] is needed",
        lambda: ops.patch_merge_norm(torch.zeros(12, 4), torch.ones(16), torch.ones(16), [1, 3, 4], 1.0, torch.zeros(2, 16, dtype=torch.int8))),
    "no room for padding": (ValueError, r"norm_shift_partition .*out is int8 \[16, 4\]; int8 \[36, 4\] is needed",
        lambda: ops.norm_shift_partition(torch.zeros(16, 4), torch.ones(4), torch.ones(4), [1, 4, 4, 3, 3, 0, 0], 1.0, torch.zeros(16, 4, dtype=torch.int8))),
    "window larger than the image": (ValueError, r"4x4 tokens have no windows of 5x4",
        lambda: ops.norm_shift_partition(torch.zeros(16, 4), torch.ones(4), torch.ones(4), [1, 4, 4, 5, 4, 0, 0], 1.0, torch.zeros(20, 4, dtype=torch.int8))),
    "geometry cut off": (ValueError, r"geometry .*found 6 numbers",
        lambda: ops.norm_shift_partition(torch.zeros(16, 4), torch.ones(4), torch.ones(4), [1, 4, 4, 2, 2, 0], 1.0, torch.zeros(16, 4, dtype=torch.int8))),
    "unknown dtype": (TypeError, r"the engine knows float32, float16, bfloat16, int8 and int32",
        lambda: ops.dequantize(torch.zeros(2, 2, dtype=torch.int64), 1.0, torch.zeros(2, 2))),
    "not contiguous": (ValueError, r"not contiguous",
        lambda: ops.dequantize(torch.zeros(4, 2, dtype=torch.int8).t(), 1.0, torch.zeros(2, 4))),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    error, message, call = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_patch_embed_names_the_image_that_is_not_finite(on_cpu):
    for value in (math.nan, math.inf):
        image = torch.zeros(3, 1, 4, 4)
        image[2, 0, 3, 1] = value
        with pytest.raises(ValueError, match="image 2 of the batch"):
            on_cpu.ops.patch_embed(image, torch.zeros(8, 4), 2, torch.zeros(12, 8))


def test_unknown_variant_is_refused():
    with pytest.raises(NotImplementedError, match="avx99.*this build on this machine has"):
        engine.select_cpu_variant("avx99")


@pytest.mark.parametrize("op", ["gemm_s8", "dequantize", "bias_residual"])
def test_opcheck_of_single_ops(op, rng):
    x, w = s8(rng, 4, 8), s8(rng, 3, 8)
    args = {
        "gemm_s8": (x, w, 0.01, True, torch.zeros(4, 3, dtype=torch.int8)),
        "dequantize": (x, 0.5, torch.zeros(4, 8)),
        "bias_residual": (x, torch.zeros(8), torch.zeros(4, 8), 0.5),
    }[op]
    torch.library.opcheck(getattr(ops, op).default, args, test_utils=("test_schema",))
