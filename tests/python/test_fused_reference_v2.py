"""The golden model of Swin-V2's fused graph, held as test_fused_reference.py holds Swin-V1's: each operation by its
definition, the whole to the fake-quantized model, and proof that either comparison and the walk see what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from fused_walk import golden_logits, outputs_of, walk
from quant_helpers import THREE_STAGES, calibrated, images_for, one_thread, sqnr_db
from test_fused_reference import (
    DROPPED,
    FOLLOWED_BOUND_DB,
    GELULESS,
    LAYERS,
    SQNR_BOUND_DB,
    generator,
    linear,
    mutated,
    pass_of,
    s8,
    scaled,
)
from v2_configs import FINE_TUNED, MICRO

from pyharness import fused_reference as fused
from pyharness import fused_reference_v2 as fused_v2
from pyharness.convert import to_engine_file
from pyharness.fused_fakequant import fused_model
from pyharness.fused_format import AMAX_FIELDS_V2
from pyharness.fused_reference import FusedReferenceSwin, Linear, Quantized, Stream
from pyharness.fused_reference_v2 import FusedReferenceSwinV2
from pyharness.random_engine import random_engine_file
from pyharness.reference import Node, ReferenceSwin, window_order

__all__ = ["generator", "one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

THREE_STAGES_V2 = dataclasses.replace(THREE_STAGES, name="three_stages_v2", version=2)
CONFIGS = pytest.mark.parametrize("config", [MICRO, FINE_TUNED, THREE_STAGES_V2], ids=lambda c: c.name)
ACTIVATIONS = pytest.mark.parametrize("activation", ["relu", "gelu"])


# --- linear_cosine_qkv ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "heads", "d", "k"), [(1, 1, 1, 16), (5, 3, 7, 33), (3, 2, 32, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_are_rounded_by_their_own_largest(m, heads, d, k, bias, generator):
    x, layer = s8(generator, m, k), linear(generator, 3 * heads * d, k, 60.0, bias)
    found = fused_v2.linear_cosine_qkv(x, layer, heads)
    assert found.q.shape == (m, 3 * heads * d)
    for row, part, head in itertools.product(range(m), range(3), range(heads)):
        columns = range((part * heads + head) * d, (part * heads + head + 1) * d)
        y = []
        for n in columns:
            acc = sum(int(a) * int(b) for a, b in zip(x[row], layer.weight[n]))
            y.append(acc * float(layer.scale[n]) + (float(layer.bias[n]) if bias else 0.0))
        largest = max(abs(value) for value in y)
        exact = y if part == 2 else [127 * value / largest for value in y]
        assert found.exact[row, columns].tolist() == pytest.approx(exact, rel=1e-12)
        assert found.q[row, columns].tolist() == [min(127, max(-128, round(value))) for value in exact]
        assert part == 2 or found.q[row, columns].abs().max() == 127


def test_queries_and_keys_of_length_zero_stay_zero(generator):
    """So do those too short to be told from it; the others fill all steps however short they are."""
    layer = Linear(s8(generator, 12, 8), torch.tensor([1e-20] * 4 + [1e-9] * 4 + [1.0] * 4), torch.zeros(0))
    x = s8(generator, 2, 8)
    x[1] = 0
    found = fused_v2.linear_cosine_qkv(x, layer, 2).q.unflatten(1, (3, 2, 2))
    assert (found[0, 0] == 0).all() and (found[1] == 0).all()
    assert (found[0, 1].abs().amax(-1) == 127).all()


# --- window_attention by cosine ---------------------------------------------------------------------------------------


def kindred(generator: torch.Generator, windows: int, n: int, heads: int, d: int) -> torch.Tensor:
    """qkv s8 [windows * N, 3C] whose keys lie near queries of their window, so that cosines reach from 1 down."""
    q, v = (s8(generator, windows, n, heads, d) for _ in range(2))
    noise = torch.randn(windows, n, heads, d, generator=generator) * 40 * torch.rand(windows, n, 1, 1, generator=generator)
    k = (q[:, torch.randperm(n, generator=generator)] + noise).round().clamp(-128, 127).to(torch.int8)
    return torch.stack((q, k, v), 2).reshape(windows * n, 3 * heads * d)


@pytest.mark.parametrize("masked", [True, False])
def test_cosine_attention_by_its_definition(masked, generator):
    batch, windows, heads, n, d = 2, 3, 2, 5, 4
    c, output_factor, scale = heads * d, 1.3, torch.tensor([3.7, 21.0])
    qkv, bias = kindred(generator, batch * windows, n, heads, d), 4 * torch.randn(heads, n, n, generator=generator)
    qkv[3, : 2 * c] = 0  # a query and a key of length zero, whose cosine is 0
    mask = torch.where(torch.rand(windows, n, n, generator=generator) < 0.3, -100.0, 0.0) if masked else None
    found = fused_v2.cosine_attention(qkv, scale, bias, mask, output_factor)
    assert found.q.shape == (batch * windows * n, c)
    for w, h, i in itertools.product(range(batch * windows), range(heads), range(n)):
        rows = qkv[w * n : (w + 1) * n].long()
        q, k, v = (rows[:, part * c + h * d : part * c + (h + 1) * d] for part in range(3))
        length = [math.sqrt(max(1, int(a @ a))) for a in (q[i], *k)]
        x = [int(q[i] @ k[j]) * float(scale[h]) / (length[0] * length[1 + j]) + float(bias[h, i, j]) for j in range(n)]
        if masked:
            x = [value + float(mask[w % windows, i, j]) for j, value in enumerate(x)]
        p = [round(127 * math.exp(value - max(x))) for value in x]
        assert max(p) == 127
        for e in range(d):
            exact = sum(p[j] * int(v[j, e]) for j in range(n)) * output_factor / sum(p)
            assert float(found.exact[w * n + i, h * d + e]) == pytest.approx(exact, rel=1e-12)
    assert not found.slack.any(), "no probability of this case lies next to a tie"


def in_float32(qkv, scale, bias, mask):
    """Probabilities and values float64 [BW, h, N, ...] as float32 logits give them, summed in the contract's order."""
    q, k, v = fused.split_heads(qkv, len(scale), bias.shape[-1])
    of_q, of_k = (t.float().square().sum(-1).clamp(min=1).sqrt().reciprocal() for t in (q, k))
    scores = (q.double() @ k.double().transpose(-1, -2)).float()
    x = scores * (of_q * scale[:, None])[..., None] * of_k[..., None, :] + bias
    x = x if mask is None else (x.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    assert x.dtype == torch.float32
    return (127 * (x - x.amax(-1, keepdim=True)).double().exp()).round(), v.double()


def crowded(generator: torch.Generator, windows: int, n: int, heads: int, d: int) -> torch.Tensor:
    """qkv s8 [windows * N, 3C] whose queries and keys all lie near one another: cosines from 0.9 to 1."""
    center, v = s8(generator, windows, 1, 1, heads, d), s8(generator, windows, n, 1, heads, d)
    qk = (center + 15 * torch.randn(windows, n, 2, heads, d, generator=generator)).round().clamp(-128, 127)
    return torch.cat((qk.to(torch.int8), v), 2).reshape(windows * n, 3 * heads * d)


def only_one_cosine(generator: torch.Generator, windows: int, n: int, heads: int, d: int) -> torch.Tensor:
    """The same with keys of 0 but for the first of each window, so that its logit's error is the largest."""
    qkv = crowded(generator, windows, n, heads, d).view(windows, n, 3, heads, d)
    qkv[:, 1:, 1] = 0
    return qkv.reshape(windows * n, 3 * heads * d)


SCALE = torch.tensor([100.0, 99.0, 10.0, 0.5])
FLOAT32_CASES = {
    "cosines": (crowded, SCALE, lambda random: 0 * random),
    "cosines and biases": (crowded, SCALE, lambda random: 15 + random),
    "one cosine, else biases": (only_one_cosine, 0 * SCALE + 100, lambda random: torch.cat((0 * random[..., :1], 93 + random[..., 1:]), -1)),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOAT32_CASES)
@pytest.mark.parametrize("masked", [True, False])
def test_the_slack_of_cosine_attention_covers_float32(masked, case, generator, monkeypatch):
    """Logits from 15 to 116, float32 of which are up to 2^-17 apart: where that rounds a probability the other way,
    the result is within the slack by the logits' error alone; and by a twentieth of that it would not be."""
    made, scale, bias_of = FLOAT32_CASES[case]
    windows, heads, n, d = 48, 4, 49, 32
    qkv, bias = made(generator, windows, n, heads, d), bias_of(torch.rand(heads, n, n, generator=generator))
    mask = torch.where(torch.rand(4, n, n, generator=generator) < 0.5, -100.0, 0.0) if masked else None
    if masked:
        mask[..., 0] = 0
    p, v = in_float32(qkv, scale, bias, mask)
    other = (p @ v / p.sum(-1, keepdim=True)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    monkeypatch.setattr(fused, "TOLERANCE", 0.0)
    found = fused_v2.cosine_attention(qkv, scale, bias, mask, 1.0)
    moved = (other - found.exact).abs()
    assert (moved > 1e-9).any(), "some probability is rounded the other way"
    assert (moved <= found.slack + 1e-9).all()
    assert (found.slack == 0).double().mean() > 0.5, "most values have no slack"
    attend = fused_v2.attend
    monkeypatch.setattr(fused_v2, "attend", lambda x, error, *rest: attend(x, error / 20, *rest))
    assert (moved > fused_v2.cosine_attention(qkv, scale, bias, mask, 1.0).slack + 1e-9).any()


def test_cosine_attention_of_extreme_values_stays_finite():
    qkv = torch.full((8, 3 * 32), 127, dtype=torch.int8)
    qkv[:4, :64] = -128
    found = fused_v2.cosine_attention(qkv, torch.tensor([100.0]), torch.zeros(1, 8, 8), None, 1.0)
    assert (found.q == 127).all() and found.exact.isfinite().all() and found.slack.isfinite().all()


# --- Norms behind a branch --------------------------------------------------------------------------------------------


def norm_of(generator: torch.Generator, c: int) -> tuple[torch.Tensor, torch.Tensor]:
    return 1 + 0.3 * torch.randn(c, generator=generator), torch.randn(c, generator=generator)


def layer_norm(x: torch.Tensor, norm) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], norm[0].double(), norm[1].double(), 1e-5)


def test_the_projection_is_normed_and_goes_back_to_the_tokens_it_came_from(generator):
    stage, inverse = next(iter(MICRO.stages())), 127 / 4.3
    order = window_order(stage, stage.shift)
    residual = torch.randn(2, 14, 14, 32, generator=generator)
    x, layer, norm = s8(generator, 2 * 196, 32), linear(generator, 32, 32, 1.0), norm_of(generator, 32)
    found = fused_v2.linear_post_norm_residual(x, layer, *norm, residual, order, inverse)
    acc = x.long() @ layer.weight.long().T
    for b, row in itertools.product(range(2), range(196)):
        token = int(order[row])
        branch = layer_norm(acc[b * 196 + row] * layer.scale.double() + layer.bias.double(), norm)
        expected = residual.flatten(1, 2)[b, token].double() + branch
        torch.testing.assert_close(found.residual.flatten(1, 2)[b, token], expected)
        torch.testing.assert_close(found.quantized.exact[b * 196 + token], expected * inverse)
    assert found.slack == 0.0 and torch.equal(found.quantized.q, fused.round_clamp(found.quantized.exact))


@ACTIVATIONS
def test_the_mlp_by_its_definition(activation, generator):
    """Written in the window order of the next block; only the residual where there is none."""
    stage, inverse = next(iter(MICRO.stages())), 127 / 4.3
    order = window_order(stage, stage.shift)
    c, f, gelu_inverse = 32, 48, None if activation == "relu" else 127 / 3.0
    residual, x = torch.randn(1, 14, 14, c, generator=generator), s8(generator, 196, c)
    fc1 = linear(generator, f, c, 50.0 if activation == "relu" else 1.5, bias=activation == "gelu")
    fc2, norm = linear(generator, c, f, 1.0), norm_of(generator, c)
    found = fused_v2.mlp_post_norm_residual(x, fc1, fc2, *norm, residual, gelu_inverse, inverse, order)
    hidden = (x.long() @ fc1.weight.long().T) * fc1.scale.double()
    if activation == "relu":
        hidden = hidden.clamp(min=0).round().clamp(0, 127)
    else:
        hidden = (torch.nn.functional.gelu(hidden + fc1.bias.double()) * gelu_inverse).round().clamp(-128, 127)
        assert hidden.min() < 0
    branch = layer_norm((hidden @ fc2.weight.double().T) * fc2.scale.double() + fc2.bias.double(), norm)
    expected = residual.double() + branch.view(1, 14, 14, c)
    torch.testing.assert_close(found.residual, expected)
    torch.testing.assert_close(found.quantized.exact, expected.flatten(0, 2)[order] * inverse)
    alone = fused_v2.mlp_post_norm_residual(x, fc1, fc2, *norm, residual, gelu_inverse)
    assert alone.quantized is None and torch.equal(alone.residual, found.residual)
    assert torch.equal(alone.slack, found.slack)


def test_the_slack_of_the_mlp_covers_the_other_rounding_of_its_hidden_channels(generator):
    """Eight hidden channels at a tie: whichever way they round, the normed branch is within the slack, and not far."""
    c, f = 24, 96
    fc1 = Linear(torch.zeros(f, 1, dtype=torch.int8), torch.full((f,), 0.5), torch.zeros(0))
    fc1.weight[:, 0] = 2 * torch.randint(0, 120, (f,), generator=generator)  # whole numbers
    fc1.weight[:8, 0] = 2 * torch.arange(8) + 1  # and a half
    fc2, norm = linear(generator, c, f, 1.0), norm_of(generator, c)
    x, zero = torch.ones(1, 1, dtype=torch.int8), torch.zeros(1, 1, 1, c)
    found = fused_v2.mlp_post_norm_residual(x, fc1, fc2, *norm, zero)
    hidden, tied = fused.hidden_channels(x, fc1, None)
    assert tied.sum() == 8
    reached = torch.zeros(c, dtype=torch.float64)
    for choice in itertools.product((0, 1), repeat=8):
        other = hidden.clone()
        other[0, :8] = torch.arange(8) + torch.tensor(choice)
        moved = (layer_norm(fused.accumulate(other, fc2), norm) - found.residual.flatten()).abs()
        assert (moved <= found.slack.flatten() + 1e-12).all()
        reached = torch.maximum(reached, moved.flatten())
    assert (found.slack.flatten() < 20 * reached).all(), "the slack is of the size of what the roundings do"


def test_the_slack_of_a_norm_reaches_its_first_order(generator):
    """A row that one channel alone moves, by which the norm moves as its derivative says; and no slack, no move."""
    y, (gamma, beta) = torch.randn(3, 16, generator=generator).double(), norm_of(generator, 16)
    slack = torch.zeros_like(y)
    assert not fused_v2.norm_slack(y, slack, gamma).any()
    slack[1, 5] = 1e-4
    moved = (layer_norm(y + slack, (gamma, beta)) - layer_norm(y, (gamma, beta))).abs()
    allowed = fused_v2.norm_slack(y, slack, gamma)
    assert (moved <= allowed).all() and not allowed[0].any() and not allowed[2].any()
    assert moved[1, 5] > 0.5 * allowed[1, 5]


# --- The whole model --------------------------------------------------------------------------------------------------


def faked_logits(checkpoint, images):
    """Of the fake-quantized model in float64, so that no machine's float32 decides a tie."""
    with torch.no_grad():
        return fused_model(checkpoint).double()(images.double())


@CONFIGS
@GELULESS
def test_the_golden_model_agrees_with_fake_quantization(config, geluless, seed):
    """The two are 52 to 147 dB apart, by whether a value falls the other way at a tie, since scales are float32 here. And
    it loses less than FasterTransformer's graph: found 1 to 6 dB."""
    model, checkpoint = calibrated(config, geluless, 1)
    images = images_for(config, 6, seed)
    file = to_engine_file(checkpoint, "fused_int8")
    golden = FusedReferenceSwin(file)
    assert isinstance(golden, FusedReferenceSwinV2)
    with torch.no_grad():
        faked, floating = faked_logits(checkpoint, images), model(images)
    found = golden(images)
    assert found.dtype == torch.float32
    assert sqnr_db(faked, found) > SQNR_BOUND_DB
    assert sqnr_db(floating, found) < sqnr_db(faked, found) - 10, "the two differ by a third of what quantization costs"
    assert sqnr_db(floating, found) > sqnr_db(floating, ReferenceSwin(to_engine_file(checkpoint))(images))


def test_a_logit_scale_counts_up_to_100(seed):
    file, images = random_engine_file(MICRO, "fused_int8", seed=seed), images_for(MICRO, 2, seed)
    at_the_end, beyond = (
        mutated(file, "layers.0.blocks.0.attn.logit_scale", lambda t, value=value: torch.full_like(t, value))
        for value in (math.log(100), 9.0)
    )
    assert torch.equal(FusedReferenceSwin(beyond)(images), FusedReferenceSwin(at_the_end)(images))
    assert not torch.equal(FusedReferenceSwin(file)(images), FusedReferenceSwin(at_the_end)(images))


def test_the_trace_has_every_operation_in_order():
    trace: dict[Node, object] = {}
    FusedReferenceSwin(random_engine_file(MICRO, "fused_int8"))(images_for(MICRO, 1, 0), trace)
    block = ["qkv", "attention", "proj_norm", "mlp_norm"]
    expected = [Node(None, None, "patch_embed"), Node(None, None, "patch_embed_norm")]
    expected += [Node(0, 0, "shift_partition"), *(Node(0, j, op) for j in range(2) for op in block)]
    expected += [Node(0, None, op) for op in ("patch_merge", "reduction", "reduction_norm")]
    expected += [Node(1, 0, "shift_partition"), *(Node(1, j, op) for j in range(2) for op in block)]
    expected += [Node(None, None, "final_norm_pool"), Node(None, None, "head")]
    assert list(trace) == expected
    written = {(node.stage, node.block): value for node, value in trace.items() if node.op == "mlp_norm"}
    assert {at for at, value in written.items() if value.quantized is None} == {(0, 1), (1, 1)}


@ACTIVATIONS
def test_images_of_a_batch_do_not_mix(activation, seed):
    model = FusedReferenceSwin(random_engine_file(FINE_TUNED, "fused_int8", seed=seed, activation=activation))
    images = images_for(FINE_TUNED, 3, seed)
    together = model(images)
    assert together.shape == (3, 48)
    for index in range(3):
        torch.testing.assert_close(model(images[index : index + 1])[0], together[index])
    assert (together[0] - together[1]).abs().max() > 0.01


@CONFIGS
def test_random_files_have_plausible_amax(config, seed):
    """Few values are clipped, and none use a small part of their steps."""
    trace: dict[Node, object] = {}
    FusedReferenceSwin(random_engine_file(config, "fused_int8", seed=seed))(images_for(config, 2, seed), trace)
    for node, value in trace.items():
        value = value.quantized if isinstance(value, Stream) else value
        if isinstance(value, Quantized):
            own = value.exact if node.op != "qkv" else value.exact.chunk(3, 1)[2]
            assert (own.abs() > 128).double().mean() < 0.02, f"{node} clips"
            assert own.abs().quantile(0.99) > 25, f"{node} leaves its steps unused"


# --- Mutations: the bound must break ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy():
    """(engine file, images, logits of the fake-quantized model) of the micro model with GELU."""
    _, checkpoint = calibrated(MICRO, False, 1)
    images = images_for(MICRO, 2, 99)
    return to_engine_file(checkpoint, "fused_int8"), images, faked_logits(checkpoint, images)


def distance_db(healthy, change=lambda ef: ef) -> float:
    ef, images, expected = healthy
    return sqnr_db(expected, FusedReferenceSwin(change(ef))(images))


def test_the_healthy_model_is_within_the_bound(healthy):
    assert distance_db(healthy) > SQNR_BOUND_DB


@pytest.mark.parametrize("layer", [*LAYERS, "layers.0.downsample.reduction"])
def test_the_steps_of_every_other_channel_10_percent_off_break_the_bound(layer, healthy):
    """A LayerNorm would hide what all of them have in common."""
    change = scaled(slice(0, None, 2), 1.1)
    assert distance_db(healthy, lambda ef: mutated(ef, f"{layer}.weight_scale", change)) < SQNR_BOUND_DB


@pytest.mark.parametrize("block", ["layers.0.blocks.1", "layers.1.blocks.0"])
@pytest.mark.parametrize("scale", AMAX_FIELDS_V2)
def test_one_wrong_amax_breaks_the_bound(scale, block, healthy):
    change = scaled(AMAX_FIELDS_V2.index(scale), 0.5)
    assert distance_db(healthy, lambda ef: mutated(ef, f"{block}.amax", change)) < SQNR_BOUND_DB


@pytest.mark.parametrize("head", [0, 1])
def test_one_wrong_logit_scale_breaks_the_bound(head, healthy):
    change = scaled(head, 1.1)
    assert distance_db(healthy, lambda ef: mutated(ef, "layers.1.blocks.0.attn.logit_scale", change)) < SQNR_BOUND_DB


@pytest.mark.parametrize("name", DROPPED)
def test_one_dropped_bias_or_mask_breaks_the_bound(name, healthy):
    assert distance_db(healthy, lambda ef: mutated(ef, name, torch.zeros_like)) < SQNR_BOUND_DB


def mis_shift(monkeypatch, wrong: tuple[int, int]) -> None:
    def shifted(stage, shift):
        return window_order(stage, (shift[0] + wrong[0], shift[1] + wrong[1]) if any(shift) else shift)

    monkeypatch.setattr(fused_v2, "window_order", shifted)


MIS_SHIFTED = pytest.mark.parametrize("wrong", [(1, 0), (0, 1), (-3, -3)])


@MIS_SHIFTED
def test_one_mis_shifted_window_breaks_the_bound(wrong, healthy, monkeypatch):
    mis_shift(monkeypatch, wrong)
    assert distance_db(healthy) < SQNR_BOUND_DB


# --- Following another implementation, here the golden model itself in the engine's place ------------------------------


@CONFIGS
@ACTIVATIONS
def test_a_pass_follows_itself(config, activation, seed, record_ties):
    ef = random_engine_file(config, "fused_int8", seed=seed, activation=activation)
    images = images_for(config, 2, seed)
    outputs, logits = pass_of(ef, images)
    assert sqnr_db(logits, walk(ef, images, outputs, record_ties)) > FOLLOWED_BOUND_DB


BLOCK, NEXT = "layers.0.blocks.0", "layers.0.blocks.1"
WRONG = {
    "one channel's step of q 10 % off": (Node(0, 0, "qkv"), f"{BLOCK}.attn.qkv.weight_scale", scaled(5, 1.1)),
    "one channel's step of k 10 % off": (Node(0, 0, "qkv"), f"{BLOCK}.attn.qkv.weight_scale", scaled(37, 1.1)),
    "one bias of q dropped": (Node(0, 0, "qkv"), f"{BLOCK}.attn.qkv.bias", scaled(7, 0)),
    "V 1 % off": (Node(0, 1, "qkv"), f"{NEXT}.amax", scaled(AMAX_FIELDS_V2.index("matmul_v"), 1.01)),
    "one logit scale 1 % off": (Node(1, 0, "attention"), "layers.1.blocks.0.attn.logit_scale", lambda t: t + torch.tensor([0, 0.01])),
    "no position bias": (Node(0, 1, "attention"), f"{NEXT}.attn.relative_position_bias", torch.zeros_like),
    "no mask": (Node(0, 1, "attention"), "layers.0.attn_mask", torch.zeros_like),
    "one bias of the projection dropped": (Node(0, 1, "proj_norm"), f"{NEXT}.attn.proj.bias", scaled(7, 0)),
    "one weight of norm1 10 % off": (Node(0, 0, "proj_norm"), f"{BLOCK}.norm1.weight", scaled(3, 1.1)),
    "no bias of norm1": (Node(0, 0, "proj_norm"), f"{BLOCK}.norm1.bias", torch.zeros_like),
    "FC1's input 1 % off": (Node(0, 0, "proj_norm"), f"{BLOCK}.amax", scaled(AMAX_FIELDS_V2.index("fc1_input"), 1.01)),
    "one step of FC1 10 % off": (Node(1, 0, "mlp_norm"), "layers.1.blocks.0.mlp.fc1.weight_scale", scaled(3, 1.1)),
    "one bias of FC1 dropped": (Node(1, 1, "mlp_norm"), "layers.1.blocks.1.mlp.fc1.bias", scaled(7, 0)),
    "one step of FC2 10 % off": (Node(1, 0, "mlp_norm"), "layers.1.blocks.0.mlp.fc2.weight_scale", scaled(3, 1.1)),
    "no bias of FC2": (Node(0, 0, "mlp_norm"), f"{BLOCK}.mlp.fc2.bias", torch.zeros_like),
    "no bias of norm2": (Node(0, 0, "mlp_norm"), f"{BLOCK}.norm2.bias", torch.zeros_like),
    "no bias of the last norm2": (Node(1, 1, "mlp_norm"), "layers.1.blocks.1.norm2.bias", torch.zeros_like),
    "the next block's input 1 % off": (Node(0, 0, "mlp_norm"), f"{NEXT}.amax", scaled(AMAX_FIELDS_V2.index("qkv_input"), 1.01)),
    "the first block's input 1 % off": (Node(1, 0, "shift_partition"), "layers.1.blocks.0.amax", scaled(AMAX_FIELDS_V2.index("qkv_input"), 1.01)),
    "the reduction's input 1 % off": (Node(0, None, "patch_merge"), "layers.0.downsample.amax", scaled(0, 1.01)),
    "one step of the reduction 10 % off": (Node(0, None, "reduction"), "layers.0.downsample.reduction.weight_scale", scaled(3, 1.1)),
    "no bias of the merging's norm": (Node(0, None, "reduction_norm"), "layers.0.downsample.norm.bias", torch.zeros_like),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_following_hides_no_fault(fault, seed, record_ties):
    """The walk stops at the operation that is wrong, and the logits end below the bound."""
    node, name, change = WRONG[fault]
    ef = random_engine_file(MICRO, "fused_int8", seed=seed, activation="gelu")
    images = images_for(MICRO, 2, seed)
    outputs, logits = pass_of(mutated(ef, name, change), images)
    with pytest.raises(AssertionError, match=rf"stage={node.stage}, block={node.block}, op='{node.op}'"):
        walk(ef, images, outputs, record_ties)
    assert sqnr_db(logits, golden_logits(ef, images, outputs)) < FOLLOWED_BOUND_DB


@MIS_SHIFTED
def test_following_hides_no_mis_shifted_window(wrong, seed, record_ties, monkeypatch):
    ef, images = random_engine_file(MICRO, "fused_int8", seed=seed), images_for(MICRO, 4, seed)
    with monkeypatch.context() as patch:
        mis_shift(patch, wrong)
        outputs, logits = pass_of(ef, images)
    with pytest.raises(AssertionError, match="stage=0, block=0, op='mlp_norm'"):
        walk(ef, images, outputs, record_ties)
    assert sqnr_db(logits, golden_logits(ef, images, outputs)) < FOLLOWED_BOUND_DB


def test_a_residual_stream_in_half_precision_is_followed(seed, record_ties):
    """What is quantized is the stream as it is stored; following it, every int8 value is still right."""
    ef, images = random_engine_file(MICRO, "fused_int8", seed=seed), images_for(MICRO, 2, seed)
    model = FusedReferenceSwin(ef)
    halved = ("patch_embed", "patch_embed_norm", "reduction", "reduction_norm")

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
    for node, field, at in ((Node(0, 1, "proj_norm"), "fc1_input", NEXT), (Node(0, 0, "mlp_norm"), "qkv_input", NEXT)):
        amax = ef.by_name()[f"{at}.amax"][AMAX_FIELDS_V2.index(field)]
        stage, stored = next(iter(MICRO.stages())), outputs[node][0].double().flatten(1, 2)
        order = window_order(stage, stage.shift) if node.op == "mlp_norm" else slice(None)
        own = stored[:, order].flatten(0, 1) * float(127 / amax)
        assert torch.equal(outputs[node][1], fused.round_clamp(own)), f"{node}: of the stream as it is stored"
