"""The golden model of the fused graph: each operation against the plainest possible computation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from quant_helpers import one_thread

from pyharness import fused_reference as fused
from pyharness.config import MICRO_DIGITS
from pyharness.fused_reference import Linear, Norm, Quantized
from pyharness.reference import window_order

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

EMPTY = torch.zeros(0)


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
