"""The fake-quantized model against timm's own, and its quantizers' places and arithmetic."""

from __future__ import annotations

import logging

import pytest
import torch
from quant_helpers import NON_SQUARE, THREE_STAGES, calibrated, exercised_model, images_for, one_thread, sqnr_db

from pyharness.config import MICRO_DIGITS
from pyharness.errors import CheckpointError
from pyharness.fakequant import FakeQuantSwin, _is_no_enum_notice, make_quantizer, modelopt_quantization
from pyharness.models import make_geluless_block

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)
GELULESS = pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])

BLOCK_QUANTIZERS = {
    "attn.qkv._input_quantizer",
    "attn.qkv._weight_quantizer",
    "attn.qkv._aftergemm_quantizer",
    "attn.matmul_q_input_quantizer",
    "attn.matmul_k_input_quantizer",
    "attn.matmul_v_input_quantizer",
    "attn.matmul_a_input_quantizer",
    "attn.softmax_input_quantizer",
    "attn.proj._input_quantizer",
    "attn.proj._weight_quantizer",
    "attn.proj._aftergemm_quantizer",
    "mlp.fc1._input_quantizer",
    "mlp.fc1._weight_quantizer",
    "mlp.fc1._aftergemm_quantizer",
    "mlp.fc2._input_quantizer",
    "mlp.fc2._weight_quantizer",
    "mlp.fc2._aftergemm_quantizer",
}
"""Written out here, so that a change of pyharness/ft_format.py cannot go unseen."""


@CONFIGS
@GELULESS
def test_without_quantizers_it_is_timms_model(config, geluless, seed):
    model = exercised_model(config, seed, geluless)
    images = images_for(config, 3, seed)
    fake = FakeQuantSwin.from_timm(model, config)
    with torch.no_grad(), fake.quantizers_disabled():
        found = fake(images)
    with torch.no_grad():
        expected = model(images)
    assert expected.std() > 0.1, "the comparison needs a signal"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_modelopts_import_hides_one_notice_alone():
    def said(text):
        return _is_no_enum_notice(logging.LogRecord("torch.utils._pytree", logging.WARNING, "f", 1, text, None, None))

    assert not said("<enum 'Kind'> is an Enum subclass and is now natively supported by torch.compile as an opaque value")
    assert said("register_constant() got another class")
    modelopt_quantization()
    assert _is_no_enum_notice not in logging.getLogger("torch.utils._pytree").filters


@pytest.mark.parametrize("fault", ["shift", "mask", "merge order", "position bias", "scale"])
def test_the_parity_test_sees_faults(fault, seed):
    model = exercised_model(MICRO_DIGITS, seed)
    images = images_for(MICRO_DIGITS, 2, seed)
    fake = FakeQuantSwin.from_timm(model, MICRO_DIGITS)
    block = fake.layers[0].blocks[1]
    with torch.no_grad():
        if fault == "shift":
            block.shift = (3, 2)
        elif fault == "mask":
            block.attn_mask = block.attn_mask.roll(1, 0)
        elif fault == "merge order":
            weight = fake.layers[0].downsample.reduction.weight
            weight.copy_(weight.view(64, 2, 2, 32).transpose(1, 2).reshape(64, 128))
        elif fault == "position bias":
            table = block.attn.relative_position_bias_table
            table.copy_(table.flip(0))
        else:
            block.attn.scale = 1.01 * block.attn.scale
        with fake.quantizers_disabled():
            assert (fake(images) - model(images)).abs().max() > 1e-4


@GELULESS
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_quantizers_stand_at_fts_places(geluless, int8_mode):
    fake = FakeQuantSwin.from_timm(exercised_model(MICRO_DIGITS, 0, geluless), MICRO_DIGITS, int8_mode)
    per_block = set(BLOCK_QUANTIZERS)
    reduction = {"_input_quantizer", "_weight_quantizer", "_aftergemm_quantizer"}
    if geluless:
        per_block.remove("mlp.fc1._aftergemm_quantizer")
    if int8_mode == 2:
        per_block.remove("mlp.fc2._aftergemm_quantizer")
        reduction.remove("_aftergemm_quantizer")
    expected = {f"layers.{i}.blocks.{j}.{name}" for i in (0, 1) for j in (0, 1) for name in per_block}
    expected |= {f"layers.0.downsample.reduction.{name}" for name in reduction}
    assert {name for name, _ in fake.quantizers()} == expected


def test_a_quantizer_is_full_range_and_rounds_half_to_even():
    quantizer = make_quantizer()
    quantizer.amax = torch.tensor(127.0)
    x = torch.tensor([-300.0, -128.0, -127.6, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.4, 300.0])
    expected = [-128.0, -128, -128, -2, -2, 0, 0, 2, 2, 126, 127, 127]
    assert quantizer(x).tolist() == expected
    quantizer.amax = torch.tensor(3.0)
    scaled = quantizer(torch.linspace(-4, 4, 1001)) * 127 / 3
    assert (scaled - scaled.round()).abs().max() < 1e-4
    assert scaled.min().round() == -128 and scaled.max().round() == 127


def test_aftergemm_quantizers_see_the_product_without_its_bias():
    model, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    fake = checkpoint.to_model()
    linear = fake.layers[0].blocks[0].attn.qkv
    seen = {}
    linear._aftergemm_quantizer.register_forward_hook(lambda m, x, y: seen.update(before=x[0], after=y))
    linear.register_forward_hook(lambda m, x, y: seen.update(input=x[0], output=y))
    with torch.no_grad():
        fake(images_for(MICRO_DIGITS, 1, 5))
        product = linear._input_quantizer(seen["input"]) @ linear._weight_quantizer(linear.weight).T
    torch.testing.assert_close(seen["before"], product)
    torch.testing.assert_close(seen["output"], seen["after"] + linear.bias)
    assert linear.bias.abs().max() > 0.1


def test_softmax_input_is_quantized_ahead_of_the_scale():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    fake = checkpoint.to_model()
    attention = fake.layers[0].blocks[0].attn
    seen = {}
    attention.matmul_q_input_quantizer.register_forward_hook(lambda m, x, y: seen.update(q=y))
    attention.matmul_k_input_quantizer.register_forward_hook(lambda m, x, y: seen.update(k=y))
    attention.softmax_input_quantizer.register_forward_hook(lambda m, x, y: seen.update(logits=x[0]))
    with torch.no_grad():
        fake(images_for(MICRO_DIGITS, 1, 5))
    torch.testing.assert_close(seen["logits"], seen["q"] @ seen["k"].transpose(-1, -2))


@GELULESS
def test_quantization_costs_little_but_something(geluless):
    model, checkpoint = calibrated(MICRO_DIGITS, geluless, 1)
    images = images_for(MICRO_DIGITS, 16, 7)
    with torch.no_grad():
        found = sqnr_db(model(images), checkpoint.to_model()(images))
    assert 20 < found < 60


def test_disabling_is_undone_even_after_an_error():
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    fake = checkpoint.to_model()
    images = images_for(MICRO_DIGITS, 2, 3)
    with torch.no_grad():
        before = fake(images)
        with pytest.raises(RuntimeError), fake.quantizers_disabled():
            assert not torch.equal(fake(images), before)
            raise RuntimeError
        assert torch.equal(fake(images), before)


def test_an_uncalibrated_model_gives_nan_and_nothing_plausible():
    fake = FakeQuantSwin.from_timm(exercised_model(MICRO_DIGITS, 0), MICRO_DIGITS)
    with torch.no_grad():
        assert fake(images_for(MICRO_DIGITS, 1, 0)).isnan().all()


def test_the_timm_model_keeps_its_own_weights(seed):
    model = exercised_model(MICRO_DIGITS, seed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FakeQuantSwin.from_timm(model, MICRO_DIGITS).round_parameters_to_fp16()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rounding_to_fp16_leaves_int8_weights_alone(seed):
    model = exercised_model(MICRO_DIGITS, seed)
    fake = FakeQuantSwin.from_timm(model, MICRO_DIGITS)
    fake.round_parameters_to_fp16()
    block, original = fake.layers[0].blocks[0], model.layers[0].blocks[0]
    assert torch.equal(block.attn.qkv.weight, original.attn.qkv.weight)
    assert torch.equal(block.attn.qkv.bias, original.attn.qkv.bias.half().float())
    assert not torch.equal(block.attn.qkv.bias, original.attn.qkv.bias)
    assert torch.equal(fake.head.weight, model.head.fc.weight.half().float())


def test_a_half_distilled_model_is_refused():
    model = exercised_model(MICRO_DIGITS, 0)
    make_geluless_block(model.layers[0].blocks[0])
    with pytest.raises(CheckpointError, match="some GELU and some|some blocks"):
        FakeQuantSwin.from_timm(model, MICRO_DIGITS)


def test_a_geluless_model_with_an_fc1_bias_is_refused():
    model = exercised_model(MICRO_DIGITS, 0, geluless=True)
    with torch.no_grad():
        model.layers[1].blocks[0].mlp.fc1.bias[3] = 0.5
    with pytest.raises(CheckpointError, match=r"layers\.1\.blocks\.0\.mlp\.fc1\.bias"):
        FakeQuantSwin.from_timm(model, MICRO_DIGITS)
