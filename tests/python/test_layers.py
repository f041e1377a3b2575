"""compare.py --layers: what quantizers cost, against the same found by switching them off one at a time."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from quant_helpers import MICRO_DIGITS, THREE_STAGES, calibrated, images_for, one_thread, sqnr_db
from torch import nn
from v2_configs import MICRO as MICRO_V2

from pyharness import compare, layers, models, plots
from pyharness.calibrated import save_calibrated
from pyharness.errors import HarnessError
from pyharness.fakequant import make_quantizer
from pyharness.fused_fakequant import ChannelRounding, RowRelative, model_in_graph

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    (MICRO_DIGITS, False, None), (MICRO_DIGITS, True, None), (THREE_STAGES, False, "fused_int8"),
    (MICRO_DIGITS, True, "fused_int8"), (MICRO_V2, False, "fused_int8"), (MICRO_V2, True, None),
]  # fmt: skip
IDS = [f"{config.name}-{'relu' if geluless else 'gelu'}-{graph or 'own'}" for config, geluless, graph in CASES]


def analysed(checkpoint, images, reference, graph=None, kinds=layers.KINDS, batch=5):
    analysis = layers.LayerAnalysis(model_in_graph(checkpoint, graph, keep_weights=True), kinds)
    for x, logits in zip(images.split(batch), reference.split(batch)):
        assert len(list(analysis.run(x, logits))) == analysis.steps()
    return analysis.result()


@torch.inference_mode()
def without(checkpoint, graph, names, images):
    """Logits with the quantizers `names` replaced by nothing, the plain way."""
    model = model_in_graph(checkpoint, graph, keep_weights=True)
    for name in names:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, nn.Identity())
    return model(images)


@pytest.mark.parametrize(("config", "geluless", "graph"), CASES, ids=IDS)
def test_gains_are_those_of_a_model_without_the_quantizer(config, geluless, graph, seed):
    """Every tenth quantizer, a kind and a block; batches of 5, 5 and 2 images."""
    model, checkpoint = calibrated(config, geluless, 1)
    images = images_for(config, 12, seed)
    with torch.inference_mode():
        reference = model(images)
        before = sqnr_db(reference, model_in_graph(checkpoint, graph)(images))
    found = analysed(checkpoint, images, reference, graph)
    assert found.images == 12 and found.logits_db == pytest.approx(before, abs=0.01)
    assert found.floating_db > 90, "the checkpoint without its quantizers is the model, to float32's last bits"

    def expected(names):
        return sqnr_db(reference, without(checkpoint, graph, names, images)) - before

    gains = [row.gain_db for row in found.quantizers]
    assert gains == sorted(gains, reverse=True) and len({row.name for row in found.quantizers}) == len(gains)
    for row in found.quantizers[::10]:
        assert row.gain_db == pytest.approx(expected([row.name]), abs=0.01), row.name
    kind, unit = found.kinds[0], found.units[-1]
    assert kind.gain_db == pytest.approx(expected([r.name for r in found.quantizers if r.kind == kind.kind]), abs=0.01)
    of_unit = [r.name for r in found.quantizers if (r.stage, r.block) == (unit.stage, unit.block)]
    assert unit.gain_db == pytest.approx(expected(of_unit), abs=0.01)
    assert kind.count == sum(row.kind == kind.kind for row in found.quantizers)
    assert kind.least_sqnr_db == min(row.sqnr_db for row in found.quantizers if row.kind == kind.kind)


def test_every_quantizer_of_a_graph_is_there():
    """As many as the checkpoint has; of the fused graph its own, and the weights', probabilities' and cosines' steps."""
    counts = {}
    for config, geluless, graph in CASES:
        _, checkpoint = calibrated(config, geluless, 1)
        analysis = layers.LayerAnalysis(model_in_graph(checkpoint, graph, keep_weights=True))
        counts[config.name, geluless, graph] = sum(len(unit.probes) for unit in analysis.units)
        if graph is None:
            assert counts[config.name, geluless, graph] == len(list(checkpoint.required()))
    blocks, merges = sum(THREE_STAGES.depths), 2
    assert counts["three_stages", False, "fused_int8"] == blocks * (7 + 1 + 4) + merges * 2
    assert counts[MICRO_V2.name, False, "fused_int8"] == sum(MICRO_V2.depths) * (5 + 3 + 4) + 2 * (len(MICRO_V2.depths) - 1)


@pytest.mark.parametrize("graph", [None, "fused_int8"])
def test_a_damaged_scale_comes_first(graph, seed):
    """An amax an eighth of its own: its quantizer, its kind and its block gain most, and it is seen to clip."""
    model, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    name = "layers.0.blocks.1.mlp.fc2._input_quantizer"
    state = {**checkpoint.state, f"{name}._amax": checkpoint.state[f"{name}._amax"] / 8}
    images = images_for(MICRO_DIGITS, 8, seed)
    with torch.inference_mode():
        reference = model(images)
    found = analysed(dataclasses.replace(checkpoint, state=state), images, reference, graph)
    worst = found.quantizers[0]
    assert (worst.name, worst.kind, worst.stage, worst.block) == (name, "fc2_input", 0, 1)
    assert worst.clipped > 1 and worst.sqnr_db < 15 and worst.gain_db > 5 * worst.error_db > 0
    assert found.kinds[0].kind == "fc2_input" and found.kinds[0].least_sqnr_db == worst.sqnr_db
    assert max(found.units, key=lambda unit: unit.gain_db).block == 1
    own = {(unit.stage, unit.block): unit.own_db for unit in found.units}
    assert min(own, key=own.get) == (0, 1)
    streams = [unit.stream_db for unit in found.units]
    assert streams[0] > streams[1] + 3, "the error is in the residual stream from there on"


def test_a_quantizer_against_its_input():
    probe = layers.Probe(make_quantizer(), of_weight=False)
    probe.quantizer.amax = torch.tensor(127.0)
    probe.watching = True
    x = torch.tensor([1.0, 2.25, 127.4, 127.6, -128.4, -128.6, 200.0, -300.0])
    y = probe(x)
    assert y.tolist() == [1, 2, 127, 127, -128, -128, 127, -128]
    assert (probe.clipped, probe.values) == (4, 8), "what rounds into the range is not clipped"
    assert probe.ratio.db == pytest.approx(10 * math.log10(float(x.square().sum() / (x - y).square().sum())))
    probe.on = False
    assert probe(x) is x
    assert layers.clipped(RowRelative(), torch.ones(3)) == 0
    weight = torch.cat((torch.full((2, 999), 0.01), torch.tensor([[1.0], [0.01]])), dim=1)
    assert ChannelRounding("channel").clipped(weight) == 0
    assert ChannelRounding("balanced").clipped(weight) == 0, "no coarser than the tensor's: the largest fits"


def test_the_standard_error_of_a_gain_is_what_samples_show(seed):
    """Of 400 samples of 24 images each; the formula is of first order."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.rand(400, 24, generator=generator, dtype=torch.float64) + 0.5
    after = 0.7 * before + 0.2 * torch.rand(400, 24, generator=generator, dtype=torch.float64)
    found = [layers.gain_of(a, b) for a, b in zip(before, after)]
    spread = torch.tensor([gain.gain_db for gain in found]).std()
    assert torch.tensor([gain.error_db for gain in found]).mean() == pytest.approx(float(spread), rel=0.15)
    assert layers.gain_of(torch.ones(3), torch.zeros(3)) == layers.Gain(None, None)
    assert layers.gain_of(torch.ones(1), torch.ones(1)) == layers.Gain(0.0, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A floating-point checkpoint and the calibrated one made of it."""
    folder = tmp_path_factory.mktemp("layers")
    model, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    models.save_checkpoint(folder / "fp32.safetensors", model, models.checkpoint_meta(model, MICRO_DIGITS.name))
    save_calibrated(folder / "calibrated.safetensors", checkpoint)
    return folder


def words(folder, *more):
    return [str(folder / "fp32.safetensors"), str(folder / "calibrated.safetensors"), "--layers", *more]


def test_the_program_writes_tables_and_a_picture(folder, tmp_path, capsys):
    command = words(folder, "--graph", "fused_int8", "--images", "6", "--batch", "4", "--out", str(tmp_path / "out"))
    assert compare.main(command) == 0
    out, err = capsys.readouterr()
    document = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["layers.json", "layers.md", "layers.png"]
    assert (document["graph"], document["weight_scales"], document["images"]) == ("fused_int8", "channel", 6)
    assert "leaving out 50 quantizers, 14 kinds and 5 blocks, 6 images: about " in err and "min" in err
    assert "30 quantizers more" in out and "6 images of digits" in out
    text = (tmp_path / "out" / "layers.md").read_text()
    first = document["quantizers"][0]
    assert f"{first['gain_db']:+.2f} ± " in text and f"{first['gain_db']:+.2f} ± " in out
    assert text.count("fc2_input") == 1 + 4 and "| 0 merge |" in text and "more" not in text
    assert len(document["quantizers"]) == 50 and [row["stage"] for row in document["units"]] == [0, 0, 0, 1, 1]


def test_a_picture_without_a_gain(tmp_path):
    """Of one quantizer that costs nothing, and of one that does not err."""
    rows = [{"kind": "fc1_input", "stage": 0, "block": 0, "sqnr_db": None, "gain_db": -0.3}]
    document = {"model": "m", "graph": "ft_int8", "quantizers": rows, "units": [{"stage": 0, "block": 0}]}
    plots.plot_layers(document, tmp_path / "a.png")
    plots.plot_layers({**document, "quantizers": [{**rows[0], "gain_db": None}]}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"


def test_a_subset_by_kind(folder, tmp_path):
    assert compare.main(words(folder, "--kinds", "weights,fc2_input", "--images", "3", "--out", str(tmp_path))) == 0
    document = json.loads((tmp_path / "layers.json").read_text())
    kinds = {row["kind"] for row in document["quantizers"]}
    assert kinds == {*layers.GROUPS["weights"], "fc2_input"} == {row["kind"] for row in document["kinds"]}
    assert len(document["units"]) == 5 and document["graph"] == "ft_int8" and document["weight_scales"] is None


def test_what_is_no_use_is_refused(folder, tmp_path):
    for more, message in (
        (["--kinds", "fc3_input"], "--kinds fc3_input: fc3_input is no kind of quantizer; give .*weights, activations, qkv"),
        (["--kinds", ","], "nothing is no kind"),
        (["--kinds", "fc2_aftergemm", "--graph", "fused_int8"], "has no quantizer of the kinds fc2_aftergemm; it has qkv"),
        (["--graph", "geluless_int8"], "is calibrated for ft_int8, not geluless_int8"),
        (["--weight-scales", "balanced"], "--weight-scales is for --graph fused_int8"),
    ):
        with pytest.raises(HarnessError, match=message):
            compare.main(words(folder, *more, "--images", "2"))
    with pytest.raises(HarnessError, match="two files, .* these are fp32, fp32, calibrated"):
        compare.main([str(folder / "fp32.safetensors"), *words(folder)])
    with pytest.raises(HarnessError, match="--kinds is for --layers"):
        compare.main([*words(folder)[:2], "--kinds", "weights"])
    model = models.create_model(MICRO_DIGITS.name, num_classes=7, seed=1)
    models.save_checkpoint(tmp_path / "seven.pth", model, models.checkpoint_meta(model, MICRO_DIGITS.name))
    with pytest.raises(HarnessError, match=r"calibrated.safetensors: has 10 results per image, .*seven.pth has 7"):
        compare.main([str(tmp_path / "seven.pth"), *words(folder)[1:], "--images", "2"])
    same = layers.LayerAnalysis(model_in_graph(calibrated(MICRO_DIGITS, False, 1)[1], keep_weights=True))
    images = images_for(MICRO_DIGITS, 2, 0)
    with torch.inference_mode():
        list(same.run(images, same.model(images)))
    with pytest.raises(HarnessError, match="equal to the reference's"):
        same.result()
