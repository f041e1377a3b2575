"""train.py: it learns, stops in time, goes on to the same bits; and a small model at 224 from training to the engine."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import signal
import tarfile

import pytest
import torch
from PIL import Image
from v2_configs import MICRO as V2_MICRO

from pyharness import train as t
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset, get_dataset
from pyharness.errors import CheckpointError, ClassesError, EngineError, HarnessError, ModelError
from pyharness.models import (
    blocks_of,
    checkpoint_meta,
    create_model,
    load_model,
    model_from_config,
    save_checkpoint,
)

QUICK = t.TrainingOptions(epochs=2, batch_size=8, lr=2e-3, warmup_epochs=0.2, seed=4)
GEOMETRY = ["--set", "img_size=28", "patch_size=4", "in_chans=3", "embed_dim=32", "depths=1", "num_heads=1", "window_size=7"]


def training(folder, options=QUICK, data="procedural:classes=10,train=40,val=12", **more):
    model = create_model(MICRO_DIGITS.name, seed=options.seed)
    t.spread_initial_weights(model, options.seed)
    sets = [get_dataset(data, MICRO_DIGITS.name, train=part, model=model) for part in (True, False)]
    return t.Training(model, MICRO_DIGITS.name, *sets, options, folder, data=data, **{"eval_every": 4, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped: 40 images in batches of 8, two epochs."""
    run = training(tmp_path_factory.mktemp("train") / "whole")
    assert run.run() and run.step == 10
    return run


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, whole):
    """10 steps; stopped after the first, inside the epoch, and again, at last ahead of the last evaluation."""
    stops = 0
    while not (part := training(tmp_path / "parts")).run(max_seconds=0):
        stops += 1
    assert stops == 10
    assert [row["images_per_s"] for row in part.rows] == [None] * 3, "no start took a step ahead of an evaluation"
    same_run(whole, part)
    assert whole.rows[-1]["lr"] == 0 and whole.rows[-1]["eval_images"] == 12


def same_run(whole, part):
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    timeless = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in run.rows] for run in (whole, part)]
    assert timeless[0] == timeless[1] and [row["step"] for row in whole.rows] == [4, 8, 10]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4, 10])
def test_a_signal_in_the_middle_of_a_step_stops_after_it(tmp_path, monkeypatch, capsys, whole, step, kind):
    """In the middle: the gradients are there, half of the work of the step is not done."""
    run, before = training(tmp_path / "parts"), signal.getsignal(kind)
    clip = torch.nn.utils.clip_grad_norm_

    def with_signal(*args):
        if run.step == step - 1:
            signal.raise_signal(kind)
        return clip(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", with_signal)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert run.step == step and signal.getsignal(kind) is before
    assert f"stopped by {kind.name}" in capsys.readouterr().err
    part = training(tmp_path / "parts")
    assert part.run()
    same_run(whole, part)


@pytest.mark.parametrize("step", [4, 10])
def test_an_evaluation_that_a_signal_stopped_is_made_up_for(tmp_path, monkeypatch, whole, step):
    """So is the last one, after which there is no step to go on with."""
    run = training(tmp_path / "parts")
    evaluate = t.Training.evaluate

    def with_signal(self, limit):
        if self is run and self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, limit)

    monkeypatch.setattr(t.Training, "evaluate", with_signal)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.step == step and all(row["step"] < step for row in run.rows)
    part = training(tmp_path / "parts")
    assert part.run()
    same_run(whole, part)


def test_a_kill_in_the_last_evaluation_loses_no_step(tmp_path, monkeypatch, whole):
    """What leaves no time to write anything is stood in for by an exception that nothing catches."""

    class Killed(BaseException):
        pass

    run, evaluate = training(tmp_path / "parts"), t.Training.evaluate

    def killed(self, limit):
        if self is run and self.step == 10:
            raise Killed
        return evaluate(self, limit)

    monkeypatch.setattr(t.Training, "evaluate", killed)
    with pytest.raises(Killed):
        run.run()
    part = training(tmp_path / "parts")
    monkeypatch.setattr(t.Training, "_train_step", lambda *a: pytest.fail("a step was lost"))
    assert part.run(max_seconds=0), "the time is up at once, and yet the evaluation is done"
    same_run(whole, part)


def test_no_evaluation_begins_when_the_time_is_up(tmp_path, monkeypatch):
    run = training(tmp_path, eval_every=1)
    monkeypatch.setattr(t.Training, "evaluate", lambda *a: pytest.fail("evaluated"))
    assert not run.run(max_seconds=0) and run.step == 1 and run.state_path.exists()


def test_a_state_of_another_run_is_refused(tmp_path):
    training(tmp_path).run(max_seconds=0)
    with pytest.raises(CheckpointError, match="batch_size was 8, now 4"):
        training(tmp_path, t.TrainingOptions(epochs=2, batch_size=4, lr=2e-3, warmup_epochs=0.2, seed=4)).run()
    with pytest.raises(CheckpointError, match="training set was procedural.*seed=0, now procedural.*seed=1"):
        training(tmp_path, data="procedural:classes=10,train=40,val=12,seed=1").run()


def test_an_old_state_is_told_by_what_its_data_was_called(tmp_path):
    training(tmp_path).run(max_seconds=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["identity"]["training set"]
    state["identity"]["data"] = "procedural:classes=10,train=40,val=12"
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="data was procedural.*val=12, now procedural.*val=12,seed=1"):
        training(tmp_path, data="procedural:classes=10,train=40,val=12,seed=1").run()
    run = training(tmp_path)
    assert not run.run(max_seconds=0) and run.step == 2


def test_a_state_from_before_there_was_a_choice_of_weights_goes_on(tmp_path):
    training(tmp_path).run(max_seconds=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["identity"]["init"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="init was auto, now identity"):
        training(tmp_path, dataclasses.replace(QUICK, init="identity")).run()
    run = training(tmp_path)
    assert not run.run(max_seconds=0) and run.step == 2


@pytest.mark.parametrize("config", [dataclasses.replace(MICRO_DIGITS, depths=(2, 1)), V2_MICRO], ids=lambda c: f"v{c.version}")
def test_blocks_begin_as_identities_and_learn(config):
    """Behind one step both matrices that began as zero have a gradient to go on with."""
    torch.manual_seed(0)
    model = model_from_config(config)
    head = model.head.fc.weight.detach().clone()
    t.set_initial_weights(model, config, "identity", seed=1)
    assert torch.equal(model.head.fc.weight, head), "timm's own"
    seen = []
    for block in blocks_of(model):
        block.register_forward_hook(lambda block, given, result: seen.append((given[0], result)))
    loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 1, 28, 28)), torch.arange(4))
    assert len(seen) == sum(config.depths) and all(torch.equal(given, result) for given, result in seen)
    loss.backward()
    last = blocks_of(model)[-1]
    written = [last.norm1.weight, last.norm2.weight] if config.version == 2 else [last.attn.proj.weight, last.mlp.fc2.weight]
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in written)


@pytest.mark.parametrize(
    ("init", "width", "changed"), [("timm", 32, False), ("auto", 32, True), ("auto", 96, False), ("spread", 96, True)]
)
def test_which_models_have_spread_weights(init, width, changed):
    config = dataclasses.replace(MICRO_DIGITS, embed_dim=width)
    model = model_from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    t.set_initial_weights(model, config, init, seed=0)
    same = {name: torch.equal(value, before[name]) for name, value in model.state_dict().items()}
    assert all(same.values()) != changed
    assert same["patch_embed.proj.weight"] and same["layers.0.blocks.0.attn.qkv.weight"] != changed


def test_a_state_that_began_from_other_weights_is_refused(tmp_path):
    training(tmp_path, weights="one.pth").run(max_seconds=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    run = training(tmp_path, weights="the same under another name.pth")
    assert not run.run(max_seconds=0) and run.step == 2
    state["identity"][t.STARTING_WEIGHTS] = "another digest"
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="starting weights was another digest, now "):
        training(tmp_path, weights="one.pth").run()
    del state["identity"][t.STARTING_WEIGHTS]  # as an older program wrote it
    torch.save(state, tmp_path / "state.pt")
    assert not training(tmp_path, weights="one.pth").run(max_seconds=0)


def test_a_state_of_images_that_came_in_otherwise_is_refused(tmp_path):
    """Another normalization by the file of --weights; of an older state, which does not say it, nothing is known."""
    model = create_model(MICRO_DIGITS.name, weights="pretrained")
    command = ["--data", "procedural:classes=10,train=16,val=4", "--batch", "8", "--epochs", "1", "--warmup-epochs", "0"]
    command += ["--out", str(tmp_path / "out"), "--max-minutes", "0.00001", "--weights", str(tmp_path / "w.pth")]
    for mean in (0.5, 0.9):
        model.image_input = {"mean": [mean], "std": [0.1]}
        save_checkpoint(tmp_path / "w.pth", model, checkpoint_meta(model, MICRO_DIGITS.name))
        if mean == 0.5:
            assert t.main(command) == t.UNFINISHED
    with pytest.raises(CheckpointError, match=r"input was \{'mean': \[0.5\].*, now \{'mean': \[0.9\]"):
        t.main(command)
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    del state["identity"]["input"]
    torch.save(state, tmp_path / "out" / "state.pt")
    assert t.main(command) == t.UNFINISHED


def test_a_checkpoint_gets_a_new_head_for_other_classes(tmp_path, capsys):
    teacher = create_model(MICRO_DIGITS.name, weights="pretrained")
    save_checkpoint(tmp_path / "ten.pth", teacher, checkpoint_meta(teacher, MICRO_DIGITS.name))
    more = {"weights": str(tmp_path / "ten.pth"), "changes": {}, "new_name": None, "seed": 3}
    model, _ = t.build_model(MICRO_DIGITS.name, classes=7, **more)
    assert "its head of 10 classes gives way to a random one of 7" in capsys.readouterr().err
    found = model.state_dict()
    changed = [name for name, value in teacher.state_dict().items() if not torch.equal(value, found[name])]
    assert changed == ["head.fc.weight", "head.fc.bias"] and found["head.fc.weight"].shape == (7, 64)
    again, _ = t.build_model(MICRO_DIGITS.name, classes=7, **more)
    assert torch.equal(again.head.fc.weight, model.head.fc.weight), "drawn from the seed"
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 7)
    for classes in (7, 10):  # the micro model's "pretrained" is a file too
        packaged, _ = t.build_model(MICRO_DIGITS.name, classes=classes, **{**more, "weights": "pretrained"})
        assert packaged.num_classes == classes
        assert torch.equal(packaged.norm.weight, teacher.norm.weight)
    same, _ = t.build_model(MICRO_DIGITS.name, classes=10, **more)
    assert torch.equal(same.head.fc.weight, teacher.head.fc.weight)


def test_trained_weights_go_on_at_a_lower_learning_rate_than_random_ones_begin(tmp_path):
    assert [t.learning_rate_of(*words) for words in (("random", None), ("a.pth", None), ("a.pth", 5e-4))] == [1e-3, 2e-4, 5e-4]
    few = ["--data", "procedural:classes=10,train=8,val=2", "--batch", "8", "--epochs", "1", "--weights", "pretrained"]
    assert t.main([*few, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "train.json").read_text())["options"]["lr"] == 2e-4


@pytest.mark.parametrize("weights", ["one.pth", "random"])
def test_a_state_of_the_former_default_learning_rate_is_told_how_to_go_on(tmp_path, weights):
    former = dataclasses.replace(QUICK, lr=1e-3)
    training(tmp_path, former, weights=weights).run(max_seconds=0)
    with pytest.raises(CheckpointError, match=r"lr was 0.001, now 0.0002. (.*) to begin anew") as caught:
        training(tmp_path, dataclasses.replace(QUICK, lr=2e-4), weights=weights).run()
    assert ("--lr 0.001, once the default with --weights too, is what it had" in str(caught.value)) == (weights != "random")
    run = training(tmp_path, former, weights=weights)
    assert not run.run(max_seconds=0) and run.step == 2


def test_an_output_folder_that_cannot_be_is_told_ahead_of_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    run = training(tmp_path / "file" / "out")
    monkeypatch.setattr(t.Training, "_train_step", lambda *a: pytest.fail("a step was made"))
    with pytest.raises(HarnessError, match=r"the folder of .*state.pt cannot be made \(Not a directory\)"):
        run.run()


def test_a_damaged_state_is_explained(tmp_path):
    training(tmp_path).run(max_seconds=0)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="state.pt: cannot be read as the state of a run.*Remove it to begin anew"):
        training(tmp_path).run()


def test_divergence_is_an_error_and_leaves_no_state(tmp_path):
    run = training(tmp_path)
    with torch.no_grad():
        run.model.head.fc.weight[0, 0] = float("nan")
    with pytest.raises(HarnessError, match="step 4: the loss is not finite"):
        run.run()
    assert not run.state_path.exists()


def test_it_learns_and_bfloat16_does_too(tmp_path):
    """400 digits for 5 epochs: far above the 10 % of chance on digits it has not seen. In float32 where the processor has
    no bfloat16, which takes six times as long then; test_trainer.py has some steps of it everywhere."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        precision = "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(file.read().split()) else "fp32"
    model = create_model(MICRO_DIGITS.name, seed=0)
    t.spread_initial_weights(model, 0)
    few = torch.utils.data.Subset(DigitsDataset(train=True), range(400))
    heldout = torch.utils.data.Subset(DigitsDataset(train=False), range(200))
    options = t.TrainingOptions(epochs=5, batch_size=16, lr=2e-3, warmup_epochs=0.5, precision=precision)
    run = t.Training(model, MICRO_DIGITS.name, few, heldout, options, tmp_path, eval_every=1000)
    assert run.run()
    assert run.rows[-1]["eval_accuracy"] > 40
    assert all(p.dtype == torch.float32 for p in run.model.parameters()), "bf16 is for the arithmetic, not the weights"


def test_the_program_makes_a_model_of_its_own_geometry(tmp_path, capsys):
    command = ["--out", str(tmp_path), "--data", "procedural:classes=5,train=16,val=6", "--batch", "8", *GEOMETRY]
    command += ["--epochs", "1", "--warmup-epochs", "0.1"]
    assert t.main([*command, "--max-minutes", "0.00001"]) == t.UNFINISHED
    assert "stopped at step 1/2" in capsys.readouterr().out
    assert t.main(command) == 0
    model, meta = load_model(tmp_path / "model.safetensors")
    assert meta["model"] == "swin_micro_digits_custom" and model.num_classes == 5
    assert meta["config"]["img_size"] == [28, 28] and meta["config"]["depths"] == [1]
    (row,) = csv.DictReader((tmp_path / "log.csv").read_text().splitlines())
    record = json.loads((tmp_path / "train.json").read_text())
    assert float(row["eval_accuracy"]) == record["heldout_accuracy"] == meta["heldout_accuracy"]
    assert record["heldout_images"] == 6
    weights = ["--weights", str(tmp_path / "model.safetensors"), "--classes", "3"]
    goes_on = [*weights, "--data", "procedural:classes=3,train=8,val=3", "--batch", "8", "--epochs", "1"]
    goes_on += ["--warmup-epochs", "0"]
    assert t.main([*goes_on, "--out", str(tmp_path / "next")]) == 0, "the file names its model"
    model, meta = load_model(tmp_path / "next" / "model.safetensors")
    assert meta["model"] == "swin_micro_digits_custom" and model.num_classes == 3
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="bare.pth: does not say which model it is of; give .*--model"):
        t.main(["--weights", str(tmp_path / "bare.pth"), *goes_on[2:], "--out", str(tmp_path / "none")])


def test_without_a_terminal_a_line_says_how_far_it_is(tmp_path, capsys, monkeypatch, whole):
    monkeypatch.setattr("pyharness.training.LINE_SECONDS", 0.0)
    run = training(tmp_path)
    assert run.run()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 10
    found = r"epoch 0\.20, step 1/10: loss \d+\.\d{4}, \S+ images/s, about \d+ s of training left"
    assert re.fullmatch(found, lines[0]), lines[0]
    same_run(whole, run)


def class_folders(root):
    """Two images of each of three classes, in both splits."""
    for split in ("train", "val"):
        for label in range(3):
            (root / split / f"c{label}").mkdir(parents=True)
            for number in range(2):
                Image.new("L", (28, 28), 80 * label + number).save(root / split / f"c{label}" / f"{number}.png")


def webdataset(root):
    """The same as shards, whose labels are numbers."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for number in range(6):
                out = io.BytesIO()
                Image.new("L", (28, 28), 40 * number).save(out, "png")
                for kind, content in (("png", out.getvalue()), ("cls", b"%d" % (number // 2))):
                    info = tarfile.TarInfo(f"{number}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def unnamed_parquet(root):
    """The same as parquet files without the classes' names."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    out = io.BytesIO()
    Image.new("L", (28, 28), 99).save(out, "png")
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        table = pa.table({"label": [0, 0, 1, 1, 2, 2], "image": [out.getvalue()] * 6})
        pq.write_table(table, root / split / "0.parquet")


@pytest.mark.parametrize("make", [webdataset, unnamed_parquet])
def test_numbers_as_labels_give_random_weights_their_number_of_classes(make, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    make(tmp_path / "data")
    command = ["--data", str(tmp_path / "data"), "--batch", "3", "--epochs", "1", "--out"]
    assert t.main([*command, str(tmp_path / "a")]) == 0
    assert f"3 classes, of {tmp_path / 'data'}" in capsys.readouterr().err
    assert load_model(tmp_path / "a" / "model.safetensors")[0].num_classes == 3
    for name, more, classes in (("b", ["--classes", "5"], 5), ("c", ["--weights", "pretrained"], 10)):
        assert t.main([*command, str(tmp_path / name), *more]) == 0
        assert load_model(tmp_path / name / "model.safetensors")[0].num_classes == classes, "as it was said"


@pytest.mark.parametrize("make", [class_folders, webdataset, None])
def test_weights_without_a_head_get_one_of_the_images_classes(make, tmp_path, capsys):
    backbone = create_model(MICRO_DIGITS.name, num_classes=0)
    save_checkpoint(tmp_path / "w.pth", backbone, checkpoint_meta(backbone, MICRO_DIGITS.name))
    command = ["--weights", str(tmp_path / "w.pth"), "--out", str(tmp_path / "out")]
    if make is None:  # the digits
        assert t.main([*command, "--epochs", "0.01", "--batch", "12"]) == 0
    else:
        make(tmp_path / "data")
        assert t.main([*command, "--data", str(tmp_path / "data"), "--epochs", "1", "--batch", "3"]) == 0
    classes = 3 if make else 10
    assert f"w.pth: has no head, and gets a random one of {classes}" in capsys.readouterr().err
    assert load_model(tmp_path / "out" / "model.safetensors")[0].num_classes == classes


def test_features_are_not_trained_on_as_if_they_were_logits(tmp_path):
    few = torch.utils.data.Subset(DigitsDataset(train=True), range(16))
    with pytest.raises(ModelError, match="has no classification head, its results are features; training is on classes"):
        t.Training(create_model(MICRO_DIGITS.name, num_classes=0), MICRO_DIGITS.name, few, few, QUICK, tmp_path)


def test_an_own_folder_gives_random_weights_their_number_of_classes(tmp_path, capsys):
    class_folders(tmp_path / "data")
    command = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--batch", "3", "--epochs", "1"]
    assert t.main(command) == 0
    assert f"3 classes, of {tmp_path / 'data'}" in capsys.readouterr().err
    assert load_model(tmp_path / "out" / "model.safetensors")[0].num_classes == 3
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["options"]["warmup_epochs"] == 0.1, "a tenth of --epochs, where the default is not below it"
    for more in (["--classes", "4"], ["--weights", "pretrained"]):
        with pytest.raises(ClassesError, match="has 3 classes, the model has (4|10)"):
            t.main([*command, *more])


def test_the_default_warm_up_is_that_of_older_states_where_it_was_allowed():
    assert [t.warmup_of(epochs, None) for epochs in (30, 5, 1.5, 1, 0.5)] == [1, 1, 1, 0.1, 0.05]
    assert t.warmup_of(1, 0.3) == 0.3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "depth=2"], "'depth=2' is not understood"),
        (["--set", "depths=2,x"], "'depths=2,x' is not understood"),
        (["--set", "embed_dim=32", "--weights", "pretrained"], "leave --weights out"),
        (["--init", "identity", "--weights", "pretrained"], "--init identity is for random weights"),
        (["--name", "mine"], "--name is for a model of --set"),
        (["--epochs", "1", "--warmup-epochs", "1"], "--warmup-epochs must be at least 0 and below"),
        (["--epochs", "inf"], "--epochs must be a number greater than 0, found inf"),
        (["--epochs", "nan"], "--epochs must be a number greater than 0, found nan"),
        (["--lr", "inf"], "--lr must be a number greater than 0, found inf"),
        (["--weight-decay", "inf"], "--weight-decay must be a number of at least 0, found inf"),
        (["--warmup-epochs", "inf"], "--warmup-epochs must be at least 0 and below --epochs, found inf"),
        (["--max-minutes", "0"], "--max-minutes"),
        (["--batch", "2000"], "more than the 1200 training images"),
        (["--classes", "3"], r"the digits have 10 classes, the model has 3; give the images that it is for \(--data\)"),
        (["--set", "num_classes=0"], "--set num_classes=0: training is on classes"),
    ],
)
def test_mistakes_are_explained(words, message, tmp_path):
    with pytest.raises(HarnessError, match=message):
        t.main(["--out", str(tmp_path), *words])


def test_a_small_model_at_224_goes_all_the_way_to_the_engine(tmp_path, capsys):
    """Train, distil, calibrate, convert and evaluate on procedural images, by the programs' own command lines.

    Two steps teach nothing: what is held is that all parts take the images at this size, and that the engine answers as
    the fake-quantized model does.
    """
    from pyharness import convert, distill, engine, evaluate, quantize

    try:
        engine.engine_info()
    except EngineError as error:
        pytest.skip(f"the engine is not built: {error}")
    data = ["--data", "procedural:classes=6,size=224,train=10,val=4"]
    geometry = "img_size=224 patch_size=4 in_chans=3 embed_dim=32 depths=1,1,1,1 num_heads=1,2,4,8 window_size=7,7,7,7"
    model = ["--set", *geometry.split(), "--name", "swin_small_224"]
    teacher = [*model, *data, "--out", str(tmp_path / "t"), "--batch", "2", "--epochs", "0.4"]
    assert t.main([*teacher, "--warmup-epochs", "0.1"]) == 0
    weights, student = tmp_path / "t" / "model.safetensors", tmp_path / "s" / "student.safetensors"
    named = ["--model", "swin_small_224"]
    assert distill.main([*named, "--weights", str(weights), *data, "--out", str(tmp_path / "s")]) == 0
    files = []
    for name, source in (("ft", weights), ("geluless", student)):
        calibrated, converted = tmp_path / f"{name}.calibrated.safetensors", tmp_path / f"{name}.engine.safetensors"
        calibrate = ["--weights", str(source), *data, "--out", str(calibrated), "--batches", "1", "--batch-size", "4"]
        assert quantize.main(calibrate) == 0
        assert convert.main(["to-engine", str(calibrated), str(converted)]) == 0
        files += [calibrated, converted]
    out = ["--out", str(tmp_path / "e"), "--batch", "4"]
    assert evaluate.main([str(weights), str(student), *map(str, files), *data, *out]) == 0
    rows = json.loads((tmp_path / "e" / "evaluate.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [
        "fp32", "fp32, GELU-less", "fake-quantized, ft_int8", "engine, ft_int8", "fake-quantized, geluless_int8",
        "engine, geluless_int8",
    ]  # fmt: skip
    assert all(row["n_eval"] == 4 and row["model"] == "swin_small_224" for row in rows)
    opened = [evaluate.open_predictor(file) for file in files]
    dataset = get_dataset(data[1], "swin_small_224", train=False, model=opened[0].timm_model)
    images, _ = dataset.batch(range(4))
    for fake, real in (opened[:2], opened[2:]):
        with torch.inference_mode():
            expected, found = fake.predict(images), real.predict(images)
        spread = (expected - expected.mean(0)).square().mean()
        assert (expected - found).square().mean() < 0.02 * expected.square().mean() + 0.1 * spread
