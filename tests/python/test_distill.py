"""Algorithm 1, its bookkeeping, and that a killed run resumes to the same student bit for bit."""

from __future__ import annotations

import copy
import csv
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from pyharness import convert, models
from pyharness import distill as d
from pyharness.config import MICRO_DIGITS
from pyharness.data import DigitsDataset
from pyharness.errors import CheckpointError, HarnessError
from pyharness.model_card import read_card
from pyharness.swin_blocks import activation_of

ROOT = Path(__file__).resolve().parents[2]
MICRO = MICRO_DIGITS.name
TINY = d.DistillOptions(batch_size=8, subset=1.0, epochs_per_block=2, seed=3)
"""With 20 images: steps of 8, 8 and 4 images, two epochs, four blocks: 24 steps."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher():
    return models.create_model(MICRO, weights="pretrained")


@pytest.fixture(scope="module")
def images():
    return Subset(DigitsDataset(train=True), range(20))


@pytest.fixture(scope="module")
def whole_run(teacher, images, tmp_path_factory):
    """An uninterrupted run, to compare with."""
    torch.set_num_threads(1)
    return d.distill(teacher, MICRO, images, TINY, tmp_path_factory.mktemp("whole"))


def assert_same_weights(a, b):
    a, b = (m if isinstance(m, dict) else m.state_dict() for m in (a, b))
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"


# --- The loss ---------------------------------------------------------------------------------------------------------


def test_soft_label_loss_is_the_divergence_from_the_teacher():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator) * 3
    for temperature in (1.0, 4.0):
        p = (teacher / temperature).softmax(1)
        q = (student / temperature).softmax(1)
        expected = (p * (p / q).log()).sum(1).mean() * temperature**2
        torch.testing.assert_close(d.soft_label_loss(student, teacher, temperature), expected)
    assert d.soft_label_loss(teacher, teacher).abs() < 1e-6
    assert not torch.isclose(d.soft_label_loss(student, teacher), d.soft_label_loss(teacher, student))


# --- The order of the images ------------------------------------------------------------------------------------------


def test_subset_is_drawn_once_without_replacement():
    options = d.DistillOptions(subset=0.1)
    indices = d.subset_indices(1203, options).tolist()
    assert len(indices) == len(set(indices)) == 121 and max(indices) < 1203
    assert indices == d.subset_indices(1203, options).tolist()
    assert indices != d.subset_indices(1203, replace(options, seed=1)).tolist()


def test_each_epoch_sees_every_image_once_in_its_own_order():
    indices = d.subset_indices(50, TINY)
    orders = []
    for block, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = d.epoch_batches(indices, TINY, block, epoch)
        assert [len(b) for b in batches] == [8] * 6 + [2]
        orders.append([index for batch in batches for index, _ in batch])
        assert sorted(orders[-1]) == sorted(indices.tolist())
        seeds = [seed for batch in batches for _, seed in batch]
        assert len(set(seeds)) == len(seeds)
    assert orders[0] != orders[1] != orders[2] != orders[0]


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def algorithm_1(teacher, dataset, options):
    """Algorithm 1 written out plainly, sharing with the program only the order of the images."""
    student = copy.deepcopy(teacher).train()
    velocity = {}
    for i in range(4):
        block = [b for layer in student.layers for b in layer.blocks][i]
        block.mlp.act = nn.ReLU()
        block.mlp.fc1.bias.data.fill_(0)
        block.mlp.fc1.bias.requires_grad = False
        velocity.clear()
        for epoch in range(options.epochs_per_block):
            for batch in d.epoch_batches(d.subset_indices(len(dataset), options), options, i, epoch):
                x = torch.stack([dataset[index][0] for index, _ in batch])
                with torch.no_grad():
                    p = F.softmax(teacher(x), dim=1)
                    entropy = -(p * p.log()).sum(1).mean()
                loss = F.cross_entropy(student(x), p) - entropy
                student.zero_grad()
                loss.backward()
                for name, parameter in student.named_parameters():
                    if parameter.requires_grad:
                        velocity[name] = options.momentum * velocity.get(name, 0) + parameter.grad
                        parameter.data -= options.lr * velocity[name]
    return student.eval()


def test_the_student_is_algorithm_1s(teacher, images, whole_run):
    expected = algorithm_1(teacher, images, TINY).state_dict()
    for name, tensor in whole_run.student.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_blocks_change_one_after_the_other(teacher, images, tmp_path, monkeypatch):
    seen = []
    step = d._Run._train_step

    def watch(run, *batch):
        seen.append([activation_of(b) for b in run.blocks])
        step(run, *batch)
        for block in run.blocks:
            frozen = isinstance(block.mlp.act, nn.ReLU)
            assert block.mlp.fc1.bias.requires_grad != frozen
            assert bool(block.mlp.fc1.bias.any()) != frozen

    monkeypatch.setattr(d._Run, "_train_step", watch)
    d.distill(teacher, MICRO, images, replace(TINY, epochs_per_block=1), tmp_path)
    expected = [["relu"] * (i + 1) + ["gelu"] * (3 - i) for i in range(4) for _ in range(3)]
    assert seen == expected


def test_student_file_log_and_teacher_afterwards(teacher, images, whole_run):
    student, meta = models.load_model(whole_run.student_path)
    assert models.is_geluless(student) and meta["activation"] == "relu"
    assert meta["distillation"]["lr"] == TINY.lr and meta["distillation"]["epochs_per_block"] == 2
    assert_same_weights(student, whole_run.student)
    assert not models.is_geluless(teacher) and all(p.requires_grad for p in teacher.parameters())
    assert_same_weights(teacher, models.create_model(MICRO, weights="pretrained"))
    trained = [n for n, t in student.state_dict().items() if not torch.equal(t, teacher.state_dict()[n])]
    assert len(trained) == len(student.state_dict()), "every parameter is free but the FC1 biases, which are zero"
    with open(whole_run.student_path.parent / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["block"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) > 0 and 0 <= float(row["train_accuracy"]) <= 100 for row in rows)
    assert (whole_run.images, whole_run.steps_per_block) == (20, 6)


def test_distillation_brings_the_accuracy_back(teacher, tmp_path):
    """On 240 training images: without distillation the soft labels are far off; with it they come close."""
    data = Subset(DigitsDataset(train=True), range(240))
    options = d.DistillOptions(subset=1.0)
    ablation = d.distill(teacher, MICRO, data, replace(options, distill=False), tmp_path / "ablation")
    distilled = d.distill(teacher, MICRO, data, options, tmp_path / "distilled")
    x = DigitsDataset(train=False).images[:300]
    with torch.no_grad():
        before, after = (d.soft_label_loss(s.student(x), teacher(x)).item() for s in (ablation, distilled))
    assert after < before / 4, f"divergence from the teacher: {before:.4f} without distillation, {after:.4f} with"


def test_no_distill_replaces_all_blocks_and_trains_nothing(teacher, images, tmp_path):
    summary = d.distill(teacher, MICRO, images, replace(TINY, distill=False), tmp_path, eval_dataset=images)
    expected = copy.deepcopy(teacher)
    models.make_geluless(expected)
    assert_same_weights(summary.student, expected)
    assert [row["loss"] for row in summary.rows] == [None]
    assert summary.rows[0]["eval_accuracy"] is not None and summary.images == 0


# --- Interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(1,), (5, 4), (6,), (23, 1), (2, 7, 11)])
def test_a_run_in_pieces_gives_the_same_student(teacher, images, tmp_path, whole_run, stops):
    """Stops inside epochs, at their ends, at blocks' ends, and at the very last step."""
    for steps in stops:
        assert d.distill(teacher, MICRO, images, TINY, tmp_path, stop_after_steps=steps) is None
        torch.rand(7)  # what else uses the generator in between must not matter
    summary = d.distill(teacher, MICRO, images, TINY, tmp_path)
    assert_same_weights(summary.student, whole_run.student)
    without_time = [{k: v for k, v in row.items() if k != "seconds"} for row in summary.rows]
    assert without_time == [{k: v for k, v in row.items() if k != "seconds"} for row in whole_run.rows]


def test_evaluation_does_not_touch_the_result(teacher, images, tmp_path, whole_run):
    summary = d.distill(teacher, MICRO, images, TINY, tmp_path, eval_dataset=images, state_every=1)
    assert_same_weights(summary.student, whole_run.student)


def test_the_state_is_written_every_n_steps_however_short_the_epochs_are(
    teacher, images, tmp_path, monkeypatch, whole_run
):
    """Epochs of 3 steps, 6 in a block. What was written between and at the ends of epochs all leads to one student."""
    save, kept = d._Run.save_state, {}

    def keep(run):
        save(run)
        kept[run.state.steps, run.state.phase] = run.state_path.read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr(d._Run, "save_state", keep)
        d.distill(teacher, MICRO, images, TINY, tmp_path / "run", state_every=5)
    blocks = {(6 * phase, phase) for phase in range(1, 5)}
    assert kept.keys() == {(5, 0), (10, 1), (15, 2), (20, 3)} | blocks
    kept.clear()
    monkeypatch.setattr(d._Run, "save_state", keep)
    d.distill(teacher, MICRO, images, TINY, tmp_path / "run2", state_every=3)
    monkeypatch.undo()
    for at in ((3, 0), (6, 0), (6, 1), (9, 1)):
        (tmp_path / str(at)).mkdir()
        (tmp_path / str(at) / "state.pt").write_bytes(kept[at])
        assert_same_weights(d.distill(teacher, MICRO, images, TINY, tmp_path / str(at)).student, whole_run.student)


def test_a_program_killed_inside_a_block_resumes_bit_for_bit(teacher, tmp_path):
    """SIGKILL, which no handler sees, then the same command again."""
    options = ["--batch", "8", "--subset", "0.1", "--state-every", "1", "--threads", "1"]
    command = [sys.executable, str(ROOT / "pyharness" / "distill.py"), *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        state = _wait_for(lambda: _state_inside_a_block(tmp_path / "killed" / "state.pt", first_block=1), process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert state["phase"] < 4 and not (tmp_path / "killed" / "student.safetensors").exists()

    assert d.main([*options, "--out", str(tmp_path / "killed")]) == 0
    whole = d.distill(teacher, MICRO, DigitsDataset(train=True), d.DistillOptions(batch_size=8), tmp_path / "whole")
    assert_same_weights(models.load_checkpoint(tmp_path / "killed" / "student.safetensors")[0], whole.student)
    assert [row["block"] for row in whole.rows] == [1, 2, 3, 4]


def _state_inside_a_block(path, first_block):
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)["state"]
    return state if state["phase"] >= first_block and state["step"] >= 2 else None


def _wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"the program ended with {process.poll()} before it could be killed")


class RandomCrops(Dataset):
    """Images with random changes, drawn from both generators that timm's transforms use."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        shifted = image.roll((random.randrange(-2, 3), random.randrange(-2, 3)), (1, 2))
        return shifted + 0.1 * torch.randn(image.shape), label


def test_random_crops_are_the_same_after_a_resume_and_with_workers(teacher, images, tmp_path, whole_run):
    crops, options = RandomCrops(images), replace(TINY, epochs_per_block=1)
    random.seed(1)
    whole = d.distill(teacher, MICRO, crops, options, tmp_path / "whole")
    random.seed(2)
    assert d.distill(teacher, MICRO, crops, options, tmp_path / "pieces", stop_after_steps=4, workers=1) is None
    pieces = d.distill(teacher, MICRO, crops, options, tmp_path / "pieces")
    assert_same_weights(pieces.student, whole.student)
    assert not torch.equal(whole.student.head.fc.weight, whole_run.student.head.fc.weight)


def test_a_teacher_with_dropout_resumes_too(teacher, images, tmp_path, whole_run):
    """Dropout draws from the generator whose state the run keeps."""
    teacher = copy.deepcopy(teacher)
    for block in models.blocks_of(teacher):
        block.mlp.drop1.p = 0.2
    whole = d.distill(teacher, MICRO, images, TINY, tmp_path / "whole")
    assert d.distill(teacher, MICRO, images, TINY, tmp_path / "pieces", stop_after_steps=8) is None
    pieces = d.distill(teacher, MICRO, images, TINY, tmp_path / "pieces")
    assert_same_weights(pieces.student, whole.student)
    assert not torch.equal(whole.student.head.fc.weight, whole_run.student.head.fc.weight)


def test_the_callers_generators_and_settings_come_back(teacher, images, tmp_path):
    torch.manual_seed(5)
    state, python_state = torch.get_rng_state(), random.getstate()
    d.distill(teacher, MICRO, RandomCrops(images), TINY, tmp_path, stop_after_steps=2)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_finished_run_is_only_read(teacher, images, tmp_path, monkeypatch, whole_run):
    folder = whole_run.student_path.parent
    monkeypatch.setattr(d._Run, "_train_step", lambda *a: pytest.fail("trained again"))
    again = d.distill(teacher, MICRO, images, TINY, folder)
    assert_same_weights(again.student, whole_run.student)
    assert again.rows == whole_run.rows


# --- Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_done(teacher, images, tmp_path):
    d.distill(teacher, MICRO, images, TINY, tmp_path, stop_after_steps=2)
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value"), [("lr", 0.02), ("momentum", 0.5), ("seed", 4), ("subset", 0.5), ("temperature", 2.0)]
)
def test_other_options_do_not_resume(teacher, images, half_done, field, value):
    was = getattr(TINY, field)
    with pytest.raises(CheckpointError, match=rf"{field} was {was}, now {value}.*remove"):
        d.distill(teacher, MICRO, images, replace(TINY, **{field: value}), half_done)


def test_another_teacher_or_data_set_does_not_resume(teacher, images, half_done):
    other = models.create_model(MICRO, seed=1)
    with pytest.raises(CheckpointError, match="teacher was"):
        d.distill(other, MICRO, images, TINY, half_done)
    with pytest.raises(CheckpointError, match="training images was 20, now 10"):
        d.distill(teacher, MICRO, Subset(images, range(10)), TINY, half_done)


def test_as_many_images_of_another_set_do_not_resume(tmp_path):
    """Procedural sets of other seeds, by the program: the finished run must not be taken for the other set's."""
    model = models.model_from_config(replace(MICRO_DIGITS, num_classes=3))
    models.save_checkpoint(tmp_path / "t.safetensors", model, models.checkpoint_meta(model, MICRO))
    command = ["--weights", str(tmp_path / "t.safetensors"), "--out", str(tmp_path / "out"), "--no-distill", "--data"]
    assert d.main([*command, "procedural:classes=3,train=8,val=4"]) == 0
    assert d.main([*command, "procedural:classes=3,train=8,val=6,seed=0"]) == 0, "the same training images"
    with pytest.raises(CheckpointError, match="training set was procedural.*seed=0, now procedural.*seed=7"):
        d.main([*command, "procedural:classes=3,train=8,val=4,seed=7"])


def test_as_large_a_subset_of_other_images_does_not_resume(teacher, half_done):
    with pytest.raises(CheckpointError, match="training set was 20 images .* of digits, 1200 images, now 20 images"):
        d.distill(teacher, MICRO, Subset(DigitsDataset(train=True), range(1, 21)), TINY, half_done)


def test_an_old_state_that_does_not_say_its_set_goes_on(teacher, images, half_done, whole_run, capsys):
    state = torch.load(half_done / "state.pt", weights_only=True)
    del state["identity"]["training set"]
    torch.save(state, half_done / "state.pt")
    summary = d.distill(teacher, MICRO, images, TINY, half_done)
    assert_same_weights(summary.student, whole_run.student)
    assert "does not say its training set" in capsys.readouterr().err
    assert "training set" in torch.load(half_done / "state.pt", weights_only=True)["identity"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_teacher_of_other_images_or_geometry_does_not_resume(teacher, images, half_done, whole_run, finished):
    """Its weights are the same. A student of the former would be said to take the latter's images."""
    folder = whole_run.student_path.parent if finished else half_done
    config = replace(MICRO_DIGITS, img_size=(56, 56))
    larger = models.model_from_config(config)
    larger.load_state_dict(teacher.state_dict())
    with pytest.raises(CheckpointError, match=r"teacher's img size was \[28, 28\], now \[56, 56\]\. remove"):
        d.distill(larger, MICRO, images, TINY, folder)
    other = copy.deepcopy(teacher)
    models.note_data(other, {"input": {"mean": [0.9], "std": [0.1]}})
    with pytest.raises(CheckpointError, match=r"options: teacher's input was None, now \{'mean': \[0.9\], 'std': \[0.1\]"):
        d.distill(other, MICRO, images, TINY, folder)


def test_the_program_takes_no_finished_student_of_another_normalization(tmp_path):
    out = ["--no-distill", "--out", str(tmp_path / "out")]
    assert d.main(out) == 0
    words = ["to-timm", "pretrained", str(tmp_path / "t.safetensors"), "--model", MICRO, "--mean", "0.9", "--std", "0.1"]
    assert convert.main(words) == 0
    with pytest.raises(CheckpointError, match=r"teacher's input was .*0\.305.*, now .*0\.9"):
        d.main(["--weights", str(tmp_path / "t.safetensors"), *out])


def test_an_old_state_that_does_not_describe_the_teacher_goes_on(teacher, images, half_done, whole_run, capsys):
    state = torch.load(half_done / "state.pt", weights_only=True)
    described = [key for key in state["identity"] if key.startswith("teacher's ")]
    assert {"teacher's input", "teacher's img size", "teacher's window size"} < set(described)
    for key in described:
        del state["identity"][key]
    torch.save(state, half_done / "state.pt")
    summary = d.distill(teacher, MICRO, images, TINY, half_done)
    assert_same_weights(summary.student, whole_run.student)
    assert "does not say its models' geometry and how their images come in" in capsys.readouterr().err
    assert set(described) < torch.load(half_done / "state.pt", weights_only=True)["identity"].keys()


@pytest.mark.parametrize("content", [b"", b"not a state", None])
def test_a_damaged_state_is_an_error(teacher, images, half_done, content):
    state = half_done / "state.pt"
    state.write_bytes(state.read_bytes()[:5000] if content is None else content)
    with pytest.raises(CheckpointError, match="state.pt: cannot be read.*Remove it to begin anew, or choose another"):
        d.distill(teacher, MICRO, images, TINY, half_done)


def test_a_state_that_may_not_be_read_is_not_called_damaged_alone(teacher, images, half_done, monkeypatch):
    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"state of a run \(Permission denied\)"):
        d.distill(teacher, MICRO, images, TINY, half_done)


def test_a_state_of_another_kind_is_an_error(teacher, images, tmp_path):
    torch.save({"model": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="not a distillation state"):
        d.distill(teacher, MICRO, images, TINY, tmp_path)


def test_divergence_is_an_error_and_not_a_student(teacher, images, tmp_path):
    with pytest.raises(HarnessError, match="diverged"):
        d.distill(teacher, MICRO, images, replace(TINY, lr=1e6), tmp_path)
    assert not (tmp_path / "student.safetensors").exists()


def test_wrong_teacher_and_empty_data(teacher, images, tmp_path):
    relu = models.create_model(MICRO, activation="relu")
    with pytest.raises(HarnessError, match="ReLU blocks already"):
        d.distill(relu, MICRO, images, TINY, tmp_path)
    with pytest.raises(HarnessError, match="empty"):
        d.distill(teacher, MICRO, Subset(images, []), TINY, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lr", "0"],
        ["--lr", "inf"],
        ["--temperature", "inf"],
        ["--momentum", "1"],
        ["--batch", "0"],
        ["--subset", "1.5"],
        ["--epochs-per-block", "0"],
        ["--temperature", "-1"],
        ["--state-every", "0"],
        ["--threads", "0"],
        ["--weights", "none.safetensors"],
        ["--model", "swin_nothing"],
        ["--data", "nowhere"],
    ],
)
def test_program_explains_mistakes(tmp_path, arguments):
    with pytest.raises(HarnessError):
        d.main(["--out", str(tmp_path), *arguments])


def test_a_checkpoint_names_its_own_model_and_both_students_have_cards(tmp_path):
    """A model that is not called swin_micro_digits: --model may be left out, and another name is refused."""
    config = replace(MICRO_DIGITS, name="swin_mine", num_classes=3)
    model = models.model_from_config(config)
    weights = tmp_path / "t.safetensors"
    models.save_checkpoint(weights, model, models.checkpoint_meta(model, "swin_mine"))
    command = ["--weights", str(weights), "--data", "procedural:classes=3,train=8,val=4", "--out", str(tmp_path / "out")]
    with pytest.raises(CheckpointError, match="of swin_mine, not of swin_micro_digits; give that name, or none"):
        d.main([*command, "--model", MICRO])
    assert d.main([*command, "--subset", "1", "--ema", "0.9", "--no-tensorboard"]) == 0
    (row, *_) = reversed(list(csv.DictReader((tmp_path / "out" / "log.csv").read_text().splitlines())))
    for name, column in (("student", "eval_accuracy"), ("student_ema", "ema_eval_accuracy")):
        card = read_card(tmp_path / "out" / f"{name}.safetensors")
        assert card["model"] == "swin_mine" and card["kind"].startswith("GELU-less student")
        assert card["accuracy"] == {"top1 on the held-out images": round(float(row[column]), 3)}
        assert card["inputs"][0]["name"] == "t.safetensors" and card["data"] == command[3]
    assert "average" in card["kind"]


def test_names_of_teachers(tmp_path):
    """As --model says, else as the checkpoint does; the one in the package is the micro model's."""
    model = models.create_model(MICRO, weights="pretrained")
    models.save_checkpoint(tmp_path / "nameless.pth", model, {})
    assert d.load_teacher("pretrained", None)[1] == MICRO
    with pytest.raises(CheckpointError, match="nameless.pth: does not say which model it is of; .*--model"):
        d.load_teacher(str(tmp_path / "nameless.pth"), None)
    teacher, name = d.load_teacher(str(tmp_path / "nameless.pth"), MICRO)
    assert name == MICRO
    assert_same_weights(teacher, model)
    models.save_checkpoint(tmp_path / "named.pth", model, models.checkpoint_meta(model, MICRO))
    assert d.load_teacher(str(tmp_path / "named.pth"), MICRO)[1] == MICRO
    help_text = " ".join(d.build_parser().format_help().split())
    assert f"the checkpoint's own; of the teacher in the package {MICRO}" in help_text


def test_defaults_are_the_papers():
    options = d.options_from(d.build_parser().parse_args(["--out", "x"]))
    assert options == d.DistillOptions()
    assert (options.lr, options.momentum, options.batch_size) == (1e-2, 0.9, 32)
    assert (options.subset, options.epochs_per_block, options.temperature) == (0.1, 1, 1.0)
