"""Damaged files among the images of the training programs and of the calibration: the limit, and what is listed."""

from __future__ import annotations

import csv
import io
import os

import pytest
import torch
import torchrun_helper
from PIL import Image
from quant_helpers import one_thread

from pyharness import distill as d
from pyharness import models, qat, quantize, reproduce_table2, train, trainer
from pyharness.calibrated import save_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, check_images, get_dataset, input_normalization, make_loader
from pyharness.errors import DataError, HarnessError
from pyharness.pipeline import Inputs, Pipeline
from pyharness.train_options import Machine

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name
RESULT = {"distill": "student.safetensors", "qat": "calibrated.safetensors", "train": "model.safetensors"}


def image_folder(root, per_class: int):
    """Ten classes of `per_class` grey images for training, and one each for evaluation; the folder."""
    for split, count in (("train", per_class), ("val", 1)):
        for label in range(10):
            (root / split / f"c{label}").mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 20 * label + number).save(root / split / f"c{label}" / f"{number:02}.png")
    return root


def cut_off(root, *names, split="train"):
    for name in names:
        path = root / split / name
        path.write_bytes(path.read_bytes()[:-40])


def mend(root, name):
    file = io.BytesIO()
    Image.new("L", (8, 8), 99).save(file, "png")
    (root / "train" / name).write_bytes(file.getvalue())


@pytest.fixture(scope="module")
def calibrated_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "c.safetensors"
    model = models.create_model(MICRO, weights="pretrained")
    noted = {"normalization": input_normalization("images", MICRO, model)}
    save_calibrated(path, quantize.quantize(model, MICRO_DIGITS, [DigitsDataset(train=True).images[:16]], **noted))
    return path


def command_of(program, data, out, calibrated_file):
    """Every image is asked for, once an epoch."""
    common = ["--data", str(data), "--out", str(out)]
    if program == "train":
        return train.main, [*common, "--epochs", "1", "--warmup-epochs", "0", "--batch", "55", "--classes", "10"]
    common += ["--subset", "1", "--batch", "55", "--no-tensorboard"]
    if program == "qat":
        return qat.main, [str(calibrated_file), *common, "--epochs", "1"]
    return d.main, common


@pytest.mark.parametrize("program", RESULT)
def test_training_lists_damaged_images_and_refuses_a_result_past_one_per_cent(program, tmp_path, calibrated_file):
    data = image_folder(tmp_path / "data", 11)
    cut_off(data, "c3/05.png")
    main, command = command_of(program, data, tmp_path / "one", calibrated_file)
    assert main(command) == 0 and (tmp_path / "one" / RESULT[program]).exists()
    assert (tmp_path / "one" / "corrupt.txt").read_text() == "c3/05.png\n"

    cut_off(data, "c7/10.png")
    main, command = command_of(program, data, tmp_path / "two", calibrated_file)
    out = tmp_path / "two"
    for _ in range(2):  # started again, a finished run is refused again
        with pytest.raises(DataError, match=r"2 of 110 images cannot be read, more than 1 %: c3/05.png, c7/10.png\."):
            main(command)
        assert (out / "corrupt.txt").read_text() == "c3/05.png\nc7/10.png\n"
        assert not (out / RESULT[program]).exists()
    before = (out / "log.csv").read_text()
    assert main([*command, "--max-corrupt", "0.02"]) == 0 and (out / RESULT[program]).exists()
    assert (out / "log.csv").read_text() == before, "the state had it all"


def test_calibration_refuses_a_result_past_one_per_cent(tmp_path):
    data, out = image_folder(tmp_path / "data", 1), tmp_path / "c.safetensors"
    cut_off(data, "c4/00.png")
    command = ["--model", MICRO, "--data", str(data), "--out", str(out), "--batches", "1", "--batch-size", "10"]
    with pytest.raises(DataError, match=r"1 of 10 images cannot be read, more than 1 %: c4/00.png"):
        quantize.main(command)
    assert not out.exists()
    assert quantize.main([*command, "--max-corrupt", "0.1"]) == 0 and out.exists()


def test_what_readers_read_ahead_in_vain_does_not_count_in_a_calibration(tmp_path):
    """But for the 8 images of the one batch, all are damaged."""
    data, out = image_folder(tmp_path / "data", 4), tmp_path / "c.safetensors"
    dataset = get_dataset(data, MICRO, train=True, model=models.create_model(MICRO))
    used = set(next(iter(make_loader(list(range(40)), 8, shuffle=True))).tolist())
    cut_off(data, *(dataset.filename(number) for number in range(40) if number not in used))
    command = ["--model", MICRO, "--data", str(data), "--out", str(out), "--batches", "1", "--batch-size", "8"]
    for workers in ("0", "2"):
        assert quantize.main([*command, "--workers", workers]) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rest_of_a_last_epoch_is_not_read(tmp_path, workers):
    """Two steps of five."""
    data = image_folder(tmp_path / "data", 4)
    model = models.create_model(MICRO)
    sets = [get_dataset(data, MICRO, train=train_part, model=model) for train_part in (True, False)]
    options = train.TrainingOptions(epochs=0.4, batch_size=8, warmup_epochs=0)
    run = train.Training(model, MICRO, *sets, options, tmp_path / "out", workers=workers)
    assert run.run() and run.step == 2
    assert sets[0].met.nonzero().flatten().tolist() == sorted(train.epoch_order(40, options.seed, 0)[:16].tolist())


def test_names_that_are_no_utf8_are_listed_as_they_are(tmp_path):
    """And such as hold what ends a line elsewhere."""
    data, path = image_folder(tmp_path / "data", 1), tmp_path / "corrupt.txt"
    names = [b"\xff.png", "a\u2028b.png".encode()]
    for name in names:
        (tmp_path / "data" / "train" / "c0" / os.fsdecode(name)).write_bytes(b"no image")
    dataset = get_dataset(data, MICRO, train=True, model=models.create_model(MICRO))
    for number in range(len(dataset)):
        dataset[number]
    for _ in range(2):
        check_images(dataset, path, 1.0)
        assert sorted(path.read_bytes().split(b"\n")) == sorted([b"", *(b"c0/" + name for name in names)])


def table_pipeline(data, work, **options):
    """What Table 2's rows of the micro model are made from, with the images of `data`."""
    return Pipeline(Inputs(MICRO, weights=models.MICRO_TEACHER, data=data), work, **options)


@pytest.mark.parametrize("method", ["ft_int8", "geluless_int8"])
def test_table2_keeps_no_step_made_of_damaged_images(method, tmp_path):
    data, work = image_folder(tmp_path / "data", 8), tmp_path / "work"
    cut_off(data, *(f"c{label}/{number:02}.png" for label in range(10) for number in range(0, 8, 2)))
    with pytest.raises(DataError, match=r" of \d+ images cannot be read, more than 1 %"):
        table_pipeline(data, work).calibrated_path(method)
    assert not list(work.rglob("calibrated.safetensors")) and not list(work.rglob("student.safetensors"))
    path = table_pipeline(data, work, max_corrupt=1.0).calibrated_path(method)
    written = path.stat().st_mtime_ns
    assert table_pipeline(data, work, max_corrupt=0.6).calibrated_path(method) == path
    assert path.stat().st_mtime_ns == written, "what was made is found again"
    with pytest.raises(DataError, match="more than 10 %"):
        table_pipeline(data, work, max_corrupt=0.1).calibrated_path(method)


def test_table2_gives_no_accuracy_on_damaged_images(tmp_path):
    data = image_folder(tmp_path / "data", 1)
    cut_off(data, *(f"c{label}/00.png" for label in range(0, 10, 2)), split="val")
    pipeline = table_pipeline(data, tmp_path / "work")
    methods = {"fp32": reproduce_table2.Predictor(pipeline.teacher)}
    for _ in range(2):  # the second finds all counted
        with pytest.raises(DataError, match=r"5 of 10 images cannot be read, more than 1 %"):
            reproduce_table2.evaluate(pipeline, methods, reproduce_table2.evaluations(pipeline, methods, None))
    pipeline = table_pipeline(data, tmp_path / "work", max_corrupt=0.5)
    todo = reproduce_table2.evaluations(pipeline, methods, None)
    assert reproduce_table2.evaluate(pipeline, methods, todo)["fp32"].n == 5


def test_what_was_damaged_before_a_stop_is_listed_although_it_was_mended(tmp_path):
    data = image_folder(tmp_path / "data", 4)
    teacher = models.create_model(MICRO, weights="pretrained")
    options = d.DistillOptions(batch_size=40, subset=1.0)

    def images():
        return get_dataset(data, MICRO, train=True, model=teacher)

    cut_off(data, "c2/01.png")
    assert d.distill(teacher, MICRO, images(), options, tmp_path / "d", stop_after_steps=1, max_corrupt=1.0) is None
    once = train.TrainingOptions(epochs=1, batch_size=20, warmup_epochs=0)
    first = train.epoch_order(40, once.seed, 0)[:20].tolist()
    cut_off(data, name := images().filename(first[0]))

    def run():
        model = models.create_model(MICRO)
        return train.Training(model, MICRO, images(), images(), once, tmp_path / "t", max_corrupt=1.0)

    assert not run().run(max_seconds=0)
    for damaged in {"c2/01.png", name}:
        mend(data, damaged)
    assert d.distill(teacher, MICRO, images(), options, tmp_path / "d", max_corrupt=1.0)
    assert (tmp_path / "d" / "corrupt.txt").read_text() == "c2/01.png\n"
    (again := run()).run()
    again.finish()
    assert name in (tmp_path / "t" / "corrupt.txt").read_text().splitlines()


def distil_on_two(data, out):
    program = str(torchrun_helper.ROOT / "pyharness" / "distill.py")
    command = [program, "--data", str(data), "--out", str(out), "--subset", "1", "--batch", "20", "--no-tensorboard"]
    return torchrun_helper.run(command, 2, SWIN_DIST_TIMEOUT="60")


def test_the_first_of_two_processes_lists_what_the_second_met(tmp_path):
    """An image that only process 1 is asked for, in all four blocks."""
    data = image_folder(tmp_path / "data", 4)
    options = d.DistillOptions(batch_size=20, subset=1.0)
    indices = trainer.subset_indices(40, options)
    shares = [
        {i for batch in trainer.epoch_batches(indices, options, phase, 0) for i, _ in trainer.share_of(batch, 1, 2)[0]}
        for phase in range(4)
    ]
    number = min(set.intersection(*shares))
    teacher = models.create_model(MICRO, weights="pretrained")
    name = get_dataset(data, MICRO, train=True, model=teacher).filename(number)
    cut_off(data, name)
    ended = distil_on_two(data, tmp_path / "out")
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert f"1 of 40 images cannot be read, more than 1 %: {name}." in ended[0][2]
    assert f"warning: {name} cannot be read" in ended[1][2], "the one that met it names it"
    assert (tmp_path / "out" / "corrupt.txt").read_text() == f"{name}\n"
    assert not (tmp_path / "out" / "student.safetensors").exists()


def test_held_out_images_of_which_one_process_can_read_none_are_evaluated_on_the_other(tmp_path):
    """Process 1 evaluates images 1, 3, 5, 7 and 9, each of them the only one of its class."""
    data = image_folder(tmp_path / "data", 4)
    cut_off(data, *(f"c{label}/00.png" for label in range(1, 10, 2)), split="val")
    ended = distil_on_two(data, tmp_path / "out")
    assert [status for status, _, _ in ended] == [0, 0], ended
    with open(tmp_path / "out" / "log.csv", encoding="utf-8") as file:
        accuracies = [float(row["eval_accuracy"]) for row in csv.DictReader(file)]
    assert len(accuracies) == 4
    assert all(accuracy % 20 == 0 for accuracy in accuracies)


def test_held_out_images_of_which_none_can_be_read_are_told_by_every_process(tmp_path):
    data = image_folder(tmp_path / "data", 4)
    cut_off(data, *(f"c{label}/00.png" for label in range(10)), split="val")
    ended = distil_on_two(data, tmp_path / "out")
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert all("none of the 10 held-out images can be read" in err for _, _, err in ended)


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_limit_that_is_no_share_is_explained(share, tmp_path, calibrated_file):
    message = "--max-corrupt must be a share from 0 to 1, found"
    with pytest.raises(HarnessError, match=message):
        Machine(max_corrupt=float(share))
    for program in RESULT:
        main, command = command_of(program, tmp_path, tmp_path / "out", calibrated_file)
        with pytest.raises(HarnessError, match=message):
            main([*command, f"--max-corrupt={share}"])
    with pytest.raises(HarnessError, match=message):
        quantize.main(["--model", MICRO, "--out", str(tmp_path / "c.pth"), f"--max-corrupt={share}"])
    with pytest.raises(HarnessError, match=message):
        reproduce_table2.main(["--models", MICRO, "--out", str(tmp_path), f"--max-corrupt={share}"])


def test_images_met_are_taken_over(tmp_path):
    model = models.create_model(MICRO)
    data = image_folder(tmp_path, 2)
    cut_off(data, "c0/01.png")
    one, other = (get_dataset(data, MICRO, train=True, model=model) for _ in range(2))
    one[1], other[0]
    other.remember(one.met)
    other.remember(None)
    assert (other.corrupt(), other.asked()) == ([1], 3), "0, 1 and 2, which stood in for 1"
    assert torch.equal(other.met[:4], torch.tensor([1, 2, 1, 0], dtype=torch.uint8))
