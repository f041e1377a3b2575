"""Accuracy, its interval, and the kinds of files that evaluate.py opens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math

import pytest
import torch
import torchrun_helper

from pyharness import distill, evaluate, models, pipeline
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, evaluation_indices, make_loader
from pyharness.errors import CheckpointError, DataError, EngineError, HarnessError, ModelError

MICRO = MICRO_DIGITS.name


def batches(*sizes, classes=10, start=0):
    """Batches whose images carry their running number, with labels number % classes."""
    for size in sizes:
        number = torch.arange(start, start + size)
        yield number.float().view(-1, 1, 1, 1), number % classes
        start += size


def predictor(ranks, classes=10):
    """Logits that put the true class of image n at rank ranks[n]."""

    def predict(images):
        number = images.flatten().long()
        logits = torch.arange(classes, 0, -1).float().repeat(len(number), 1)
        for row, n in enumerate(number.tolist()):
            label, place = n % classes, ranks[n]
            order = [c for c in range(classes) if c != label]
            order.insert(place, label)
            logits[row, order] = torch.arange(classes, 0, -1).float()
        return logits

    return predict


def test_accuracy_counts_ranks_over_uneven_batches():
    ranks = [0, 1, 4, 5, 0, 9, 0]
    result = evaluate.accuracy(predictor(ranks), batches(4, 2, 1))
    assert result.n == 7
    assert result.top1 == pytest.approx(100 * 3 / 7)
    assert result.top5 == pytest.approx(100 * 5 / 7)


def test_limit_cuts_inside_a_batch_and_asks_for_no_more():
    asked = []

    def predict(images):
        asked.append(len(images))
        return predictor([0] * 5 + [3] * 20)(images)

    result = evaluate.accuracy(predict, batches(4, 4, 4, 4), limit=6)
    assert (result.n, asked) == (6, [4, 2])
    assert result.top1 == pytest.approx(100 * 5 / 6)


def test_few_classes_have_no_top5():
    assert evaluate.accuracy(predictor([0, 4], classes=5), batches(2, classes=5)).top5 is None
    assert evaluate.accuracy(predictor([0, 4], classes=6), batches(2, classes=6)).top5 == 100


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 27.753), (10, 10, 72.247, 100.0), (5, 10, 23.659, 76.341), (593, 597, 98.290, 99.739)],
)
def test_wilson_interval(correct, n, low, high):
    """The ends solve (p - p0)^2 = z^2 p0 (1 - p0) / n, the definition of the score interval."""
    interval = evaluate.wilson_interval(correct, n)
    assert interval == pytest.approx((low, high), abs=0.01)
    for end in interval:
        p0 = end / 100
        residual = (correct / n - p0) ** 2 - evaluate.Z_95**2 * p0 * (1 - p0) / n
        assert math.isclose(residual, 0, abs_tol=1e-9)


def test_no_share_is_a_programming_error():
    for correct, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="not a share"):
            evaluate.wilson_interval(correct, n)


def test_broken_input_is_an_error_not_a_low_accuracy():
    def nan(images):
        logits = torch.zeros(len(images), 10)
        logits[1, 3] = float("nan")
        return logits

    with pytest.raises(HarnessError, match="image 5 "):
        evaluate.accuracy(lambda x: nan(x) if x[0] == 4 else torch.zeros(len(x), 10), batches(4, 4))
    with pytest.raises(DataError, match="label 9, the model has 7 classes"):
        evaluate.accuracy(lambda x: torch.zeros(len(x), 7), batches(10))
    with pytest.raises(DataError, match="no image"):
        evaluate.accuracy(predictor([]), [])


def test_features_have_no_accuracy(tmp_path):
    headless = models.create_model(MICRO, num_classes=0)
    models.save_checkpoint(tmp_path / "backbone.pth", headless, models.checkpoint_meta(headless, MICRO))
    for program, words in ((evaluate, []), (distill, ["--weights"])):
        more = ["--out", str(tmp_path / "out"), "--model", MICRO] if program is distill else []
        with pytest.raises(ModelError, match="has no classification head, its results are features"):
            program.main([*words, str(tmp_path / "backbone.pth"), *more])


def test_packaged_teacher_reaches_its_recorded_accuracy(capsys):
    """On the 597 images it was not trained on; at least 97 % is required."""
    assert evaluate.main([str(models.MICRO_TEACHER)]) == 0
    shown = float(capsys.readouterr().out.split("top-1 ")[1].split(" %")[0])
    recorded = models.load_checkpoint(models.MICRO_TEACHER)[1]["heldout_accuracy"]
    assert shown >= 97.0
    assert shown == pytest.approx(recorded, abs=0.35)  # two images: another CPU may round a close call otherwise


def test_program_takes_several_files_and_a_limit(tmp_path, capsys):
    model = models.create_model(MICRO, seed=1, activation="relu")
    models.save_checkpoint(tmp_path / "relu.pth", model, models.checkpoint_meta(model, MICRO))
    arguments = [str(models.MICRO_TEACHER), str(tmp_path / "relu.pth"), "--limit", "32"]
    assert evaluate.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("32 images" in line for line in lines)
    assert "fp32)" in lines[0] and "GELU-less)" in lines[1]


@pytest.fixture
def calibrated(tmp_path):
    """The packaged teacher with rough scales: enough to be far better than chance."""
    from pyharness.calibrated import checkpoint_of, save_calibrated
    from pyharness.fakequant import FakeQuantSwin

    fake = FakeQuantSwin.from_timm(models.create_model(MICRO, weights="pretrained"), MICRO_DIGITS)
    for name, quantizer in fake.quantizers():
        quantizer.amax = torch.tensor(1.0 if "matmul_a" in name or "weight" in name else 8.0)
    save_calibrated(tmp_path / "calibrated.safetensors", checkpoint_of(fake, {}))
    return tmp_path / "calibrated.safetensors"


def test_calibrated_checkpoints_are_recognized(calibrated):
    predictor = evaluate.open_predictor(calibrated)
    assert (predictor.kind, predictor.model_name) == ("fake-quantized, ft_int8", MICRO)
    with pytest.raises(CheckpointError, match="not of swin_tiny"):
        evaluate.open_predictor(calibrated, "swin_tiny_patch4_window7_224")


def test_calibrated_checkpoints_are_evaluated_as_another_graph(calibrated, tmp_path, capsys):
    rows = {}
    for name, words in {
        "own": [], "fused": ["--graph", "fused_int8"], "tensor": ["--graph", "fused_int8", "--weight-scales", "tensor"],
    }.items():  # fmt: skip
        command = [str(calibrated), str(models.MICRO_TEACHER), "--limit", "64", "--out", str(tmp_path / name), *words]
        assert evaluate.main(command) == 0
        rows[name] = rows_of(tmp_path / name)
        assert rows[name][1]["method"] == "fp32"
    assert [rows[name][0]["method"] for name in rows] == [
        "fake-quantized, ft_int8", "fake-quantized, fused_int8", "fake-quantized, fused_int8, tensor weight scales",
    ]  # fmt: skip
    assert rows["fused"][0]["top1"] > 50
    with pytest.raises(HarnessError, match="calibrated for ft_int8, not geluless_int8"):
        evaluate.main([str(calibrated), "--graph", "geluless_int8"])
    with pytest.raises(HarnessError, match="--graph fused_int8 is for calibrated checkpoints, and none was given"):
        evaluate.main([str(models.MICRO_TEACHER), "--graph", "fused_int8"])


def test_a_calibrated_file_of_fastertransformers_tool_takes_its_models_name(calibrated, tmp_path):
    from pyharness.calibrated import load_calibrated

    state = load_calibrated(calibrated).state
    torch.save({"model": state}, tmp_path / "ft.pth")
    with pytest.raises(CheckpointError, match=r"give its timm name \(--model\)"):
        evaluate.open_predictor(tmp_path / "ft.pth")
    opened = evaluate.open_predictor(tmp_path / "ft.pth", MICRO)
    assert (opened.kind, opened.model_name) == ("fake-quantized, ft_int8", MICRO)
    images = DigitsDataset(train=False)[0][0][None]
    with torch.inference_mode():
        assert torch.equal(opened.predict(images), evaluate.open_predictor(calibrated).predict(images))


def test_engine_files_run_on_the_engine(calibrated, tmp_path):
    from pyharness import engine
    from pyharness.calibrated import load_calibrated
    from pyharness.convert import to_engine_file
    from pyharness.engine_file import save_engine_file

    try:
        engine.engine_info()
    except EngineError as error:
        pytest.skip(f"the engine is not built: {error}")
    save_engine_file(tmp_path / "engine.safetensors", to_engine_file(load_calibrated(calibrated)))
    on_engine = evaluate.open_predictor(tmp_path / "engine.safetensors")
    assert (on_engine.kind, on_engine.model_name) == ("engine, ft_int8", MICRO)
    assert isinstance(on_engine.model, engine.SwinInt8)
    assert evaluate.open_predictor(tmp_path / "engine.safetensors", f"{MICRO}.some_tag").model_name == MICRO
    with pytest.raises(CheckpointError, match="not of swin_tiny"):
        evaluate.open_predictor(tmp_path / "engine.safetensors", "swin_tiny_patch4_window7_224")
    loader = make_loader(DigitsDataset(train=False), 32)
    fake = evaluate.accuracy(evaluate.open_predictor(calibrated).predict, loader, limit=96)
    assert evaluate.accuracy(on_engine.predict, loader, limit=96).top1 == pytest.approx(fake.top1, abs=5)
    assert fake.top1 > 50


def test_program_explains_mistakes(tmp_path):
    with pytest.raises(HarnessError, match="--batch"):
        evaluate.main([str(models.MICRO_TEACHER), "--batch", "0"])
    with pytest.raises(HarnessError, match="--workers must be at least 0, found -1"):
        evaluate.main([str(models.MICRO_TEACHER), "--workers", "-1"])
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate.main([str(tmp_path / "none.safetensors")])
    with pytest.raises(CheckpointError, match="not of swin_tiny"):
        evaluate.main([str(models.MICRO_TEACHER), "--model", "swin_tiny_patch4_window7_224"])


# --- many processes, many starts --------------------------------------------------------------------------------------


def rows_of(folder):
    return json.loads((folder / "evaluate.json").read_text())["rows"]


def test_two_processes_go_on_from_a_killed_one_to_the_same_result(tmp_path, monkeypatch):
    """597 digits in 12 batches, the last of them short; the killed run had done 5."""
    command = [str(models.MICRO_TEACHER), "--batch", "50"]
    assert evaluate.main([*command, "--out", str(tmp_path / "one")]) == 0

    calls = []

    def dies(self, images):
        calls.append(len(images))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return self.model(images)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "SAVE_SECONDS", 0.0)
        patch.setattr(evaluate.Predictor, "predict", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate.main([*command, "--out", str(tmp_path / "two")])
    assert not (tmp_path / "two" / "evaluate.json").exists()
    done = torchrun_helper.run(["pyharness/evaluate.py", *command, "--out", str(tmp_path / "two")], 2)
    assert [status for status, _, _ in done] == [0, 0], done
    assert "5 of 12 batches are done" in done[0][2]
    assert done[0][1].count("597 images") == 1 and done[1][1] == "", "process 0 alone prints"
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one")
    assert not (tmp_path / "two" / "partial").exists()
    table = (tmp_path / "one" / "evaluate.md").read_text()
    assert "| swin_micro_digits.safetensors | swin_micro_digits | fp32 | 99.33 (98.29 to 99.74) |" in table


class Numbered(torch.utils.data.Dataset):
    """Image n carries n; its label is n % 10, but of those of the numbers `unread`, which cannot be read."""

    def __init__(self, unread=range(3, 95, 7)):
        self.unread = unread

    def __len__(self):
        return 95

    def __getitem__(self, n):
        return torch.full((1, 1, 1), float(n)), -1 if n in self.unread else n % 10


def test_resuming_counts_no_image_twice_and_asks_only_for_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "SAVE_SECONDS", 0.0)
    right = predictor([0 if n % 3 else 4 for n in range(95)])
    asked = []

    def predict(images):
        asked.append([int(n) for n in images.flatten()])
        if len(asked) == 3:
            raise RuntimeError("killed")
        return right(images)

    def sharded():
        images = Numbered(unread=(93, 94))
        return evaluate.ShardedEvaluation(images, 10, limit=88, folder=tmp_path, identity={"weights": "w"})

    with pytest.raises(RuntimeError, match="killed"):
        sharded().run(predict)
    asked.append(None)
    result, corrupt = sharded().run(predict)
    chosen = evaluation_indices(95, 88).tolist()
    assert asked[4:] == [chosen[k : k + 10] for k in range(20, 88, 10)]
    readable = [n for n in chosen if n < 93]
    assert (result.n, result.corrupt) == (len(readable), 88 - len(readable))
    assert corrupt == [f"image {n}" for n in chosen if n >= 93] != []
    assert result.top1 == pytest.approx(100 * sum(n % 3 != 0 for n in readable) / len(readable))
    assert result.top5 == 100 and result.top5_interval95 == evaluate.wilson_interval(result.n, result.n)
    before = len(asked)
    assert sharded().run(predict) == (result, corrupt)
    assert asked[before:] == [chosen[80:]], "only the batch of an unreadable image is left to do"
    before = len(asked)
    other = evaluate.ShardedEvaluation(Numbered(), 10, limit=88, folder=tmp_path, identity={"weights": "v"})
    other.run(predict)
    assert len(asked) == before + 9, "counts of other weights must not be taken"


def test_batches_of_unreadable_images_are_counted_again(tmp_path):
    """Those of a file of before too, which holds them."""
    images = Numbered()
    first = evaluate.ShardedEvaluation(images, 10, folder=tmp_path, identity={"weights": "w"})
    assert first.run(predictor([0] * 95))[0].corrupt == 14
    kept = {number: found for number, found in first.done.items() if not found[3]}
    assert json.loads(first.path.read_text())["done"] == {str(k): v for k, v in kept.items()}
    first.path.write_text(json.dumps({"identity": first.identity, "done": first.done}))
    images.unread = (3,)  # the others were mended
    again = evaluate.ShardedEvaluation(images, 10, folder=tmp_path, identity={"weights": "w"})
    result, corrupt = again.run(predictor([0] * 95))
    assert (result.n, result.corrupt, corrupt) == (94, 1, ["image 3"])


def grey_images(root, classes):
    """`root`/val with 12 grey images of each of `classes`, {name: shade}; the folder as a word for --data."""
    from PIL import Image

    for name, shade in classes.items():
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for number in range(12):
            size = 20 + shade // 10 + number  # so that no two files have one size
            Image.new("L", (size, size), shade).save(folder / f"{number:02}.png")
    return str(root)


def test_counts_of_other_labels_models_and_inputs_are_not_taken(tmp_path):
    config = dataclasses.replace(MICRO_DIGITS, name="own", num_classes=2)
    predictors = {}
    for name, changed, noted in (
        ("a", config, {}),
        ("named", dataclasses.replace(config, name="other"), {}),
        ("scaled", dataclasses.replace(config, qk_scale=0.5), {}),
        ("shifted", config, {"mean": [0.9], "std": [0.1]}),
    ):
        model = models.model_from_config(changed)
        models.note_data(model, {"input": noted})
        predictors[name] = evaluate.Predictor("fp32", changed.name, model, model)
    models.save_checkpoint(path := tmp_path / "weights.pth", model, models.checkpoint_meta(model, "own"))
    data = grey_images(tmp_path / "data", {"a": 50, "b": 200})
    args = evaluate.build_parser().parse_args([str(path), "--data", data, "--out", str(tmp_path / "out")])
    first = evaluate.evaluate_one(predictors["a"], str(path), args)[1]
    assert evaluate.evaluate_one(predictors["a"], str(path), args)[1].pattern == first.pattern
    others = {evaluate.evaluate_one(predictors[name], str(path), args)[1].pattern for name in ("named", "scaled")}
    others.add(evaluate.evaluate_one(predictors["shifted"], str(path), args)[1].pattern)
    val = tmp_path / "data" / "val"
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (val / old).rename(val / new)
    others.add(evaluate.evaluate_one(predictors["a"], str(path), args)[1].pattern)
    assert len(others | {first.pattern}) == 5


def test_images_that_were_mended_are_counted(tmp_path):
    """The refused evaluation had counted them as unreadable."""
    model = models.create_model(MICRO, num_classes=2)
    models.save_checkpoint(path := tmp_path / "weights.pth", model, models.checkpoint_meta(model, MICRO))
    data = grey_images(tmp_path / "data", {"a": 50, "b": 200})
    damaged = tmp_path / "data" / "val" / "b" / "04.png"
    content = damaged.read_bytes()
    command = [str(path), "--data", data, "--batch", "5", "--out", str(tmp_path / "out")]
    damaged.write_bytes(content[:-30])
    with pytest.raises(DataError, match="1 of 24 images cannot be read"):
        evaluate.main(command)
    assert (tmp_path / "out" / "corrupt.txt").read_text() == "b/04.png\n"
    damaged.write_bytes(content)
    assert evaluate.main(command) == 0
    assert not (tmp_path / "out" / "corrupt.txt").exists()
    (row,) = rows_of(tmp_path / "out")
    assert (row["n_eval"], row["corrupt"]) == (24, [])


class Sorted(torch.utils.data.Dataset):
    """10 images of each of 10 classes, in the order of the classes, as a folder's; image n carries n."""

    def __len__(self):
        return 100

    def __getitem__(self, n):
        return torch.full((1, 1, 1), float(n)), n // 10


def test_a_limit_takes_of_every_class():
    seen = []

    def predict(images):
        seen.extend(int(n) for n in images.flatten())
        return torch.zeros(len(images), 10)

    result, _ = evaluate.ShardedEvaluation(Sorted(), 8, limit=20).run(predict)
    assert [n // 10 for n in seen] == [label for label in range(10) for _ in range(2)]
    assert result.n == 20 and result.top1 == 10, "a constant answer is right for one class in ten"
    for limit in (None, 100, 500):
        seen.clear()
        evaluate.ShardedEvaluation(Sorted(), 8, limit=limit).run(predict)
        assert seen == list(range(100))

    def broken(images):
        return torch.where(images.flatten()[:, None] == seen[-1], torch.nan, torch.zeros(1, 10))

    seen[:] = evaluate.images_of(100, 20)
    with pytest.raises(HarnessError, match=f"image {seen[-1]} are not finite"):
        evaluate.ShardedEvaluation(Sorted(), 8, limit=20).run(broken)


def test_counts_of_the_first_images_are_not_taken_for_those_of_all_stretches(tmp_path):
    """What versions that took the first `limit` images have left of a killed run."""

    def predict(images):
        asked.append(len(images))
        return torch.zeros(len(images), 10)

    for limit, expected in ((20, [8, 8, 4]), (100, [])):
        identity = {"weights": "w", "images": 100, "limit": limit, "batch": 8}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        done = {k: [8, 8, 8, 0, 10, []] for k in range(-(-limit // 8))}
        (tmp_path / f"{digest}-0.json").write_text(json.dumps({"identity": identity, "done": done}))
        asked = []
        evaluate.ShardedEvaluation(Sorted(), 8, limit=limit, folder=tmp_path, identity={"weights": "w"}).run(predict)
        assert asked == expected, "of all images the counts still hold"


def test_two_processes_give_the_result_of_one_on_a_limit(tmp_path):
    command = [str(models.MICRO_TEACHER), "--batch", "50", "--limit", "120"]
    assert evaluate.main([*command, "--out", str(tmp_path / "one")]) == 0
    done = torchrun_helper.run(["pyharness/evaluate.py", *command, "--out", str(tmp_path / "two")], 2)
    assert [status for status, _, _ in done] == [0, 0], done
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "one") and rows_of(tmp_path / "one")[0]["n_eval"] == 120


def test_partial_counts_go_and_what_else_lies_there_stays(tmp_path, monkeypatch):
    command = [str(models.MICRO_TEACHER), "--batch", "50", "--out", str(tmp_path)]

    partial = tmp_path / "partial"
    monkeypatch.setattr(evaluate, "SAVE_SECONDS", 0.0)
    other = evaluate.ShardedEvaluation(Numbered(), 10, folder=partial, identity={"weights": "w"})
    other.run(predictor([0] * 95))
    (partial / "notes").mkdir()
    (partial / "notes" / "mine.txt").write_text("kept")
    assert evaluate.main([*command, "--limit", "100", "--dtype", "fp32", "bf16"]) == 0
    assert sorted(path.name for path in partial.iterdir()) == [other.path.name, "notes"]
    assert (partial / "notes" / "mine.txt").read_text() == "kept"
    other.forget()
    assert [path.name for path in partial.iterdir()] == ["notes"]


def test_damaged_partial_counts_are_counted_again(tmp_path):
    first = evaluate.ShardedEvaluation(Numbered(), 10, folder=tmp_path)
    result = first.run(predictor([0] * 95))
    first.path.write_text(first.path.read_text()[:50])
    assert evaluate.ShardedEvaluation(Numbered(), 10, folder=tmp_path).run(predictor([0] * 95)) == result


def test_accuracy_leaves_unreadable_images_out():
    loader = make_loader(Numbered(), 20)
    result = evaluate.accuracy(predictor([0 if n % 3 else 1 for n in range(95)]), loader)
    readable = [n for n in range(95) if n % 7 != 3]
    assert (result.n, result.corrupt) == (len(readable), 95 - len(readable))
    assert result.top1 == pytest.approx(100 * sum(n % 3 != 0 for n in readable) / len(readable))


def test_more_unreadable_images_than_allowed_end_with_an_error(tmp_path, monkeypatch, capsys):
    chosen = evaluation_indices(597, 100).tolist()

    class Damaged(DigitsDataset):
        def __getitem__(self, n):
            image, label = super().__getitem__(n)
            return image, -1 if n in chosen[:8] else label

    monkeypatch.setattr(evaluate, "get_dataset", lambda *a, **k: Damaged(train=False))
    command = [str(models.MICRO_TEACHER), "--limit", "100", "--out", str(tmp_path)]
    with pytest.raises(DataError, match="8 of 100 images cannot be read, more than 1 %"):
        evaluate.main(command)
    assert "92 images, 8 more cannot be read" in capsys.readouterr().out
    assert (tmp_path / "corrupt.txt").read_text().splitlines() == sorted(f"image {n}" for n in chosen[:8])
    assert evaluate.main([*command, "--max-corrupt", "0.1"]) == 0
    (row,) = rows_of(tmp_path)
    assert row["n_eval"] == 92 and len(row["corrupt"]) == 8


def test_floating_point_types_each_give_a_row(tmp_path):
    command = [str(models.MICRO_TEACHER), "--limit", "64", "--out", str(tmp_path), "--dtype", "fp32", "bf16"]
    assert evaluate.main(command) == 0
    assert [row["method"] for row in rows_of(tmp_path)] == ["fp32", "bf16"]
    opened = list(evaluate.open_predictors(models.MICRO_TEACHER, None, torch.device("cpu"), ["fp16"]))[0]
    assert next(opened.model.parameters()).dtype == torch.float16
    assert opened.predict(torch.zeros(1, 1, 28, 28)).dtype == torch.float16


def test_a_folders_digest_follows_its_files(tmp_path):
    folders = [tmp_path / "x", tmp_path / "y", tmp_path / "z"]
    for folder, content in zip(folders, "112"):
        folder.mkdir()
        (folder / "model.safetensors").write_text(content)
    same, again, other = map(pipeline.file_digest, folders)
    assert same == again != other
