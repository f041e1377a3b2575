"""The golden model of the fused graph: each operation against the plainest possible computation, the whole against the
fake-quantized PyTorch model, and proof that either comparison sees a wrong scale, a dropped bias and a wrong shift."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from fused_walk import golden_logits, outputs_of, walk
from quant_helpers import NON_SQUARE, THREE_STAGES, calibrated, images_for, one_thread, sqnr_db

from pyharness import fused_reference as fused
from pyharness.config import MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.errors import FormatError
from pyharness.fused_fakequant import fused_model
from pyharness.fused_format import AMAX_FIELDS
from pyharness.fused_reference import FusedReferenceSwin, Linear, Norm, Quantized, Stream
from pyharness.random_engine import random_engine_file
from pyharness.reference import Node, ReferenceSwin, window_order

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

EMPTY = torch.zeros(0)

SQNR_BOUND_DB = 50.0
"""Golden model against fake quantization, on the logits. Found: 53 dB and more; each mutation below ends under it."""

FOLLOWED_BOUND_DB = 90.0
"""Logits of another implementation against the golden ones that follow it: what is left is its float32."""

CONFIGS = pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)
GELULESS = pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])


@pytest.fixture
def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def s8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def weight(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def linear(generator: torch.Generator, n: int, k: int, std: float, bias: bool = True) -> Linear:
    """Results of about `std` for random int8 inputs; every channel with a scale of its own."""
    scale = std / (74 * 74 * math.sqrt(k)) * (0.5 + torch.rand(n, generator=generator))
    return Linear(weight(generator, n, k), scale, std * torch.randn(n, generator=generator) if bias else EMPTY)


# --- What a tie allows ------------------------------------------------------------------------------------------------


def test_rounds_to_allows_the_neighbour_at_a_tie_and_what_the_slack_reaches():
    exact = torch.tensor([0.5004, 0.5004, 0.6, 0.6, 3.0, 130.0, -129.0, torch.nan], dtype=torch.float64)
    wanted = Quantized(fused.round_clamp(exact), exact)
    assert wanted.q.tolist() == [1, 1, 1, 1, 3, 127, -128, 0]
    found = torch.tensor([0, 2, 0, 1, 3, 127, -128, 0], dtype=torch.int8)
    assert fused.rounds_to(found, wanted).tolist() == [True, False, False, True, True, True, True, True]
    slack = torch.tensor([0, 1, 0.2, 0, 1.0, 2.2, 0, 0], dtype=torch.float64)
    near = torch.tensor([0, 2, 0, 0, 4, 126, -127, 1], dtype=torch.int8)
    allowed = fused.rounds_to(near, wanted._replace(slack=slack))
    assert allowed.tolist() == [True, True, True, False, True, False, False, False]


# --- linear_s8 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 16), (5, 7, 33), (3, 4, 6144)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_scales_and_biases_each_channel(m, n, k, bias, generator):
    x, layer = s8(generator, m, k), linear(generator, n, k, 60.0, bias)
    found = fused.linear_s8(x, layer)
    for row, column in itertools.product(range(m), range(n)):
        acc = sum(int(a) * int(b) for a, b in zip(x[row], layer.weight[column]))
        exact = acc * float(layer.scale[column]) + (float(layer.bias[column]) if bias else 0.0)
        assert float(found.exact[row, column]) == pytest.approx(exact, rel=1e-12)
        assert int(found.q[row, column]) == min(127, max(-128, round(exact)))
    assert torch.equal(fused.linear_float(x, layer), found.exact)


# --- window_attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_window_attention_by_its_definition(masked, generator):
    batch, windows, heads, n, d = 2, 3, 2, 5, 4
    c, factor, output_factor = heads * d, 0.0007, 1.3
    qkv, bias = s8(generator, batch * windows * n, 3 * c), torch.randn(heads, n, n, generator=generator)
    mask = torch.where(torch.rand(windows, n, n, generator=generator) < 0.3, -100.0, 0.0) if masked else None
    found = fused.window_attention(qkv, heads, factor, bias, mask, output_factor)
    assert found.q.shape == (batch * windows * n, c)
    for w, h, i in itertools.product(range(batch * windows), range(heads), range(n)):
        rows = qkv[w * n : (w + 1) * n].long()
        q, k, v = (rows[:, part * c + h * d : part * c + (h + 1) * d] for part in range(3))
        x = [int(q[i] @ k[j]) * factor + float(bias[h, i, j]) for j in range(n)]
        if masked:
            x = [value + float(mask[w % windows, i, j]) for j, value in enumerate(x)]
        p = [round(127 * math.exp(value - max(x))) for value in x]
        assert max(p) == 127
        for e in range(d):
            exact = sum(p[j] * int(v[j, e]) for j in range(n)) * output_factor / sum(p)
            assert float(found.exact[w * n + i, h * d + e]) == pytest.approx(exact, rel=1e-12)
    assert not found.slack.any(), "no probability of this case lies next to a tie"


def test_the_slack_of_attention_covers_the_other_rounding_of_its_probabilities(monkeypatch):
    """Logits chosen so that probabilities lie at ties: whichever way they round, the result is within the slack."""
    n, d = 6, 3
    qkv = torch.randint(-128, 128, (n, 3 * d), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    p = torch.tensor([127, 20.5, 0.5, 63.49999, 5, 0.50001], dtype=torch.float64)
    bias = (p / 127).log().float().expand(1, n, n)
    found = fused.window_attention(qkv, 1, 0.0, bias, None, 1.0)
    v = qkv[:, 2 * d :].double()
    reached = torch.zeros(d, dtype=torch.float64)
    for choice in itertools.product((0, 1), repeat=4):
        rounded = torch.tensor([127, 20 + choice[0], choice[1], 63 + choice[2], 5, choice[3]], dtype=torch.float64)
        other = rounded @ v / rounded.sum()
        assert ((other - found.exact).abs() <= found.slack + 1e-9).all()
        reached = torch.maximum(reached, (other - found.exact[0]).abs())
    assert (found.slack[0] < 20 * reached).all(), "the slack is of the size of what the roundings do"
    assert (found.slack < 10).all()


def test_saturated_queries_and_keys_stay_finite():
    qkv = torch.full((8, 3 * 32), 127, dtype=torch.int8)
    qkv[:4, :32] = -128
    found = fused.window_attention(qkv, 1, 0.05, torch.zeros(1, 8, 8), None, 1.0)
    assert (found.q == 127).all() and found.exact.isfinite().all() and found.slack.isfinite().all()


# --- linear_residual_norm and mlp_residual_norm -----------------------------------------------------------------------


def norm_of(generator: torch.Generator, c: int) -> Norm:
    return Norm(1 + 0.3 * torch.randn(c, generator=generator), torch.randn(c, generator=generator), 127 / 2.6)


def layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight.double(), norm.bias.double(), 1e-5)


def test_the_projection_goes_back_to_the_tokens_it_came_from(generator):
    stage = next(iter(MICRO_DIGITS.stages()))
    order = window_order(stage, stage.shift)
    residual = torch.randn(2, 14, 14, 32, generator=generator)
    x, layer, norm = s8(generator, 2 * 196, 32), linear(generator, 32, 32, 1.0), norm_of(generator, 32)
    found = fused.linear_residual_norm(x, layer, residual, order, norm)
    acc = x.long() @ layer.weight.long().T
    for b, row in itertools.product(range(2), range(196)):
        token = int(order[row])
        expected = residual.flatten(1, 2)[b, token].double() + acc[b * 196 + row] * layer.scale.double() + layer.bias
        torch.testing.assert_close(found.residual.flatten(1, 2)[b, token], expected)
        normed = layer_norm(expected, norm) * norm.inverse_scale
        torch.testing.assert_close(found.quantized.exact[b * 196 + token], normed)
    assert found.slack == 0.0 and torch.equal(found.quantized.q, fused.round_clamp(found.quantized.exact))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_mlp_by_its_definition(activation, generator):
    """Written in the window order of the next block; only the residual where there is none."""
    stage = next(iter(MICRO_DIGITS.stages()))
    order = window_order(stage, stage.shift)
    c, f, gelu_inverse = 32, 48, None if activation == "relu" else 127 / 3.0
    residual, x = torch.randn(1, 14, 14, c, generator=generator), s8(generator, 196, c)
    fc1 = linear(generator, f, c, 50.0 if activation == "relu" else 1.5, bias=activation == "gelu")
    fc2, norm = linear(generator, c, f, 1.0), norm_of(generator, c)
    found = fused.mlp_residual_norm(x, fc1, fc2, residual, gelu_inverse, norm, order)
    hidden = (x.long() @ fc1.weight.long().T) * fc1.scale.double()
    if activation == "relu":
        hidden = hidden.clamp(min=0).round().clamp(0, 127)
    else:
        hidden = (torch.nn.functional.gelu(hidden + fc1.bias.double()) * gelu_inverse).round().clamp(-128, 127)
        assert hidden.min() < 0
    expected = residual.double() + ((hidden @ fc2.weight.double().T) * fc2.scale.double() + fc2.bias).view(1, 14, 14, c)
    torch.testing.assert_close(found.residual, expected)
    normed = layer_norm(expected.flatten(0, 2), norm)[order] * norm.inverse_scale
    torch.testing.assert_close(found.quantized.exact, normed)
    alone = fused.mlp_residual_norm(x, fc1, fc2, residual, gelu_inverse)
    assert alone.quantized is None and torch.equal(alone.residual, found.residual)


def test_the_slack_of_the_mlp_covers_the_other_rounding_of_its_hidden_channels():
    """Hidden channels at 0.5, 1.5, 200.5 (clamped either way) and -0.5 (ReLU): two of them may be one higher."""
    x = torch.tensor([[1]], dtype=torch.int8)
    fc1 = Linear(torch.tensor([[1], [3], [100], [-1], [2]], dtype=torch.int8), torch.tensor([0.5, 0.5, 2.005, 0.5, 0.5]), EMPTY)
    hidden, tied = fused.hidden_channels(x, fc1, None)
    assert hidden.tolist() == [[0, 2, 127, 0, 1]] and tied.tolist() == [[True, True, False, False, False]]
    fc2 = Linear(torch.tensor([[7, -5, 1, 1, 1]], dtype=torch.int8), torch.tensor([0.5]), torch.zeros(1))
    found = fused.mlp_residual_norm(x, fc1, fc2, torch.zeros(1, 1, 1, 1))
    assert found.slack.flatten().tolist() == [(7 + 5) * 0.5]


# --- The whole model --------------------------------------------------------------------------------------------------


@CONFIGS
@GELULESS
def test_the_golden_model_agrees_with_fake_quantization(config, geluless, seed):
    """And it loses less than FasterTransformer's graph: found 0.8 to 4.5 dB, by channel scales and fewer roundings."""
    model, checkpoint = calibrated(config, geluless, 1)
    images = images_for(config, 6, seed)
    with torch.no_grad():
        faked, floating = fused_model(checkpoint)(images), model(images)
    found = FusedReferenceSwin(to_engine_file(checkpoint, "fused_int8"))(images)
    assert found.dtype == torch.float32
    assert sqnr_db(faked, found) > SQNR_BOUND_DB
    assert sqnr_db(floating, found) < sqnr_db(faked, found) - 10, "the two differ by a third of what quantization costs"
    assert sqnr_db(floating, found) > sqnr_db(floating, ReferenceSwin(to_engine_file(checkpoint))(images))


def test_the_trace_has_every_operation_in_order():
    trace: dict[Node, object] = {}
    FusedReferenceSwin(random_engine_file(MICRO_DIGITS, "fused_int8"))(images_for(MICRO_DIGITS, 1, 0), trace)
    block = ["qkv", "attention", "proj_norm", "mlp_norm"]
    expected = [Node(None, None, "patch_embed"), Node(None, None, "patch_embed_norm")]
    expected += [Node(0, 0, "norm1_shift_partition"), *(Node(0, j, op) for j in range(2) for op in block)]
    expected += [Node(0, None, "patch_merge_norm"), Node(0, None, "reduction")]
    expected += [Node(1, 0, "norm1_shift_partition"), *(Node(1, j, op) for j in range(2) for op in block)]
    expected += [Node(None, None, "final_norm_pool"), Node(None, None, "head")]
    assert list(trace) == expected
    written = {(node.stage, node.block): value for node, value in trace.items() if node.op == "mlp_norm"}
    assert {at for at, value in written.items() if value.quantized is None} == {(0, 1), (1, 1)}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_images_of_a_batch_do_not_mix(activation, seed):
    model = FusedReferenceSwin(random_engine_file(NON_SQUARE, "fused_int8", seed=seed, activation=activation))
    images = images_for(NON_SQUARE, 3, seed)
    together = model(images)
    assert together.shape == (3, 64)
    for index in range(3):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index])
    assert (together[0] - together[1]).abs().max() > 0.01


def test_what_it_is_not_for_is_refused():
    model = FusedReferenceSwin(random_engine_file(MICRO_DIGITS, "fused_int8"))
    for shape in ((1, 28, 28), (2, 3, 28, 28), (2, 1, 28, 32)):
        with pytest.raises(FormatError, match=r"images must be \[B, 1, 28, 28\]"):
            model(torch.zeros(shape))
    with pytest.raises(FormatError, match="an engine file of ft_int8"):
        FusedReferenceSwin(random_engine_file(MICRO_DIGITS, "ft_int8"))


# --- Mutations: the bound must break ----------------------------------------------------------------------------------

LAYERS = [f"layers.{i}.blocks.{j}.{name}" for i, j in ((0, 1), (1, 0))
          for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip

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
    """(engine file, images, logits of the fake-quantized model) of the micro model with GELU."""
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    images = images_for(MICRO_DIGITS, 2, 99)
    with torch.no_grad():
        return to_engine_file(checkpoint, "fused_int8"), images, fused_model(checkpoint)(images)


def mutated(ef, name: str, change):
    """`ef` with the tensor `name` replaced by change(its copy)."""
    tensors = [change(t.clone()) if each == name else t for each, t in zip(ef.names, ef.tensors)]
    return dataclasses.replace(ef, tensors=tensors)


def scaled(index: int, factor: float):
    def change(tensor):
        tensor[index] *= factor
        return tensor

    return change


def test_the_healthy_model_is_within_the_bound(healthy):
    ef, images, expected = healthy
    assert sqnr_db(expected, FusedReferenceSwin(ef)(images)) > SQNR_BOUND_DB


@pytest.mark.parametrize("layer", [*LAYERS, "layers.0.downsample.reduction"])
def test_the_steps_of_one_weight_10_percent_off_break_the_bound(layer, healthy):
    ef, images, expected = healthy
    wrong = mutated(ef, f"{layer}.weight_scale", lambda steps: 1.1 * steps)
    assert sqnr_db(expected, FusedReferenceSwin(wrong)(images)) < SQNR_BOUND_DB


@pytest.mark.parametrize("block", ["layers.0.blocks.1", "layers.1.blocks.0"])
@pytest.mark.parametrize("scale", AMAX_FIELDS)
def test_one_wrong_amax_breaks_the_bound(scale, block, healthy):
    """An amax acts on both sides, on what is quantized and on what its steps are worth: half of it clips."""
    ef, images, expected = healthy
    wrong = mutated(ef, f"{block}.amax", scaled(AMAX_FIELDS.index(scale), 0.5))
    assert sqnr_db(expected, FusedReferenceSwin(wrong)(images)) < SQNR_BOUND_DB


@pytest.mark.parametrize("name", DROPPED)
def test_one_dropped_bias_or_mask_breaks_the_bound(name, healthy):
    ef, images, expected = healthy
    assert sqnr_db(expected, FusedReferenceSwin(mutated(ef, name, torch.zeros_like))(images)) < SQNR_BOUND_DB


def mis_shift(monkeypatch, wrong: tuple[int, int]) -> None:
    def shifted(stage, shift):
        return window_order(stage, (shift[0] + wrong[0], shift[1] + wrong[1]) if any(shift) else shift)

    monkeypatch.setattr(fused, "window_order", shifted)


@pytest.mark.parametrize("wrong", [(1, 0), (0, 1), (-3, -3)])
def test_one_mis_shifted_window_breaks_the_bound(wrong, healthy, monkeypatch):
    ef, images, expected = healthy
    mis_shift(monkeypatch, wrong)
    assert sqnr_db(expected, FusedReferenceSwin(ef)(images)) < SQNR_BOUND_DB


# --- Following another implementation, here the golden model itself in the engine's place ------------------------------


def pass_of(ef, images):
    """(outputs, logits) of a pass of the golden model as if the engine had made it."""
    trace: dict[Node, object] = {}
    logits = FusedReferenceSwin(ef)(images, trace)
    return outputs_of(trace), logits


@CONFIGS
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_pass_follows_itself(config, activation, seed, record_ties):
    ef = random_engine_file(config, "fused_int8", seed=seed, activation=activation)
    images = images_for(config, 2, seed)
    outputs, logits = pass_of(ef, images)
    assert sqnr_db(logits, walk(ef, images, outputs, record_ties)) > FOLLOWED_BOUND_DB


def test_the_other_rounding_of_a_tie_is_followed(seed, record_ties):
    """An int8 value at a tie rounded the other way is right, and everything behind it is computed from it."""
    ef, images = random_engine_file(MICRO_DIGITS, "fused_int8", seed=seed), images_for(MICRO_DIGITS, 8, seed)
    trace: dict[Node, object] = {}
    FusedReferenceSwin(ef)(images, trace)
    node = Node(0, 0, "qkv")
    tied = fused.rounds_to(trace[node].q + 1, trace[node]) & (trace[node].q < 127)
    assert tied.any()
    trace[node] = trace[node]._replace(q=trace[node].q + tied)
    logits = FusedReferenceSwin(ef)(images, follow={node: outputs_of(trace)[node]})
    own = FusedReferenceSwin(ef)(images)
    assert not torch.equal(logits, own)
    again: dict[Node, object] = {}
    FusedReferenceSwin(ef)(images, again, {node: outputs_of(trace)[node]})
    other = outputs_of({**again, node: trace[node]})
    assert sqnr_db(logits, walk(ef, images, other, lambda off, values: None)) > FOLLOWED_BOUND_DB
    assert sqnr_db(logits, own) < FOLLOWED_BOUND_DB, "without following, the tie would pass for an error"


WRONG = {
    "one channel's step 10 % off": (Node(0, 1, "qkv"), lambda f: mutated(f, "layers.0.blocks.1.attn.qkv.weight_scale", scaled(5, 1.1))),
    "one step of FC2 10 % off": (Node(1, 0, "mlp_norm"), lambda f: mutated(f, "layers.1.blocks.0.mlp.fc2.weight_scale", scaled(3, 1.1))),
    "one step of FC1 10 % off": (Node(1, 0, "mlp_norm"), lambda f: mutated(f, "layers.1.blocks.0.mlp.fc1.weight_scale", scaled(3, 1.1))),
    "one step of the reduction 10 % off": (Node(0, None, "reduction"), lambda f: mutated(f, "layers.0.downsample.reduction.weight_scale", scaled(3, 1.1))),
    "V 1 % off": (Node(0, 1, "qkv"), lambda f: mutated(f, "layers.0.blocks.1.amax", scaled(AMAX_FIELDS.index("matmul_v"), 1.01))),
    "no bias of FC2": (Node(0, 0, "mlp_norm"), lambda f: mutated(f, "layers.0.blocks.0.mlp.fc2.bias", torch.zeros_like)),
    "one bias of the projection dropped": (Node(1, 1, "proj_norm"), lambda f: mutated(f, "layers.1.blocks.1.attn.proj.bias", scaled(7, 0))),
    "one bias of FC1 dropped": (Node(1, 1, "mlp_norm"), lambda f: mutated(f, "layers.1.blocks.1.mlp.fc1.bias", scaled(7, 0))),
    "no bias of norm2": (Node(0, 0, "proj_norm"), lambda f: mutated(f, "layers.0.blocks.0.norm2.bias", torch.zeros_like)),
    "no bias of the next block's norm1": (Node(0, 0, "mlp_norm"), lambda f: mutated(f, "layers.0.blocks.1.norm1.bias", torch.zeros_like)),
    "no position bias": (Node(0, 1, "attention"), lambda f: mutated(f, "layers.0.blocks.1.attn.relative_position_bias", torch.zeros_like)),
    "no mask": (Node(0, 1, "attention"), lambda f: mutated(f, "layers.0.attn_mask", torch.zeros_like)),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_following_hides_no_fault(fault, seed, record_ties):
    """The walk stops at the operation that is wrong, and the logits end below the bound."""
    node, change = WRONG[fault]
    ef = random_engine_file(MICRO_DIGITS, "fused_int8", seed=seed, activation="gelu")
    images = images_for(MICRO_DIGITS, 2, seed)
    outputs, logits = pass_of(change(ef), images)
    with pytest.raises(AssertionError, match=rf"stage={node.stage}, block={node.block}, op='{node.op}'"):
        walk(ef, images, outputs, record_ties)
    assert sqnr_db(logits, golden_logits(ef, images, outputs)) < FOLLOWED_BOUND_DB


@pytest.mark.parametrize("wrong", [(1, 0), (0, 1), (-3, -3)])
def test_following_hides_no_mis_shifted_window(wrong, seed, record_ties, monkeypatch):
    ef, images = random_engine_file(MICRO_DIGITS, "fused_int8", seed=seed), images_for(MICRO_DIGITS, 4, seed)
    with monkeypatch.context() as patch:
        mis_shift(patch, wrong)
        outputs, logits = pass_of(ef, images)
    with pytest.raises(AssertionError, match="stage=0, block=0, op='mlp_norm'"):
        walk(ef, images, outputs, record_ties)
    assert sqnr_db(logits, golden_logits(ef, images, outputs)) < FOLLOWED_BOUND_DB


def test_a_missing_output_is_seen(seed, record_ties):
    ef, images = random_engine_file(MICRO_DIGITS, "fused_int8", seed=seed), images_for(MICRO_DIGITS, 1, seed)
    outputs, _ = pass_of(ef, images)
    with pytest.raises(AssertionError, match="mlp_norm.*writes 1 tensors, not 2"):
        short = {**outputs, Node(0, 0, "mlp_norm"): outputs[Node(0, 0, "mlp_norm")][:1]}
        walk(ef, images, short, record_ties)
    with pytest.raises(AssertionError, match="the operations are"):
        walk(ef, images, {node: value for node, value in outputs.items() if node.op != "head"}, record_ties)


def test_a_residual_stream_in_half_precision_is_followed(seed, record_ties):
    """fp16 rounds the stream a thousand times more coarsely; following it, every int8 value is still right."""
    ef, images = random_engine_file(MICRO_DIGITS, "fused_int8", seed=seed), images_for(MICRO_DIGITS, 2, seed)
    model, halved = FusedReferenceSwin(ef), ("patch_embed", "patch_embed_norm", "reduction")

    class Half(fused._Recorder):
        def at(self, stage, block=None):
            return Half(self._trace, self._follow, stage, block)

        def __call__(self, op, value):
            return super().__call__(op, value.half().double() if op in halved else value)

        def stream(self, op, value, normalized):
            residual = value.residual.half().double()
            return super().stream(op, Stream(residual, value.quantized and normalized(residual)), normalized)

    trace: dict[Node, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_Recorder", Half)
        logits = model(images, trace)
    outputs = {
        node: [t.half() if t.dtype != torch.int8 and node.op in (*halved, "proj_norm", "mlp_norm") else t for t in tensors]
        for node, tensors in outputs_of(trace).items()
    }
    assert sqnr_db(logits, model(images)) < FOLLOWED_BOUND_DB
    assert sqnr_db(logits, walk(ef, images, outputs, record_ties)) > FOLLOWED_BOUND_DB
