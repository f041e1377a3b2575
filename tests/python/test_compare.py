"""compare.py: files of all kinds against a reference, on images without labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from quant_helpers import calibrated

from pyharness import compare, data, models
from pyharness.calibrated import load_calibrated, save_calibrated
from pyharness.config import FUSED_GRAPH, MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.engine_file import save_engine_file
from pyharness.errors import DataError, HarnessError

MICRO = MICRO_DIGITS.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A floating-point checkpoint, the same calibrated, and its engine file; 40 images, one of which is none."""
    folder = tmp_path_factory.mktemp("compare")
    _, checkpoint = calibrated(MICRO_DIGITS, geluless=False, int8_mode=1)
    save_calibrated(folder / "calibrated.safetensors", checkpoint)
    save_engine_file(folder / "engine.safetensors", to_engine_file(checkpoint, "ft_int8"))
    (folder / "images" / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(40):
        file = folder / "images" / ("deep" if i % 3 else ".") / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(file)
    return folder


def differences(folder, capsys, *words):
    assert compare.main([*words, "--out", str(folder / "found.json")]) == 0
    document = json.loads((folder / "found.json").read_text())
    return document, capsys.readouterr().out


def test_every_kind_of_file_on_images_without_labels(folder, capsys):
    files = [str(folder / f"{name}.safetensors") for name in ("calibrated", "calibrated", "engine")]
    document, out = differences(folder, capsys, *files, "--data", str(folder / "images"), "--images", "30")
    same, engine = document["differences"]
    assert document["images"] == 30 and "30 images of " in out
    assert same["sqnr_db"] is None and same["max_abs"] == 0 and same["top1_agreement"] == 100 and "equal" in out
    predictors = [compare.open_predictor(file, None) for file in files[1:]]
    dataset = data.get_dataset(folder / "images", MICRO, train=False, model=predictors[0].timm_model, labels=False)
    images = torch.stack([dataset[int(i)][0] for i in data.evaluation_indices(40, 30)])
    with torch.inference_mode():
        expected = compare.compare_logits("a", predictors[0].predict(images), "b", predictors[1].predict(images))
    assert engine["sqnr_db"] == pytest.approx(expected.sqnr_db, abs=0.01)
    assert engine["top1_agreement"] == expected.top1_agreement and f"{expected.sqnr_db:.1f} |" in out
    assert engine["reference"] == files[0] and engine["other"] == files[2]


@pytest.mark.parametrize("words", [["--out", "file/found.json"], ["--layers", "--out", "file"]])
def test_a_place_that_cannot_be_written_to_is_refused_ahead_of_the_work(folder, tmp_path, monkeypatch, words):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "open_predictor", lambda *_: pytest.fail("a file was opened first"))
    calibrated = str(folder / "calibrated.safetensors")
    with pytest.raises(HarnessError, match="the folder of file/.*json cannot be made .*; choose another place"):
        compare.main([calibrated, calibrated, *words])


def test_a_calibrated_checkpoint_is_run_as_the_graph_of_its_engine_file(folder, capsys, tmp_path):
    """With it the engine is as near to its model as the kinds of arithmetic allow; as FasterTransformer's graph it is
    not. The same with balanced steps."""
    calibrated = str(folder / "calibrated.safetensors")
    found = {}
    for scales in ("channel", "balanced"):
        file = tmp_path / f"{scales}.safetensors"
        save_engine_file(file, to_engine_file(load_calibrated(calibrated), FUSED_GRAPH, scales))
        for words in ([], ["--graph", FUSED_GRAPH], ["--graph", FUSED_GRAPH, "--weight-scales", "balanced"]):
            document, _ = differences(folder, capsys, calibrated, str(file), "--images", "60", *words)
            found[scales, len(words)] = document["differences"][0]["sqnr_db"]
    assert min(found["channel", 2], found["balanced", 4]) > 45, "measured 55"
    others = [db for key, db in found.items() if key not in (("channel", 2), ("balanced", 4))]
    assert max(others) < min(found["channel", 2], found["balanced", 4]) - 6
    kinds = [compare.open_predictor(calibrated, None, FUSED_GRAPH, scales).kind for scales in (None, "balanced")]
    assert kinds == ["fake-quantized, fused_int8", "fake-quantized, fused_int8, balanced weight scales"]


def test_a_graph_that_no_file_is_run_as_is_refused(folder):
    calibrated, engine = (str(folder / f"{name}.safetensors") for name in ("calibrated", "engine"))
    for words, message in (
        ([calibrated, engine, "--graph", "geluless_int8"], "is calibrated for ft_int8, not geluless_int8"),
        ([engine, engine, "--graph", FUSED_GRAPH], "--graph fused_int8 is for calibrated checkpoints, and none was given"),
        ([calibrated, engine, "--weight-scales", "tensor"], "--weight-scales is for --graph fused_int8"),
    ):
        with pytest.raises(HarnessError, match=message):
            compare.main(words)


def test_by_default_the_digits(folder, capsys):
    file = str(folder / "calibrated.safetensors")
    document, out = differences(folder, capsys, file, file, "--images", "20")
    assert document["images"] == 20 and document["data"] == "digits" and "the held-out digits" in out


def test_images_that_cannot_be_read_are_left_out_and_limited(folder, capsys, tmp_path):
    for i, file in enumerate(sorted((folder / "images").rglob("*.png"))[:10]):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes() if i else b"no image")
    command = [str(folder / "calibrated.safetensors"), str(folder / "engine.safetensors"), "--data", str(tmp_path)]
    with pytest.raises(DataError, match="1 of 10 images cannot be read"):
        compare.main(command)
    document, _ = differences(folder, capsys, *command, "--max-corrupt", "0.2")
    assert document["images"] == 9
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        compare.main([*command, "--max-corrupt", "1", "--images", "1", "--data", str(first_alone(tmp_path))])


def first_alone(folder):
    (folder / "alone").mkdir()
    (folder / "0.png").rename(folder / "alone" / "0.png")
    return folder / "alone"


def test_features_are_compared_and_other_heads_are_not(folder, capsys, tmp_path):
    for name, classes in (("none", 0), ("seven", 7)):
        model = models.create_model(MICRO, num_classes=classes, seed=1)
        models.save_checkpoint(tmp_path / f"{name}.pth", model, models.checkpoint_meta(model, MICRO))
    document, _ = differences(folder, capsys, *[str(tmp_path / "none.pth")] * 2, "--images", "5")
    assert document["differences"][0]["sqnr_db"] is None
    with pytest.raises(HarnessError, match="seven.pth: has 7 results per image, .*none.pth has 64"):
        compare.main([str(tmp_path / "none.pth"), str(tmp_path / "seven.pth"), "--images", "5"])
    with torch.no_grad():
        model.head.fc.bias[0] = float("inf")
    with pytest.raises(HarnessError, match="its results are not finite, or zero throughout"):
        compare.logits_of(compare.Predictor("fp32", MICRO, model, model), compare.build_parser().parse_args(["a", "b"]))
    for words in (["--images", "0"], ["--batch", "0"], ["--workers", "-1"]):
        with pytest.raises(HarnessError, match=f"{words[0]} must be at least"):
            compare.main(["a", "b", *words])
