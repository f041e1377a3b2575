"""Models, their geometry, the GELU-less variant, and checkpoints good and bad."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
import os
import pickle
import re
import tarfile
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver
from torch import nn

from pyharness import models, quantize
from pyharness.atomic import atomic_path
from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.errors import CheckpointError, FormatError, HarnessError, ModelError

MICRO = MICRO_DIGITS.name


@pytest.fixture
def micro():
    return models.create_model(MICRO, seed=3)


def save(model, path, **extra):
    models.save_checkpoint(path, model, models.checkpoint_meta(model, MICRO, **extra))
    return path


def images(config=MICRO_DIGITS, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.in_chans, *config.img_size, generator=generator)


# --- create_model and config_of ---------------------------------------------------------------------------------------


def test_micro_model_has_the_agreed_geometry(micro):
    assert models.config_of(micro, MICRO) == MICRO_DIGITS
    assert micro(images()).shape == (2, 10)
    assert not micro.training
    assert micro.layers[0].blocks[1].attn_mask is not None, "stage 0 must shift"
    assert micro.layers[1].blocks[1].attn_mask is None, "stage 1 is one window and must not"


@pytest.mark.parametrize(
    ("name", "depths", "embed_dim", "windows"),
    [
        ("swin_tiny_patch4_window7_224", (2, 2, 6, 2), 96, (7, 7, 7, 7)),
        ("swin_s3_tiny_224", (2, 2, 6, 2), 96, (7, 7, 14, 7)),
    ],
)
def test_geometry_of_timm_models(name, depths, embed_dim, windows):
    config = models.config_of(models.create_model(name, num_classes=3), name)
    assert (config.depths, config.embed_dim, config.window_size) == (depths, embed_dim, windows)
    assert (config.num_classes, config.img_size, config.qk_scale) == (3, (224, 224), None)


def test_window_is_read_as_configured_not_as_clamped():
    """Stage 1 has 7x7 tokens, so its window of 14 shrinks to 7; the configuration still says 14."""
    config = dataclasses.replace(MICRO_DIGITS, depths=(1, 1), window_size=(14, 14))
    model = models.model_from_config(config)
    assert model.layers[1].blocks[0].window_size == (7, 7)
    assert models.config_of(model, MICRO).window_size == (14, 14)


@pytest.mark.parametrize(
    "change",
    [
        {"qkv_bias": False},
        {"qk_scale": 0.25},
        {"mlp_ratio": 2.0},
        {"img_size": (28, 56)},
        {"img_size": (30, 26)},
        {"img_size": (30, 26), "pad_first": True},
        {"img_size": (30, 26), "pad_first": True, "version": 2},
        {"num_classes": 0},
        {"in_chans": 3},
        {"depths": (1, 3), "num_heads": (2, 4)},
    ],
)
def test_model_from_config_and_config_of_are_inverse(change):
    config = dataclasses.replace(MICRO_DIGITS, **change)
    model = models.model_from_config(config)
    assert models.config_of(model, MICRO) == config
    assert model(images(config, batch=1)).isfinite().all()


@pytest.mark.parametrize("ratio", [2.3, 8 / 3, 2.6, 1.3, 3.999])
@pytest.mark.parametrize("dim", [24, 32, 40])
def test_hidden_channels_are_the_whole_part_of_a_ratio(ratio, dim):
    """timm's rule: the ratio that stage 0 shows, 55/24 for 2.3, would give other stages less than they have."""
    config = dataclasses.replace(MICRO_DIGITS, embed_dim=dim, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=(7, 7, 7),
                                 mlp_ratio=ratio)
    model = models.model_from_config(config)
    found = models.config_of(model, MICRO)
    assert [found.hidden_dim(dim << i) for i in range(3)] == [int((dim << i) * ratio) for i in range(3)]


@pytest.mark.parametrize("version", [1, 2])
def test_windows_that_timm_scaled_with_the_image_are_known(version):
    model = models.model_from_config(dataclasses.replace(MICRO_DIGITS, version=version))
    model.set_input_size(img_size=(56, 56))
    config = models.config_of(model, MICRO)
    assert (config.img_size, config.window_size) == ((56, 56), (14, 14))
    again = models.model_from_config(config)
    again.load_state_dict(model.state_dict())
    x = images(config, batch=1)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_seed_decides_the_random_weights_and_leaves_the_callers_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (models.create_model(MICRO, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.fc.weight"], other["head.fc.weight"])


def test_no_stochastic_depth(micro):
    """Training mode must compute the function of eval mode, or distillation would chase noise."""
    tiny = models.create_model("swin_tiny_patch4_window7_224", num_classes=2)
    assert not any(isinstance(m, timm.layers.DropPath) for m in tiny.modules())
    assert torch.equal(micro.train()(images()), micro.eval()(images()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "swin_huge"}, "swin_tiny_patch4_window7_224"),
        ({"name": "resnet18", "num_classes": 2}, "only Swin-V1"),
        ({"name": "swinv2_cr_tiny_ns_224", "num_classes": 2}, "only Swin-V1"),
        ({"name": MICRO, "activation": "silu"}, "gelu, relu"),
    ],
)
def test_wrong_requests_are_explained(arguments, message):
    with pytest.raises(ModelError, match=message):
        models.create_model(**arguments)


def test_a_part_of_a_patch_is_refused():
    with pytest.raises(FormatError, match=r"img_size \(31, 31\) is not a multiple of patch_size 2"):
        models.create_model(MICRO, img_size=31)


def _break_eps(model):
    model.layers[0].blocks[0].norm2.eps = 1e-6


def _break_scale(model):
    model.layers[1].blocks[0].attn.scale *= 2


def _break_activation(model):
    model.layers[0].blocks[1].mlp.act = nn.GELU(approximate="tanh")


def _break_partition(model):
    model.layers[0].blocks[0].always_partition = True


def _break_pool(model):
    model.global_pool = "max"


def _break_ape(model):
    model.absolute_pos_embed = nn.Parameter(torch.zeros(1, 196, 32))


def _break_shift(model):
    model.layers[0].blocks[1].shift_size = (2, 2)


def _break_resolution(model):
    model.layers[1].blocks[0].input_resolution = (7, 6)


def _break_mask(model):
    model.layers[0].blocks[1].attn_mask = model.layers[0].blocks[1].attn_mask[:2]


def _break_head_dim(model):
    model.layers[0].blocks[0].attn.qkv = nn.Linear(32, 3 * 48)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_eps, "layers.0.blocks.0.norm2 has eps"),
        (_break_scale, "layers.1.blocks.0 has its own qk_scale"),
        (_break_activation, "layers.0.blocks.1 has the activation"),
        (_break_partition, "always_partition"),
        (_break_pool, "pools with 'max'"),
        (_break_ape, "ape"),
        (_break_shift, "window and shift"),
        (_break_resolution, r"layers.1.blocks.0 is made for \(7, 6\) tokens, \(7, 7\) come to it"),
        (_break_mask, "layers.0.blocks.1 has a mask of 2 windows, not 4"),
        (_break_head_dim, "head_dim"),
    ],
)
def test_what_the_engine_cannot_run_is_refused(micro, damage, message):
    damage(micro)
    with pytest.raises(ModelError, match=message):
        models.config_of(micro, MICRO)


def test_without_network_the_hub_gives_one_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match="give its path"):
        models.create_model("swin_tiny_patch4_window7_224", weights="pretrained")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in22k_ft_in1k"])
def test_which_of_timms_weights_they_are_is_noted(monkeypatch, tmp_path, name):
    """What a name without a tag stands for is up to timm's version."""
    build = models._build
    monkeypatch.setattr(models, "_build", lambda name, wanted, pretrained: build(name, {**wanted, "depths": (1,) * 4}, False))
    tag = timm.create_model(name).pretrained_cfg["tag"]
    weights = f"swin_tiny_patch4_window7_224.{tag}"
    model = models.create_model(name, weights="pretrained")
    meta = models.checkpoint_meta(model, name)
    assert meta["timm_weights"] == weights and copy.deepcopy(model).timm_weights == weights
    assert "timm_weights" not in models.checkpoint_meta(models.create_model(name, weights="random"), name)
    args = argparse.Namespace(weights="pretrained", model=name, data="images", seed=0, activation=None)
    assert quantize._load_model(args)[2] == {"weights": "pretrained", "timm_weights": weights}


# --- GELU-less --------------------------------------------------------------------------------------------------------


def test_geluless_block_has_relu_and_a_frozen_zero_bias(micro):
    nn.init.ones_(micro.layers[0].blocks[0].mlp.fc1.bias)
    before = copy.deepcopy(micro)
    models.make_geluless_block(models.blocks_of(micro)[0])
    mlp = micro.layers[0].blocks[0].mlp
    assert isinstance(mlp.act, nn.ReLU) and not mlp.fc1.bias.any() and not mlp.fc1.bias.requires_grad
    assert not models.is_geluless(micro), "one block of four"
    untouched = [n for n, p in before.state_dict().items() if torch.equal(p, micro.state_dict()[n])]
    assert len(untouched) == len(before.state_dict()) - 1
    models.make_geluless(micro)
    assert models.is_geluless(micro)


def test_geluless_forward_is_relu_of_the_product_alone(micro):
    models.make_geluless(micro)
    mlp = micro.layers[0].blocks[0].mlp
    x = torch.randn(5, 32)
    expected = nn.functional.linear(torch.clamp(x @ mlp.fc1.weight.T, min=0), mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x), expected)


def test_blocks_are_in_order(micro):
    assert models.blocks_of(micro) == [micro.layers[i].blocks[j] for i in (0, 1) for j in (0, 1)]


# --- Layouts ----------------------------------------------------------------------------------------------------------


def test_layouts_are_inverse_and_idempotent(micro):
    state = micro.state_dict()
    microsoft = models.to_microsoft_layout(state)
    assert {"head.weight", "layers.0.downsample.reduction.weight"} <= microsoft.keys()
    assert not any(name.startswith(("layers.1.downsample", "head.fc")) for name in microsoft)
    assert models.to_microsoft_layout(microsoft).keys() == microsoft.keys()
    for back in (models.to_timm_layout(microsoft), models.to_timm_layout(state)):
        assert list(back) == list(state)
        assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_microsoft_checkpoint_loads(micro, tmp_path):
    nn.init.ones_(micro.layers[0].blocks[0].mlp.fc1.bias)  # all zero, it might be a GELU-less student's
    state = models.to_microsoft_layout(micro.state_dict())
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    torch.save({"model": state}, tmp_path / "ms.pth")
    loaded = models.create_model(MICRO, weights=tmp_path / "ms.pth", seed=9)
    assert torch.equal(loaded(images()), micro(images()))


def test_reduction_columns_are_in_microsofts_order(micro):
    """Microsoft concatenates x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]; timm must do the same."""
    merge = micro.layers[1].downsample
    x = torch.randn(2, 14, 14, 32)
    gathered = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
    torch.testing.assert_close(merge(x), merge.reduction(merge.norm(gathered)))


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_checkpoint_round_trip(tmp_path, suffix, activation):
    model = models.create_model(MICRO, seed=5, num_classes=7, activation=activation)
    path = save(model, tmp_path / f"m{suffix}", note="hello")
    loaded, meta = models.load_model(path)
    assert meta["activation"] == activation and meta["note"] == "hello"
    assert SwinConfig(**meta["config"]) == models.config_of(model, MICRO)
    assert models.is_geluless(loaded) == (activation == "relu")
    assert torch.equal(loaded(images()), model(images()))
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file may stay"


def test_wrapped_and_distributed_checkpoints_are_unwrapped(micro, tmp_path):
    state = {f"module.{name}": tensor for name, tensor in micro.state_dict().items()}
    for key in ("model", "state_dict", "model_ema", "model_state_dict", "net"):
        torch.save({key: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "w.pth")
        models.load_weights(models.create_model(MICRO, seed=8), tmp_path / "w.pth")
    torch.save({"net": state, "critic": state}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="tensors by name under net, critic; one state dict is needed"):
        models.load_checkpoint(tmp_path / "w.pth")


def test_pytorchs_averaged_model_is_the_model(micro, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(micro).state_dict()
    assert "n_averaged" in averaged
    for content in (averaged, {"model": averaged}, {f"module.{name}": tensor for name, tensor in averaged.items()}):
        torch.save(content, tmp_path / "a.pth")
        models.load_weights(models.create_model(MICRO, seed=8), tmp_path / "a.pth")
    save_file({name: tensor.clone() for name, tensor in averaged.items()}, tmp_path / "a.safetensors")
    models.load_weights(models.create_model(MICRO, seed=8), tmp_path / "a.safetensors")


def test_files_of_other_kinds_are_called_by_their_names(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather have it no more
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "s.pt")
    for name in ("lfs.pth", "lfs.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torch.save({"a": torch.zeros(1)}, tmp_path / "renamed.safetensors")
    (tmp_path / "tar.pth").write_bytes(tar_of("sys_info"))
    for name, message in (
        ("s.pt", r"is a TorchScript archive; save the model's state_dict\(\)"),
        ("lfs.pth", "is a Git LFS pointer, .*`git lfs pull`"),
        ("lfs.safetensors", "is a Git LFS pointer, .*`git lfs pull`"),
        ("renamed.safetensors", r"is a PyTorch checkpoint, not a safetensors file; .* ends in \.pth"),
        ("tar.pth", "is of a kind that cannot be read without running code; save the model's"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(CheckpointError, match=message) as error:
                models.load_checkpoint(tmp_path / name)
        assert "weights_only" not in str(error.value) and "cut off" not in str(error.value), name


def tar_of(name: str) -> bytes:
    """A tar file with one empty file: PyTorch's format of before 0.1.10, which weights_only refuses."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


@pytest.mark.parametrize(("weights", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema")])
def test_the_moving_average_is_taken_and_that_is_said_once(weights, average, micro, tmp_path, capsys):
    plain, averaged = micro.state_dict(), models.create_model(MICRO, seed=9).state_dict()
    swa = {"n_averaged": torch.tensor(5), **{f"module.{name}": tensor for name, tensor in averaged.items()}}
    for number, content in enumerate((averaged, swa)):
        path = tmp_path / f"{number}.pth"
        torch.save({weights: plain, average: content, "epoch": 3}, path)
        for _ in range(2):
            found, _ = models.load_checkpoint(path)
        assert torch.equal(found["head.fc.weight"], averaged["head.fc.weight"]) and found.keys() == averaged.keys()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{path}: the weights under {average} are taken, not what is under {weights}: ")

    for number, content in enumerate((None, {}, {"decay": 0.9, "shadow": averaged})):
        path = tmp_path / f"none{number}.pth"
        torch.save({weights: plain, average: content}, path)
        assert torch.equal(models.load_checkpoint(path)[0]["head.fc.weight"], plain["head.fc.weight"])
        said = f"{path}: the weights under {weights} are taken, not what is under {average}: "
        assert capsys.readouterr().err.startswith(said) == (content is not None)


def test_number_of_classes_follows_the_checkpoint(tmp_path):
    path = save(models.create_model(MICRO, num_classes=4), tmp_path / "m.pth")
    assert models.create_model(MICRO, weights=path).num_classes == 4


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": (56, 56)},
        {"qk_scale": 0.5},
        {"img_size": (30, 26), "pad_first": True, "qkv_bias": False},
        {"depths": (1, 3), "mlp_ratio": 2.0, "num_classes": 0, "in_chans": 3},
        {"version": 2, "name": f"{MICRO}_custom", "window_size": (7, 5)},
    ],
)
def test_a_checkpoints_own_geometry_counts_by_name_too(change, tmp_path, seed):
    config = dataclasses.replace(MICRO_DIGITS, **change)
    model = models.model_from_config(config)
    models.exercise(model, seed)
    path = tmp_path / "m.safetensors"
    models.save_checkpoint(path, model, models.checkpoint_meta(model, config.name))
    state = torch.get_rng_state()
    found = models.create_model(config.name, weights=path)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is its own"
    assert models.config_of(found, config.name) == config and not found.training
    assert torch.equal(found(images(config)), model(images(config)))


def test_only_what_is_asked_for_replaces_a_checkpoints_geometry(tmp_path, seed):
    config = dataclasses.replace(MICRO_DIGITS, name="own", qk_scale=0.5)
    model = models.model_from_config(config)
    models.exercise(model, seed)
    path = tmp_path / "m.pth"
    models.save_checkpoint(path, model, models.checkpoint_meta(model, "own"))
    for size in (56, (56, 84)):
        found = models.config_of(models.create_model("own", weights=path, img_size=size, num_classes=10), "own")
        assert found == dataclasses.replace(config, img_size=(56, 56) if size == 56 else size)
    for asked in ({"num_classes": 4}, {"in_chans": 3}):
        with pytest.raises(CheckpointError, match="wrong shape"):
            models.create_model("own", weights=path, **asked)
    for load in (models.load_model, lambda path, name: models.create_model(name, weights=path)):
        with pytest.raises(CheckpointError, match=r"of own, not of swin_micro_digits; give that name, or none.*\(--model\)"):
            load(path, MICRO)


def test_every_fault_of_a_checkpoint_is_listed(micro, tmp_path):
    state = micro.state_dict()
    del state["norm.weight"]
    state["extra"] = torch.zeros(1)
    state["head.fc.weight"] = torch.zeros(3, 64)
    state["norm.bias"] = torch.full((64,), float("nan"))
    torch.save(state, tmp_path / "bad.pth")
    target = models.create_model(MICRO, seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(CheckpointError) as error:
        models.load_weights(target, tmp_path / "bad.pth")
    for part in (
        "missing (1): norm.weight;",
        "unexpected (1): extra",
        "head.fc.weight [3, 64] (the model has [10, 64])",
        "NaN or infinite (1): norm.bias",
    ):
        assert part in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_of_many_faults_the_first_are_listed_and_all_are_counted(micro):
    state = {f"x{i:02d}": torch.zeros(1) for i in range(9)} | dict(list(micro.state_dict().items())[8:])
    with pytest.raises(CheckpointError) as error:
        models.load_state(micro, state, {}, "f")
    assert re.search(r"missing \(8\): (\S+, ){7}\S+; unexpected \(9\): x00, (\S+, ){6}x07 and 1 more$", str(error.value))


def test_gelu_and_geluless_are_not_mixed_up(micro, tmp_path):
    nn.init.ones_(micro.layers[0].blocks[0].mlp.fc1.bias)
    gelu = save(micro, tmp_path / "gelu.pth")
    relu = save(models.create_model(MICRO, weights=gelu, activation="relu"), tmp_path / "relu.pth")
    with pytest.raises(CheckpointError, match="is a GELU-less checkpoint"):
        models.create_model(MICRO, weights=relu)
    with pytest.raises(CheckpointError, match="FC1 biases"):
        models.load_weights(models.create_model(MICRO, activation="relu"), gelu)
    assert models.is_geluless(models.create_model(MICRO, weights=relu, activation="relu"))


def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for path, writer in ((tmp_path / "a.pth", torch.save), (tmp_path / "b.pth", _raw_pickle)):
        writer({"model": Payload()}, path)
        with pytest.raises(CheckpointError, match="could run code|not a readable"):
            models.load_checkpoint(path)
    assert not marker.exists()


def test_a_checkpoint_of_timms_training_program_loads(micro, tmp_path):
    """Its options are an argparse.Namespace: values only. Anything else in there is refused as elsewhere."""
    options = argparse.Namespace(model="swin_micro", lr=5e-4, opt_betas=None, aug_splits=0, opt_kwargs={}, data_dir="d")
    optimizer = torch.optim.AdamW(micro.parameters())
    CheckpointSaver(micro, optimizer, options, checkpoint_dir=str(tmp_path)).save_checkpoint(3, metric=71.5)
    (path,) = tmp_path.glob("checkpoint-3*")
    assert isinstance(torch.load(path, weights_only=False)["args"], argparse.Namespace)
    loaded = models.create_model(MICRO, seed=8)
    models.load_weights(loaded, path)
    assert torch.equal(loaded.eval()(images()), micro.eval()(images()))

    options.config = SwinConfig
    torch.save({"state_dict": micro.state_dict(), "args": options}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"\(pyharness\.config\.SwinConfig\) whose loading could run code"):
        models.load_checkpoint(tmp_path / "other.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "for this file alone"


def _raw_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.98])
def test_a_cut_off_checkpoint_is_an_error(micro, tmp_path, suffix, keep):
    path = save(micro, tmp_path / f"m{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match="cut off"):
        models.load_checkpoint(path)


@pytest.mark.parametrize("content", [3, {}, [1, 2], {"a": 1}, {"model": {"w": torch.zeros(1), "n": None}}])
def test_what_is_no_state_dict_is_an_error(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="state dict"):
        models.load_checkpoint(tmp_path / "x.pth")


def test_missing_file_wrong_suffix_and_missing_name(micro, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        models.load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"\.safetensors, \.pth or \.pt"):
        models.save_checkpoint(tmp_path / "m.bin", micro, {})
    torch.save(micro.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="timm name"):
        models.load_model(tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="not of swin_tiny"):
        models.load_model(save(micro, tmp_path / "m.pth"), "swin_tiny_patch4_window7_224")


def test_packaged_teacher_is_the_micro_model_with_gelu():
    model, meta = models.load_model(models.MICRO_TEACHER)
    assert meta["model"] == MICRO and meta["activation"] == "gelu" and not models.is_geluless(model)
    assert models.MICRO_TEACHER.stat().st_size < 1_000_000
    same = models.create_model(MICRO, weights="pretrained")
    assert torch.equal(same(images()), model(images()))


# --- atomic_path ------------------------------------------------------------------------------------------------------


def test_atomic_path_replaces_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == target.parent
        temporary.write_text("one")
        assert not target.exists()
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "one"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_atomic_path_explains_an_impossible_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot be made"), atomic_path(tmp_path / "file" / "x"):
        pass
    with pytest.raises(HarnessError, match="nothing was written"), atomic_path(tmp_path / "x"):
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(HarnessError, match="is a folder"), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_text("x")
