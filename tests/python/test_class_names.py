"""The names of the classes go from the folders of the training images through every file to whoever shows a class."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from quant_helpers import one_thread

from pyharness import convert, data, distill, evaluate, models, pipeline, predict, qat, quantize, train
from pyharness.c_library import CModel
from pyharness.calibrated import load_calibrated
from pyharness.checkpoint import load_checkpoint
from pyharness.config import MICRO_DIGITS
from pyharness.engine_file import load_engine_file
from pyharness.errors import DataError, FormatError, HarnessError
from pyharness.hf_format import read_labels
from pyharness.random_engine import random_engine_file
from pyharness.trainer import data_identity

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["cat", "dog", "newt | eft"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Grey images of three classes, and a model trained on them for a step: its checkpoint, GELU-less student, calibrated
    checkpoint and engine file."""
    folder = tmp_path_factory.mktemp("named")
    for split in ("train", "val"):
        for label, name in enumerate(NAMES):
            (folder / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new("L", (28, 28), 80 * label + number).save(folder / "images" / split / name / f"{number}.png")
    images = ["--data", str(folder / "images")]
    assert train.main([*images, "--out", str(folder / "run"), "--batch", "4", "--epochs", "1"]) == 0
    shutil.copy(folder / "run" / "model.safetensors", folder / "teacher.safetensors")
    options = ["--subset", "0.5", "--epochs", "1", "--batch", "2", "--out", str(folder / "distilled")]
    assert distill.main(["--weights", str(folder / "teacher.safetensors"), *images, *options]) == 0
    shutil.copy(folder / "distilled" / "student.safetensors", folder / "student.safetensors")
    calibrated, engine = str(folder / "calibrated.safetensors"), str(folder / "engine.safetensors")
    words = ["--weights", str(folder / "student.safetensors"), *images, "--batches", "2", "--batch-size", "4"]
    assert quantize.main([*words, "--out", calibrated]) == 0
    convert.main(["to-engine", calibrated, engine, "--graph", "fused_int8"])
    return folder


FILES = ("teacher.safetensors", "student.safetensors", "calibrated.safetensors", "engine.safetensors")


def test_files_hold_them(folder):
    for name in FILES[:2]:
        assert load_checkpoint(folder / name)[1]["classes"] == NAMES
    meta = load_calibrated(folder / FILES[2]).meta
    assert meta["classes"] == NAMES and "classes" not in meta["weights_meta"]
    assert load_engine_file(folder / FILES[3]).meta["classes"] == NAMES
    card = json.loads((folder / f"{FILES[3]}.card.json").read_text())
    assert card["meta"]["classes"] == "3 names, in the file"
    convert.main(["to-engine", str(folder / FILES[2]), str(folder / "unfused.safetensors")])
    convert.main(["to-timm", str(folder / "unfused.safetensors"), str(folder / "again.safetensors")])
    assert load_checkpoint(folder / "again.safetensors")[1]["classes"] == NAMES


@pytest.mark.parametrize("name", FILES)
def test_predictions_show_them(folder, name, tmp_path, capsys):
    image = str(folder / "images" / "val" / NAMES[0] / "1.png")
    assert predict.main([str(folder / name), image, "--json", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert all(guess["label"] == NAMES[guess["class"]] for guess in row["classes"]) and len(row["classes"]) == 3
    assert "newt | eft" in capsys.readouterr().out
    (tmp_path / "others.txt").write_text("one\ntwo\nthree\n")
    words = ["--labels", str(tmp_path / "others.txt"), "--json", str(tmp_path / "found.json")]
    assert predict.main([str(folder / name), image, *words]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert {guess["label"] for guess in row["classes"]} == {"one", "two", "three"}


def test_the_c_library_gives_them(folder):
    with CModel(folder / FILES[3]) as model, model.at_size(56, 56) as larger:
        for each in (model, larger):
            info = each.info()
            assert [info.class_names[i].decode() for i in range(info.classes)] == NAMES
    unnamed = random_engine_file(MICRO_DIGITS, "fused_int8")
    convert.save_engine_file(folder / "unnamed.safetensors", unnamed)
    with CModel(folder / "unnamed.safetensors") as model:
        assert not model.info().class_names


@pytest.mark.parametrize("name", FILES)
def test_images_whose_classes_are_numbered_otherwise_are_refused(folder, name, tmp_path):
    """Their labels would all be taken for others, and nothing but a low accuracy would show it."""
    words = [str(folder / name), "--out", str(tmp_path / "out")]
    assert evaluate.main([*words, "--data", str(folder / "images")]) == 0
    for split in ("train", "val"):
        shutil.copytree(folder / "images" / split / "cat", tmp_path / "images" / split / "ewe")
        for kept in NAMES[1:]:
            shutil.copytree(folder / "images" / split / kept, tmp_path / "images" / split / kept)
    with pytest.raises(DataError, match=r"class 'dog' is number 0 here, and number 1 to the model.*not all names are the same"):
        evaluate.main([*words, "--data", str(tmp_path / "images")])
    for split in ("train", "val"):
        for number, kept in enumerate(sorted((tmp_path / "images" / split).iterdir())):
            kept.rename(kept.with_name(f"n0{number}"))
    assert evaluate.main([*words, "--data", str(tmp_path / "images")]) == 0, "names of another list say nothing"


def test_training_goes_by_its_own_images(folder, tmp_path):
    for split in ("train", "val"):
        for name, other in zip(NAMES, ("dog", "emu", "cat of 9")):
            shutil.copytree(folder / "images" / split / name, tmp_path / "images" / split / other)
    words = ["--weights", str(folder / FILES[0]), "--batch", "4", "--epochs", "1"]
    assert train.main([*words, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]) == 0
    assert load_checkpoint(tmp_path / "run" / "model.safetensors")[1]["classes"] == ["cat of 9", "dog", "emu"]
    assert train.main([*words, "--data", "procedural:classes=3,train=8,val=4", "--out", str(tmp_path / "unnamed")]) == 0
    assert "classes" not in load_checkpoint(tmp_path / "unnamed" / "model.safetensors")[1], "those have no names"


def test_a_student_of_an_unnamed_teacher_has_those_of_its_images(folder, tmp_path):
    state, meta = load_checkpoint(folder / FILES[0])
    model, _ = models.load_model(folder / FILES[0])
    model.class_names = []
    models.save_checkpoint(tmp_path / "unnamed.safetensors", model, models.checkpoint_meta(model, meta["model"]))
    words = ["--weights", str(tmp_path / "unnamed.safetensors"), "--data", str(folder / "images")]
    options = ["--subset", "0.5", "--epochs", "1", "--batch", "2", "--out", str(tmp_path / "out")]
    assert distill.main([*words, *options]) == 0
    assert load_checkpoint(tmp_path / "out" / "student.safetensors")[1]["classes"] == NAMES


def test_hugging_faces_labels_are_taken_and_written(folder, tmp_path):
    convert.main(["to-hf", str(folder / FILES[0]), str(tmp_path / "hf")])
    config = tmp_path / "hf" / "config.json"
    fields = json.loads(config.read_text())
    assert fields["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert fields["label2id"] == {name: i for i, name in enumerate(NAMES)}
    assert models.noted_classes(models.load_model(tmp_path / "hf")[0]) == NAMES
    config.write_text(json.dumps({**fields, "id2label": {"2": "c", "0": "a", "1": "b"}}))
    assert models.noted_classes(models.load_model(tmp_path / "hf")[0]) == ["a", "b", "c"], "config.json goes first"
    for made_up in ({"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a"}, {"0": "a", "1": 2}, None):
        assert read_labels({"id2label": made_up}, 2) == []


@pytest.mark.parametrize("names", [["a"], [], "abcdefghij", [1] * 10, {"0": "a"}])
def test_an_engine_file_with_others_is_refused(names, tmp_path):
    file = random_engine_file(MICRO_DIGITS, "fused_int8")
    with pytest.raises(FormatError, match="needed is a list of 10 texts"):
        dataclasses.replace(file, meta={**file.meta, "classes": names})


def test_names_of_imagenet_come_with_timms_weights(monkeypatch):
    build = models._build
    few = {"depths": (1, 1, 1, 1)}
    monkeypatch.setattr(models, "_build", lambda name, wanted, pretrained: build(name, {**wanted, **few}, False))
    name = "swin_tiny_patch4_window7_224"
    model = models.create_model(f"{name}.ms_in1k", weights="pretrained")
    names = models.noted_classes(model)
    assert len(names) == 1000 and names[281].startswith("tabby") and names[0] == "tench, Tinca tinca"
    assert models.checkpoint_meta(model, name)["classes"] == names
    assert not models.noted_classes(models.create_model(name, weights="random"))
    assert not models.noted_classes(models.create_model(f"{name}.ms_in22k", weights="pretrained"))
    assert not models.noted_classes(models.create_model(f"{name}.ms_in1k", weights="pretrained", num_classes=7))


def test_names_that_occur_twice_say_nothing():
    data._need_same_numbers(["crane", "heron", "crane"], ["heron 2", "crane", "crane"], "images")
    with pytest.raises(DataError, match="class 'heron' is number 1"):
        data._need_same_numbers(["crane", "heron", "crane"], ["heron", "crane", "crane"], "images")


def test_the_order_of_numbers_is_told_where_the_file_leaves_it_open(folder, tmp_path, capsys):
    """torchvision has 10 before 2: a model that it fed would be wrong here, one whose file has these names is not."""
    for split in ("train", "val"):
        for name, number in zip(NAMES, ("2", "10", "1")):
            shutil.copytree(folder / "images" / split / name, tmp_path / "images" / split / number)
    model = models.load_model(folder / FILES[0])[0]
    for noted, told in (([], True), (["1", "2", "10"], False)):
        model.class_names = noted
        data.imagefolder(tmp_path / "images", "val", model)
        assert ("numbered in timm's order" in capsys.readouterr().err) is told


# --- The same names in another order ----------------------------------------------------------------------------------

ORDER = ["newt | eft", "cat", "dog"]
"""Of a model's file; the images' folders are in the order of NAMES."""


@pytest.fixture
def reordered(folder, tmp_path):
    """The model's files with the classes, head included, in ORDER: it sees the same as before, under other numbers."""
    state, meta = load_checkpoint(folder / FILES[0])
    rows = [NAMES.index(name) for name in ORDER]
    state = {name: tensor[rows] if name.startswith("head.fc.") else tensor for name, tensor in state.items()}
    models.save_state_dict(tmp_path / "teacher.safetensors", state, {**meta, "classes": ORDER})
    words = ["--weights", str(tmp_path / "teacher.safetensors"), "--batches", "2", "--batch-size", "4"]
    data_words = ["--data", str(folder / "images")]
    assert quantize.main([*words, *data_words, "--out", str(tmp_path / "calibrated.safetensors"), "--method", "max"]) == 0
    convert.main(["to-engine", str(tmp_path / "calibrated.safetensors"), str(tmp_path / "engine.safetensors")])
    return tmp_path


def rows_of(out, words):
    assert evaluate.main([*words, "--out", str(out)]) == 0
    return [(row["top1"], row["n_eval"]) for row in json.loads((out / "evaluate.json").read_text())["rows"]]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_labels_go_by_the_names(folder, reordered, workers, capsys):
    """Also in the processes that read images."""
    words = ["--data", str(folder / "images"), "--workers", workers]
    before = rows_of(reordered / "a", [str(folder / FILES[0]), *words])
    capsys.readouterr()
    files = [str(reordered / name) for name in ("teacher.safetensors", "calibrated.safetensors", "engine.safetensors")]
    assert rows_of(reordered / "b", [*files, *words])[0] == before[0]
    said = [line for line in capsys.readouterr().err.splitlines() if "numbered as the model's file has them" in line]
    assert said == [] or said == [
        f"note: {folder / 'images'} (val): its classes are numbered as the model's file has them, by their names: number 0 "
        "is 'newt | eft', not 'cat'"
    ], "once, of all three and both runs"


def test_every_image_has_the_number_of_its_name(folder, reordered):
    model = models.load_model(reordered / "teacher.safetensors")[0]
    plain = data.get_dataset(folder / "images", MICRO_DIGITS.name, train=True, model=models.load_model(folder / FILES[0])[0])
    mapped = data.get_dataset(folder / "images", MICRO_DIGITS.name, train=True, model=model)
    assert data.class_names(plain) == NAMES and data.class_names(mapped) == ORDER
    for (image, label), (same, number) in zip(plain, mapped):
        assert NAMES[label] == ORDER[number] and torch.equal(image, same)
    loader = torch.utils.data.DataLoader(mapped, 4, num_workers=1, multiprocessing_context="spawn")
    assert [ORDER[number] for _, labels in loader for number in labels] == [NAMES[label] for _, label in plain]
    assert data_identity(plain) != data_identity(mapped) and data_identity(mapped) == data_identity(mapped)
    assert pipeline.listing_digest(plain) != pipeline.listing_digest(mapped)


def test_tar_files_of_class_folders_too(folder, reordered):
    for split in ("train", "val"):
        (reordered / "tars" / split).mkdir(parents=True)
        with tarfile.open(reordered / "tars" / split / "all.tar", "w") as archive:
            for name in NAMES:
                content = (folder / "images" / split / name / "1.png").read_bytes()
                entry = tarfile.TarInfo(f"{name}/1.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    model = models.load_model(reordered / "teacher.safetensors")[0]
    found = data.get_dataset(reordered / "tars", MICRO_DIGITS.name, train=False, model=model)
    assert [label for _, label in found] == [ORDER.index(name) for name in NAMES]


def test_training_programs_follow_and_go_on(folder, reordered, capsys):
    """The labels count in each of them: with --hard-weight, and in the held-out accuracy."""
    images, teacher = ["--data", str(folder / "images")], str(reordered / "teacher.safetensors")
    options = ["--subset", "1", "--batch", "4", "--hard-weight", "1"]
    logs = {}
    for name, weights in (("a", str(folder / FILES[0])), ("b", teacher)):
        out = str(reordered / name)
        words = ["--weights", weights, *images, *options, "--out", out]
        assert distill.main(words) == 0
        logs[name] = [line.split(",")[:4] for line in (reordered / name / "log.csv").read_text().splitlines()[1:]]
        assert distill.main(words) == 0, "again: the state is of this run"
    for before, after in zip(logs["a"], logs["b"]):
        assert before[0] == after[0] and before[2:] == after[2:]
        assert float(before[1]) == pytest.approx(float(after[1]), rel=1e-3), "the loss, but for the order of its sums"
    assert load_checkpoint(reordered / "b" / "student.safetensors")[1]["classes"] == ORDER
    words = [str(reordered / "calibrated.safetensors"), "--teacher", teacher, *images, *options, "--epochs", "1"]
    assert qat.main([*words, "--out", str(reordered / "qat")]) == 0
    assert load_calibrated(reordered / "qat" / "calibrated.safetensors").meta["classes"] == ORDER
    words = ["--weights", teacher, *images, "--batch", "4", "--epochs", "1", "--out", str(reordered / "run")]
    assert train.main(words) == 0
    assert load_checkpoint(reordered / "run" / "model.safetensors")[1]["classes"] == ORDER, "its head has them so"
    shutil.rmtree(reordered / "run")
    assert train.main([word for word in words if word not in ("--weights", teacher)]) == 0
    assert load_checkpoint(reordered / "run" / "model.safetensors")[1]["classes"] == NAMES


def test_a_run_does_not_go_on_with_labels_of_other_numbers(folder, tmp_path):
    """Nothing but the names changed in the teacher's file: its weights are the same."""
    words = ["--weights", str(tmp_path / "teacher.safetensors"), "--data", str(folder / "images"), "--subset", "1"]
    words += ["--batch", "4", "--out", str(tmp_path / "run")]
    state, meta = load_checkpoint(folder / FILES[0])
    models.save_state_dict(tmp_path / "teacher.safetensors", state, meta)
    assert distill.main(words) == 0
    models.save_state_dict(tmp_path / "teacher.safetensors", state, {**meta, "classes": ORDER})
    with pytest.raises(HarnessError, match="belongs to a run with other options: training set was"):
        distill.main(words)


# --- Names from a file ------------------------------------------------------------------------------------------------


def test_names_from_a_file_are_written(folder, tmp_path):
    """By the calibration, and by each conversion."""
    labels, names = tmp_path / "labels.txt", ["Katze", "Hund", "Molch"]
    labels.write_text("Katze\nHund\nMolch\n", encoding="utf-8")
    given = ["--labels", str(labels)]
    words = ["--weights", str(folder / FILES[0]), "--data", str(folder / "images"), "--batches", "1", "--method", "max"]
    assert quantize.main([*words, *given, "--out", str(tmp_path / "c.safetensors")]) == 0
    assert load_calibrated(tmp_path / "c.safetensors").meta["classes"] == names
    source = {"to-engine": FILES[2], "to-checkpoint": FILES[2], "to-timm": FILES[0], "to-microsoft": FILES[1]}
    for command, file in source.items():
        out = tmp_path / f"{command}.safetensors"
        assert convert.main([command, str(folder / file), str(out), *given]) == 0
        meta = load_engine_file(out).meta if command == "to-engine" else load_checkpoint(out)[1]
        assert meta["classes"] == names, command
    assert convert.main(["to-hf", str(folder / FILES[0]), str(tmp_path / "hf"), *given]) == 0
    assert models.noted_classes(models.load_model(tmp_path / "hf")[0]) == names
    labels.write_text("Katze\nHund\n")
    for command, file in source.items():
        with pytest.raises(HarnessError, match="labels.txt: has 2 names, the model has 3 classes"):
            convert.main([command, str(folder / file), str(tmp_path / "no.safetensors"), *given])
    with pytest.raises(HarnessError, match="labels.txt: has 2 names, the model has 3 classes"):
        quantize.main([*words, *given, "--out", str(tmp_path / "no.safetensors")])
    assert not (tmp_path / "no.safetensors").exists()
