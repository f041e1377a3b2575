"""Checkpoints of others, in and out: timm old and new, Microsoft, Hugging Face, FasterTransformer's calibration."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import pytest
import timm
import torch
from quant_helpers import NON_SQUARE, calibrated, exercised_model, images_for, one_thread
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import checkpoint_filter_fn

from pyharness import data, models
from pyharness.calibrated import load_calibrated, save_calibrated
from pyharness.checkpoint import describe_geometry, describe_state, to_microsoft_layout
from pyharness.config import MICRO_DIGITS, SwinConfig
from pyharness.convert import main, to_checkpoint, to_engine_file
from pyharness.engine_file import load_engine_file, save_engine_file
from pyharness.errors import CheckpointError, FormatError, HarnessError, ModelError
from pyharness.export import COMMANDS, Source, export, open_source, resized
from pyharness.hf_format import DEFAULTS, V2_DEFAULTS, published_name, to_huggingface_names
from pyharness.model_card import read_card
from pyharness.quantize import main as quantize_main
from pyharness.random_engine import random_engine_file

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name
CONFIGS = {
    "micro": MICRO_DIGITS,
    "RGB, 2 classes": dataclasses.replace(MICRO_DIGITS, in_chans=3, num_classes=2),
    "no head": dataclasses.replace(MICRO_DIGITS, num_classes=0),
    "ImageNet-22k classes": dataclasses.replace(MICRO_DIGITS, num_classes=21841),
    "not square": dataclasses.replace(MICRO_DIGITS, img_size=(56, 112), in_chans=3),
    "window 12": SwinConfig("window12", (96, 96), 4, 3, 5, 32, (2, 2), (1, 2), (12, 12), mlp_ratio=2.0, qkv_bias=False),
    "Swin-V2": dataclasses.replace(MICRO_DIGITS, name="v2", version=2),
    "V2, no biases": SwinConfig("v2_bare", (64, 96), 2, 1, 0, 16, (2, 2), (1, 2), (8, 8), qkv_bias=False, version=2),
    "V2, other windows": SwinConfig(  # 16, 8 and 4 tokens: the last two stages are one window, the last a smaller one
        "v2_windows", (64, 64), 4, 3, 5, 32, (2, 2, 2), (1, 2, 4), (8, 8, 8), version=2,
        pretrained_window_size=(6, 6, 3),
    ),  # fmt: skip
}
TRANSFORMERS_BOUND = 1e-11
"""Relative to the largest logit, in float64: 2**-53 times some thousands of additions. A tensor in the wrong place moves
the logits by more than a hundredth."""


@pytest.fixture(params=CONFIGS)
def config(request) -> SwinConfig:
    return CONFIGS[request.param]


def source_of(config: SwinConfig, seed: int, geluless: bool = False, **meta) -> Source:
    return Source(exercised_model(config, seed, geluless).eval(), config, {"model": config.name, **meta})


def path_for(command: str, folder, suffix: str = ".pth"):
    return folder / (command if command == "to-hf" else f"{command}{suffix}")


def same_function(one, other, config: SwinConfig, seed: int = 0) -> bool:
    images = images_for(config, 2, seed)
    with torch.no_grad():
        return torch.equal(one(images), other(images))


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_comes_back_from_every_format(command, geluless, config, tmp_path, seed):
    source = source_of(config, seed, geluless, distillation={"seed": 3})
    path = path_for(command, tmp_path)
    export(source, command, path)
    loaded, meta = models.load_model(path)
    # Hugging Face's models pad ahead of the shift, which shows at other image sizes.
    assert models.config_of(loaded, meta["model"]) == dataclasses.replace(config, pad_first=command == "to-hf")
    assert meta["activation"] == ("relu" if geluless else "gelu") and models.is_geluless(loaded) == geluless
    assert meta["distillation"] == {"seed": 3}
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in source.model.state_dict().items())
    assert same_function(source.model, loaded, config)


@pytest.mark.parametrize("command", ["to-timm", "to-microsoft"])
def test_a_file_stripped_of_its_meta_data_loads_by_name(command, tmp_path, seed):
    """As the files that others publish: Microsoft's {"model": ...} with its buffers, timm's state dict."""
    source = source_of(dataclasses.replace(MICRO_DIGITS, num_classes=2, in_chans=3), seed)
    path = tmp_path / "x.pth"
    export(source, command, path)
    content = torch.load(path, weights_only=True)["model"]
    if command == "to-microsoft":
        index = content["layers.0.blocks.0.attn.relative_position_index"]
        assert index.shape == (49, 49) and content["layers.0.blocks.1.attn_mask"].shape == (4, 49, 49)
        assert "layers.0.downsample.reduction.weight" in content and "layers.0.blocks.0.attn_mask" not in content
    torch.save({"model": content}, path)
    with pytest.raises(CheckpointError, match=r"--model\). It shows embed_dim 32, depths \[2, 2\].*windows \[7, 7\].*2 cl"):
        models.load_model(path)
    loaded, meta = models.load_model(path, MICRO)
    assert meta == {"model": MICRO, "activation": "gelu"} and (loaded.num_classes, loaded.in_chans) == (2, 3)
    assert same_function(source.model, loaded, source.config)


@pytest.mark.parametrize("late_downsample", [False, True])
@pytest.mark.parametrize("plain_head", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model."])
def test_every_age_of_timm_loads(late_downsample, plain_head, prefix, tmp_path, seed):
    """Downsample moved from the end of a stage to the start of the next, the head from `head` to `head.fc`."""
    model = exercised_model(MICRO_DIGITS, seed)
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("layers.1.downsample", "layers.0.downsample") if late_downsample else name
        state[prefix + (name.replace("head.fc.", "head.") if plain_head else name)] = tensor
    torch.save({"state_dict_ema": state, "epoch": 3}, tmp_path / "old.pth")
    assert same_function(model, models.load_model(tmp_path / "old.pth", MICRO)[0], MICRO_DIGITS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["calibrated", "engine"])
@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_calibrated_checkpoints_and_engine_files_go_out_too(command, kind, geluless, tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, geluless, 1)
    if kind == "engine":
        save_engine_file(tmp_path / "in.safetensors", to_engine_file(checkpoint))
        checkpoint = to_checkpoint(load_engine_file(tmp_path / "in.safetensors"))
    else:
        save_calibrated(tmp_path / "in.safetensors", checkpoint)
    out = path_for(command, tmp_path)
    assert main([command, str(tmp_path / "in.safetensors"), str(out)]) == 0
    loaded, meta = models.load_model(out)
    state = to_microsoft_layout(loaded.state_dict())
    expected = {name: t for name, t in checkpoint.state.items() if not name.endswith("._amax")}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    left = state.keys() - expected.keys()
    assert left == ({name for name in state if name.endswith("fc1.bias")} if geluless else set())
    card = read_card(out)
    assert card["activation"] == meta["activation"] == ("relu" if geluless else "gelu")
    assert ("dequantized" if kind == "engine" else "left behind") in card["notes"][0]
    asked = [command, str(tmp_path / "in.safetensors"), str(path_for(command, tmp_path / "asked")), "--activation"]
    assert main([*asked, meta["activation"]]) == 0
    with pytest.raises(CheckpointError, match=f"is {meta['activation']}, not .*leave --activation out"):
        main([*asked, "gelu" if geluless else "relu"])


# --- GELU-less files that do not say so -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["to-timm", "to-microsoft"])
def test_a_student_without_meta_data_is_refused_until_somebody_says_what_it_is(command, tmp_path, seed):
    source = source_of(MICRO_DIGITS, seed, geluless=True)
    export(source, command, tmp_path / "s.pth")
    torch.save({"model": torch.load(tmp_path / "s.pth", weights_only=True)["model"]}, tmp_path / "s.pth")
    for load in (models.load_model, lambda path, name: models.create_model(name, weights=path)):
        with pytest.raises(CheckpointError, match="all 4 FC1 biases are exactly zero.*--model NAME --activation relu"):
            load(tmp_path / "s.pth", MICRO)
    arguments = ["to-timm", str(tmp_path / "s.pth"), str(tmp_path / "t.safetensors"), "--model", MICRO]
    with pytest.raises(CheckpointError, match="exactly zero"):
        main(arguments)
    assert main([*arguments, "--activation", "relu"]) == 0
    loaded, _ = models.load_model(tmp_path / "t.safetensors")
    assert models.is_geluless(loaded) and same_function(source.model, loaded, MICRO_DIGITS)
    with pytest.raises(CheckpointError, match="says that its activation is relu, not gelu"):
        models.load_model(tmp_path / "t.safetensors", activation="gelu")


def test_one_bias_that_is_not_zero_makes_it_a_gelu_model(tmp_path, seed):
    model = source_of(MICRO_DIGITS, seed, geluless=True).model
    state = model.state_dict()
    state["layers.1.blocks.1.mlp.fc1.bias"][5] = 1e-30
    torch.save(state, tmp_path / "s.pth")
    assert not models.is_geluless(models.load_model(tmp_path / "s.pth", MICRO)[0])
    with pytest.raises(CheckpointError, match="has FC1 biases"):
        models.load_model(tmp_path / "s.pth", MICRO, activation="relu")


# --- An ablation's student: ReLU with FC1 biases ------------------------------------------------------------------------


@pytest.fixture
def biased_student(tmp_path, seed):
    """(model, file) of what `distill.py --drop-bias none` writes."""
    model = exercised_model(MICRO_DIGITS, seed).eval()
    models.set_activation(model, models.RELU_WITH_FC1_BIAS)
    models.save_checkpoint(tmp_path / "student.safetensors", model, models.checkpoint_meta(model, MICRO))
    return model, tmp_path / "student.safetensors"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_student_with_fc1_biases_stays_one_in_every_format(command, biased_student, tmp_path, capsys):
    student, path = biased_student
    out = path_for(command, tmp_path, ".safetensors")
    assert main([command, str(path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "ReLU with FC1 biases, which no INT8 graph runs" in printed and "GELU-less" not in printed
    loaded, meta = models.load_model(out)
    assert meta["activation"] == models.RELU_WITH_FC1_BIAS and same_function(student, loaded, MICRO_DIGITS)
    assert not same_function(models.model_from_config(MICRO_DIGITS), loaded, MICRO_DIGITS)
    assert read_card(out)["activation"] == models.RELU_WITH_FC1_BIAS
    with pytest.raises(CheckpointError, match="FC1 biases that are not zero"):
        quantize_main(["--weights", str(out), "--out", str(tmp_path / "c.pth"), "--batches", "1", "--batch-size", "2"])
    assert not (tmp_path / "c.pth").exists()
    again = path_for("to-timm", tmp_path, ".pth")
    assert main(["to-timm", str(out), str(again), "--img-size", "56"]) == 0
    bigger, meta = models.load_model(again)
    assert meta["activation"] == models.RELU_WITH_FC1_BIAS
    wanted = models.model_from_config(dataclasses.replace(MICRO_DIGITS, img_size=(56, 56)))
    models.set_activation(wanted, models.RELU_WITH_FC1_BIAS)
    wanted.load_state_dict(student.state_dict())
    assert same_function(wanted, bigger, dataclasses.replace(MICRO_DIGITS, img_size=(56, 56)))


def test_transformers_computes_a_student_with_fc1_biases(transformers, biased_student, tmp_path):
    student, path = biased_student
    assert main(["to-hf", str(path), str(tmp_path / "hf")]) == 0
    theirs = transformers.SwinForImageClassification.from_pretrained(tmp_path / "hf")
    assert theirs.config.hidden_act == "relu"
    assert_same_logits(theirs, student, MICRO_DIGITS)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install '.[test]')")


def assert_same_logits(theirs, ours, config: SwinConfig) -> None:
    images = images_for(config, 2, 0).double()
    with torch.no_grad():
        wanted, found = ours.double()(images), theirs.double().eval()(images).logits
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < TRANSFORMERS_BOUND * wanted.abs().max()


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
def test_transformers_computes_what_we_export(transformers, geluless, config, tmp_path, seed):
    source = source_of(config, seed, geluless)
    export(source, "to-hf", tmp_path / "hf")
    model, info = their_class(transformers, config).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), "no tensor may be missing, unexpected or of another shape"
    assert model.config.num_labels == config.num_classes
    assert_same_logits(model, source.model, config)


def their_class(transformers, config: SwinConfig):
    return transformers.SwinForImageClassification if config.version == 1 else transformers.Swinv2ForImageClassification


def transformers_model(transformers, config: SwinConfig, seed: int, **changes):
    """A model of their own making, every parameter of which matters."""
    fields = {
        "image_size": config.img_size, "patch_size": config.patch_size, "num_channels": config.in_chans,
        "embed_dim": config.embed_dim, "depths": config.depths, "num_heads": config.num_heads,
        "window_size": config.window_size[0], "mlp_ratio": config.mlp_ratio, "qkv_bias": config.qkv_bias,
        "num_labels": config.num_classes,
    }  # fmt: skip
    if config.version == 2:
        fields["pretrained_window_sizes"] = config.pretrained_window_size or (0, 0, 0, 0)
    kind = transformers.SwinConfig if config.version == 1 else transformers.Swinv2Config
    model = their_class(transformers, config)(kind(**{**fields, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


KINDS = [("model.safetensors", name) for name in CONFIGS]
KINDS += [(kind, name) for name in ("RGB, 2 classes", "Swin-V2")
          for kind in ("pytorch_model.bin", "shards", "file", "in memory")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_we_compute_what_transformers_saves(transformers, kind, name, tmp_path, seed):
    config = CONFIGS[name]
    theirs = transformers_model(transformers, config, seed)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": "50KB"} if kind == "shards" else {}))
    weights = tmp_path / "model.safetensors"
    if kind == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not weights.exists()
    elif kind == "pytorch_model.bin":
        torch.save(load_file(weights), tmp_path / kind)
        weights.unlink()
    elif kind == "in memory":  # the names of transformers 5's modules, which its files do not have
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        weights.unlink()
    ours, meta = models.load_model(weights if kind == "file" else tmp_path)
    wanted = dataclasses.replace(config, name=meta["model"], pad_first=True)
    assert models.config_of(ours, meta["model"]) == wanted and meta["activation"] == "gelu"
    assert_same_logits(theirs, ours, config)


def test_a_relu_model_of_transformers_is_geluless_without_fc1_biases_alone(transformers, tmp_path, seed):
    theirs = transformers_model(transformers, MICRO_DIGITS, seed, hidden_act="relu")
    theirs.save_pretrained(tmp_path)
    ours, meta = models.load_model(tmp_path)
    assert meta["activation"] == models.RELU_WITH_FC1_BIAS and not models.is_geluless(ours)
    assert_same_logits(theirs, ours, MICRO_DIGITS)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("fc1.bias"):
                parameter.zero_()
    theirs.save_pretrained(tmp_path)
    ours, meta = models.load_model(tmp_path)
    assert meta["activation"] == "relu" and models.is_geluless(ours)
    assert_same_logits(theirs, ours, MICRO_DIGITS)


@pytest.mark.parametrize(("kind", "defaults"), [("SwinConfig", DEFAULTS), ("Swinv2Config", V2_DEFAULTS)])
def test_defaults_are_those_of_transformers(kind, defaults, transformers):
    config = getattr(transformers, kind)()
    theirs = {name: getattr(config, name) for name in defaults}
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in theirs.items()} == defaults


def test_older_files_of_transformers_hold_buffers_too(transformers, tmp_path, seed):
    """Up to transformers 4.30 or so those that follow from the geometry were saved."""
    config = CONFIGS["Swin-V2"]
    theirs = transformers_model(transformers, config, seed)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name, buffer in theirs.named_buffers():
        if name.endswith(("relative_coords_table", "relative_position_index")):
            state[name] = buffer
    assert len(state) > len(list(theirs.parameters()))
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same_logits(theirs, models.load_model(tmp_path)[0], config)


@pytest.fixture
def folder(tmp_path, seed):
    export(source_of(MICRO_DIGITS, seed), "to-hf", tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(folder, **fields) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def edit_weights(folder, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


QKV = "swin.encoder.layers.0.blocks.0.attention.self."


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json: no such file"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "not readable JSON"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "the weights are missing"),
        (lambda f: edit_config(f, model_type="vit"), CheckpointError, r"'vit'; a Swin \('swin'\) or Swin-V2 \('swinv2'\)"),
        (lambda f: edit_config(f, model_type=["swin"]), CheckpointError, r"\['swin'\]; a Swin"),
        (lambda f: edit_config(f, model_type="swinv2"), CheckpointError, "is given for key too, which has none in Swin-V2"),
        (lambda f: edit_config(f, hidden_act="gelu_new"), ModelError, "hidden_act is 'gelu_new'"),
        (lambda f: edit_config(f, layer_norm_eps=1e-6), ModelError, "layer_norm_eps is 1e-06"),
        (lambda f: edit_config(f, use_absolute_embeddings=True), ModelError, "absolute position"),
        (lambda f: edit_config(f, id2label={"0": "a", "1": "b"}), CheckpointError, "has 10 classes.*names 2 labels"),
        (lambda f: edit_config(f, patch_size=[2, 4]), ModelError, "patch size"),
        (lambda f: edit_config(f, depths="x"), FormatError, "does not describe a Swin"),
        (lambda f: edit_config(f, window_size=14), ModelError, "fewer than the window"),
        (lambda f: edit_config(f, window_size=5), CheckpointError, "wrong shape"),
        (lambda f: edit_config(f, image_size=29), FormatError, "not a multiple of patch_size"),
        (lambda f: edit_config(f, embed_dim=64), CheckpointError, "with embed_dim 32.*wrong shape"),
        (lambda f: edit_weights(f, lambda s: s.pop(QKV + "key.bias")), CheckpointError, "key is missing"),
        (lambda f: edit_weights(f, lambda s: s.pop("swin.layernorm.bias")), CheckpointError, r"missing \(1\): norm.bias"),
        (lambda f: edit_weights(f, lambda s: s.update(extra=torch.ones(1))), CheckpointError, r"unexpected \(1\): extra"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_folder_is_explained(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        models.load_model(folder)


def test_the_file_that_was_named_is_the_one_that_is_read(folder):
    """Beside the file of the usual name, and in a folder without one; a part of many stands for all."""
    state = load_file(folder / "model.safetensors")
    average = {name: tensor + 1 for name, tensor in state.items()}
    save_file(average, folder / "model_ema.safetensors")
    weight = "norm.weight"
    plain, average = (models.load_model(folder / f"{n}.safetensors")[0].state_dict()[weight] for n in ("model", "model_ema"))
    assert torch.equal(average, plain + 1)
    (folder / "model.safetensors").unlink()
    assert torch.equal(models.load_model(folder / "model_ema.safetensors")[0].state_dict()[weight], average)
    with pytest.raises(CheckpointError, match="the weights are missing"):
        models.load_model(folder)

    names = sorted(state)
    parts = {"part-1.safetensors": names[:20], "part-2.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in ("part-1.safetensors", "part-2.safetensors"):
        assert torch.equal(models.load_model(folder / file)[0].state_dict()[weight], plain)
    assert torch.equal(models.load_model(folder / "model_ema.safetensors")[0].state_dict()[weight], average)


def test_a_file_of_timms_own_weights(tmp_path, capsys):
    assert main(["to-timm", "pretrained", str(tmp_path / "own.safetensors"), "--model", MICRO]) == 0
    model, meta = models.load_model(tmp_path / "own.safetensors")
    teacher = models.create_model(MICRO, weights="pretrained").state_dict()
    assert meta["model"] == MICRO and all(torch.equal(t, teacher[n]) for n, t in model.state_dict().items())
    for words, message in (([], "name one"), (["--model", MICRO, "--activation", "relu"], "has GELU, not relu")):
        with pytest.raises(HarnessError, match=message):
            main(["to-timm", "pretrained", str(tmp_path / "no.safetensors"), *words])
    with pytest.raises(CheckpointError, match="pretrained: no such file; .*convert.py to-timm pretrained FILE"):
        models.load_model("pretrained", MICRO)
    assert not (tmp_path / "no.safetensors").exists()


def test_normalization_is_noted_for_every_program_that_follows(tmp_path, seed):
    """Of a plain state dict, which says nothing of it: in the file, and in what is made of it."""
    torch.save(exercised_model(MICRO_DIGITS, seed).state_dict(), tmp_path / "plain.pth")
    command = ["to-timm", str(tmp_path / "plain.pth"), str(tmp_path / "noted.pth"), "--model", MICRO]
    assert main([*command, "--mean", "0.25", "--std", "0.5"]) == 0
    model, meta = models.load_model(tmp_path / "noted.pth")
    assert meta["input"] == {"mean": [0.25], "std": [0.5]}
    assert data.input_normalization(None, MICRO, model) == {"mean": [0.25], "std": [0.5]}
    assert main(["to-timm", str(tmp_path / "noted.pth"), str(tmp_path / "again.pth"), "--img-size", "56"]) == 0
    assert models.load_model(tmp_path / "again.pth")[1]["input"] == meta["input"]
    for words, message in (
        (["--mean", "0.5"], "--std needs 1 numbers, one per channel, beside the other; found none"),
        (["--mean", "0.5", "0.5", "--std", "1"], "--mean needs 1 numbers, .*; found 2"),
        (["--mean", "0.5", "--std", "0"], "--std must be greater than 0 and at most 1, found 0$"),
        (["--mean", "0.5", "--std", "nan"], "--std must be greater than 0 and at most 1, found nan$"),
        (["--mean", "nan", "--std", "1"], "--mean must be from 0 to 1, found nan$"),
        (["--mean", "-0.1", "--std", "1"], "--mean must be from 0 to 1, found -0.1$"),
        (["--mean", "123.7", "--std", "58.4"], "--mean must be from 0 to 1, found 123.7, .* by 255"),
        (["--mean", "0.5", "--std", "58.4"], "--std must be greater than 0 and at most 1, found 58.4, .* by 255"),
        (["--mean", "0.5", "--std", "inf"], "--std must be greater than 0 and at most 1, found inf"),
    ):
        with pytest.raises(HarnessError, match=message):
            main([*command, *words])


def test_more_heads_are_not_called_other_windows(tmp_path, seed):
    wide = dataclasses.replace(MICRO_DIGITS, num_heads=tuple(2 * heads for heads in MICRO_DIGITS.num_heads))
    torch.save(exercised_model(wide, seed).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match="wrong shape") as caught:
        models.load_model(tmp_path / "wide.pth", MICRO)
    assert "indows are others" not in str(caught.value)


def test_an_index_cannot_lead_out_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside the folder; refused"):
        models.load_model(folder)


def test_weights_without_their_config_are_explained(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="geometry stands in config.json"):
        models.load_model(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": (7, 14)}, "one for all stages"),
        ({"qk_scale": 0.5}, "qk_scale"),
        ({"img_size": (28, 56)}, "compute another function"),
        ({"window_size": (14, 14)}, "fewer than the window"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(change, message, tmp_path, seed):
    with pytest.raises(ModelError, match=message):
        export(source_of(dataclasses.replace(MICRO_DIGITS, **change), seed), "to-hf", tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": (7, 14)}, "one for all stages"),
        ({"img_size": (28, 56)}, r"stage 1 of \(7, 14\) tokens has windows \(7, 7\) shifted by \(0, 3\)"),
        ({"img_size": (40, 40)}, "pads ahead of it"),
    ],
)
def test_what_hugging_faces_v2_cannot_express_is_refused(change, message, tmp_path, seed):
    config = dataclasses.replace(CONFIGS["Swin-V2"], **change)
    with pytest.raises(ModelError, match=message):
        export(source_of(config, seed), "to-hf", tmp_path / "hf")


V2_SELF = "swinv2.encoder.layers.0.blocks.0.attention.self."


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: edit_config(f, pretrained_window_sizes=[8]), FormatError, "pretrained_window_size has 1 entries"),
        (lambda f: edit_config(f, pretrained_window_sizes="8"), FormatError, "does not describe a Swin"),
        (lambda f: edit_weights(f, lambda s: s.pop(V2_SELF + "value.bias")), CheckpointError, "query and value; value is"),
        (lambda f: edit_weights(f, lambda s: s.pop(V2_SELF + "key.weight")), CheckpointError, "key is missing"),
        (lambda f: edit_weights(f, lambda s: s.pop(V2_SELF + "logit_scale")), CheckpointError, "missing.*logit_scale"),
    ],
)
def test_damage_to_a_v2_folder_is_explained(damage, error, message, tmp_path, seed):
    export(source_of(CONFIGS["Swin-V2"], seed), "to-hf", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(error, match=message):
        models.load_model(tmp_path / "hf")


def test_no_pretrained_windows_may_be_said_in_three_ways(tmp_path, seed):
    config = CONFIGS["Swin-V2"]
    export(source_of(config, seed), "to-hf", tmp_path / "hf")
    for said in ([0, 0], [0, 0, 0, 0], None):
        edit_config(tmp_path / "hf", pretrained_window_sizes=said)
        loaded, meta = models.load_model(tmp_path / "hf")
        assert models.config_of(loaded, meta["model"]) == dataclasses.replace(config, pad_first=True)


def test_microsoft_shifts_otherwise_where_a_stage_is_one_window_high(tmp_path, seed):
    with pytest.raises(ModelError, match="Microsoft's Swin would take"):
        export(source_of(NON_SQUARE, seed), "to-microsoft", tmp_path / "m.pth")
    export(source_of(NON_SQUARE, seed), "to-timm", tmp_path / "t.pth")  # timm's rule is ours


@pytest.mark.parametrize(
    "name",
    ["swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384", "swinv2_small_window16_256",
     "swinv2_base_window8_256", "swinv2_base_window12_192", "swinv2_large_window12to24_192to384"],
)  # fmt: skip
def test_published_geometries_get_timms_name(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=21841, in_chans=1)
    config = dataclasses.replace(models.config_of(model, name), name="folder")
    assert published_name(config) == name
    assert published_name(dataclasses.replace(config, mlp_ratio=3.0)) is None


# --- FasterTransformer's calibrated checkpoints -----------------------------------------------------------------------


def as_ft_writes_it(checkpoint, path):
    """Microsoft's names and buffers, an amax as [1], nothing else."""
    save_calibrated(path, checkpoint)
    state = torch.load(path, weights_only=True)["model"]
    state = {name: t.reshape(1) if name.endswith("_amax") else t for name, t in state.items()}
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["head._input_quantizer._amax"] = torch.tensor(3.0)  # of a layer that the engine keeps in fp16
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize("geluless", [False, True], ids=["gelu", "relu"])
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_an_ft_calibrated_file_makes_the_same_engine_file(geluless, int8_mode, tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, geluless, int8_mode)
    path = as_ft_writes_it(checkpoint, tmp_path / "ft.pth")
    with pytest.raises(CheckpointError, match=r"does not say of which model.*--model\).*embed_dim 32") as error:
        load_calibrated(path)
    advised = str(error.value).split("convert.py ")[1].replace("OUT", f"{tmp_path}/named.pth").replace("NAME", MICRO)
    assert main(advised.split()) == 0 and load_calibrated(tmp_path / "named.pth").graph == checkpoint.graph
    assert main(["to-engine", str(path), str(tmp_path / "e.safetensors"), "--model", MICRO]) == 0
    found, wanted = load_engine_file(tmp_path / "e.safetensors"), to_engine_file(checkpoint)
    assert (found.config, found.graph, found.int8_mode) == (MICRO_DIGITS, checkpoint.graph, int8_mode)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, wanted.tensors, strict=True))
    images = images_for(MICRO_DIGITS, 2, 0)
    with torch.no_grad():
        assert torch.equal(load_calibrated(path, MICRO).to_model()(images), checkpoint.to_model()(images))


def test_a_student_that_kept_its_zero_biases_is_recognized(tmp_path):
    model, checkpoint = calibrated(MICRO_DIGITS, True, 1)
    biases = {name: t for name, t in model.state_dict().items() if name.endswith("fc1.bias")}
    torch.save({"model": {**checkpoint.state, **biases}}, tmp_path / "ft.pth")
    again = load_calibrated(tmp_path / "ft.pth", MICRO)
    assert again.graph == "geluless_int8" and not again.state.keys() & biases.keys()
    odd = {"layers.0.blocks.0.mlp.fc1._aftergemm_quantizer._amax": torch.tensor(1.0)}
    torch.save({"model": {**checkpoint.state, **biases, **odd}}, tmp_path / "ft.pth")
    with pytest.raises(CheckpointError, match="no FC1 bias but zero"):
        load_calibrated(tmp_path / "ft.pth", MICRO)


def test_an_ft_calibrated_file_gets_its_models_normalization(tmp_path):
    """timm's of a model that takes colour or grey, the digits' of the micro model; none of other channels."""
    path, tiny = tmp_path / "ft.pth", "swin_tiny_patch4_window7_224"
    as_ft_writes_it(calibrated(MICRO_DIGITS, False, 1)[1], path)
    assert load_calibrated(path, MICRO).meta["input"] == {"mean": [0.305], "std": [0.325]}
    config = dataclasses.replace(MICRO_DIGITS, in_chans=3)
    as_ft_writes_it(calibrated(config, False, 1)[1], path)
    assert "input" not in load_calibrated(path, MICRO).meta, "no digits in colour"
    assert "input" not in to_engine_file(load_calibrated(path, MICRO)).meta
    for channels in (3, 1, 2):
        config = models.config_of(models.create_model(tiny, num_classes=2, in_chans=channels), tiny)
        save_calibrated(path, to_checkpoint(random_engine_file(config, "ft_int8")))
        torch.save({"model": torch.load(path, weights_only=True)["model"]}, path)
        meta = to_engine_file(load_calibrated(path, tiny)).meta
        if channels == 2:
            assert "input" not in meta
        elif channels == 1:
            assert meta["input"]["mean"] == [pytest.approx(0.449)]
        else:
            assert meta["input"] == data.input_normalization("images", tiny, models.create_model(tiny))


def test_int8_mode_2_may_be_asked_of_a_file_that_has_more(tmp_path):
    path = as_ft_writes_it(calibrated(MICRO_DIGITS, False, 1)[1], tmp_path / "ft.pth")
    ef = to_engine_file(load_calibrated(path, MICRO, int8_mode=2))
    assert ef.int8_mode == 2 and load_calibrated(path, MICRO).int8_mode == 1


def test_options_that_contradict_the_file_are_refused(tmp_path):
    save_calibrated(tmp_path / "c.pth", calibrated(MICRO_DIGITS, False, 1)[1])
    with pytest.raises(CheckpointError, match="its int8_mode is 1, not 2; leave --int8-mode out"):
        load_calibrated(tmp_path / "c.pth", int8_mode=2)
    with pytest.raises(CheckpointError, match="of swin_micro_digits, not of swin_tiny.*; give that name, or none"):
        load_calibrated(tmp_path / "c.pth", "swin_tiny_patch4_window7_224")
    for name in (MICRO, f"{MICRO}.tag"):
        assert load_calibrated(tmp_path / "c.pth", name).config == MICRO_DIGITS
    with pytest.raises(CheckpointError, match="is a calibrated checkpoint"):
        models.load_model(tmp_path / "c.pth")


def test_a_calibrated_file_becomes_a_pth_as_ft_reads_it(tmp_path):
    _, checkpoint = calibrated(MICRO_DIGITS, False, 1)
    save_engine_file(tmp_path / "e.safetensors", to_engine_file(checkpoint))
    save_calibrated(tmp_path / "c.safetensors", checkpoint)
    assert main(["to-checkpoint", str(tmp_path / "c.safetensors"), str(tmp_path / "c.pth")]) == 0
    again = to_engine_file(load_calibrated(tmp_path / "c.pth"))
    save_engine_file(tmp_path / "again.safetensors", again)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    with pytest.raises(HarnessError, match="leave --model"):
        main(["to-checkpoint", str(tmp_path / "e.safetensors"), str(tmp_path / "x.pth"), "--model", MICRO])


# --- What was found is named ------------------------------------------------------------------------------------------


def small_v2():
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": 8}
    return timm.models.SwinTransformerV2(**sizes)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "x.pth: is a ViT; a Swin"),
        (lambda: timm.create_model("resnet18"), r"x.pth: is no Swin \(its first tensors: bn1.bias"),
        (small_v2, "does not fit the model. Found a Swin-V2"),
    ],
    ids=["vit", "resnet", "swin v2"],
)
def test_other_models_are_named(make, found, tmp_path):
    torch.save(make().state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=found):
        models.load_model(tmp_path / "x.pth", MICRO, activation="gelu")


def test_states_are_described(seed):
    state = exercised_model(MICRO_DIGITS, seed).state_dict()
    microsoft = to_microsoft_layout(state)
    described = {
        "timm's layout": describe_state(state),
        "Microsoft's layout": describe_state(microsoft),
        "Hugging Face": describe_state(to_huggingface_names(microsoft)),
        "calibrated": describe_state([*microsoft, "layers.0.blocks.0.attn.qkv._input_quantizer._amax"]),
        "no Swin": describe_state(["conv.weight"]),
    }
    assert all(part in text for part, text in described.items())
    assert describe_geometry({"conv.weight": torch.ones(1)}) == "no sizes"


def test_a_video_swin_is_said_to_be_one(tmp_path):
    """mmaction2's has the names of an image's Swin, and a third dimension of patches."""
    state = {f"backbone.{name}": tensor for name, tensor in exercised_model(MICRO_DIGITS, 0).state_dict().items()}
    kernel = state["backbone.patch_embed.proj.weight"]
    state["backbone.patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, 2, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "video.pth")
    for model in ([], ["--model", MICRO]):
        with pytest.raises(CheckpointError, match="patches of 3 dimensions, as of a video"):
            main(["to-timm", str(tmp_path / "video.pth"), str(tmp_path / "out.pth"), *model])


def test_an_engine_file_is_no_checkpoint_to_train_from(tmp_path):
    save_engine_file(tmp_path / "e.safetensors", to_engine_file(calibrated(MICRO_DIGITS, False, 1)[1]))
    with pytest.raises(CheckpointError, match="is an engine file.*to-timm"):
        models.load_model(tmp_path / "e.safetensors")


def test_pretrained_tags_are_names_too(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    with torch.device("meta"):
        assert timm.create_model(f"{name}.ms_in22k").num_classes == 21841
    model = models.create_model(MICRO)
    path = tmp_path / "m.safetensors"
    models.save_checkpoint(path, model, models.checkpoint_meta(model, f"{name}.ms_in22k"))
    assert models.load_model(path, name)[1]["model"] == f"{name}.ms_in22k"
    assert models.load_model(path, f"{name}.ms_in1k")[1]["model"] == f"{name}.ms_in22k"
    with pytest.raises(CheckpointError, match="is a checkpoint of"):
        models.load_model(path, "swin_small_patch4_window7_224.ms_in22k")
    with pytest.raises(ModelError, match="ms_nowhere"):
        models.create_model(f"{name}.ms_nowhere")


# --- Other windows ----------------------------------------------------------------------------------------------------


def test_windows_are_resized_as_timm_does_it(tmp_path, seed):
    source = source_of(MICRO_DIGITS, seed)
    export(source, "to-timm", tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--img-size", "56", "--window", "14"]
    with warnings.catch_warnings(record=True) as said:
        assert main(["to-timm", *arguments]) == 0
    assert not [str(w.message) for w in said if "interpolate" in w.filename]
    found, meta = models.load_model(tmp_path / "out.pth")
    wanted_config = dataclasses.replace(MICRO_DIGITS, img_size=(56, 56), window_size=(14, 14))
    assert models.config_of(found, MICRO) == wanted_config
    timms = models.model_from_config(wanted_config)
    timms.load_state_dict(checkpoint_filter_fn(source.model.state_dict(), timms))
    assert same_function(found, timms, wanted_config)
    changed = [n for n, t in source.model.state_dict().items() if t.shape != found.state_dict()[n].shape]
    assert changed == [n for n in source.model.state_dict() if n.endswith("relative_position_bias_table")]
    assert "resized from image (28, 28)" in read_card(tmp_path / "out.pth")["notes"][0]


def test_another_image_size_alone_leaves_every_tensor_as_it_is(seed):
    source = source_of(MICRO_DIGITS, seed, geluless=True)
    bigger = resized(source, (56, 84), None)
    assert bigger.config.img_size == (56, 84) and bigger.activation == "relu"
    assert all(torch.equal(t, bigger.model.state_dict()[n]) for n, t in source.model.state_dict().items())


def test_windows_are_never_resized_silently(tmp_path, seed):
    wide = dataclasses.replace(MICRO_DIGITS, img_size=(56, 56), window_size=(14, 14))
    torch.save(exercised_model(wide, seed).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"windows \[14, 14\].*To change windows.*wrong shape \(4\)"):
        models.load_model(tmp_path / "wide.pth", MICRO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--img-size", "28x31"], r"img_size \(28, 31\) is not a multiple of patch_size 2"),
        (["--window", "0"], "at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message, tmp_path, seed):
    export(source_of(MICRO_DIGITS, seed), "to-timm", tmp_path / "in.pth")
    with pytest.raises(HarnessError, match=message):
        main(["to-timm", str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), *options])
    assert not (tmp_path / "out.pth").exists()


def test_a_size_that_is_none_is_a_usage_error(capsys):
    with pytest.raises(SystemExit):
        main(["to-timm", "a.pth", "b.pth", "--img-size", "3x4x5"])
    assert re.search(r"'3x4x5' is no image size", capsys.readouterr().err)


def test_a_window_that_is_not_square_cannot_be_resized(seed):
    config = dataclasses.replace(NON_SQUARE, img_size=(28, 112), window_size=(14, 14), num_classes=3)
    source = source_of(config, seed)
    with pytest.raises(ModelError, match="only a square one"):
        resized(source, (56, 112), 7)


@pytest.mark.parametrize(("command", "out"), [("to-timm", "x.bin"), ("to-hf", "file")])
def test_the_programs_outputs_must_have_fitting_names(command, out, tmp_path, seed):
    export(source_of(MICRO_DIGITS, seed), "to-timm", tmp_path / "in.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must end in|is a file"):
        main([command, str(tmp_path / "in.pth"), str(tmp_path / out)])


def test_the_source_says_what_it_is(tmp_path, seed):
    export(source_of(MICRO_DIGITS, seed, geluless=True), "to-hf", tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    wanted = dataclasses.replace(MICRO_DIGITS, pad_first=True)
    assert (source.config, source.activation, source.notes) == (wanted, "relu", ())


def test_a_swin_v2_goes_where_it_can_and_is_refused_elsewhere(tmp_path, seed):
    config = dataclasses.replace(MICRO_DIGITS, name="v2", version=2)
    source = source_of(config, seed)
    for command in ("to-timm", "to-microsoft"):
        path = tmp_path / f"{command}.pth"
        export(source, command, path)
        loaded, meta = models.load_model(path)
        assert models.config_of(loaded, meta["model"]) == config and same_function(source.model, loaded, config)
    with pytest.raises(ModelError, match="is a Swin-V2; windows"):
        resized(source, (56, 56), None)
