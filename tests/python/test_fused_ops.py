"""The fused graph's operations on every instruction set this machine has and on its GPU, against their golden functions.

As test_ops.py: integers are equal, an int8 behind floating-point work may be off by one only next to a rounding tie, or
where a tie within the operation allows it. Odd shapes, saturating values, poisoned outputs, guard bytes behind them.
"""

from __future__ import annotations

import pytest
import torch
from engine_buffers import GuardedOutput, guarded_copy
from op_targets import CPU_VARIANTS, CUDA_PARAMS, Target, target
from torch import Tensor

from pyharness import engine, fused_reference, fused_reference_v2
from pyharness.attention_geometry import expand_bias_table
from pyharness.config import StageGeometry
from pyharness.fused_reference import Linear, Norm, Quantized, difference
from pyharness.reference import window_order

engine.load()
ops = torch.ops.swin_int8

EXTREMES = torch.tensor([-128, 127, -127, 126, 0, 1], dtype=torch.int8)


@pytest.fixture(params=CPU_VARIANTS)
def variant(request):
    """Runs the test on one instruction set."""
    with target(request.param):
        yield request.param


@pytest.fixture(params=[*CPU_VARIANTS, *CUDA_PARAMS])
def on(request):
    """Runs the test on one instruction set, or on the GPU with one type of residual stream."""
    with target(request.param) as found:
        yield found


@pytest.fixture
def three_threads():
    """Many rows are shared out by rows among them, few by columns: then the last to be done norms whole rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng(seed):
    return torch.Generator().manual_seed(seed)


def f32(x: float) -> float:
    """`x` as the float32 the engine will compute with."""
    return torch.tensor(x, dtype=torch.float32).item()


def s8(rng, *shape, lowest: int = -128) -> Tensor:
    return torch.randint(lowest, 128, shape, generator=rng, dtype=torch.int8)


def normal(rng, *shape, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=rng) * scale


def linear(rng, n: int, k: int, spread: float = 60.0, bias: bool = True) -> Linear:
    """A layer of random int8 inputs whose results have a standard deviation of about `spread`; channels differ."""
    scale = spread / (74 * 74 * k**0.5) * (0.5 + torch.rand(n, generator=rng))
    return Linear(s8(rng, n, k, lowest=-127), scale, normal(rng, n, scale=spread / 3) if bias else torch.zeros(0))


def norm(rng, c: int, real: torch.dtype = torch.float32) -> Norm:
    return Norm((1 + normal(rng, c, scale=0.3)).to(real), normal(rng, c).to(real), f32(127 / 3.5))


def geometry(batch, height, width, window, shift, pad_first=False):
    """The op's eight numbers, and the window order of one image, -1 for padding."""
    stage = StageGeometry(0, 0, 2, 1, (height, width), window, shift, False, pad_first)
    return [batch, height, width, *window, *shift, int(pad_first)], window_order(stage, shift)


SIZES_PADDED = pytest.mark.parametrize("pad_first", [False, True], ids=["shift first", "pad first"])
"""Both orders, which differ at the sizes that windows of 3x3 do not divide."""


def optional(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def assert_right(value: Quantized | Tensor, found: Tensor, record_ties=None, slack=0.0) -> None:
    wrong = difference(value, found, slack)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} values are wrong"
    if isinstance(value, Quantized):
        off = found.reshape(value.q.shape) != value.q
        assert (found.reshape(value.q.shape).int() - value.q.int()).abs().max() <= 1
        record_ties(int(off.sum()), off.numel())


# Rows and columns around every block, tile and vector; K with and without a tile step, odd, and Swin's own.
LINEAR_SHAPES = [(1, 1, 1), (5, 33, 7), (17, 31, 96), (49, 288, 96), (50, 40, 130), (129, 24, 64), (7, 8, 3072), (33, 65, 36)]


@pytest.mark.parametrize("m,n,k", LINEAR_SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_s8(on: Target, rng, record_ties, m, n, k, bias):
    x, layer = s8(rng, m, k), linear(rng, n, k, bias=bias)
    out, real = GuardedOutput((m, n), torch.int8), GuardedOutput((m, n), on.real)
    on.ops.linear_s8(x, layer.weight, layer.scale, optional(layer.bias), out.tensor)
    assert_right(fused_reference.linear_s8(x, layer), out.check(), record_ties)
    on.ops.linear_s8(x, layer.weight, layer.scale, optional(layer.bias), real.tensor)
    assert_right(fused_reference.linear_float(x, layer), real.check())


def test_linear_s8_saturates(on: Target, rng):
    """Accumulators at both ends of their range, times factors beyond int32: clamped, never wrapped round."""
    x = torch.stack([torch.full((768,), value, dtype=torch.int8) for value in (-128, 127)])
    weight = torch.stack([torch.full((768,), value, dtype=torch.int8) for value in (-127, 127)] * 41)
    for scale in (1.0, 150.0, 1e3, 1e30):
        layer = Linear(weight, torch.full((82,), scale), torch.zeros(0))
        out = GuardedOutput((2, 82), torch.int8)
        on.ops.linear_s8(x, layer.weight, layer.scale, None, out.tensor)
        assert torch.equal(out.check(), torch.tensor([[127, -128], [-128, 127]], dtype=torch.int8).repeat(1, 41))


@pytest.mark.parametrize("threads", [1, 3])
def test_linear_s8_split_by_columns(variant, rng, record_ties, threads):
    """Weights beyond a cache are split by columns; so are few rows among several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, layer = s8(rng, 130, 768), linear(rng, 1200, 768)
        out = GuardedOutput((130, 1200), torch.int8)
        ops.linear_s8(x, layer.weight, layer.scale, layer.bias, out.tensor)
    finally:
        torch.set_num_threads(before)
    assert_right(fused_reference.linear_s8(x, layer), out.check(), record_ties)


# Columns of a head that divide a unit, are whole units, or begin anywhere in one; one head, and more than a panel.
COSINE_SHAPES = [(1, 1, 1, 1), (5, 3, 7, 33), (17, 2, 16, 96), (49, 3, 32, 96), (129, 2, 12, 24), (50, 1, 33, 130), (7, 1, 64, 3072)]
COSINE_SHAPES += [(33, 4, 5, 36), (130, 6, 32, 192), (9, 2, 48, 64), (3, 1, 200, 50)]


def head_sized(rng, layer: Linear, heads: int) -> Linear:
    """The layer with each head of q and k of another size, some 10^6 apart: their rounding does not see it."""
    d = len(layer.scale) // (3 * heads)
    size = torch.ones(3, heads, d)
    size[:2] = 10 ** (6 * torch.rand(2, heads, 1, generator=rng) - 4)
    size = size.flatten()
    return layer._replace(scale=layer.scale * size, bias=layer.bias * size if layer.bias.numel() else layer.bias)


@pytest.mark.parametrize("m,heads,d,k", COSINE_SHAPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_cosine_qkv(on: Target, rng, record_ties, m, heads, d, k, bias):
    x, layer = s8(rng, m, k), head_sized(rng, linear(rng, 3 * heads * d, k, bias=bias), heads)
    out = GuardedOutput((m, 3 * heads * d), torch.int8)
    on.ops.linear_cosine_qkv(x, layer.weight, layer.scale, optional(layer.bias), heads, out.tensor)
    golden = fused_reference_v2.linear_cosine_qkv(x, layer, heads)
    assert_right(golden, out.check(), record_ties)
    of_heads = golden.q.unflatten(1, (3, heads, d))[:, :2].abs().amax(-1)
    assert bias or ((of_heads == 127) | (of_heads == 0)).all()


@pytest.mark.parametrize("m,heads,d,k", [(130, 24, 32, 768), (20, 16, 24, 384), (1, 8, 32, 256), (3, 2, 25, 64)])
def test_linear_cosine_qkv_split_by_columns(variant, rng, record_ties, three_threads, m, heads, d, k):
    """Few rows, whose columns several threads share: by whole heads, which lie within units of the GEMM or do not."""
    x, layer = s8(rng, m, k), head_sized(rng, linear(rng, 3 * heads * d, k), heads)
    out = GuardedOutput((m, 3 * heads * d), torch.int8)
    ops.linear_cosine_qkv(x, layer.weight, layer.scale, layer.bias, heads, out.tensor)
    assert_right(fused_reference_v2.linear_cosine_qkv(x, layer, heads), out.check(), record_ties)


def test_queries_and_keys_of_length_zero_stay_zero(on: Target, rng, record_ties):
    """So do those of less than 1e-12; v is clamped as by linear_s8 where its factors reach beyond int32."""
    heads, d, k = 3, 8, 40
    x, layer = s8(rng, 5, k), linear(rng, 3 * heads * d, k, bias=False)
    x[2] = 0
    scale = layer.scale.unflatten(0, (3, heads, d)).clone()
    scale[0, 1] = scale[1, 2] = 1e-20
    scale[2] = 1e6
    layer = layer._replace(scale=scale.flatten())
    out = GuardedOutput((5, 3 * heads * d), torch.int8)
    on.ops.linear_cosine_qkv(x, layer.weight, layer.scale, None, heads, out.tensor)
    assert_right(fused_reference_v2.linear_cosine_qkv(x, layer, heads), out.check(), record_ties)
    found = out.tensor.unflatten(1, (3, heads, d))
    assert (found[:, 0, 1] == 0).all() and (found[:, 1, 2] == 0).all() and (found[2] == 0).all()
    assert (found[[0, 1, 3, 4], 0, 0].abs().amax(-1) == 127).all()


# Windows of one vector, of whole vectors, with a rest, with one column beyond them, larger than the registers; heads of any
# width.
ATTENTION_SHAPES = [(4, 3, 49, 32), (1, 2, 64, 16), (3, 2, 5, 7), (2, 1, 144, 24), (1, 1, 1, 1), (2, 2, 16, 33), (1, 1, 200, 8)]
ATTENTION_SHAPES += [(2, 1, 9, 4), (1, 2, 17, 12), (1, 1, 169, 8)]


@pytest.mark.parametrize("windows,heads,n,d", ATTENTION_SHAPES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_window_attention(on: Target, rng, record_ties, windows, heads, n, d, masked):
    images = 2
    rows, c = images * windows * n, heads * d
    qkv, bias = s8(rng, rows, 3 * c), normal(rng, heads, n, n).to(on.real)
    mask = torch.where(normal(rng, windows, n, n) > 0.5, -100.0, 0.0).to(on.real) if masked else None
    qk, pv = f32(2.0 / (74 * 74 * d**0.5)), f32(0.8 + 0.3 * n**0.5)
    out = GuardedOutput((rows, c), torch.int8)
    on.ops.window_attention(qkv, bias, mask, qk, pv, out.tensor)
    assert_right(fused_reference.window_attention(qkv, heads, qk, bias, mask, pv), out.check(), record_ties)


@pytest.mark.parametrize("windows,heads,n,d", [(6, 3, 49, 32), (6, 2, 144, 24), (6, 1, 17, 12), (6, 2, 5, 7)])
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
def test_windows_that_share_masks(on: Target, rng, windows, heads, n, d, cosine):
    """To the bit as with a mask for each of them; -1 is one of zeros."""
    images = 3
    rows, c = images * windows * n, heads * d
    qkv, bias = s8(rng, rows, 3 * c), normal(rng, heads, n, n).to(on.real)
    masks = torch.where(normal(rng, 2, n, n) > 0.5, -100.0, 0.0).to(on.real)
    which = torch.tensor([1, -1, 0, 1, -1, 1], dtype=torch.int32)
    each = torch.cat((masks, torch.zeros(1, n, n, dtype=on.real)))[which.long()].contiguous()
    scale = torch.linspace(20.0, 1.0, heads) if cosine else None
    qk, pv, found = f32(2.0 / (74 * 74 * d**0.5)), f32(0.8 + 0.3 * n**0.5), []
    for mask, mask_of in ((masks, which), (each, None), (each[:1], None)):
        out = GuardedOutput((rows, c), torch.int8)
        on.ops.window_attention(qkv, bias, mask, qk, pv, out.tensor, scale, mask_of)
        found.append(out.check())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("window", [(7, 7), (12, 12), (16, 16), (3, 5), (5, 3), (1, 4), (20, 13)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
def test_a_bias_without_its_repetitions(variant, rng, window, masked, cosine):
    """The same to the bit as the whole bias: csrc/include/swin/position_bias.h."""
    (height, width), heads, d, windows = window, 3, 16, 2
    n, c = height * width, heads * d
    table = normal(rng, (2 * height - 1) * (2 * width - 1), heads)
    bias = expand_bias_table(table, window)
    offsets = table.T.unflatten(1, (2 * height - 1, 2 * width - 1)).flip(1)  # by key row less query row
    x, u = torch.arange(width)[:, None], torch.arange(width)
    compact = offsets[:, :, x - u + width - 1].transpose(1, 2).contiguous()
    assert compact.shape == (heads, width, 2 * height - 1, width)
    qkv = s8(rng, 2 * windows * n, 3 * c)
    mask = torch.where(normal(rng, windows, n, n) > 0.5, -100.0, 0.0) if masked else None
    scale = torch.tensor([20.0, 7.0, 1.0]) if cosine else None
    found = []
    for form in (bias, guarded_copy(compact).tensor):
        out = GuardedOutput((2 * windows * n, c), torch.int8)
        ops.window_attention(qkv, form, mask, f32(2.0 / (74 * 74 * d**0.5)), f32(0.8 + 0.3 * n**0.5), out.tensor, scale)
        found.append(out.check())
    assert torch.equal(*found) and found[0].unique().numel() > 50


def kindred(rng, windows: int, n: int, heads: int, d: int, noise: float) -> Tensor:
    """qkv s8 [windows * N, 3C] whose keys are queries of their window and noise, so that cosines reach up to 1."""
    q, v = s8(rng, windows, n, heads, d), s8(rng, windows, n, heads, d)
    k = (q[:, torch.randperm(n, generator=rng)] + normal(rng, windows, n, heads, d, scale=noise)).round().clamp(-128, 127)
    return torch.stack((q, k.to(torch.int8), v), 2).reshape(windows * n, 3 * heads * d)


@pytest.mark.parametrize("windows,heads,n,d", [*ATTENTION_SHAPES, (2, 3, 64, 32), (1, 2, 256, 32)])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_cosine_attention(on: Target, rng, record_ties, windows, heads, n, d, masked):
    """Swin-V2's: logits from -16 to 116, and those of a mask. A query and a key of length zero have cosine 0."""
    images = 2
    rows, c = images * windows * n, heads * d
    qkv = kindred(rng, images * windows, n, heads, d, noise=30)
    qkv[rows // 2, :c] = 0
    qkv[rows - 1, c : 2 * c] = 0
    bias = (16 * torch.sigmoid(2 * normal(rng, heads, n, n))).to(on.real)
    mask = torch.where(normal(rng, windows, n, n) > 0.5, -100.0, 0.0).to(on.real) if masked else None
    for largest in (100.0, 9.0):
        scale = largest * (0.3 + 0.7 * torch.rand(heads, generator=rng))
        scale[-1], pv = largest, f32(0.8 + 0.1 * n**0.5)
        out = GuardedOutput((rows, c), torch.int8)
        on.ops.window_attention(qkv, bias, mask, 1e30, pv, out.tensor, scale)  # qk_factor is not used
        golden = fused_reference_v2.cosine_attention(qkv, scale, bias, mask, pv)
        assert_right(golden, out.check(), record_ties)


def test_cosine_attention_of_extreme_values(on: Target, rng, record_ties):
    n, d, heads = 49, 32, 2
    qkv = EXTREMES[torch.randint(0, len(EXTREMES), (2 * n, 3 * heads * d), generator=rng)]
    qkv[:7, : heads * d], qkv[7:9, : 2 * heads * d], qkv[9, : 2 * heads * d] = -128, 127, 0
    qkv[10, :d] = torch.eye(d, dtype=torch.int8)[3]  # of length 1
    bias = normal(rng, heads, n, n, scale=5).to(on.real)
    for scale in (torch.tensor([100.0, 0.01]), torch.tensor([0.0, 1.0])):
        out = GuardedOutput((2 * n, heads * d), torch.int8)
        on.ops.window_attention(qkv, bias, None, 0.0, 1.0, out.tensor, scale)
        assert_right(fused_reference_v2.cosine_attention(qkv, scale, bias, None, 1.0), out.check(), record_ties)


def test_window_attention_of_extreme_values(on: Target, rng, record_ties):
    """Every operand at an end of its range: pairs of p v are as large as they get, and so are the logits."""
    n, d, heads = 49, 32, 2
    qkv = EXTREMES[torch.randint(0, len(EXTREMES), (2 * n, 3 * heads * d), generator=rng)]
    bias = normal(rng, heads, n, n, scale=5).to(on.real)
    for qk in (0.0, 1e-6, 1e-3):
        out = GuardedOutput((2 * n, heads * d), torch.int8)
        on.ops.window_attention(qkv, bias, None, f32(qk), 1.0, out.tensor)
        assert_right(fused_reference.window_attention(qkv, heads, f32(qk), bias, None, 1.0), out.check(), record_ties)
    # All keys alike: every p is 127, and the result is the mean of values that are all -128, or all 127.
    for value in (-128, 127):
        same = torch.full((n, 3 * d), value, dtype=torch.int8)
        out = GuardedOutput((n, d), torch.int8)
        on.ops.window_attention(same, torch.zeros(1, n, n, dtype=on.real), None, 1.0, 1.0, out.tensor)
        assert (out.check() == value).all()


@pytest.mark.parametrize("c,k,size", [(96, 96, (6, 9)), (33, 50, (7, 10)), (768, 768, (5, 9)), (96, 64, (80, 76))])
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)], ids=["no shift", "shift"])
@SIZES_PADDED
def test_linear_residual_norm(on: Target, rng, record_ties, c, k, size, shift, pad_first):
    batch, (height, width) = 2, size  # of the largest a GPU has whole rows in one block
    numbers, order = geometry(batch, height, width, (3, 3), shift, pad_first)
    m = batch * height * width
    x, layer, after = s8(rng, batch * len(order), k), linear(rng, c, k, spread=1.0), norm(rng, c, on.real)
    residual = normal(rng, batch, height, width, c, scale=2).to(on.real)
    stream, out = guarded_copy(residual.reshape(m, c)), GuardedOutput((m, c), torch.int8)
    on.ops.linear_residual_norm(
        x, layer.weight, layer.scale, layer.bias, stream.tensor, after.weight, after.bias, numbers, after.inverse_scale,
        out.tensor,
    )  # fmt: skip
    golden = fused_reference.linear_residual(x, layer, residual, order)
    assert_right(golden, stream.check())
    # LayerNorm on the engine's own stream, so that its float32 does not count twice.
    own = stream.tensor.reshape(residual.shape)
    assert_right(fused_reference.normalize(own, after), out.check(), record_ties)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("c,f,size", [(96, 384, (6, 9)), (33, 50, (4, 6)), (128, 512, (20, 16)), (192, 128, (9, 9)), (768, 3072, (3, 3))])
@pytest.mark.parametrize("whole", [False, True], ids=["by blocks", "hidden rows kept"])
@SIZES_PADDED
def test_mlp_residual_norm(on: Target, rng, record_ties, activation, c, f, size, whole, pad_first):
    in_blocks = c in (96, 128, 192) and f % 64 == 0  # what a GPU takes without memory for the hidden rows
    if not (on.is_cpu or whole or in_blocks):
        pytest.skip("a GPU needs memory for these hidden rows")
    batch, (height, width) = 2, size
    numbers, order = geometry(batch, height, width, (3, 3), (1, 2), pad_first)
    m, gelu = batch * height * width, activation == "gelu"
    x, after = s8(rng, m, c), norm(rng, c, on.real)
    fc1, fc2 = linear(rng, f, c, spread=2.0 if gelu else 60.0, bias=gelu), linear(rng, c, f, spread=1.0)
    inverse = f32(127 / 4.5) if gelu else None
    residual = normal(rng, batch, height, width, c, scale=2).to(on.real)
    hidden = GuardedOutput((m, f), torch.int8) if whole else None
    golden = fused_reference.mlp_residual_norm(x, fc1, fc2, residual, inverse)
    for last in (False, True):  # the last block of a stage writes the residual stream alone
        stream, out = guarded_copy(residual.reshape(m, c)), GuardedOutput((batch * len(order), c), torch.int8)
        on.ops.mlp_residual_norm(
            x, fc1.weight, fc1.scale, optional(fc1.bias), inverse or 0.0, fc2.weight, fc2.scale, fc2.bias, stream.tensor,
            None if last else after.weight, None if last else after.bias, numbers, after.inverse_scale,
            hidden.tensor if hidden else None, None if last else out.tensor,
        )  # fmt: skip
        assert_right(golden.residual, stream.check(), slack=golden.slack)
        if hidden:
            hidden.check()
        if not last:
            own = stream.tensor.reshape(residual.shape)
            assert_right(fused_reference.normalize(own, after, order), out.check(), record_ties)


POST_NORM_SHAPES = [(96, 96, (6, 9)), (33, 50, (7, 10)), (768, 768, (5, 9)), (96, 64, (80, 76)), (1, 7, (3, 3)), (1536, 96, (20, 16))]


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("c,k,size", POST_NORM_SHAPES)
@pytest.mark.parametrize("shift", [(0, 0), (1, 2)], ids=["no shift", "shift"])
@SIZES_PADDED
def test_linear_residual_norm_behind_the_branch(on: Target, rng, record_ties, c, k, size, shift, pad_first):
    batch, (height, width) = 2, size
    numbers, order = geometry(batch, height, width, (3, 3), shift, pad_first)
    m = batch * height * width
    x, layer, after = s8(rng, batch * len(order), k), linear(rng, c, k, spread=1.0), norm(rng, c, on.real)
    residual = normal(rng, batch, height, width, c, scale=2).to(on.real)
    stream, out = guarded_copy(residual.reshape(m, c)), GuardedOutput((m, c), torch.int8)
    on.ops.linear_residual_norm(
        x, layer.weight, layer.scale, layer.bias, stream.tensor, after.weight, after.bias, numbers, after.inverse_scale,
        out.tensor, True,
    )  # fmt: skip
    golden = fused_reference_v2.linear_post_norm_residual(
        x, layer, after.weight, after.bias, residual, order, after.inverse_scale
    )
    assert_right(golden.residual, stream.check())
    # What is quantized is the residual stream as it is stored.
    own = fused_reference_v2.quantize_stream(stream.tensor.reshape(residual.shape), after.inverse_scale)
    assert_right(own, out.check(), record_ties)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("c,f,size", [(96, 384, (6, 9)), (33, 50, (4, 6)), (128, 512, (20, 16)), (192, 128, (9, 9)), (768, 3072, (3, 3))])
@pytest.mark.parametrize("whole", [False, True], ids=["by blocks", "hidden rows kept"])
@SIZES_PADDED
def test_mlp_residual_norm_behind_the_branch(on: Target, rng, record_ties, activation, c, f, size, whole, pad_first):
    in_blocks = c in (96, 128, 192) and f % 64 == 0
    if not (on.is_cpu or whole or in_blocks):
        pytest.skip("a GPU needs memory for these hidden rows")
    batch, (height, width) = 2, size
    numbers, order = geometry(batch, height, width, (3, 3), (1, 2), pad_first)
    m, gelu = batch * height * width, activation == "gelu"
    x, after = s8(rng, m, c), norm(rng, c, on.real)
    fc1, fc2 = linear(rng, f, c, spread=2.0 if gelu else 60.0, bias=gelu), linear(rng, c, f, spread=1.0)
    inverse = f32(127 / 4.5) if gelu else None
    residual = normal(rng, batch, height, width, c, scale=2).to(on.real)
    golden = fused_reference_v2.mlp_post_norm_residual(x, fc1, fc2, after.weight, after.bias, residual, inverse)
    for last in (False, True):  # the last block of a stage writes the residual stream alone
        stream, out = guarded_copy(residual.reshape(m, c)), GuardedOutput((batch * len(order), c), torch.int8)
        hidden = GuardedOutput((m, f), torch.int8) if whole else None
        on.ops.mlp_residual_norm(
            x, fc1.weight, fc1.scale, optional(fc1.bias), inverse or 0.0, fc2.weight, fc2.scale, fc2.bias, stream.tensor,
            after.weight, after.bias, [] if last else numbers, after.inverse_scale, hidden.tensor if hidden else None,
            None if last else out.tensor, True,
        )  # fmt: skip
        assert_right(golden.residual, stream.check(), slack=golden.slack)
        if hidden:
            hidden.check()
        if not last:
            own = fused_reference_v2.quantize_stream(stream.tensor.reshape(residual.shape), after.inverse_scale, order)
            assert_right(own, out.check(), record_ties)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e9])
def test_mlp_residual_norm_saturates(on: Target, scale):
    """Hidden values beyond int8's range, and int32's, are 127 or 0 behind the ReLU."""
    m, c, f = 18, 96, 64
    numbers, _ = geometry(2, 3, 3, (3, 3), (1, 2))
    x = torch.full((m, c), 127, dtype=torch.int8)
    weight1 = torch.stack([torch.full((c,), value, dtype=torch.int8) for value in (-127, 127)] * (f // 2))
    weight2 = torch.ones(c, f, dtype=torch.int8)
    stream, hidden = guarded_copy(torch.zeros(m, c, dtype=on.real)), GuardedOutput((m, f), torch.int8)
    on.ops.mlp_residual_norm(
        x, weight1, torch.full((f,), scale), None, 0.0, weight2, torch.full((c,), 2.0**-7), torch.zeros(c), stream.tensor,
        None, None, numbers, 1.0, hidden.tensor, None,
    )  # fmt: skip
    assert (stream.check().float() == f // 2 * 127 / 128).all()
    hidden.check()



def test_relu_range_is_exact_where_pairs_are_largest(variant):
    """127 times -128 and 127 times 127, pair by pair: what vpmaddubsw's int16 just holds."""
    x = torch.full((5, 64), 127, dtype=torch.int8)
    for value in (-128, 127):
        w, out = torch.full((9, 64), value, dtype=torch.int8), GuardedOutput((5, 9), torch.int32)
        ops.gemm_s8(x, w, 0.0, False, out.tensor, lowest_x=0)
        assert (out.check() == 127 * value * 64).all()


@pytest.mark.parametrize("m,n,k", LINEAR_SHAPES)
def test_relu_range_gives_the_same_integers(variant, rng, m, n, k):
    x, w = s8(rng, m, k) & 127, s8(rng, n, k)
    out = GuardedOutput((m, n), torch.int32)
    ops.gemm_s8(x, w, 0.0, False, out.tensor, lowest_x=0)
    assert torch.equal(out.check(), (x.long() @ w.long().T).int())


def rows_that_reach_most(w: torch.Tensor, lowest: int) -> torch.Tensor:
    """s8 [8N, K] for w s8 [N, K]: what gives each column its largest and smallest sum, and any two of every four k the one
    and the others the other."""
    highest, least = torch.where(w > 0, 127, lowest), torch.where(w < 0, 127, lowest)
    k = torch.arange(w.shape[1]) % 4
    halves = [torch.isin(k, torch.tensor(pair)) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    return torch.cat([highest, least, *(torch.where(half, highest, least) for half in halves)]).to(torch.int8)


@pytest.mark.parametrize("lowest", [-128, -31, -6, 0])
@pytest.mark.parametrize(
    "n,k,spread",
    [(19, 260, 3), (19, 384, 12), (19, 96, 20), (19, 389, 28), (19, 384, 35), (19, 768, 45), (19, 64, 60), (19, 99, 50),
     (300, 96, 45), (600, 384, 40), (300, 770, 40)],
)  # fmt: skip
def test_sums_in_int16_never_overflow(variant, rng, n, k, spread, lowest):
    """Weights from those that all fit into an int16 sum together to those that hardly do, inputs that reach its ends. The
    large ones need several forms of each word of a panel, three or six (pack_grouped.h), and more units than stay in a cache."""
    w = (torch.randn(n, k, generator=rng) * spread).round().clamp(-128, 127).to(torch.int8)
    w[3, 5:7], w[4, 8:10], w[5, 10:12] = -128, 127, torch.tensor([127, -128], dtype=torch.int8)
    x = rows_that_reach_most(w[:40], lowest)
    out = GuardedOutput((len(x), n), torch.int32)
    ops.gemm_s8(x, w, 0.0, False, out.tensor, lowest_x=lowest)
    assert torch.equal(out.check(), (x.double() @ w.double().T).int())  # exact: below 2^53


S8 = {"dtype": torch.int8}


def with_masks(count: int | None, which: list) -> None:
    """window_attention of three windows of 4 tokens with `count` masks, of which each window has the one of `which`."""
    mask = None if count is None else torch.zeros(count, 4, 4)
    qkv, out = torch.zeros(12, 12, **S8), torch.zeros(12, 4, **S8)
    numbers = torch.tensor(which)
    numbers = numbers if numbers.is_floating_point() else numbers.int()
    ops.window_attention(qkv, torch.zeros(2, 4, 4), mask, 1.0, 1.0, out, None, numbers)


BAD_CALLS = {
    "scale of another width": (ValueError, r"linear_s8 .*scale is float32 \[2\]; float32 \[3\] is needed",
        lambda: ops.linear_s8(torch.zeros(4, 8, **S8), torch.zeros(3, 8, **S8), torch.ones(2), None, torch.zeros(4, 3, **S8))),
    "int32 output": (TypeError, r"linear_s8 .*out is int32 \[4, 3\]; int8 or float32 is needed",
        lambda: ops.linear_s8(torch.zeros(4, 8, **S8), torch.zeros(3, 8, **S8), torch.ones(3), None, torch.zeros(4, 3, dtype=torch.int32))),
    "rows that are no windows": (ValueError, r"window_attention .*does not divide into windows of 4 tokens and 2 heads",
        lambda: ops.window_attention(torch.zeros(6, 12, **S8), torch.zeros(2, 4, 4), None, 1.0, 1.0, torch.zeros(6, 4, **S8))),
    "a compact bias of no window": (ValueError, r"window_attention .*bias is float32 \[2, 2, 4, 2\]; \[heads, N, N\] or \[heads, w, 2h-1, w\] is needed",
        lambda: ops.window_attention(torch.zeros(4, 12, **S8), torch.zeros(2, 2, 4, 2), None, 1.0, 1.0, torch.zeros(4, 4, **S8))),
    "a compact bias of two widths": (ValueError, r"window_attention .*bias is float32 \[2, 2, 3, 3\]",
        lambda: ops.window_attention(torch.zeros(4, 12, **S8), torch.zeros(2, 2, 3, 3), None, 1.0, 1.0, torch.zeros(4, 4, **S8))),
    "a bias of no heads": (ValueError, r"window_attention .*bias is .*; \[heads, N, N\] or",
        lambda: ops.window_attention(torch.zeros(4, 12, **S8), torch.zeros(0, 4, 4), None, 1.0, 1.0, torch.zeros(4, 4, **S8))),
    "a bias of a matrix": (ValueError, r"window_attention .*bias is float32 \[4, 4\]",
        lambda: ops.window_attention(torch.zeros(4, 12, **S8), torch.zeros(4, 4), None, 1.0, 1.0, torch.zeros(4, 4, **S8))),
    "mask of another model": (ValueError, r"window_attention .*3 windows are not a multiple of the mask's 2",
        lambda: ops.window_attention(torch.zeros(12, 12, **S8), torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), 1.0, 1.0, torch.zeros(12, 4, **S8))),
    "heads that do not divide": (ValueError, r"linear_cosine_qkv .*the weight's 24 rows do not divide into q, k and v of 3 heads",
        lambda: ops.linear_cosine_qkv(torch.zeros(4, 8, **S8), torch.zeros(24, 8, **S8), torch.ones(24), None, 3, torch.zeros(4, 24, **S8))),
    "no heads": (ValueError, r"linear_cosine_qkv .*the weight's 24 rows do not divide into q, k and v of 0 heads",
        lambda: ops.linear_cosine_qkv(torch.zeros(4, 8, **S8), torch.zeros(24, 8, **S8), torch.ones(24), None, 0, torch.zeros(4, 24, **S8))),
    "cosines as floats": (TypeError, r"linear_cosine_qkv .*out is float32 \[4, 24\]; int8 is needed",
        lambda: ops.linear_cosine_qkv(torch.zeros(4, 8, **S8), torch.zeros(24, 8, **S8), torch.ones(24), None, 2, torch.zeros(4, 24))),
    "windows of no mask there is": (ValueError, r"window_attention.*mask_of holds -1 to 2; -1 to 1 is needed", lambda: with_masks(2, [0, 2, -1])),
    "windows below none": (ValueError, r"window_attention.*mask_of holds -2 to 0; -1 to 1 is needed", lambda: with_masks(2, [0, -2, 0])),
    "which masks, and no masks": (ValueError, r"window_attention .*mask_of says which mask a window has, and there is no mask", lambda: with_masks(None, [0, 0, 0])),
    "windows of another image": (ValueError, r"window_attention .*3 windows are not a multiple of the mask's 2", lambda: with_masks(2, [0, 1])),
    "windows as fractions": (TypeError, r"window_attention .*mask_of is float32 \[3\]; int32 is needed", lambda: with_masks(2, [0.0, 1.0, 0.0])),
    "windows of windows": (ValueError, r"window_attention .*mask_of is int32 \[1, 3\]; rank 1 is needed", lambda: with_masks(2, [[0, 1, 0]])),
    "a scale for every head": (ValueError, r"window_attention .*head_scale is float32 \[3\]; float32 \[2\] is needed",
        lambda: ops.window_attention(torch.zeros(4, 12, **S8), torch.zeros(2, 4, 4), None, 1.0, 1.0, torch.zeros(4, 4, **S8), torch.ones(3))),
    "a norm behind the branch without its weight": (ValueError, r"mlp_residual_norm .*gamma",
        lambda: ops.mlp_residual_norm(torch.zeros(4, 8, **S8), torch.zeros(16, 8, **S8), torch.ones(16), None, 0.0, torch.zeros(8, 16, **S8),
                                      torch.ones(8), None, torch.zeros(4, 8), None, None, [], 1.0, None, None, True)),
    "second weight of another shape": (ValueError, r"mlp_residual_norm .*second weight must be \[8, 16\]",
        lambda: ops.mlp_residual_norm(torch.zeros(4, 8, **S8), torch.zeros(16, 8, **S8), torch.ones(16), None, 0.0, torch.zeros(8, 12, **S8),
                                      torch.ones(8), None, torch.zeros(4, 8), None, None, [], 1.0, None, None)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_named(case):
    error, message, call = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()
