"""The golden model: each operation against the plainest possible computation, the whole against the fake-quantized
PyTorch model (ModelOpt), and proof that this comparison sees a wrong scale, a dropped bias and a wrong shift."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from quant_helpers import NON_SQUARE, THREE_STAGES, calibrated, images_for, one_thread, sqnr_db

from pyharness import reference
from pyharness.config import GRAPHS, MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.errors import FormatError
from pyharness.ft_format import FIELD_BY_NAME
from pyharness.random_engine import random_engine_file
from pyharness.reference import Node, Quantized, ReferenceSwin, ResidualQuantized

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SQNR_BOUND_DB = 45.0
"""Reference against fake quantization, on the logits. Found: 48 dB and more; each mutation below ends under it."""


@pytest.fixture
def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_s8(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


# --- Operations -------------------------------------------------------------------------------------------------------


def test_quantize_rounds_half_to_even_clamps_and_maps_nan_to_zero():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300, -128.5, -129, torch.inf, -torch.inf, torch.nan])
    q, exact = reference.quantize(x, 1.0)
    assert q.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128, 0]
    assert q.dtype == torch.int8
    assert exact[:10].tolist() == x[:10].tolist()


def test_near_tie_marks_what_may_round_either_way():
    exact = torch.tensor([0.5, 0.4995, 0.498, -1.5004, -1.6, 7.0, 126.5009], dtype=torch.float64)
    assert reference.near_tie(exact).tolist() == [True, True, False, True, False, False, True]


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (5, 7, 33), (3, 4, 6144)])
def test_accumulators_are_exact(m, n, k, generator):
    a, w = random_s8(m, k, generator=generator), random_s8(n, k, generator=generator)
    assert torch.equal(reference.gemm_s32(a, w).long(), a.long() @ w.long().T)
    lowest = torch.full((m, k), -128, dtype=torch.int8)
    assert reference.gemm_s32(lowest, lowest[:1]).tolist() == [[k * 128 * 128]] * m


def test_gemm_epilogues_round_clamp_and_rectify():
    a = torch.tensor([[1, 0], [-1, 0], [127, 127], [-128, -128]], dtype=torch.int8)
    w = torch.tensor([[5, 0], [127, 127]], dtype=torch.int8)
    s8 = reference.gemm_s8(a, w, 0.5)
    assert s8.q.tolist() == [[2, 64], [-2, -64], [127, 127], [-128, -128]]
    relu = reference.gemm_relu_s8(a, w, 0.5)
    assert relu.q.tolist() == [[2, 64], [0, 0], [127, 127], [0, 0]]
    assert relu.exact.min() == 0


def test_the_geluless_fc1_rounds_once():
    """Not FC1, ReLU and then a second quantization: 3 * 0.48 = 1.44 rounds to 1, though 2 * round(3 * 0.24) is 2."""
    a, w = torch.tensor([[1]], dtype=torch.int8), torch.tensor([[3]], dtype=torch.int8)
    assert reference.gemm_relu_s8(a, w, 0.48).q.item() == 1


def test_layer_norm_and_gelu_are_pytorchs(generator):
    x = torch.randn(4, 7, 24, generator=generator, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(2, 24, generator=generator).half()
    expected = torch.nn.functional.layer_norm(x, (24,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias), expected)
    torch.testing.assert_close(reference.gelu(x), torch.nn.functional.gelu(x))


@pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE], ids=lambda c: c.name)
def test_window_order_by_its_definition(config):
    for stage in config.stages():
        (height, width), (win_h, win_w) = stage.resolution, stage.window
        for shift in {(0, 0), stage.shift}:
            expected = [
                ((wh * win_h + i + shift[0]) % height) * width + (ww * win_w + j + shift[1]) % width
                for wh, ww, i, j in itertools.product(
                    range(height // win_h), range(width // win_w), range(win_h), range(win_w)
                )
            ]
            assert reference.window_order(stage, shift).tolist() == expected


def test_patch_embed_is_the_convolution(generator):
    images = torch.randn(2, 3, 8, 12, generator=generator)
    weight, bias = torch.randn(5, 3, 4, 4, generator=generator).half(), torch.randn(5, generator=generator).half()
    expected = torch.nn.functional.conv2d(images.double(), weight.double(), bias.double(), stride=4).permute(0, 2, 3, 1)
    found = reference.patch_embed(images, weight.flatten(1), 4)
    empty = torch.zeros(0)
    torch.testing.assert_close(reference.patch_embed_norm(found, bias, empty, empty), expected)


def test_qkv_bias_splits_by_matrix_head_and_channel(generator):
    windows, tokens, heads, dim = 2, 3, 2, 4
    qkv = random_s8(windows * tokens, 3 * heads * dim, generator=generator)
    bias = torch.randn(3 * heads * dim, generator=generator).half()
    inverse = (10.0, 20.0, 30.0)
    found = reference.qkv_bias(qkv, 0.03, bias, inverse, heads, tokens)
    assert found.q.shape == (3, windows, heads, tokens, dim)
    for t, b, h, n, e in itertools.product(range(3), range(windows), range(heads), range(tokens), range(dim)):
        column = (t * heads + h) * dim + e
        exact = (int(qkv[b * tokens + n, column]) * 0.03 + float(bias[column])) * inverse[t]
        assert float(found.exact[t, b, h, n, e]) == pytest.approx(exact)
    without = reference.qkv_bias(qkv, 0.03, torch.zeros(0), inverse, heads, tokens)
    zero = reference.qkv_bias(qkv, 0.03, torch.zeros_like(bias), inverse, heads, tokens)
    assert torch.equal(without.exact, zero.exact)


def test_softmax_adds_bias_by_head_and_mask_by_window(generator):
    batch, windows, heads, n = 2, 3, 2, 4
    logits = random_s8(batch * windows, heads, n, n, generator=generator)
    bias = torch.randn(heads, n, n, generator=generator).half()
    mask = torch.where(torch.rand(windows, n, n, generator=generator) < 0.3, -100.0, 0.0).half()
    found = reference.softmax(logits, 0.05, 0.3, bias, mask, 127.0)
    for b, h, i in itertools.product(range(batch * windows), range(heads), range(n)):
        x = logits[b, h, i].double() * 0.05 * 0.3 + bias[h, i].double() + mask[b % windows, i].double()
        torch.testing.assert_close(found.exact[b, h, i], x.exp() / x.exp().sum() * 127)


def test_pv_gemm_puts_heads_side_by_side(generator):
    windows, heads, n, d = 2, 2, 3, 4
    p = random_s8(windows, heads, n, n, generator=generator)
    v = random_s8(windows, heads, n, d, generator=generator)
    found = reference.pv_gemm(p, v, 0.01)
    for b, h, i, e in itertools.product(range(windows), range(heads), range(n), range(d)):
        acc = sum(int(p[b, h, i, j]) * int(v[b, h, j, e]) for j in range(n))
        assert float(found.exact[b * n + i, h * d + e]) == pytest.approx(acc * 0.01)


def test_proj_goes_back_to_the_image_tokens_it_came_from(generator):
    stage = next(iter(MICRO_DIGITS.stages()))
    order = reference.window_order(stage, stage.shift)
    residual = torch.randn(2, 14, 14, 32, generator=generator, dtype=torch.float64)
    proj = random_s8(2 * 196, 32, generator=generator)
    zero, one = torch.zeros(32), torch.ones(32)
    found, _ = reference.proj_bias_residual_norm2(proj, 0.5, 2 * one, residual, order, one, zero, 1.0)
    added = (found - residual).flatten(1, 2)
    for b, row in itertools.product(range(2), range(196)):
        torch.testing.assert_close(added[b, order[row]], proj[b * 196 + row].double() * 0.5 + 2)


def test_patch_merge_gathers_column_pairs_last(generator):
    residual = torch.randn(1, 4, 6, 2, generator=generator, dtype=torch.float64)
    one, zero = torch.ones(8), torch.zeros(8)
    found = reference.patch_merge_norm(residual, one, zero, 1.0)
    for y, x in itertools.product(range(2), range(3)):
        corners = [residual[0, 2 * y + r, 2 * x + c] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        expected = reference.layer_norm(torch.cat(corners), one, zero)
        torch.testing.assert_close(found.exact[y * 3 + x], expected)


def test_s32_outputs_are_dequantized_by_both_scales():
    ef = random_engine_file(MICRO_DIGITS, "ft_int8", int8_mode=2)
    values = ef.by_name()["layers.0.blocks.0.amaxList"]
    expected = float(values[44]) * float(values[75]) / 127**2
    assert reference.BlockScales(values).s32_dequant("fc2") == pytest.approx(expected, rel=1e-6)


# --- The whole model --------------------------------------------------------------------------------------------------


def fake_and_engine_file(config, geluless: bool, int8_mode: int):
    _, checkpoint = calibrated(config, geluless, int8_mode)
    fake = checkpoint.to_model()
    fake.round_parameters_to_fp16()
    return fake, to_engine_file(checkpoint)


@pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_the_reference_agrees_with_fake_quantization(config, geluless, int8_mode, seed):
    model, _ = calibrated(config, geluless, int8_mode)
    fake, ef = fake_and_engine_file(config, geluless, int8_mode)
    images = images_for(config, 8, seed)
    with torch.no_grad():
        faked, floating = fake(images), model(images)
    found = ReferenceSwin(ef)(images)
    assert found.dtype == torch.float32
    assert sqnr_db(faked, found) > SQNR_BOUND_DB
    loss = (faked - floating).square().mean().sqrt()
    assert (found - faked).square().mean().sqrt() < 0.5 * loss, "the two differ by half of what quantization costs"


QUANTIZERS_OF_OP = {
    "norm1_shift_partition": ("attn.qkv._input_quantizer",),
    "qkv_gemm": ("attn.qkv._aftergemm_quantizer",),
    "qkv_bias": tuple(f"attn.matmul_{x}_input_quantizer" for x in "qkv"),
    "qk_gemm": ("attn.softmax_input_quantizer",),
    "softmax": ("attn.matmul_a_input_quantizer",),
    "pv_gemm": ("attn.proj._input_quantizer",),
    "proj_gemm": ("attn.proj._aftergemm_quantizer",),
    "proj_bias_residual_norm2": ("mlp.fc1._input_quantizer",),
    "fc1_gemm": ("mlp.fc1._aftergemm_quantizer",),
    "fc1_bias_gelu": ("mlp.fc2._input_quantizer",),
    "fc2_gemm": ("mlp.fc2._aftergemm_quantizer",),
    "patch_merge_norm": ("downsample.reduction._input_quantizer",),
    "reduction_gemm": ("downsample.reduction._aftergemm_quantizer",),
}


def by_quantizer(trace: dict[Node, object], geluless: bool) -> dict[str, Quantized]:
    """The int8 tensors of a trace under the names of the quantizers that make them in the fake-quantized model."""
    found: dict[str, Quantized] = {}
    for node, value in trace.items():
        value = value.quantized if isinstance(value, ResidualQuantized) else value
        if not isinstance(value, Quantized):
            continue
        names = QUANTIZERS_OF_OP[node.op]
        if geluless and node.op == "fc1_gemm":
            names = ("mlp.fc2._input_quantizer",)
        prefix = f"layers.{node.stage}." + ("" if node.block is None else f"blocks.{node.block}.")
        parts = [value] if len(names) == 1 else [Quantized(*pair) for pair in zip(*value)]
        found |= {prefix + name: part for name, part in zip(names, parts)}
    return found


@pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_every_int8_tensor_is_its_quantizers_up_to_ties(config, geluless, int8_mode, seed, record_ties):
    """Each quantizer of the fake-quantized model is compared, then its output is replaced by the reference's, so that
    one rounding tie does not spread and every operation is judged by itself."""
    fake, ef = fake_and_engine_file(config, geluless, int8_mode)
    images = images_for(config, 4, seed)
    trace: dict[Node, object] = {}
    ReferenceSwin(ef)(images, trace)
    expected = by_quantizer(trace, geluless)
    activations = {name: q for name, q in fake.quantizers() if not name.endswith("_weight_quantizer")}
    assert expected.keys() == activations.keys()

    def compare_and_replace(name):
        def hook(module, inputs, output):
            q, exact = (t.flatten() for t in expected[name])
            difference = ((output * 127 / module.amax).round().flatten() - q).abs()
            assert difference.max() <= 1, name
            assert not (difference.bool() & ~reference.near_tie(exact)).any(), name
            record_ties(int(difference.sum()), difference.numel())
            return (q * module.amax / 127).reshape(output.shape)

        return hook

    for name, quantizer in activations.items():
        quantizer.register_forward_hook(compare_and_replace(name))
    with torch.no_grad():
        faked = fake(images)
    torch.testing.assert_close(faked, ReferenceSwin(ef)(images), rtol=1e-4, atol=1e-4)


def test_the_trace_has_every_operation_in_order():
    trace: dict[Node, object] = {}
    ReferenceSwin(random_engine_file(MICRO_DIGITS, "ft_int8"))(images_for(MICRO_DIGITS, 1, 0), trace)
    block = [
        "norm1_shift_partition",
        "qkv_gemm",
        "qkv_bias",
        "qk_gemm",
        "softmax",
        "pv_gemm",
        "proj_gemm",
        "proj_bias_residual_norm2",
        "fc1_gemm",
        "fc1_bias_gelu",
        "fc2_gemm",
        "fc2_bias_residual",
    ]
    expected = [Node(None, None, "patch_embed"), Node(None, None, "patch_embed_norm")]
    expected += [Node(0, j, op) for j in range(2) for op in block]
    expected += [Node(0, None, op) for op in ("patch_merge_norm", "reduction_gemm", "reduction_dequantize")]
    expected += [Node(1, j, op) for j in range(2) for op in block]
    expected += [Node(None, None, "final_norm_pool"), Node(None, None, "head")]
    assert list(trace) == expected


@pytest.mark.parametrize("graph", GRAPHS)
def test_images_of_a_batch_do_not_mix(graph, seed):
    model = ReferenceSwin(random_engine_file(NON_SQUARE, graph, seed=seed))
    images = images_for(NON_SQUARE, 3, seed)
    together = model(images)
    assert together.shape == (3, 64)
    for index in range(3):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index])
    assert (together[0] - together[1]).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 28, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(FormatError, match=r"images must be \[B, 1, 28, 28\]"):
        ReferenceSwin(random_engine_file(MICRO_DIGITS, "ft_int8"))(torch.zeros(shape))


# --- Mutations: the bound must break ----------------------------------------------------------------------------------

NUMBERS_READ = [("qkv_input", 3), ("qkv_aftergemm", 1), ("proj_aftergemm", 1), ("matmul_q", 3), ("matmul_k", 3),
                ("matmul_v", 3), ("matmul_a", 3), ("softmax_input", 1), ("fc1_input", 3), ("fc1_aftergemm", 1),
                ("fc2_input", 3), ("fc2_aftergemm", 1), ("reduction_input", 3), ("reduction_aftergemm", 1),
                ("qkv_factor", 0), ("proj_factor", 0), ("fc1_factor", 0), ("fc2_factor", 0), ("qk_factor", 0),
                ("pv_factor", 0), ("reduction_factor", 0)]  # fmt: skip
"""Every number of a scale list that the FT graph reads: the scale's name and its place among the four."""

DROPPED = [
    *(f"layers.{i}.blocks.{j}.{name}.bias" for i in (0, 1) for j in (0, 1)
      for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")),
    *(f"layers.{block}.attn.relative_position_bias" for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0")),
    *("layers.0.downsample.norm.bias", "layers.0.attn_mask", "patch_embed.proj.bias", "patch_embed.norm.bias"),
    *("norm.bias", "head.bias"),
]  # fmt: skip
"""Zeroed one at a time. The last block's position bias is not among them: it moves the pooled logits too little."""


@pytest.fixture(scope="module")
def healthy():
    """(engine file, images, logits of the fake-quantized model) of the micro model's FT graph."""
    fake, ef = fake_and_engine_file(MICRO_DIGITS, False, 1)
    images = images_for(MICRO_DIGITS, 4, 99)
    with torch.no_grad():
        return ef, images, fake(images)


def mutated(ef, name: str, change):
    """`ef` with the tensor `name` replaced by change(its copy)."""
    tensors = [change(t.clone()) if each == name else t for each, t in zip(ef.names, ef.tensors)]
    return dataclasses.replace(ef, tensors=tensors)


def test_the_healthy_model_is_within_the_bound(healthy):
    ef, images, expected = healthy
    assert sqnr_db(expected, ReferenceSwin(ef)(images)) > SQNR_BOUND_DB


@pytest.mark.parametrize("block", ["layers.0.blocks.1", "layers.1.blocks.0"])
@pytest.mark.parametrize(("scale", "part"), NUMBERS_READ, ids=lambda v: str(v))
def test_one_wrong_scale_breaks_the_bound(scale, part, block, healthy):
    ef, images, expected = healthy
    if scale.startswith("reduction") and block.startswith("layers.1"):
        block = "layers.0.blocks.1"

    def wrong(values):
        values[FIELD_BY_NAME[scale].index + part] *= 1.5
        return values

    assert sqnr_db(expected, ReferenceSwin(mutated(ef, f"{block}.amaxList", wrong))(images)) < SQNR_BOUND_DB


@pytest.mark.parametrize("name", DROPPED)
def test_one_dropped_bias_or_mask_breaks_the_bound(name, healthy):
    ef, images, expected = healthy
    assert sqnr_db(expected, ReferenceSwin(mutated(ef, name, torch.zeros_like))(images)) < SQNR_BOUND_DB


@pytest.mark.parametrize("wrong", [(1, 0), (0, 1), (-3, -3)])
def test_one_mis_shifted_window_breaks_the_bound(wrong, healthy, monkeypatch):
    ef, images, expected = healthy
    right = reference.window_order

    def shifted(stage, shift):
        return right(stage, (shift[0] + wrong[0], shift[1] + wrong[1]) if any(shift) else shift)

    monkeypatch.setattr(reference, "window_order", shifted)
    assert sqnr_db(expected, ReferenceSwin(ef)(images)) < SQNR_BOUND_DB
