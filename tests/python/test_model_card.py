"""Model cards: complete, tied to the file by its hash, chained back to the first checkpoint, and never guessing."""

from __future__ import annotations

import json

import pytest
import torch

from pyharness import convert, models, quantize
from pyharness.config import MICRO_DIGITS
from pyharness.errors import HarnessError
from pyharness.model_card import card_paths, file_meta, read_card, sha256, write_card

MICRO = MICRO_DIGITS.name


@pytest.fixture
def student(tmp_path):
    """A GELU-less checkpoint that says how it was distilled, with its card."""
    model = models.create_model(MICRO, seed=3, activation="relu")
    path = tmp_path / "student.safetensors"
    models.save_checkpoint(path, model, models.checkpoint_meta(model, MICRO, distillation={"lr": 0.01, "seed": 5}))
    write_card(
        path, "GELU-less student", inputs={"teacher": "pretrained"}, accuracy={"top1": 12.5}, argv=["--lr", "0.01"]
    )
    return path


def test_a_card_says_what_is_known_and_what_is_not(student):
    card = read_card(student)
    assert card["file"] == {"name": student.name, "sha256": sha256(student), "bytes": student.stat().st_size}
    assert (card["model"], card["activation"], card["graph"]) == (MICRO, "relu", None)
    assert card["geometry"]["embed_dim"] == 32 and card["distillation"] == {"lr": 0.01, "seed": 5}
    assert card["calibration"] is None and card["data"] is None and card["accuracy"] == {"top1": 12.5}
    assert card["inputs"] == [{"role": "teacher", "name": "pretrained", "sha256": None, "bytes": None}]
    assert card["made_by"]["command"].endswith("--lr 0.01") and card["made_by"]["packages"]["torch"]
    text = card_paths(student)[1].read_text()
    for part in (card["file"]["sha256"], "ReLU, no FC1 bias", "top1 12.5", "embed_dim | 32", "none, or not noted"):
        assert part in text


def test_an_unmeasured_accuracy_is_said_to_be_unmeasured(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    assert write_card(tmp_path / "x.bin", "thing")["accuracy"] is None
    assert "| accuracy | not measured |" in card_paths(tmp_path / "x.bin")[1].read_text()


def test_a_card_of_another_content_does_not_count(student):
    assert read_card(student) is not None
    torch.save({}, student)
    assert read_card(student) is None
    card_paths(student)[0].write_text("{")
    assert read_card(student) is None


def test_a_chain_of_programs_leads_back_to_the_student(student, tmp_path):
    calibrated, engine, back = (tmp_path / f"{name}.safetensors" for name in ("calibrated", "engine", "back"))
    arguments = ["--weights", str(student), "--out", str(calibrated), "--batches", "1", "--batch-size", "2"]
    assert quantize.main([*arguments, "--method", "max"]) == 0
    assert convert.main(["to-engine", str(calibrated), str(engine)]) == 0
    assert convert.main(["to-checkpoint", str(engine), str(back)]) == 0
    card = read_card(engine)
    assert (card["graph"], card["activation"]) == ("geluless_int8", "relu") and card["calibration"]["images"] == 2
    assert "digits" in card["calibration"]["data"]
    assert card["distillation"] == {"lr": 0.01, "seed": 5}
    assert convert.main(["to-engine", str(calibrated), str(tmp_path / "f.safetensors"), "--graph", "fused_int8"]) == 0
    fused = read_card(tmp_path / "f.safetensors")
    assert (fused["graph"], fused["activation"], fused["distillation"]) == ("fused_int8", "relu", card["distillation"])
    assert card["accuracy"] is None, "the student's accuracy is not the engine file's"
    assert [entry["sha256"] for entry in card["inputs"]] == [sha256(calibrated)]
    chain = read_card(back)["history"]
    assert [entry["file"]["sha256"] for entry in chain] == [sha256(path) for path in (student, calibrated, engine)]
    assert chain[0]["accuracy"] == {"top1": 12.5} and "history" not in chain[0]
    text = card_paths(back)[1].read_text()
    assert "accuracy | not measured" in text and "student.safetensors" in text and "--method max" in text


def test_a_folder_is_hashed_by_the_content_of_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    before = sha256(folder)
    card = write_card(folder, "folder")
    assert card["file"] == {"name": "model", "sha256": before, "bytes": 1} and read_card(folder)
    (folder / "b").write_bytes(b"22")
    assert sha256(folder) != before and read_card(folder) is None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_meta_data_is_read_from_either_kind_of_file(suffix, tmp_path):
    model = models.create_model(MICRO, seed=1)
    models.save_checkpoint(tmp_path / f"m{suffix}", model, models.checkpoint_meta(model, MICRO, note="n"))
    meta = file_meta(tmp_path / f"m{suffix}")
    assert meta["note"] == "n" and meta["config"]["name"] == MICRO
    assert json.loads(json.dumps(write_card(tmp_path / f"m{suffix}", "checkpoint")))["meta"] == {"note": "n"}


def test_a_missing_file_has_no_card(tmp_path):
    with pytest.raises(HarnessError, match="cannot read"):
        write_card(tmp_path / "none.bin", "thing", meta={})
