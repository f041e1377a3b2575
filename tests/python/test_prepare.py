"""Photographs without Python: `swin_prepare` gives to the bit what timm's evaluation transform gives of an image in Pillow, and
swin_run takes them from PPM files and arrays."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from quant_helpers import NON_SQUARE
from test_c_library import IMAGENET, refused, saved, swin_run
from v2_configs import SMALL

from pyharness.c_library import (
    ERROR_ARGUMENT,
    ERROR_UNSUPPORTED,
    CModel,
    check,
    library,
    options,
    program_path,
)
from pyharness.config import MICRO_DIGITS
from pyharness.errors import EngineError, FormatError
from pyharness.tensor_file import load_tensors, save_tensors

columns_first = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 resizes the rows of every image first"
)
MODES = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
MODEL_SIZES = [(28, 56), (56, 28), (48, 32), (62, 62), (84, 98)]
"""What NON_SQUARE takes at once and by swin_at_size: square ones, which torchvision resizes, and others, which timm does."""


def input_of(channels: int = 3, **fields) -> dict:
    mean, std = IMAGENET if channels == 3 else ((0.45,), (0.225,))
    return {"input": {"mean": list(mean), "std": list(std), "interpolation": "bicubic", "crop_pct": 0.9, **fields}}


def model_of(folder: Path, seed: int, config=NON_SQUARE, threads: int = 2, **fields) -> CModel:
    return CModel(saved(folder, config, "fused_int8", seed, **input_of(config.in_chans, **fields))[0], options(threads=threads))


def model_saying(folder: Path, seed: int, **fields) -> CModel:
    """A model whose file says of images what this package writes into none."""
    path = saved(folder, NON_SQUARE, "fused_int8", seed, **input_of())[0]
    tensors, header = load_tensors(path, FormatError)
    meta = json.loads(header["meta"])
    meta["input"] |= fields
    save_tensors(path, tensors, {**header, "meta": json.dumps(meta)})
    return CModel(path, options(threads=2))


def photograph(random: np.random.Generator, height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise, a third of it black or white, so that sums go below 0 and above 255."""
    pixels = random.integers(-128, 384, (height, width, channels)).clip(0, 255)
    return pixels.astype(np.uint8)


def timms(pixels: np.ndarray, size: tuple[int, int], **fields) -> np.ndarray:
    """f32 [C, H, W] of timm's evaluation transform."""
    from timm.data import create_transform

    channels = pixels.shape[2]
    cfg = input_of(channels, **fields)["input"]
    transform = create_transform(input_size=(channels, *size), **cfg)
    return transform(Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])).numpy()


def sizes_of(random: np.random.Generator, count: int):
    """Sides from 1 pixel to some hundred: smaller and larger than the models', near and far from their shapes."""
    for _ in range(count):
        yield tuple(int(side) for side in np.exp(random.uniform(0, np.log([400, 400]))).round())


# --- against timm and Pillow -----------------------------------------------------------------------------------------


@columns_first
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875, 0.37])
@pytest.mark.parametrize("crop_mode", [None, "center", "squash", "border"])
@pytest.mark.parametrize("interpolation", MODES)
def test_it_is_timms_transform(tmp_path, interpolation, crop_mode, crop_pct, seed):
    said = {"interpolation": interpolation, "crop_pct": crop_pct} | ({"crop_mode": crop_mode} if crop_mode else {})
    random, compared = np.random.default_rng(seed), 0
    with model_of(tmp_path, seed, **said) as model:
        for size in MODEL_SIZES:
            with model.at_size(*size) as other:
                for height, width in sizes_of(random, 6):
                    pixels = photograph(random, height, width)
                    try:
                        wanted = timms(pixels, size, **said)
                    except ValueError:  # Pillow's, of an image of no pixels
                        refused(ERROR_ARGUMENT, "would be resized to", lambda o=other, p=pixels: o.prepare(p))
                        continue
                    found = other.prepare(pixels)
                    assert np.array_equal(found, wanted), (size, pixels.shape)
                    compared += 1
    assert compared > 20


EXTREMES = [(1, 1), (1, 5000), (5000, 1), (2, 3), (3000, 40), (31, 2500), (700, 1000), (29, 57), (56, 112), (55, 111)]


@columns_first
@pytest.mark.parametrize("interpolation", MODES)
def test_resizing_is_pillows_to_the_byte(tmp_path, interpolation, seed):
    """Without a crop, and normalized so that the bytes can be read."""
    random = np.random.default_rng(seed)
    said = {"interpolation": interpolation, "crop_pct": 1.0, "crop_mode": "squash", "mean": [0, 0, 0], "std": [1, 1, 1]}
    with model_of(tmp_path, seed, **said) as model:
        for height, width in [*EXTREMES, (28, 56), (28, 90), (90, 56), *sizes_of(random, 10)]:
            pixels = photograph(random, height, width)
            resized = Image.fromarray(pixels).resize((56, 28), getattr(Image.Resampling, interpolation.upper()))
            found = model.prepare(pixels).transpose(1, 2, 0) * 255
            assert np.array_equal(found.round().astype(np.uint8), np.asarray(resized)), (height, width)


@columns_first
@pytest.mark.parametrize(("height", "width"), EXTREMES)
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
def test_extreme_sizes(tmp_path, interpolation, height, width, seed):
    pixels = photograph(np.random.default_rng(seed), height, width)
    with model_of(tmp_path, seed, interpolation=interpolation) as model, model.at_size(62, 62) as square:
        for one in (model, square):
            wanted = timms(pixels, one.image_shape[1:], interpolation=interpolation)
            assert np.array_equal(one.prepare(pixels), wanted)


@columns_first
@pytest.mark.parametrize("interpolation", MODES)
def test_photographs_as_large_as_they_are(tmp_path, interpolation, seed):
    """Of millions of bytes: a weight that is off by 1e-8 of itself is a byte of some of them."""
    random, config = np.random.default_rng(seed), dataclasses.replace(NON_SQUARE, name="large", img_size=(224, 224))
    with model_of(tmp_path, seed, config, interpolation=interpolation) as model:
        for size in [(224, 224), (256, 256), (384, 384), (448, 224)]:
            with model.at_size(*size) as other:
                for height, width in [(1368, 1032), (605, 999), (501, 226)]:
                    pixels = photograph(random, height, width)
                    assert np.array_equal(other.prepare(pixels), timms(pixels, size, interpolation=interpolation))


@columns_first
@pytest.mark.parametrize("interpolation", MODES)
@pytest.mark.parametrize("crop_mode", ["center", "border"])
def test_grey_images(tmp_path, crop_mode, interpolation, seed):
    random, said = np.random.default_rng(seed), {"interpolation": interpolation, "crop_mode": crop_mode}
    with model_of(tmp_path, seed, MICRO_DIGITS, **said) as model:
        for height, width in [(28, 28), (100, 75), (30, 300), *((20 + h, 20 + w) for h, w in sizes_of(random, 4))]:
            pixels = photograph(random, height, width, 1)
            assert np.array_equal(model.prepare(pixels), timms(pixels, (28, 28), **said)), (height, width)


def test_rows_may_lie_apart(tmp_path, seed):
    whole = photograph(np.random.default_rng(seed), 80, 120)
    part = whole[7:60, 11:90]
    with model_of(tmp_path, seed) as model:
        wanted = model.prepare(part.copy())
        assert part.strides[0] == 360 and np.array_equal(model.prepare(part), wanted)
        for other in (part[:, ::-1], part[::-1], part[:, :, ::-1]):
            assert np.array_equal(model.prepare(other), model.prepare(other.copy()))


def test_nothing_is_written_past_the_image(tmp_path, seed):
    pixels = photograph(np.random.default_rng(seed), 61, 47)
    with model_of(tmp_path, seed) as model:
        out = np.full(3 * 28 * 56 + 1, np.nan, np.float32)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        check(library().swin_prepare(model.handle, data, 61, 47, 0, out.ctypes.data))
        assert np.isfinite(out[:-1]).all() and np.isnan(out[-1])
        assert np.array_equal(out[:-1].reshape(3, 28, 56), model.prepare(pixels))


def test_threads_make_no_difference(tmp_path, seed):
    random, wrong = np.random.default_rng(seed), []
    with model_of(tmp_path, seed, threads=1) as alone, model_of(tmp_path, seed, threads=4) as four:
        images = [photograph(random, 90 + 40 * i, 130) for i in range(4)]
        wanted = [alone.prepare(image) for image in images]

        def call(image: np.ndarray, result: np.ndarray) -> None:
            wrong.extend(1 for _ in range(20) if not np.array_equal(four.prepare(image), result))

        threads = [threading.Thread(target=call, args=pair) for pair in zip(images, wanted)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# --- what the file says ----------------------------------------------------------------------------------------------


def test_info_says_how(tmp_path, seed):
    with model_of(tmp_path, seed, crop_mode="squash") as model:
        info = model.info()
        assert (info.interpolation, info.crop_pct, info.crop_mode) == (b"bicubic", 0.9, b"squash")
    with CModel(saved(tmp_path, NON_SQUARE, "fused_int8", seed)[0]) as model:
        info = model.info()
        assert (info.interpolation, info.crop_pct, info.crop_mode) == (None, 0, None)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"interpolation": None}, ERROR_ARGUMENT, r"does not say how images are resized \('interpolation'\)"),
        ({"crop_pct": None}, ERROR_ARGUMENT, r"does not say how large a share .*\('crop_pct'\)"),
        ({"interpolation": "random"}, ERROR_UNSUPPORTED, "interpolation is 'random'; 'nearest', .* is needed"),
        ({"crop_mode": "middle"}, ERROR_UNSUPPORTED, "crop_mode is 'middle'; 'center', 'squash' or 'border'"),
        ({"crop_pct": 0}, ERROR_ARGUMENT, "'crop_pct' is 0; a number above zero is needed"),
        ({"crop_pct": -0.5}, ERROR_ARGUMENT, "'crop_pct' is -0.5"),
        ({"crop_pct": "0.9"}, ERROR_ARGUMENT, "'crop_pct' is a string"),
        ({"interpolation": 3}, ERROR_ARGUMENT, "'interpolation' is"),
        ({"crop_mode": ["center"]}, ERROR_ARGUMENT, "'crop_mode' is an array"),
        ({"crop_pct": 60}, ERROR_ARGUMENT, "of 40x60 would be resized to 0x0 .*sides of 1 to"),
        ({"crop_pct": 1e-300}, ERROR_ARGUMENT, "would be resized to"),
        ({"crop_mode": "border", "mean": [1.5, 0, 0]}, ERROR_UNSUPPORTED, "mean is 1.5, which crop_mode 'border'"),
    ],
)
def test_what_a_file_says_wrong_is_an_error_of_preparing_alone(tmp_path, fields, status, message, seed):
    with model_saying(tmp_path, seed, **fields) as model:
        refused(status, message, lambda: model.prepare(np.zeros((40, 60, 3), np.uint8)))
        assert np.isfinite(model.normalize(np.zeros((1, 28, 56, 3), np.uint8))).all()


def test_a_file_that_says_nothing_is_an_error_of_preparing_alone(tmp_path, seed):
    with CModel(saved(tmp_path, NON_SQUARE, "fused_int8", seed)[0]) as model:
        message = "does not say how its images are prepared; resize them, and give swin_normalize mean and std"
        refused(ERROR_ARGUMENT, message, lambda: model.prepare(np.zeros((40, 60, 3), np.uint8)))


def test_arguments_out_of_range(tmp_path, seed):
    lib, pixels = library(), np.zeros((4, 5, 3), np.uint8)
    out, data = np.zeros((3, 28, 56), np.float32).ctypes.data, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    with model_of(tmp_path, seed) as model:
        for call, message in (
            ((None, data, 4, 5, 0, out), "model is NULL"),
            ((model.handle, None, 4, 5, 0, out), "pixels is NULL"),
            ((model.handle, data, 4, 5, 0, None), "image is NULL"),
            ((model.handle, data, 0, 5, 0, out), "the image is 0x5; sides of 1 to 65536 are needed"),
            ((model.handle, data, 4, -1, 0, out), "the image is 4x-1"),
            ((model.handle, data, 65537, 5, 0, out), "the image is 65537x5"),
            ((model.handle, data, 4, 2**62, 0, out), "the image is 4x"),
            ((model.handle, data, 4, 5, 14, out), "stride is 14; a row has 15 bytes"),
            ((model.handle, data, 4, 5, -15, out), "stride is -15"),
            ((model.handle, data, 4, 5, 2**62, out), "stride is 4611686018427387904"),
        ):
            refused(ERROR_ARGUMENT, message, lambda c=call: check(lib.swin_prepare(*c)))
        for wrong in (np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.float32)):
            with pytest.raises(EngineError, match=r"a photograph is .*; uint8 \(height, width, 3\) is needed"):
                model.prepare(wrong)


# --- swin_run --------------------------------------------------------------------------------------------------------


def ppm(pixels: np.ndarray, header: str = "P6\n{width} {height}\n255\n") -> bytes:
    height, width = pixels.shape[:2]
    return header.format(width=width, height=height).encode() + pixels.tobytes()


@pytest.fixture
def colour(tmp_path, seed) -> Path:
    return saved(tmp_path, NON_SQUARE, "fused_int8", seed, **input_of())[0]


@pytest.fixture
def photographs(seed) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [photograph(random, *size) for size in ((60, 47), (28, 56), (1, 9), (90, 200), (61, 33))]


def features_of(path: Path, images: list[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
    """Of each image as `CModel` prepares it."""
    with CModel(path) as model, model.at_size(*(size or model.image_shape[1:])) as other:
        return other.forward(np.stack([other.prepare(image) for image in images]))


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_swin_run_takes_photographs_of_any_size(colour, photographs, tmp_path, batch):
    (tmp_path / "all.ppm").write_bytes(b"".join(map(ppm, photographs)))
    words = ("--images", tmp_path / "all.ppm", "--out", tmp_path / "out.npy", "--batch", batch)
    assert swin_run(colour, *words).stdout == ""  # a model without a head
    assert np.array_equal(np.load(tmp_path / "out.npy"), features_of(colour, photographs))


def test_swin_run_takes_a_photograph_as_array(colour, photographs, tmp_path):
    np.save(tmp_path / "one.npy", photographs[0])
    swin_run(colour, "--images", tmp_path / "one.npy", "--out", tmp_path / "out.npy", "--batch", 4)
    assert np.array_equal(np.load(tmp_path / "out.npy"), features_of(colour, photographs[:1]))
    # [n, height, width, channels] are images that have their size.
    np.save(tmp_path / "one.npy", photographs[1][None])
    swin_run(colour, "--images", tmp_path / "one.npy", "--out", tmp_path / "out.npy")
    with CModel(colour) as model:
        assert np.array_equal(np.load(tmp_path / "out.npy"), model.forward(model.normalize(photographs[1][None])))


@pytest.mark.parametrize("kind", ["ppm", "npy"])
def test_swin_run_gives_the_model_photographs_of_a_size(colour, photographs, tmp_path, kind):
    path = tmp_path / f"one.{kind}"
    np.save(path, photographs[3]) if kind == "npy" else path.write_bytes(ppm(photographs[3]))
    swin_run(colour, "--images", path, "--img-size", "48x32", "--out", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), features_of(colour, photographs[3:4], (48, 32)))


def test_swin_run_names_the_classes_of_photographs(tmp_path, photographs, seed):
    names = [f"number {i}" for i in range(7)]
    path, _ = saved(tmp_path, SMALL, "fused_int8", seed, classes=names, **input_of())
    (tmp_path / "all.ppm").write_bytes(b"".join(map(ppm, photographs)))
    wanted = features_of(path, photographs).argmax(1).tolist()
    lines = swin_run(path, "--images", tmp_path / "all.ppm", "--batch", 3).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[str(i), str(c)] for i, c in enumerate(wanted)]
    said = json.loads(swin_run(path, "--images", tmp_path / "all.ppm", "--json").stdout)["images"]
    assert [guesses[0]["label"] for guesses in said] == [names[c] for c in wanted]


def test_swin_run_reads_a_pipe(colour, photographs, tmp_path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as pipe:
        words = [str(colour), "--images", "/dev/stdin", "--out", str(tmp_path / "out.npy")]
        with subprocess.Popen([program_path(), *words], stdin=pipe.stdout) as run:
            pipe.stdin.write(ppm(photographs[0]))
            pipe.stdin.close()
            assert run.wait(60) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), features_of(colour, photographs[:1]))


@pytest.mark.parametrize(
    "header",
    [
        "P6 {width} {height} 255 ",
        "P6\n# by a camera\n{width}\n# and # again\n\n {height}\t255\r",
        "P6#\n{width} {height}\n#255\n255\n",
        "P6\r\n00{width} {height}\n0255\n",
    ],
)
def test_headers_of_ppm_files(colour, photographs, tmp_path, header):
    (tmp_path / "one.ppm").write_bytes(ppm(photographs[0], header))
    swin_run(colour, "--images", tmp_path / "one.ppm", "--out", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), features_of(colour, photographs[:1]))


PIXELS = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P3\n1 1\n255\n0 0 0\n", "P3 is a PPM in text; a binary PPM (P6) of 8 bits is needed: `convert"),
        (b"P5\n1 1\n255\n\0", "P5 is grey; a binary PPM"),
        (b"P4\n1 1\n\0", "P4 is black and white; a binary PPM"),
        (b"P7\nWIDTH 1\n", "P7 is another format; a binary PPM"),
        (b"PK\3\4", "PK is another format; a binary PPM"),
        (ppm(PIXELS, "P6\n{width} {height}\n65535\n"), "has values up to 65535 in 16 bits; a binary PPM"),
        (ppm(PIXELS, "P6\n{width} {height}\n15\n"), "has values up to 15; a binary PPM"),
        (ppm(PIXELS)[:-1], "the file is cut off: it says it holds 5x4 pixels"),
        (b"P6\n65536 65536\n255\nabc", "the file is cut off: it says it holds 65536x65536 pixels"),
        (b"P6\n5 4\n25", "the file is cut off"),
        (b"P6", "the file is cut off"),
        (b"P", "the file is cut off"),
        (b"P6\n# no end", "the file is cut off"),
        (b"P6\n0 4\n255\n", "is 0 wide and 4 high; sides of 1 to 65536 are needed"),
        (b"P6\n5 65537\n255\n", "is 5 wide and 65537 high"),
        (b"P6\n99999999999999999999 4\n255\n", "wide and 4 high; sides of 1 to 65536"),
        (b"P6\n-5 4\n255\n", "no width is in its header"),
        (b"P6\n5x4\n255\n", "something else follows the width in its header"),
        (b"P6\n5 4\n255#\n" + bytes(60), "something else follows the maxval in its header"),
        (ppm(PIXELS) + b"\n", "image 1: something follows the image before that is no PPM"),
        (ppm(PIXELS) + ppm(PIXELS)[:-1], "image 1: the file is cut off"),
        (b"\xff\xd8\xff\xe0JFIF", "no .npy file, and no binary PPM; numpy.save writes the one, djpeg the other"),
        (b"", "no .npy file, and no binary PPM"),
        (np.zeros((4, 5, 4), np.uint8), "has images of 4 channels; non_square takes 3"),
        (np.zeros((0, 5, 3), np.uint8), "holds uint8 [0, 5, 3]; sides of 1 to 65536 are needed"),
        (np.zeros((4, 5), np.uint8), "[n, height, width, 3] is needed by non_square, or a photograph's [height, width, 3]"),
        (np.zeros((4, 5, 3), np.float32), "holds float32 [4, 5, 3]; [n, 3, height, width] is needed by non_square"),
    ],
)
def test_swin_run_refuses_photographs_by_name(colour, tmp_path, content, message):
    path, out = tmp_path / "photographs", tmp_path / "out.npy"
    with open(path, "wb") as file:
        file.write(content) if isinstance(content, bytes) else np.save(file, content)
    error = swin_run(colour, "--images", path, "--out", out, status=1).stderr
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob("*.tmp")), "half a result was left"


def test_swin_run_says_what_a_model_does_not(tmp_path, seed):
    micro, _ = saved(tmp_path, MICRO_DIGITS, "fused_int8", seed, **input_of(1))
    silent, _ = saved(tmp_path, NON_SQUARE, "fused_int8", seed)
    (tmp_path / "one.ppm").write_bytes(ppm(PIXELS))
    words = ("--images", tmp_path / "one.ppm")
    for path, message in ((micro, "has images of 3 channels; swin_micro_digits takes 1"), (silent, "does not say how its")):
        error = swin_run(path, *words, status=1).stderr
        assert error.startswith(f"error: {tmp_path / 'one.ppm'}: ") and message in error
    assert "photographs are prepared as the engine file says" in swin_run(
        micro, *words, "--mean", "0.5", "--std", "0.5", status=2
    ).stderr
