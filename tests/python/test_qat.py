"""Quantization-aware training: what it lowers, what it leaves alone, and that the engine runs its result."""

from __future__ import annotations

import copy
import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import qat_worker
import torch
import torchrun_helper
from quant_helpers import one_thread, sqnr_db
from torch import nn
from torch.utils.data import Subset

from pyharness import models, qat
from pyharness.calibrated import load_calibrated
from pyharness.config import FUSED_GRAPH, MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.data import DigitsDataset, make_loader
from pyharness.engine import SwinInt8, runs_graph
from pyharness.engine_file import load_engine_file, save_engine_file
from pyharness.errors import CheckpointError, HarnessError
from pyharness.fakequant import make_quantizer
from pyharness.fused_fakequant import ChannelRounding, CosineSteps, RowRelative, fused_model
from pyharness.model_card import read_card, write_card
from pyharness.quantize import quantize
from pyharness.trainer import divergence

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name
OPTIONS = qat.QatOptions(batch_size=16, subset=1.0, epochs=2, seed=5)
"""On 80 images: ten steps."""
CASES = [("ft_int8", 1), ("ft_int8", 2), ("geluless_int8", 1), ("geluless_int8", 2)]
HELDOUT = Subset(DigitsDataset(train=False), range(200))


@pytest.fixture(scope="module")
def teacher():
    return models.create_model(MICRO, weights="pretrained")


@pytest.fixture(scope="module")
def images():
    return Subset(DigitsDataset(train=True), range(80))


@pytest.fixture(scope="module")
def calibrated():
    """(graph, int8_mode) -> the calibrated checkpoint. The GELU-less student has had no distillation."""
    made = {}

    def get(graph, int8_mode):
        if (graph, int8_mode) not in made:
            activation = "relu" if graph == "geluless_int8" else "gelu"
            model = models.create_model(MICRO, weights="pretrained", activation=activation)
            loader = make_loader(DigitsDataset(train=True), 8, shuffle=True)
            batches = [x for x, _ in itertools.islice(loader, 4)]
            made[graph, int8_mode] = quantize(model, MICRO_DIGITS, batches, int8_mode=int8_mode)
        return made[graph, int8_mode]

    return get


def amax_of(checkpoint):
    return {name: float(tensor) for name, tensor in checkpoint.state.items() if name.endswith("._amax")}


def loss_of(checkpoint, teacher):
    return divergence(checkpoint.to_model(), teacher, HELDOUT)


@pytest.mark.parametrize(("graph", "int8_mode"), CASES)
def test_it_lowers_the_loss_on_unseen_images_and_the_engine_agrees(
    teacher, images, calibrated, tmp_path, graph, int8_mode
):
    """Divergence of the fake-quantized model from the teacher, before and after ten steps."""
    before = calibrated(graph, int8_mode)
    summary = qat.train_quantized(before, teacher, images, OPTIONS, tmp_path)
    after = load_calibrated(summary.path)
    assert (after.graph, after.int8_mode, after.state.keys()) == (graph, int8_mode, before.state.keys())
    assert amax_of(after) == amax_of(before), "as calibrated"
    weights = [name for name in before.state if not name.endswith("._amax")]
    assert all(not torch.equal(after.state[name], before.state[name]) for name in weights), "every weight learns"
    assert loss_of(after, teacher) < {"ft_int8": 1.0, "geluless_int8": 0.5}[graph] * loss_of(before, teacher)
    assert summary.rows[1]["loss"] < summary.rows[0]["loss"] or graph == "ft_int8"

    save_engine_file(tmp_path / "engine.safetensors", to_engine_file(after))
    engine = SwinInt8.from_engine_file(load_engine_file(tmp_path / "engine.safetensors"))
    x = DigitsDataset(train=False).images[:200]
    fake = after.to_model()
    fake.round_parameters_to_fp16()
    with torch.no_grad():
        expected = fake(x)
    found = engine(x).float()
    assert sqnr_db(expected, found) > 35  # measured 43 to 54: how many values lie next to a tie decides
    assert (expected.argmax(1) == found.argmax(1)).float().mean() >= 0.99


@pytest.mark.parametrize("learn_amax", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("graph", ["ft_int8", "geluless_int8"])
def test_the_fused_graphs_quantizers_are_trained_and_the_engine_agrees(
    teacher, images, calibrated, tmp_path, graph, learn_amax
):
    """From the same calibrated checkpoint. Of what the fused graph reads, weights and, where learned, amax change.

    The GELU model is 0.0001 nats from its teacher to begin with; found: 0.8 and 1.1 times that, of the other 0.12."""
    before = calibrated(graph, 1)
    options = qat.QatOptions(**{**vars(OPTIONS), "graph": FUSED_GRAPH, "learn_amax": learn_amax})
    summary = qat.train_quantized(before, teacher, images, options, tmp_path)
    after = load_calibrated(summary.path)
    assert (after.graph, after.state.keys()) == (graph, before.state.keys())
    assert after.meta["qat"]["graph"] == FUSED_GRAPH

    def loss(checkpoint):
        return divergence(fused_model(checkpoint), teacher, HELDOUT)

    assert loss(after) < {"ft_int8": 1.3, "geluless_int8": 0.3}[graph] * loss(before)
    changed = {name for name, amax in amax_of(after).items() if amax != amax_of(before)[name]}
    weights = {name for name in amax_of(before) if name.endswith("_weight_quantizer._amax")}
    assert all(amax_of(after)[n] == float(after.state[f"{n.split('._w')[0]}.weight"].abs().max()) for n in weights)
    read = {name for name in amax_of(before) if name.endswith("_input_quantizer._amax")}
    read = {name for name in read if "matmul_a" not in name and "softmax" not in name}
    moved = changed - weights
    assert moved <= read and (len(moved) >= {"ft_int8": 5, "geluless_int8": 24}[graph] if learn_amax else not moved), (
        "9 and 28 of 29, measured: a GELU model has next to no gradient"
    )

    save_engine_file(tmp_path / "engine.safetensors", to_engine_file(after, FUSED_GRAPH))
    x = DigitsDataset(train=False).images[:200]
    with torch.no_grad():
        expected, student = fused_model(after)(x), fused_model(after, keep_weights=True)(x)
    torch.testing.assert_close(student, expected, atol=0, rtol=0)
    if runs_graph(FUSED_GRAPH):
        found = SwinInt8.from_engine_file(load_engine_file(tmp_path / "engine.safetensors"))(x)
        assert sqnr_db(expected, found) > 45  # found 51 to 53
        assert (expected.argmax(1) == found.argmax(1)).float().mean() >= 0.99


def test_a_run_is_of_one_graph(teacher, images, calibrated, tmp_path):
    """To name the checkpoint's own graph is the default; a state of before the option, which does not hold it, goes on."""
    before = calibrated("geluless_int8", 1)
    assert qat.train_quantized(before, teacher, images, OPTIONS, tmp_path, stop_after_steps=1) is None
    own = qat.QatOptions(**{**vars(OPTIONS), "graph": "geluless_int8"})
    assert qat.train_quantized(before, teacher, images, own, tmp_path, stop_after_steps=1) is None
    fused = qat.QatOptions(**{**vars(OPTIONS), "graph": FUSED_GRAPH})
    with pytest.raises(CheckpointError, match="graph was geluless_int8, now fused_int8"):
        qat.train_quantized(before, teacher, images, fused, tmp_path)
    other = qat.QatOptions(**{**vars(OPTIONS), "graph": "ft_int8"})
    with pytest.raises(HarnessError, match="calibrated for geluless_int8, not ft_int8"):
        qat.train_quantized(before, teacher, images, other, tmp_path / "other")
    with pytest.raises(HarnessError, match="graph must be one of , ft_int8"):
        qat.QatOptions(graph="fused")


def test_the_fused_graphs_roundings_pass_gradients_on(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 7, generator=generator)
    for module, x in (
        (RowRelative(), logits.softmax(-1)),
        (CosineSteps(), nn.functional.normalize(logits, dim=-1)),
        (ChannelRounding(), logits),
    ):
        x.requires_grad_()
        weights = torch.randn(3, 7, generator=generator)
        y = module(x)
        (y * weights).sum().backward()
        assert torch.equal(x.grad, weights) and 0 < float((y - x).detach().abs().max()) < 0.02


def test_it_resumes_bit_for_bit_and_says_what_it_did(teacher, images, calibrated, tmp_path):
    before, options = calibrated("geluless_int8", 1), qat.QatOptions(**{**vars(OPTIONS), "learn_amax": True})
    whole = qat.train_quantized(before, teacher, images, options, tmp_path / "whole", eval_dataset=images)
    for steps in (5, 3):
        folder = tmp_path / "pieces"
        assert qat.train_quantized(before, teacher, images, options, folder, stop_after_steps=steps) is None
    pieces = qat.train_quantized(before, teacher, images, options, tmp_path / "pieces")
    assert all(torch.equal(pieces.checkpoint.state[name], tensor) for name, tensor in whole.checkpoint.state.items())
    meta = load_calibrated(whole.path).meta
    assert meta["calibration"] == before.meta["calibration"] and meta["qat"]["learn_amax"] is True
    assert json.loads((tmp_path / "whole" / "options.json").read_text()) == vars(options)
    assert [row["epoch"] for row in whole.rows] == [1, 2] and whole.rows[1]["eval_accuracy"] is not None
    # Learned scales moved, and what they give is a calibrated checkpoint of the same names that converts.
    moved = [name for name, amax in amax_of(whole.checkpoint).items() if amax != amax_of(before)[name]]
    assert len(moved) > 0.9 * len(amax_of(before)), "63 of 67, measured"
    assert min(amax_of(whole.checkpoint).values()) > 0
    assert loss_of(whole.checkpoint, teacher) < 0.5 * loss_of(before, teacher)
    assert to_engine_file(load_calibrated(whole.path)).graph == "geluless_int8"
    with pytest.raises(CheckpointError, match="learn amax was True, now False"):
        qat.train_quantized(before, teacher, images, OPTIONS, tmp_path / "whole")
    with pytest.raises(CheckpointError, match="teacher was"):
        other = models.create_model(MICRO, seed=1)
        qat.train_quantized(before, other, images, options, tmp_path / "whole")
    with pytest.raises(CheckpointError, match="int8 mode was 1, now 2|calibrated was"):
        qat.train_quantized(calibrated("geluless_int8", 2), teacher, images, options, tmp_path / "whole")


def test_a_run_with_a_teacher_of_other_images_or_geometry_does_not_resume(teacher, images, calibrated, tmp_path):
    before = calibrated("geluless_int8", 1)
    assert qat.train_quantized(before, teacher, images, OPTIONS, tmp_path, stop_after_steps=1) is None
    other = copy.deepcopy(teacher)
    models.note_data(other, {"input": {"mean": [0.9], "std": [0.1]}})
    with pytest.raises(CheckpointError, match="teacher's input was None, now"):
        qat.train_quantized(before, other, images, OPTIONS, tmp_path)
    scaled = replace(before, config=replace(before.config, qk_scale=0.5))
    with pytest.raises(CheckpointError, match="options: calibrated checkpoint's qk scale was None, now 0.5. remove"):
        qat.train_quantized(scaled, teacher, images, OPTIONS, tmp_path)


def test_the_average_is_a_checkpoint_of_its_own(teacher, images, calibrated, tmp_path):
    """With a decay that leaves next to nothing of the training, the average is what was calibrated; the result is not."""
    before, options = calibrated("geluless_int8", 1), qat.QatOptions(**{**vars(OPTIONS), "ema_decay": 0.999, "epochs": 1})
    summary = qat.train_quantized(before, teacher, images, options, tmp_path)
    average = load_calibrated(tmp_path / "calibrated_ema.safetensors")
    assert average.meta["qat"]["ema_decay"] == 0.999 and amax_of(average) == amax_of(before)

    def distance(checkpoint):
        return max(float((checkpoint.state[name] - tensor).abs().max()) for name, tensor in before.state.items())

    assert 0 < distance(average) < 0.01 * distance(summary.checkpoint)


def test_a_learned_quantizer_is_modelopts_with_lsqs_gradient(seed):
    x = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    amax = torch.tensor(1.5)
    fixed = make_quantizer()
    fixed.amax = amax
    learned = qat.LearnedQuantizer(amax)
    torch.testing.assert_close(learned(x), fixed(x), atol=1e-6, rtol=0)
    inputs = x.clone().requires_grad_()
    learned(inputs).sum().backward()
    scaled = x * 127 / amax
    inside = (scaled >= -128) & (scaled <= 127)
    torch.testing.assert_close(inputs.grad, inside.float())
    lsq = torch.where(inside, scaled.round() - scaled, scaled.clamp(-128, 127)) / 127
    expected = lsq.sum() * 127**2 / (127 * 3000) ** 0.5
    torch.testing.assert_close(learned._amax.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def in_one_piece():
    torch.set_num_threads(1)
    return qat_worker.learned()


def assert_learned_alike(in_one_piece, found):
    """Each amax moved as far. Measured 4e-11 of the way."""
    before, expected = in_one_piece
    assert found.keys() == expected.keys()
    for name, amax in expected.items():
        assert found[name] - before[name] == pytest.approx(amax - before[name], rel=1e-8, abs=1e-12 * amax), name


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_pieces_of_a_batch_teach_an_amax_what_the_whole_does(in_one_piece, accumulate):
    """Two batches of 8 and one of a single image; 8 in three pieces are 3, 3 and 2."""
    assert_learned_alike(in_one_piece, qat_worker.learned(accumulate)[1])


def test_two_processes_teach_an_amax_what_one_does(in_one_piece):
    for status, out, err in torchrun_helper.run([str(Path(qat_worker.__file__)), "2"], 2):
        assert status == 0, err
        assert_learned_alike(in_one_piece, json.loads(out))


def test_a_learned_amax_does_not_sink_to_zero(teacher, images, calibrated, tmp_path):
    from pyharness.train_options import Machine

    options = qat.QatOptions(**{**vars(OPTIONS), "learn_amax": True})
    run = qat._Run(calibrated("ft_int8", 1), teacher, images, options, tmp_path, None, Machine())
    learned = [module for module in run.student.modules() if isinstance(module, qat.LearnedQuantizer)]
    before = learned[0]._amax.item()
    with torch.no_grad():
        learned[0]._amax.fill_(-1.0)
    run.after_step()
    assert learned[0]._amax.item() == pytest.approx(before * qat.AMAX_FLOOR)


def test_teacher_and_checkpoint_must_match(images, calibrated, tmp_path):
    other = models.create_model(MICRO, num_classes=7)
    with pytest.raises(HarnessError, match="num_classes 7, the calibrated checkpoint of swin_micro_digits 10"):
        qat.train_quantized(calibrated("ft_int8", 1), other, images, OPTIONS, tmp_path)


def test_the_program(calibrated, tmp_path, capsys):
    from pyharness.calibrated import save_calibrated

    before = calibrated("ft_int8", 1)
    arguments = [str(tmp_path / "c.safetensors"), "--out", str(tmp_path / "out"), "--subset", "0.02", "--epochs", "1"]
    foreign = replace(before, meta={**before.meta, "input": {"mean": [0.5], "std": [0.325]}})
    save_calibrated(tmp_path / "c.safetensors", foreign)
    message = r"c\.safetensors: says .*'mean': \[0\.5\].*its teacher pretrained come in with .*'mean': \[0\.305\]"
    with pytest.raises(CheckpointError, match=message):
        qat.main(arguments)
    save_calibrated(tmp_path / "c.safetensors", before)  # says nothing: what it is trained on goes into the result
    assert qat.main([*arguments, "--threads", "1", "--no-tensorboard"]) == 0
    assert "ft_int8, int8_mode 1, held-out accuracy 99" in capsys.readouterr().out
    meta = load_calibrated(tmp_path / "out" / "calibrated.safetensors").meta
    assert meta["qat"]["epochs"] == 1 and meta["input"] == {"mean": [0.305], "std": [0.325]}
    with pytest.raises(HarnessError, match="at least one epoch"):
        qat.main([*arguments, "--epochs", "0"])
    arguments[2] = str(tmp_path / "fused")
    assert qat.main([*arguments, "--graph", "fused_int8", "--threads", "1", "--no-tensorboard"]) == 0
    assert "fused_int8, int8_mode 1, held-out accuracy 99" in capsys.readouterr().out
    assert load_calibrated(tmp_path / "fused" / "calibrated.safetensors").meta["qat"]["graph"] == FUSED_GRAPH


def test_a_file_of_fastertransformers_tool_is_named_and_results_have_cards(calibrated, tmp_path):
    """The chain: the card of the calibrated checkpoint is carried over. Two steps, with an average of the weights."""
    before = calibrated("ft_int8", 1)
    torch.save({"model": before.state}, tmp_path / "ft.pth")
    write_card(tmp_path / "ft.pth", "calibrated elsewhere")
    command = [str(tmp_path / "ft.pth"), "--out", str(tmp_path / "out"), "--subset", "0.02", "--epochs", "1"]
    command += ["--ema", "0.9", "--batch", "16", "--threads", "1", "--no-tensorboard"]
    with pytest.raises(CheckpointError, match=r"does not say of which model; give its timm name \(--model\)"):
        qat.main(command)
    assert qat.main([*command, "--model", MICRO]) == 0
    for name, column in (("calibrated", "eval_accuracy"), ("calibrated_ema", "ema_eval_accuracy")):
        path = tmp_path / "out" / f"{name}.safetensors"
        after, card = load_calibrated(path), read_card(path)
        assert (after.graph, after.int8_mode, after.config.name) == ("ft_int8", 1, MICRO)
        assert (card["model"], card["graph"], card["int8_mode"]) == (MICRO, "ft_int8", 1)
        assert {entry["role"]: entry["name"] for entry in card["inputs"]} == {
            "calibrated": "ft.pth", "teacher": models.MICRO_TEACHER.name,
        }  # fmt: skip
        assert card["meta"]["qat"]["ema_decay"] == 0.9 and "digits" in card["data"]
        assert [earlier["kind"] for earlier in card["history"]][:1] == ["calibrated elsewhere"]
        row = list(csv.DictReader((tmp_path / "out" / "log.csv").read_text().splitlines()))[-1]
        assert card["accuracy"] == {"top1 on the held-out images, fake-quantized": round(float(row[column]), 3)}
        assert card["kind"].startswith("calibrated checkpoint after quantization-aware training")


def test_quantizers_pass_gradients_straight_through(teacher, calibrated):
    """Outside the range too, as ModelOpt's do unless told otherwise."""
    quantizer = make_quantizer()
    quantizer.amax = torch.tensor(1.0)
    x = torch.tensor([0.3, 0.9999, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    assert isinstance(calibrated("ft_int8", 1).to_model().layers[0].blocks[0].mlp.act, nn.GELU)
