"""libswin_int8_c and swin_run: to the bit what the torch extension computes, and every mistake a status and a sentence."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from op_targets import CPU_VARIANTS, target
from quant_helpers import NON_SQUARE, PADDED, PADDED_FIRST, THREE_STAGES
from test_engine import images_for
from v2_configs import FINE_TUNED, MICRO

from pyharness.c_library import (
    ERROR_ARGUMENT,
    ERROR_FILE,
    ERROR_UNSUPPORTED,
    CModel,
    Info,
    Options,
    StatusError,
    check,
    library,
    library_path,
    options,
    program_path,
)
from pyharness.config import ENGINE_GRAPHS, MICRO_DIGITS
from pyharness.engine import SwinInt8
from pyharness.engine_file import save_engine_file
from pyharness.errors import EngineError
from pyharness.random_engine import random_engine_file

CONFIGS = [MICRO_DIGITS, NON_SQUARE, THREE_STAGES, PADDED, PADDED_FIRST, MICRO, FINE_TUNED]
BUILD = library_path().parent.parent
PROGRAM = program_path()
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def saved(folder: Path, config, graph: str, seed: int, **meta):
    """(path, engine file) of random weights, with `meta` beside what a random file says of itself."""
    file = random_engine_file(config, graph, seed=seed)
    file = dataclasses.replace(file, meta={**file.meta, **meta})
    path = folder / f"{config.name}.engine.safetensors"
    save_engine_file(path, file)
    return path, file


@pytest.fixture
def micro(tmp_path, seed) -> Path:
    """A micro model's engine file, of images of one channel with mean 0.25 and standard deviation 0.5."""
    return saved(tmp_path, MICRO_DIGITS, "geluless_int8", seed, input={"mean": [0.25], "std": [0.5]})[0]


def refused(status: int, message: str, call) -> None:
    with pytest.raises(StatusError, match=message) as error:
        call()
    assert error.value.status == status


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_results_are_the_torch_extensions(tmp_path, config, graph, seed):
    path, file = saved(tmp_path, config, graph, seed)
    images, reference = images_for(config, 3, seed), SwinInt8.from_engine_file(file)
    with CModel(path) as model:
        for batch in (3, 1, 2, 3):
            assert np.array_equal(model.forward(images[:batch].numpy()), reference(images[:batch]).numpy())
            features = reference.forward_features(images[:batch]).numpy()
            assert np.array_equal(model.features(images[:batch].numpy()), features)


@pytest.mark.parametrize("function", ["swin_forward", "swin_features"])
def test_nothing_is_written_past_the_results(micro, function, seed):
    images = images_for(MICRO_DIGITS, 3, seed).numpy()
    with CModel(micro) as model:
        columns = model.outputs if function == "swin_forward" else model.num_features
        out = np.full(3 * columns + 1, np.nan, np.float32)
        check(getattr(library(), function)(model.handle, images.ctypes.data, 3, out.ctypes.data, None))
        assert np.isfinite(out[:-1]).all() and np.isnan(out[-1])


@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_isa_chooses_the_kernels(micro, variant, seed):
    images = images_for(MICRO_DIGITS, 2, seed)
    with target(variant), CModel(micro, options(isa=variant.encode())) as model:
        assert model.info().isa.decode() == variant
        assert np.array_equal(model.forward(images.numpy()), SwinInt8.from_file(micro)(images).numpy())


def test_info_says_what_the_file_holds(tmp_path, seed):
    mean, std = [0.5, 0.25, 0.125], [1.0, 0.5, 0.25]
    path, _ = saved(tmp_path, NON_SQUARE, "fused_int8", seed, input={"mean": mean, "std": std})
    with CModel(path, options(threads=3)) as model:
        info = model.info()
        text = [getattr(info, name).decode() for name in ("name", "graph", "device")]
        assert text == ["non_square", "fused_int8", "cpu"]
        assert (info.channels, info.height, info.width, info.threads) == (3, 28, 56, 3)
        assert (info.classes, info.features, info.outputs) == (0, 64, 64)
        assert (info.mean[:3], info.std[:3]) == (mean, std)
        assert model.workspace_bytes(2) > model.workspace_bytes(1) > 0
    assert library().swin_version().decode() == "0.1.0"


def test_an_older_programs_shorter_structs_are_enough(micro):
    """What a header that ends behind `isa` and `name` knows: nothing behind them is read or written."""
    short = options(threads=-5)
    short.struct_size = type(short).threads.offset
    with CModel(micro, short) as model:
        info = Info(Info.graph.offset)
        info.height = -7
        check(library().swin_get_info(model.handle, ctypes.byref(info)))
        assert (info.name, info.graph, info.height) == (MICRO_DIGITS.name.encode(), None, -7)


def test_of_a_newer_programs_longer_structs_zeros_are_enough(micro):
    class Longer(ctypes.Structure):
        _fields_ = [("known", Options), ("more", ctypes.c_int64)]

    class LongerInfo(ctypes.Structure):
        _fields_ = [("known", Info), ("more", ctypes.c_int64)]

    longer = Longer(options(threads=3), 0)
    longer.known.struct_size = ctypes.sizeof(longer)
    handle, path = ctypes.c_void_p(), str(micro).encode()
    given = ctypes.cast(ctypes.byref(longer), ctypes.POINTER(Options))
    check(library().swin_load(path, given, ctypes.byref(handle)))
    info = LongerInfo(Info(ctypes.sizeof(LongerInfo)), -1)
    check(library().swin_get_info(handle, ctypes.cast(ctypes.byref(info), ctypes.POINTER(Info))))
    assert (info.known.threads, info.known.struct_size, info.more) == (3, ctypes.sizeof(LongerInfo), 0)
    library().swin_free(handle)
    longer.more = 1
    message = "the options set something that this version of the library, 0.1.0, does not know"
    refused(ERROR_ARGUMENT, message, lambda: check(library().swin_load(path, given, ctypes.byref(handle))))


def test_workspace_is_counted_without_memory_for_it(micro):
    """Of more images than any machine has memory for."""
    with CModel(micro) as model:
        few, many = model.workspace_bytes(1000), model.workspace_bytes(20_000_000)
        assert many > 10**12 and abs(many / few / 20_000 - 1) < 0.01


TRAPS = """
import ctypes, sys
import numpy as np
from pyharness.c_library import CModel, options
images = np.load(sys.argv[2])
with CModel(sys.argv[1], options(isa=sys.argv[3].encode(), threads=2)) as model:
    assert ctypes.CDLL("libm.so.6").feenableexcept(4 | 8 | 1) >= 0
    logits = model.forward(images)
np.save(sys.argv[4], logits)
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="glibc's traps on x86")
@pytest.mark.parametrize("variant", CPU_VARIANTS)
def test_a_caller_may_have_divisions_by_zero_trapped(tmp_path, micro, variant, seed):
    images = images_for(MICRO_DIGITS, 3, seed).numpy()
    np.save(tmp_path / "images.npy", images)
    words = [str(micro), str(tmp_path / "images.npy"), variant, str(tmp_path / "logits.npy")]
    with target(variant), CModel(micro, options(isa=variant.encode())) as model:
        done = subprocess.run([sys.executable, "-c", TRAPS, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(np.load(tmp_path / "logits.npy"), model.forward(images))


@pytest.mark.parametrize("config", [MICRO_DIGITS, NON_SQUARE], ids=lambda c: c.name)
def test_a_file_in_memory_may_go_after_loading(tmp_path, config, seed):
    path, file = saved(tmp_path, config, "fused_int8", seed)
    images = images_for(config, 2, seed)
    content = bytearray(path.read_bytes())
    with CModel(bytes(content)) as model:
        del content
        assert np.array_equal(model.forward(images.numpy()), SwinInt8.from_engine_file(file)(images).numpy())


def test_models_and_threads_side_by_side(micro, tmp_path, seed):
    """Two models, two threads each, all at a time: every call gives what it gives alone."""
    other, _ = saved(tmp_path, THREE_STAGES, "fused_int8", seed)
    wrong: list[str] = []

    def call(model: CModel, images: np.ndarray, wanted: np.ndarray) -> None:
        for _ in range(20):
            if not np.array_equal(model.forward(images), wanted):
                wrong.append("another result")

    with CModel(micro, options(threads=2)) as first, CModel(other, options(threads=2)) as second:
        threads = []
        for model, config in ((first, MICRO_DIGITS), (second, THREE_STAGES)):
            for batch in (1, 2):
                images = images_for(config, batch, seed).numpy()
                threads.append(threading.Thread(target=call, args=(model, images, model.forward(images))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(("config", "mean", "std"), [(MICRO_DIGITS, (0.45,), (0.225,)), (FINE_TUNED, *IMAGENET)])
@pytest.mark.parametrize("from_file", [True, False])
def test_pixels_are_normalized_as_torchvision_does(tmp_path, config, mean, std, from_file, seed):
    from torchvision.transforms.v2 import functional

    said = {"input": {"mean": list(mean), "std": list(std)}} if from_file else {}
    path, _ = saved(tmp_path, config, "fused_int8", seed, **said)
    size = (3, *config.img_size, config.in_chans)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    pixels[0].reshape(-1)[:256] = np.arange(256)
    wanted = functional.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255), mean, std)
    with CModel(path, options(threads=2)) as model:
        found = model.normalize(pixels) if from_file else model.normalize(pixels, mean, std)
    assert np.array_equal(found, wanted.numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [b"float16", b"bfloat16"])
@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
def test_results_on_a_gpu_are_the_torch_extensions(tmp_path, graph, residual, seed):
    path, file = saved(tmp_path, MICRO_DIGITS, graph, seed)
    reference = SwinInt8.from_engine_file(file, residual.decode()).to("cuda")
    images = images_for(MICRO_DIGITS, 3, seed).cuda()
    with CModel(path, options(device=b"cuda:0", residual=residual)) as model:
        own, default = torch.cuda.Stream(), torch.cuda.default_stream()
        # The default stream under both of its names, 0 and cudaStreamLegacy, which PyTorch does not take for a stream's.
        for stream, handle in ((own, own.cuda_stream), (default, 0), (default, 1)):
            for _ in range(3):  # as it is, recorded, replayed
                out = torch.full((3, 10), torch.nan, device="cuda")
                stream.wait_stream(torch.cuda.current_stream())
                call = (model.handle, images.data_ptr(), 3, out.data_ptr(), handle)
                check(library().swin_forward(*call))
                stream.synchronize()
                assert torch.equal(out, reference(images))


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"device": b"tpu"}, ERROR_ARGUMENT, "device is 'tpu'"),
        ({"device": b"cuda:"}, ERROR_ARGUMENT, "device is 'cuda:'"),
        ({"device": b"cuda:-1"}, ERROR_ARGUMENT, "device is 'cuda:-1'"),
        ({"device": b"cuda:1x"}, ERROR_ARGUMENT, "device is 'cuda:1x'"),
        ({"device": b"cuda:4096"}, ERROR_UNSUPPORTED, "no CUDA backend|no usable GPU|no cuda:4096"),
        ({"isa": b"sse9"}, ERROR_UNSUPPORTED, "sse9"),
        ({"threads": -1}, ERROR_ARGUMENT, "threads is -1"),
        ({"threads": 1025}, ERROR_ARGUMENT, "threads is 1025"),
        ({"residual": b"float16"}, ERROR_ARGUMENT, "on the CPU it is float32"),
    ],
)
def test_options_that_do_not_fit(micro, given, status, message):
    refused(status, message, lambda: CModel(micro, options(**given)))


def test_a_struct_of_no_size_is_refused(micro):
    unset = options()
    for size in (0, 1 << 20):
        unset.struct_size = size
        refused(ERROR_ARGUMENT, f"struct_size is {size}", lambda: CModel(micro, unset))


def test_null_pointers_are_refused(micro):
    lib = library()
    images, handle = np.zeros((1, 1, 28, 28), np.float32), ctypes.c_void_p()
    refused(ERROR_ARGUMENT, "path is NULL", lambda: check(lib.swin_load(None, None, ctypes.byref(handle))))
    refused(ERROR_ARGUMENT, "model is NULL", lambda: check(lib.swin_load(str(micro).encode(), None, None)))
    refused(ERROR_ARGUMENT, "bytes is NULL", lambda: check(lib.swin_load_memory(None, 1, None, ctypes.byref(handle))))
    refused(ERROR_ARGUMENT, "model is NULL", lambda: check(lib.swin_forward(None, images.ctypes.data, 1, None, None)))
    with CModel(micro) as model:
        data, out = images.ctypes.data, np.zeros((1, 64), np.float32).ctypes.data
        for function in (lib.swin_forward, lib.swin_features):
            for call in ((data, 1, None), (None, 1, out)):
                refused(ERROR_ARGUMENT, "is NULL", lambda f=function, c=call: check(f(model.handle, *c, None)))
            refused(ERROR_ARGUMENT, "there is a stream", lambda f=function: check(f(model.handle, data, 1, out, 8)))
    lib.swin_free(None)


def test_a_closed_model_is_refused(micro):
    with CModel(micro) as model:
        pass
    refused(ERROR_ARGUMENT, "model is NULL", lambda: model.forward(np.zeros((1, 1, 28, 28), np.float32)))
    model.close()


def test_the_model_is_null_after_an_error(tmp_path):
    handle = ctypes.c_void_p(0xDEAD)
    assert library().swin_load(str(tmp_path / "nowhere").encode(), None, ctypes.byref(handle)) == ERROR_FILE
    assert handle.value is None
    handle = ctypes.c_void_p(0xDEAD)
    assert library().swin_load_memory(b"no file", 7, None, ctypes.byref(handle)) == ERROR_FILE
    assert handle.value is None


@pytest.mark.parametrize("batch", [0, -1, 2**62])
def test_batches_out_of_range(micro, batch):
    image = np.zeros((1, 1, 28, 28), np.float32).ctypes.data
    with CModel(micro) as model:
        for function in (library().swin_forward, library().swin_features):
            call = (model.handle, image, batch, image, None)
            refused(ERROR_ARGUMENT, f"batch is {batch}", lambda f=function, c=call: check(f(*c)))
        refused(ERROR_ARGUMENT, f"batch is {batch}", lambda: model.workspace_bytes(batch))


def test_images_with_nan_are_named(micro, seed):
    images = images_for(MICRO_DIGITS, 3, seed).numpy()
    images[1, 0, 5, 5] = np.nan
    with CModel(micro) as model:
        refused(ERROR_ARGUMENT, "image 1", lambda: model.forward(images))


def test_arrays_of_other_shapes_and_types_do_not_reach_the_library(tmp_path, seed):
    path, _ = saved(tmp_path, FINE_TUNED, "ft_int8", seed)
    with CModel(path) as model:
        for images in (np.zeros((1, 3, 32, 64)), np.zeros((1, 3, 64, 32), np.float32), np.zeros((3, 32, 64), np.float32)):
            with pytest.raises(EngineError, match="images are .* is needed"):
                model.forward(images)
        for pixels in (np.zeros((1, 3, 32, 64), np.uint8), np.zeros((1, 32, 64, 3), np.float32)):
            with pytest.raises(EngineError, match="pixels are .* is needed"):
                model.normalize(pixels)
        with pytest.raises(EngineError, match="found 1 numbers for mean or std; 3"):
            model.normalize(np.zeros((1, 32, 64, 3), np.uint8), [0.5], [0.5])


def test_normalization_must_be_known_and_possible(tmp_path, seed):
    path, _ = saved(tmp_path, MICRO_DIGITS, "ft_int8", seed)
    pixels = np.zeros((1, 28, 28, 1), np.uint8)
    with CModel(path) as model:
        assert not model.info().mean and not model.info().std
        refused(ERROR_ARGUMENT, "does not say how its images are normalized", lambda: model.normalize(pixels))
        refused(ERROR_ARGUMENT, "give both or none", lambda: model.normalize(pixels, mean=[0.5]))
        for std in (0.0, -1.0, float("nan"), float("inf")):
            refused(ERROR_ARGUMENT, "a std above zero", lambda s=std: model.normalize(pixels, [0.5], [s]))


@pytest.mark.parametrize("graph", ENGINE_GRAPHS)
def test_files_that_do_not_fit(tmp_path, graph, seed):
    path, file = saved(tmp_path, MICRO_DIGITS, graph, seed)
    content = path.read_bytes()
    refused(ERROR_FILE, "no such file|No such file", lambda: CModel(tmp_path / "nowhere"))
    refused(ERROR_FILE, "directory", lambda: CModel(tmp_path))
    for damaged in (b"", content[:7], content[: len(content) // 2], content[:-1], content + b"\0"):
        refused(ERROR_FILE, "engine file in memory: ", lambda d=damaged: CModel(d))
    # Weights that no graph takes, in a file that is whole: a scale of zero.
    position, scales = next((i, t) for i, t in enumerate(file.tensors) if file.names[i].endswith(("amaxList", ".amax")))
    broken = scales.clone()
    broken.view(-1)[0] = 0
    damaged = content.replace(scales.numpy().tobytes(), broken.numpy().tobytes())
    assert damaged != content, position
    refused(ERROR_FILE, "amax", lambda: CModel(damaged))


def test_errors_are_of_the_calling_thread(micro):
    messages = []

    def other() -> None:
        messages.append(library().swin_last_error())
        with pytest.raises(StatusError):
            CModel("elsewhere")
        messages.append(library().swin_last_error())

    with pytest.raises(StatusError):
        CModel("nowhere")
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert messages[0] == b"" and b"elsewhere" in messages[1] and b"nowhere" in library().swin_last_error()


# --- swin_run --------------------------------------------------------------------------------------------------------


def swin_run(*words, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("kind", ["float32", "uint8", "uint8 with mean and std"])
def test_swin_run_classifies_a_file_of_images(micro, tmp_path, kind, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    mean, std = (0.25, 0.5) if kind != "uint8 with mean and std" else (0.5, 0.25)
    images = ((pixels.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)).transpose(0, 3, 1, 2)
    np.save(tmp_path / "images.npy", images.copy() if kind == "float32" else pixels)
    wanted = SwinInt8.from_file(micro)(torch.from_numpy(images.copy()))
    (tmp_path / "labels.txt").write_text("".join(f"digit {i}\n" for i in range(10)), encoding="utf-8")
    words = ["--images", tmp_path / "images.npy", "--out", tmp_path / "logits.npy", "--batch", 2, "--top", 2]
    if kind == "uint8 with mean and std":
        words += ["--mean", mean, "--std", std]
    lines = swin_run(micro, *words, "--labels", tmp_path / "labels.txt").stdout.splitlines()
    assert np.array_equal(np.load(tmp_path / "logits.npy"), wanted.numpy())
    values, classes = wanted.double().softmax(1).topk(2)
    pairs = zip(values.tolist(), classes.tolist())
    assert lines == [
        f"{image}  " + "  ".join(f"{c} {p:.4f} digit {c}" for p, c in zip(*of_image)) for image, of_image in enumerate(pairs)
    ]


def test_swin_run_writes_features(micro, tmp_path, seed):
    images = images_for(MICRO_DIGITS, 3, seed)
    np.save(tmp_path / "images.npy", images.numpy())
    words = ("--images", tmp_path / "images.npy", "--features", "--out", tmp_path / "features.npy", "--threads", 1)
    assert swin_run(micro, *words).stdout == ""
    wanted = SwinInt8.from_file(micro).forward_features(images).numpy()
    assert np.array_equal(np.load(tmp_path / "features.npy"), wanted)


def test_swin_run_measures_random_images(micro):
    import json

    start = time.monotonic()
    said = json.loads(swin_run(micro, "--seconds", 0.1, "--batch", 3, "--threads", 1, "--json").stdout)
    whole = time.monotonic() - start
    assert (said["model"], said["graph"], said["threads"], said["batch"]) == (MICRO_DIGITS.name, "geluless_int8", 1, 3)
    latency = said["latency_ms"]
    assert 0 < latency["p10"] <= latency["median"] <= latency["p90"] and latency["runs"] >= 1
    assert said["load_ms"] > 0 and said["callers"] == 1
    # As long as was asked for, and as half of the calls took at least; no longer than the whole program.
    seconds = 3 * latency["runs"] / said["images_per_s"]
    assert max(0.1, latency["runs"] / 2 * latency["median"] / 1000) * 0.99 <= seconds <= whole
    # Of its own, whatever the process that started it held: this one, with PyTorch in it, holds hundreds of MB.
    assert 2 < said["peak_mb"] < 250
    text = swin_run(micro, "--seconds", 0.1).stdout
    assert re.search(r"latency  [\d.]+ ms a batch of 1 ", text) and MICRO_DIGITS.name in text


def test_swin_run_measures_several_callers(micro):
    import json

    said = json.loads(swin_run(micro, "--seconds", 0.1, "--callers", 3, "--threads", 1, "--json").stdout)
    assert said["callers"] == 3 and said["latency_ms"]["runs"] >= 3 and said["images_per_s"] > 0
    error = swin_run(micro, "--seconds", 0.1, "--callers", 0, status=2).stderr
    assert "--callers is '0'" in error


def test_swin_run_shows_the_files_own_names_of_classes(tmp_path, seed):
    names = [f"number {i}" for i in range(9)] + ["ne\u00fcn"]
    micro = saved(tmp_path, MICRO_DIGITS, "geluless_int8", seed, classes=names)[0]
    np.save(tmp_path / "images.npy", images_for(MICRO_DIGITS, 2, seed).numpy())
    lines = swin_run(micro, "--images", tmp_path / "images.npy").stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        _, number, _, name = line.split(maxsplit=3)
        assert name == names[int(number)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "'classes' has 2 names; one for each of the 10 classes is needed"),
        ("abcdefghij", "'classes'.*an array is needed"),
        ([0] * 10, "a string is needed"),
        (["a\0"] * 10, "holds a zero byte"),
    ],
)
def test_other_names_of_classes_are_refused(names, message, tmp_path, seed):
    import json

    from safetensors import safe_open
    from safetensors.torch import save

    path, _ = saved(tmp_path, MICRO_DIGITS, "geluless_int8", seed)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    header["meta"] = json.dumps({**json.loads(header["meta"]), "classes": names})
    refused(ERROR_FILE, message, lambda: CModel(save(tensors, header)))


def test_swin_run_says_classes_as_json(micro, tmp_path, seed):
    import json

    np.save(tmp_path / "images.npy", images_for(MICRO_DIGITS, 3, seed).numpy())
    labels = ['a "quoted" name', *map(str, range(9))]
    (tmp_path / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    words = ("--images", tmp_path / "images.npy", "--labels", tmp_path / "labels.txt", "--top", 10, "--json")
    images = json.loads(swin_run(micro, *words).stdout)["images"]
    assert len(images) == 3
    for guesses in images:
        assert sorted(g["class"] for g in guesses) == list(range(10))
        assert all(g["label"] == labels[g["class"]] for g in guesses)
        assert sum(g["probability"] for g in guesses) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no engine file was given"),
        (("MODEL", "MODEL"), "is left over"),
        (("MODEL", "--fast"), "there is no option --fast"),
        (("MODEL", "--batch"), "--batch needs a value"),
        (("MODEL", "--batch", "0"), "from 1 to 65536"),
        (("MODEL", "--batch", "1.5"), "a whole number is needed"),
        (("MODEL", "--threads", "two"), "--threads is 'two'"),
        (("MODEL", "--mean", "0.5"), "go together"),
        (("MODEL", "--out", "x.npy"), "there is no --images"),
        (("MODEL", "--seconds", "0"), "nothing to do"),
        (("MODEL", "--images", "IMAGES", "--mean", "0.5", "--std", "1"), "of uint8 images"),
        (("MODEL", "--images", "PIXELS", "--mean", "1,2", "--std", "1,2"), "1 are needed"),
    ],
)
def test_swin_run_names_a_mistake_in_its_words(micro, tmp_path, words, message, seed):
    np.save(tmp_path / "images.npy", images_for(MICRO_DIGITS, 1, seed).numpy())
    np.save(tmp_path / "pixels.npy", np.zeros((1, 28, 28, 1), np.uint8))
    names = {"MODEL": micro, "IMAGES": tmp_path / "images.npy", "PIXELS": tmp_path / "pixels.npy"}
    error = swin_run(*(names.get(word, word) for word in words), status=2).stderr
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 1, 28, 28)), "holds '<f8'; float32 "),
        (np.zeros((1, 1, 28, 27), np.float32), "an image of 28x27 does not divide into patches of 2"),
        (np.zeros((1, 2, 28, 28), np.float32), r"float32 [1, 2, 28, 28]; [n, 1, height, width] is needed by swin_micro_digits"),
        (np.zeros((1, 1, 28, 28), np.uint8), r"uint8 [1, 1, 28, 28]; [n, height, width, 1] is needed"),
        (np.zeros((28, 28), np.float32), "[n, 1, height, width] is needed"),
        (np.zeros((0, 1, 28, 28), np.float32), "[n, 1, height, width] is needed"),
        (np.asfortranarray(np.zeros((2, 1, 28, 28), np.float32)), "Fortran"),
        (b"\x93NUMPY", "no .npy file"),
        (b"no array at all", "no .npy file"),
        ("cut off", "the file is cut off"),
        (None, "No such file"),
    ],
)
def test_swin_run_refuses_images_by_name(micro, tmp_path, array, message):
    path, out = tmp_path / "images.npy", tmp_path / "out.npy"
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif isinstance(array, str):
        np.save(path, np.zeros((4, 1, 28, 28), np.float32))
        path.write_bytes(path.read_bytes()[:-1])
    elif array is not None:
        np.save(path, array)
    error = swin_run(micro, "--images", path, "--out", out, status=1).stderr
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob("*.tmp")), "half a result was left"


def test_swin_run_refuses_other_files(micro, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n", encoding="utf-8")
    np.save(tmp_path / "images.npy", np.zeros((1, 1, 28, 28), np.float32))
    images = ("--images", tmp_path / "images.npy")
    for words, message in (
        ((tmp_path / "nowhere", *images), "nowhere"),
        ((labels, *images), "labels.txt"),
        ((micro, *images, "--labels", labels), "has 2 lines, and the model 10 classes"),
        ((micro, *images, "--labels", tmp_path / "none.txt"), "cannot be read"),
        ((micro, *images, "--out", tmp_path / "no" / "folder.npy"), "cannot be written"),
        ((micro, *images, "--isa", "sse9"), "sse9"),
    ):
        error = swin_run(*words, status=1).stderr
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.skipif("sanitize" in str(BUILD), reason="AddressSanitizer needs more address space than this test leaves")
def test_a_batch_beyond_all_memory_is_an_error(micro):
    def little_memory() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    done = subprocess.run(
        [PROGRAM, micro, "--batch", "65536", "--threads", "1"],
        capture_output=True, text=True, preexec_fn=little_memory,
    )  # fmt: skip
    assert done.returncode == 1 and re.fullmatch("error: .*not enough memory.*smaller .*batch\\n", done.stderr)


# --- what is installed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """The runtime, installed as docs/runtime.md says."""
    folder = tmp_path_factory.mktemp("prefix")
    cmake = Path(sys.executable).with_name("cmake")
    subprocess.run(
        [cmake if cmake.is_file() else "cmake", "--install", BUILD, "--component", "runtime", "--prefix", folder],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_what_is_installed_runs_by_itself(prefix, micro):
    assert {p.name for p in prefix.glob("*/*") if p.is_file() and not p.is_symlink()} == {
        "swin_int8.h", "libswin_int8_c.so.0.1.0", "swin_run"
    }  # fmt: skip
    done = subprocess.run([prefix / "bin" / "swin_run", micro, "--seconds", "0.05"], capture_output=True, env={}, text=True)
    assert done.returncode == 0 and "latency" in done.stdout, done.stderr


ALONE = """
import sys
sys.path[:] = [sys.argv[1], *sys.path, sys.argv[2]]
import numpy as np
from pyharness.c_library import CModel, library_path, options, program_path
with CModel(sys.argv[3], options(threads=1)) as model:
    np.save(sys.argv[4], model.forward(model.prepare(np.full((40, 30, 1), 77, np.uint8))[None]))
print(library_path(), program_path())
known = {*sys.stdlib_module_names, "__main__", "numpy", "pyharness"}
print(sorted({name.split(".")[0] for name in sys.modules} - known))
"""


def test_the_package_has_the_library_for_a_python_with_numpy_alone(tmp_path, repository, seed):
    """Three of its files, and what `cmake --install --component engine`, as `pip install .`, puts beside them."""
    said = {"mean": [0.25], "std": [0.5], "interpolation": "bicubic", "crop_pct": 0.9}
    micro, file = saved(tmp_path, MICRO_DIGITS, "geluless_int8", seed, input=said)
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or "cmake"
    subprocess.run([cmake, "--install", BUILD, "--component", "engine", "--prefix", tmp_path], check=True, capture_output=True)
    installed = tmp_path / "pyharness" / "_lib"
    assert {path.name for path in installed.iterdir()} >= {"libswin_int8_c.so.0.1", "swin_run"}
    assert not any(path.is_symlink() for path in installed.iterdir())  # a wheel holds none
    for name in ("__init__.py", "errors.py", "c_library.py"):
        shutil.copy(repository / "pyharness" / name, installed.parent)
    site, out = Path(np.__file__).parent.parent, tmp_path / "logits.npy"
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", ALONE, tmp_path, site, micro, out],
        capture_output=True, text=True, env={key: os.environ[key] for key in ("LD_PRELOAD", "ASAN_OPTIONS") if key in os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths, others = done.stdout.splitlines()
    assert paths == f"{installed / 'libswin_int8_c.so.0.1'} {installed / 'swin_run'}" and others == "[]"
    value = (np.float32(77) / np.float32(255) - np.float32(0.25)) / np.float32(0.5)
    wanted = SwinInt8.from_engine_file(file)(torch.full((1, 1, 28, 28), float(value)))
    assert np.array_equal(np.load(out), wanted.numpy())
    done = subprocess.run([installed / "swin_run", micro, "--seconds", "0.05"], capture_output=True, env={}, text=True)
    assert done.returncode == 0 and "latency" in done.stdout, done.stderr


def test_where_the_library_is_looked_for(tmp_path, monkeypatch):
    from pyharness import c_library

    built, installed = tmp_path / "build/release/lib/libswin_int8_c.so", tmp_path / "pyharness/_lib/libswin_int8_c.so.0.1"
    monkeypatch.setattr(c_library, "ROOT", tmp_path)
    monkeypatch.setattr(c_library, "INSTALLED", installed)
    monkeypatch.delenv("SWIN_INT8_C_LIBRARY", raising=False)
    assert c_library.library_path() == installed  # which the error names where neither is there
    with pytest.raises(EngineError, match=f"swin_run is not at .* or {re.escape(str(installed.parent / 'swin_run'))}"):
        c_library.program_path()
    for path in (installed, built, built.parent.parent / "bin" / "swin_run", installed.parent / "swin_run"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert c_library.library_path() == built
    assert c_library.program_path() == built.parent.parent / "bin" / "swin_run"
    monkeypatch.setenv("SWIN_INT8_C_LIBRARY", str(installed))
    assert c_library.library_path() == installed and c_library.program_path() == installed.parent / "swin_run"


def test_the_library_shows_its_functions_and_no_more(prefix):
    header = (prefix / "include" / "swin_int8.h").read_text(encoding="utf-8")
    declared = set(re.findall(r"SWIN_API [\w ]+\*?\s*\*?(swin_\w+)\(", header))
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", prefix / "lib" / "libswin_int8_c.so"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {line.split()[-1] for line in symbols} == declared and len(declared) == 14


def test_the_documented_program_in_c(prefix, tmp_path, repository, seed):
    """The example of docs/runtime.md, compiled as its text says, gives the logit that the engine gives."""
    said = {"mean": [0.25], "std": [0.5], "interpolation": "bicubic", "crop_pct": 0.9}
    micro, _ = saved(tmp_path, MICRO_DIGITS, "geluless_int8", seed, input=said)
    text = (repository / "docs" / "runtime.md").read_text(encoding="utf-8")
    (tmp_path / "app.c").write_text(text.split("```c\n")[1].split("```")[0], encoding="utf-8")
    package = text.split("```cmake\n")[1].split("```")[0]
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(app LANGUAGES C)\nset(CMAKE_C_STANDARD 99)\n"
        "set(CMAKE_C_EXTENSIONS OFF)\nadd_compile_options(-Wall -Wextra -Wpedantic -Werror)\nadd_executable(app app.c)\n"
        + package,
        encoding="utf-8",
    )
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or "cmake"
    for command in (
        [cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"],
        [cmake, "--build", tmp_path / "build"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    found = subprocess.run([tmp_path / "build" / "app", micro], capture_output=True, text=True, check=True).stdout
    wanted = SwinInt8.from_file(micro)(torch.full((4, 1, 28, 28), -0.5))[0, 0].item()  # (0 - 0.25) / 0.5
    assert found.startswith(f"{MICRO_DIGITS.name} on ") and float(found.split()[-1]) == pytest.approx(wanted, rel=1e-6)
    nowhere = subprocess.run([tmp_path / "build" / "app", "nowhere"], capture_output=True, text=True)
    assert nowhere.returncode == 1 and nowhere.stderr.startswith("error: nowhere")


def test_unloading_leaves_no_thread_in_gone_code(micro):
    """The pool's threads outlive dlclose."""
    program = f"""
import ctypes, _ctypes, numpy as np, time
for _ in range(2):
    lib = ctypes.CDLL({str(library_path())!r})
    lib.swin_free.restype = None
    handle = ctypes.c_void_p()
    assert lib.swin_load({str(micro)!r}.encode(), None, ctypes.byref(handle)) == 0
    images, out = np.zeros((8, 1, 28, 28), np.float32), np.zeros((8, 10), np.float32)
    for data in range(20):
        assert lib.swin_forward(handle, ctypes.c_void_p(images.ctypes.data), ctypes.c_int64(8),
                                ctypes.c_void_p(out.ctypes.data), None) == 0
    lib.swin_free(handle)
    _ctypes.dlclose(lib._handle)
    time.sleep(0.05)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_names_that_are_no_utf8(micro, tmp_path):
    """The C library takes a path's bytes as they are, and says them again."""
    named = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    shutil.copy(micro, named)
    with CModel(named) as model:
        assert model.info().classes == MICRO_DIGITS.num_classes
    with pytest.raises(StatusError, match="none\ufffd.safetensors"):
        CModel(tmp_path / os.fsdecode(b"none\xe9.safetensors"))
