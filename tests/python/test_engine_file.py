"""The engine file: what it holds, that it is reproducible, and that damaged or foreign files are refused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_helpers import NON_SQUARE, THREE_STAGES

from pyharness import ft_format
from pyharness.config import GRAPHS, MICRO_DIGITS
from pyharness.engine_file import (
    LARGEST_AMAX,
    SMALLEST_AMAX,
    EngineFile,
    check_scales,
    load_engine_file,
    save_engine_file,
    scale_list,
    weight_specs,
)
from pyharness.errors import CalibrationError, FormatError
from pyharness.random_engine import random_engine_file
from pyharness.tensor_file import load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE, THREE_STAGES], ids=lambda c: c.name)


@pytest.fixture
def engine_file(seed) -> EngineFile:
    return random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)


def replaced(ef: EngineFile, name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor if each == name else old for each, old in zip(ef.names, ef.tensors)]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.0.blocks.0.norm1.weight", "layers.1.blocks.1.attn.proj.bias", "head.weight"])
def test_parameters_that_are_no_numbers_are_refused(graph, value, name, seed, tmp_path):
    """int8 makes 0 of a NaN, and logits that look like any others."""
    ef = random_engine_file(MICRO_DIGITS, graph, seed=seed)
    save_engine_file(tmp_path / "good.safetensors", ef)
    tensors, header = load_tensors(tmp_path / "good.safetensors", FormatError)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[3] = value
    save_tensors(tmp_path / "damaged.safetensors", tensors, header)
    with pytest.raises(FormatError, match=rf"{re.escape(name)} holds NaN or infinity; convert the checkpoint again"):
        load_engine_file(tmp_path / "damaged.safetensors")
    ef.by_name()[name].view(-1)[3] = value
    with pytest.raises(FormatError, match="holds NaN or infinity"):
        save_engine_file(tmp_path / "new.safetensors", ef)


@CONFIGS
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_list_has_fts_order_and_length(config, graph):
    specs = weight_specs(config, graph)
    names = ft_format.weight_names(config.depths, bool(config.num_classes))
    assert [spec.name for spec in specs] == names
    assert len(specs) == 16 * sum(config.depths) + 5 * len(config.depths) + 6 + (2 if config.num_classes else 0)


def test_shapes_of_the_micro_models_list():
    specs = {spec.name: spec for spec in weight_specs(MICRO_DIGITS, "ft_int8")}
    expected = {
        "layers.0.blocks.0.attn.qkv.weight": (torch.int8, (96, 32)),
        "layers.1.blocks.1.mlp.fc1.weight": (torch.int8, (256, 64)),
        "layers.1.blocks.1.mlp.fc1.bias": (torch.float16, (256,)),
        "layers.1.blocks.0.attn.relative_position_bias": (torch.float16, (2, 49, 49)),
        "layers.0.downsample.reduction.weight": (torch.int8, (64, 128)),
        "layers.0.downsample.norm.bias": (torch.float16, (128,)),
        "layers.0.attn_mask": (torch.float16, (4, 49, 49)),
        "layers.1.attn_mask": (torch.float16, (0,)),
        "layers.1.downsample.reduction.weight": (torch.int8, (0,)),
        "layers.0.blocks.0.amaxList": (torch.float32, (96,)),
        "patch_embed.proj.weight": (torch.float16, (32, 4)),
        "norm.weight": (torch.float16, (64,)),
        "head.weight": (torch.float16, (10, 64)),
    }
    assert {name: (specs[name].dtype, specs[name].shape) for name in expected} == expected


def test_empty_slots_follow_graph_and_geometry():
    def empty(config, graph):
        return {spec.name for spec in weight_specs(config, graph) if spec.is_empty and "padded" not in spec.name}

    last = {f"layers.1.downsample.{name}" for name in ("norm.weight", "norm.bias", "reduction.weight")}
    fc1 = {f"layers.{i}.blocks.{j}.mlp.fc1.bias" for i in (0, 1) for j in (0, 1)}
    assert empty(MICRO_DIGITS, "ft_int8") == last | {"layers.1.attn_mask"}
    assert empty(MICRO_DIGITS, "geluless_int8") == last | {"layers.1.attn_mask"} | fc1
    qkv = {f"layers.{i}.blocks.{j}.attn.qkv.bias" for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))}
    assert empty(NON_SQUARE, "ft_int8") == last | qkv


@CONFIGS
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_a_file_comes_back_as_it_was(config, graph, int8_mode, tmp_path, seed):
    ef = random_engine_file(config, graph, int8_mode, seed)
    save_engine_file(tmp_path / "engine.safetensors", ef)
    loaded = load_engine_file(tmp_path / "engine.safetensors")
    assert (loaded.config, loaded.graph, loaded.int8_mode, loaded.meta) == (config, graph, int8_mode, ef.meta)
    for name, before, after in zip(ef.names, ef.tensors, loaded.tensors):
        assert before.dtype == after.dtype and torch.equal(before, after), name


def test_the_same_content_gives_the_same_bytes(tmp_path, engine_file):
    for name in ("a", "b"):
        save_engine_file(tmp_path / name, engine_file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_random_files_depend_on_the_seed_alone(seed):
    first, second = (random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors))
    other = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed + 1)
    assert not torch.equal(first.tensors[0], other.tensors[0])


def test_the_header_tells_what_the_file_is(tmp_path, engine_file):
    save_engine_file(tmp_path / "engine", engine_file)
    _, header = load_tensors(tmp_path / "engine", FormatError)
    assert (header["format"], header["version"], header["graph"], header["int8_mode"]) == (
        "swin-int8",
        "1",
        "ft_int8",
        "1",
    )
    assert json.loads(header["config"])["embed_dim"] == 32
    assert "convert.py random" in header["hint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "swin-checkpoint"}, "no engine file"),
        ({"version": "2"}, "version '2', this program reads version 1"),
        ({"int8_mode": "one"}, "header is not readable"),
        ({"int8_mode": "3"}, "int8_mode 3 is unknown"),
        ({"graph": "relu"}, "graph 'relu' is unknown"),
        ({"graph": "geluless_int8"}, r"mlp\.fc1\.bias\) must be float16 \[0\]"),
        ({"config": "{}"}, "model description is not readable"),
        ({"config": None}, "header lacks config"),
        ({"meta": "[1]"}, r"meta must be a JSON object, found \[1\]"),
    ],
)
def test_a_wrong_header_is_refused(change, message, tmp_path, engine_file):
    path = tmp_path / "engine"
    save_engine_file(path, engine_file)
    tensors, header = load_tensors(path, FormatError)
    header = {key: value for key, value in {**header, **change}.items() if value is not None}
    save_tensors(path, tensors, header)
    with pytest.raises(FormatError, match=message):
        load_engine_file(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("patch_size", 0, "patch_size must be a whole number from 1 to 2147483647, found 0"),
        ("patch_size", 2.0, "patch_size must be a whole number from 1 to 2147483647, found 2.0"),
        ("in_chans", None, "in_chans must be a whole number from 1 to 2147483647, found None"),
        ("num_classes", -1, "num_classes must be a whole number from 0 to 2147483647, found -1"),
        ("embed_dim", 10**400, "embed_dim must be a whole number from 1 to 2147483647, found 1000"),
        ("mlp_ratio", 1e308, "mlp_ratio must be a number that gives .*, found 1e"),
        ("embed_dim", "32", "embed_dim must be a whole number from 1 to 2147483647, found '32'"),
        ("version", True, "version must be a whole number from 1 to 2147483647, found True"),
        ("num_heads", [0, 2], r"num_heads must be a list of whole numbers from 1 to 2147483647, found \[0, 2\]"),
        ("window_size", [7, 0], r"window_size must be a list of whole numbers from 1 to 2147483647, found \[7, 0\]"),
        ("window_size", 7, "window_size must be a list of whole numbers from 1 to 2147483647, found 7"),
        ("depths", [2, None], r"depths must be a list of whole numbers from 1 to 2147483647, found \[2, None\]"),
        ("depths", "22", "depths must be a list of whole numbers from 1 to 2147483647, found '22'"),
        ("img_size", [28.5, 28], r"img_size must be a list of whole numbers from 1 to 2147483647, found \[28.5, 28\]"),
        ("mlp_ratio", None, "mlp_ratio must be a number that gives .*, found None"),
        ("mlp_ratio", 0.01, "mlp_ratio must be a number that gives .*, found 0.01"),
        ("mlp_ratio", float("nan"), "mlp_ratio must be .*, found nan"),
        ("mlp_ratio", 10**400, "mlp_ratio must be .*, found 1000"),
        ("qk_scale", "a", "qk_scale must be null or a number above 0, at most 1048576, found 'a'"),
        ("qkv_bias", None, "qkv_bias must be true or false, found None"),
        ("name", 3, "name must be text"),
    ],
)
def test_a_geometry_of_no_use_is_refused_by_its_field(field, value, message, tmp_path, engine_file):
    path = tmp_path / "engine"
    save_engine_file(path, engine_file)
    tensors, header = load_tensors(path, FormatError)
    header["config"] = json.dumps({**json.loads(header["config"]), field: value})
    save_tensors(path, tensors, header)
    with pytest.raises(FormatError, match=f"engine: model .*: {message}"):
        load_engine_file(path)


GOOD_INPUT = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic", "crop_pct": 0.9}


@pytest.mark.parametrize(
    "normalization",
    [
        GOOD_INPUT,
        {**GOOD_INPUT, "crop_pct": 1, "crop_mode": "squash"},
        {"mean": [0, -1, 0.5], "std": [1, 2, 1e-30], "crop_mode": "center"},
    ],
)
def test_how_images_are_normalized_comes_back(normalization, tmp_path, seed):
    ef = random_engine_file(NON_SQUARE, "ft_int8", seed=seed)
    save_engine_file(tmp_path / "engine", dataclasses.replace(ef, meta={**ef.meta, "input": normalization}))
    assert load_engine_file(tmp_path / "engine").meta == {**ef.meta, "input": normalization}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, 'is None; needed is an object with "mean" and "std"'),
        ([0.5], "is \\[0.5\\]; needed is an object"),
        ({"mean": [0.5]}, "has 1 numbers as mean; needed is a list of 3"),
        ({"std": [0.5] * 4}, "has 4 numbers as std; needed is a list of 3"),
        ({"std": 0.5}, "has std 0.5; needed is a list of 3"),
        ({"mean": None}, "has mean None"),
        ({"mean": [0.5, float("nan"), 0.5]}, "has nan in mean; needed is a number that is finite"),
        ({"mean": [0.5, "0.5", 0.5]}, "has '0.5' in mean"),
        ({"mean": [True, 0.5, 0.5]}, "has True in mean"),
        ({"mean": [10**400, 0, 0]}, r"has 10{39}\.\.\. in mean"),
        ({"std": [1, 1, float("inf")]}, "has inf in std"),
        ({"std": [1, 1, 1e39]}, r"has 1e\+39 in std; needed is a number that is finite in float32"),
        ({"std": [1, 0, 1]}, "has 0 in std; needed is a number above zero"),
        ({"std": [1, -0.2, 1]}, "has -0.2 in std"),
        ({"std": [1e-50, 1, 1]}, "has 1e-50 in std; needed is a number above zero in float32"),
        ({"crop_mode": "stretch"}, "has crop_mode 'stretch'; needed is one of center, squash, border"),
        ({"crop_mode": ["squash"]}, r"has crop_mode \['squash'\]"),
        ({"crop_pct": 1.5}, "has crop_pct 1.5; needed is a number above 0 and at most 1"),
        ({"crop_pct": True}, "has crop_pct True"),
        ({"interpolation": "random"}, "has interpolation 'random'; needed is one of bicubic, "),
    ],
)
def test_a_normalization_of_no_use_is_refused(change, message, tmp_path, seed):
    ef = random_engine_file(NON_SQUARE, "ft_int8", seed=seed)
    save_engine_file(tmp_path / "engine", ef)
    tensors, header = load_tensors(tmp_path / "engine", FormatError)
    wrong = {**GOOD_INPUT, **change} if isinstance(change, dict) else change
    save_tensors(tmp_path / "engine", tensors, {**header, "meta": json.dumps({**ef.meta, "input": wrong})})
    with pytest.raises(FormatError, match=f'engine: "input" of the meta data.* {message}.* leave "input" out'):
        load_engine_file(tmp_path / "engine")
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(ef, meta={"input": wrong})


@pytest.mark.parametrize("fault", ["missing", "extra", "renamed", "dtype", "shape"])
def test_wrong_tensors_are_named(fault, tmp_path, engine_file):
    path = tmp_path / "engine"
    save_engine_file(path, engine_file)
    tensors, header = load_tensors(path, FormatError)
    key = "0002.layers.0.blocks.0.attn.proj.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "extra":
        tensors["9999.more"] = torch.zeros(1)
    elif fault == "renamed":
        tensors["0002.layers.0.blocks.0.attn.proj.weights"] = tensors.pop(key)
    elif fault == "dtype":
        tensors[key] = tensors[key].float()
    else:
        tensors[key] = tensors[key][:, 1:]
    save_tensors(path, tensors, header)
    with pytest.raises(FormatError, match=r"9999\.more" if fault == "extra" else r"attn\.proj\.weight"):
        load_engine_file(path)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_a_cut_off_file_is_refused(tmp_path_factory, fraction):
    folder = tmp_path_factory.mktemp("cut")
    save_engine_file(folder / "whole", random_engine_file(MICRO_DIGITS, "ft_int8"))
    content = (folder / "whole").read_bytes()
    (folder / "cut").write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(FormatError, match="cut off"):
        load_engine_file(folder / "cut")


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 64, b"PK\x03\x04" + b"\0" * 100])
def test_foreign_files_are_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        load_engine_file(tmp_path / "file")


def test_what_is_taken_for_an_engine_file_is_called_by_its_name(tmp_path):
    both = "quantize.py --weights .*convert.py to-engine"
    torch.save({"a": torch.zeros(1)}, tmp_path / "m.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_tensors(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {})
    (tmp_path / "lfs").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, message in (
        ("m.pth", f"is a PyTorch checkpoint, not an engine file; .*{both}"),
        ("old.pth", f"is a PyTorch checkpoint, not an engine file; .*{both}"),
        (".", f"is a folder, not an engine file; .*{both}"),
        ("m.safetensors", f"a safetensors file, but no engine file .*{both}"),
        ("lfs", "is a Git LFS pointer, .*`git lfs pull`"),
    ):
        with pytest.raises(FormatError, match=message):
            load_engine_file(tmp_path / name)


WRITERS = {
    "engine.safetensors": "save_tensors(path, {'x': x}, {})",
    "checkpoint.pth": "save_state_dict(path, {'x': x}, {})",
    "state.pt": "save_torch(path, {'x': x})",
    "table2.md": "write_text(path, 'x' * (1 << 18))",
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_does_not_fit_is_one_error_and_leaves_nothing(name, tmp_path):
    """The limit on a file's size stands for a full disk."""
    (tmp_path / name).write_bytes(b"before")
    code = f"""if True:
        import resource, sys, torch
        from pyharness.checkpoint import save_state_dict
        from pyharness.errors import run_cli
        from pyharness.results import write_text
        from pyharness.tensor_file import save_tensors, save_torch
        path, x = sys.argv[1], torch.zeros(1 << 18)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        run_cli(lambda: {WRITERS[name]})"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: \S*/{name} could not be written \(.+\); is the disk full\? .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"before"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"nothing\.safetensors: no such file"):
        load_engine_file(tmp_path / "nothing.safetensors")


def test_wrong_number_of_weights(engine_file):
    with pytest.raises(FormatError, match="has 82 tensors, found 81"):
        dataclasses.replace(engine_file, tensors=engine_file.tensors[:-1])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), SMALLEST_AMAX, LARGEST_AMAX, 1e-30])
def test_every_unusable_amax_is_named(value, engine_file, tmp_path):
    tensors = engine_file.by_name()
    for block, index in (("layers.0.blocks.1", 44), ("layers.1.blocks.0", 73)):
        for name in ("amaxList", "h_amaxList"):
            tensors[f"{block}.{name}"][index] = value
    with pytest.raises(CalibrationError) as error:
        save_engine_file(tmp_path / "engine", engine_file)
    assert "layers.0.blocks.1.mlp.fc2._input_quantizer" in str(error.value)
    assert "layers.1.blocks.0.attn.proj._weight_quantizer" in str(error.value)
    assert str(error.value).count("quantizer has amax") == 2
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("index", [1, 2, 3, 17, 77, 81, 82, 85, 86, 87, 95])
def test_numbers_that_do_not_follow_from_their_amax_are_refused(index, engine_file):
    for name in ("amaxList", "h_amaxList"):
        engine_file.by_name()[f"layers.0.blocks.0.{name}"][index] += 0.001
    with pytest.raises(FormatError, match="do not follow"):
        check_scales(engine_file)


def test_contradicting_lists_are_refused(engine_file, seed):
    engine_file.by_name()["layers.1.blocks.1.h_amaxList"][0] *= 2
    with pytest.raises(FormatError, match=r"layers\.1\.blocks\.1\.amaxList differs from h_amaxList"):
        check_scales(engine_file)
    other = random_engine_file(MICRO_DIGITS, "ft_int8", seed=seed)
    amax = ft_format.decode_scales(other.by_name()["layers.0.blocks.1.amaxList"].tolist())
    amax["reduction_input"] *= 2
    for name in ("amaxList", "h_amaxList"):
        other.by_name()[f"layers.0.blocks.1.{name}"].copy_(scale_list(amax, "ft_int8"))
    with pytest.raises(FormatError, match="another amax for the patch merging"):
        check_scales(other)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_scale_list_holds_fts_numbers_at_fts_places(data):
    """Indices and formulas written out from FasterTransformer's table, not taken from pyharness/ft_format.py."""
    amax_values = st.floats(2**-13, 2**13, width=32)
    names = [field.name for field in ft_format.SCALE_FIELDS if field.kind != "factor"]
    amax = {name: data.draw(amax_values, label=name) for name in names}
    values = scale_list(amax, "ft_int8").double()

    def close(index: int, expected: float) -> None:
        assert float(values[index]) == pytest.approx(expected, rel=1e-6), index

    for index, name in (
        (0, "qkv_input"),
        (4, "qkv_aftergemm"),
        (8, "proj_input"),
        (28, "matmul_a"),
        (32, "softmax_input"),
        (36, "fc1_input"),
        (48, "fc2_aftergemm"),
        (60, "reduction_input"),
    ):
        close(index, amax[name])
        close(index + 1, amax[name] / 127)
        close(index + 2, amax[name] / 127 / 127)
        close(index + 3, 127 / amax[name])
    close(72, amax["qkv_weight"])
    close(76, amax["reduction_weight"])
    close(77, amax["qkv_input"] * amax["qkv_weight"] / (127 * amax["qkv_aftergemm"]))
    close(79, amax["fc1_input"] * amax["fc1_weight"] / (127 * amax["fc1_aftergemm"]))
    close(81, amax["matmul_q"] * amax["matmul_k"] / (127 * amax["softmax_input"]))
    close(82, amax["matmul_a"] * amax["matmul_v"] / (127 * amax["proj_input"]))
    close(83, amax["reduction_input"] * amax["reduction_weight"] / (127 * amax["reduction_aftergemm"]))
    gelu_less = scale_list(amax, "geluless_int8").double()
    assert float(gelu_less[79]) == pytest.approx(
        amax["fc1_input"] * amax["fc1_weight"] / (127 * amax["fc2_input"]), rel=1e-6
    )


def test_meta_is_written_as_json_that_every_reader_takes(engine_file, tmp_path):
    meta = {"loss": float("nan"), "steps": [1, float("inf"), 0.5], "weights": "caf\udce9.pth", "note": "ä"}
    save_engine_file(tmp_path / "m", dataclasses.replace(engine_file, meta=meta))
    header = load_tensors(tmp_path / "m", FormatError)[1]
    assert "NaN" not in header["meta"] and "Infinity" not in header["meta"] and "\\udce9" not in header["meta"]
    kept = {"loss": None, "steps": [1, None, 0.5], "weights": "caf?.pth", "note": "ä"}
    assert load_engine_file(tmp_path / "m").meta == kept


@pytest.mark.parametrize("hint", [None, "make\udcff it"])
def test_names_that_are_no_utf8_are_written_as_what_every_reader_takes(hint, tmp_path):
    """A folder's name becomes the model's: half a surrogate pair is what Python makes of a byte that is no UTF-8."""
    ef = random_engine_file(dataclasses.replace(MICRO_DIGITS, name="a\udcff"), "fused_int8")
    save_engine_file(tmp_path / "engine", dataclasses.replace(ef, meta={**ef.meta, **({"hint": hint} if hint else {})}))
    assert load_engine_file(tmp_path / "engine").config.name == "a?"
    _, header = load_tensors(tmp_path / "engine", FormatError)
    assert "udcff" not in "".join(header.values()) and ("make? it" if hint else "--model a? ") in header["hint"]
