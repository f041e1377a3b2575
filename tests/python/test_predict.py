"""predict.py: images go in as in evaluate.py, classes come out as there, and what cannot be read is named and left out."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quant_helpers import one_thread

from pyharness import data, evaluate, models, predict, quantize
from pyharness.calibrated import save_calibrated
from pyharness.config import MICRO_DIGITS
from pyharness.convert import to_engine_file
from pyharness.engine_file import save_engine_file
from pyharness.errors import DataError, HarnessError, ModelError

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name
NOTE = {"mean": [0.3], "std": [0.4], "interpolation": "bilinear", "crop_pct": 0.7}
"""Of the calibrated checkpoint and the engine file: none of it is what timm says of the model."""
FILES = ("fp32.pth", "calibrated.safetensors", "engine.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged teacher as a file of each kind, and 60 held-out digits enlarged, of several modes, sizes and types,
    in class folders: `images/val/<digit>/`, as evaluate.py needs them."""
    folder = tmp_path_factory.mktemp("predict")
    model = models.create_model(MICRO, weights="pretrained")
    checkpoint = quantize.quantize(model, MICRO_DIGITS, [data.DigitsDataset(train=True).images[:64]])
    checkpoint = dataclasses.replace(checkpoint, meta={**checkpoint.meta, "input": NOTE})
    models.save_checkpoint(folder / FILES[0], model, models.checkpoint_meta(model, MICRO))
    save_calibrated(folder / FILES[1], checkpoint)
    save_engine_file(folder / FILES[2], to_engine_file(checkpoint, "fused_int8"))
    held_out = data.DigitsDataset(train=False)
    for i in range(60):
        image, label = held_out[i]
        pixels = ((image[0] * data.DIGITS_STD + data.DIGITS_MEAN) * 255).round().clamp(0, 255).byte().numpy()
        mode, suffix = (("L", "png"), ("RGB", "jpg"), ("RGBA", "png"))[i % 3]
        place = folder / "images" / "val" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((40 + i, 64)).convert(mode).save(place / f"{i}.{suffix}")
    assert len(list((folder / "images" / "val").iterdir())) == 10
    return folder


def predicted(*words, status: int = 0):
    """What predict.py writes as JSON, and what it prints."""
    out = Path(words[0]).parent / "found.json"
    assert predict.main([*map(str, words), "--json", str(out)]) == status
    return json.loads(out.read_text())


def first_class(row) -> int:
    return row["classes"][0]["class"]


@pytest.mark.parametrize("file", FILES)
def test_as_many_are_right_as_evaluate_counts(folder, file, tmp_path):
    """And the images are get_dataset's to the bit, in the same order."""
    images, npy = folder / "images", tmp_path / "images.npy"
    document = predicted(folder / file, images / "val", "--batch", 7, "--npy", npy)
    assert evaluate.main([str(folder / file), "--data", str(images), "--out", str(tmp_path)]) == 0
    row = json.loads((tmp_path / "evaluate.json").read_text())["rows"][0]
    right = [first_class(found) == int(Path(found["image"]).parent.name) for found in document["images"]]
    assert len(right) == row["n_eval"] == 60 and row["top1"] == pytest.approx(100 * sum(right) / 60)
    assert 10 < sum(right) < 60, "an accuracy that says something"
    in_five = [
        int(Path(found["image"]).parent.name) in [guess["class"] for guess in found["classes"]]
        for found in document["images"]
    ]
    assert row["top5"] == pytest.approx(100 * sum(in_five) / 60)

    opened = evaluate.open_predictor(folder / file)
    dataset = data.get_dataset(images, MICRO, train=False, model=opened.timm_model)
    assert [found["image"] for found in document["images"]] == [str(images / "val" / dataset.filename(i)) for i in range(60)]
    expected = torch.stack([dataset[i][0] for i in range(60)]).numpy()
    np.save(tmp_path / "expected.npy", expected)
    assert npy.read_bytes() == (tmp_path / "expected.npy").read_bytes()
    with torch.inference_mode():
        probabilities = opened.predict(torch.from_numpy(expected)).softmax(dim=1)
    for found, row in zip(document["images"], probabilities):
        for guess in found["classes"]:
            assert guess["probability"] == pytest.approx(row[guess["class"]].item(), abs=1e-5)

    said = document["preprocessing"]
    assert said["input_size"] == [1, 28, 28]
    if file != FILES[0]:
        assert {key: said[key] for key in NOTE} == NOTE
    assert document["graph"] == {FILES[0]: None, FILES[1]: "ft_int8", FILES[2]: "fused_int8"}[file]
    assert (document["model"], document["method"], document["unreadable"]) == (MICRO, opened.kind, [])


def test_what_is_printed(folder, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_bytes("\ufeffnull\r\n".encode() + b"".join(b"digit %d\r\n" % i for i in range(1, 10)) + b"\r\n")
    files = sorted((folder / "images" / "val" / "0").iterdir())[:2]
    document = predicted(folder / FILES[2], *files, "--top", 3, "--labels", labels)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == str(files[0]) and out[4] == str(files[1]) and len(out) == 8
    for line, guess in zip([*out[1:4], *out[5:]], [guess for row in document["images"] for guess in row["classes"]]):
        name = "null" if guess["class"] == 0 else f"digit {guess['class']}"
        assert guess["label"] == name
        assert line == f"  {100 * guess['probability']:6.2f} %  {guess['class']} {name}"
    document = predicted(folder / FILES[2], files[0], "--top", 99)
    guesses = document["images"][0]["classes"]
    assert sorted(guess["class"] for guess in guesses) == list(range(10)) and "label" not in guesses[0]
    assert sum(guess["probability"] for guess in guesses) == pytest.approx(1)
    assert guesses == sorted(guesses, key=lambda guess: -guess["probability"])
    assert all(re.fullmatch(r" +\d+\.\d\d %  \d", line) for line in capsys.readouterr().out.splitlines()[1:])


def test_folders_are_read_in_depth_and_in_natural_order(folder, tmp_path):
    source = next((folder / "images" / "val" / "3").iterdir())
    for name in ("10.PNG", "9.png", "deep/er/2.png", "notes.txt", "moving.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source.read_bytes())
    (tmp_path / "chosen").write_bytes(source.read_bytes())
    document = predicted(folder / FILES[2], tmp_path / "chosen", tmp_path, tmp_path / "9.png")
    names = [os.path.relpath(row["image"], tmp_path) for row in document["images"]]
    assert names == ["chosen", "9.png", "10.PNG", "deep/er/2.png", "9.png"]


def test_what_cannot_be_read_is_named_and_left_out(folder, tmp_path, capsys):
    """Files of no image, cut off and missing, each in another batch, and a folder without images."""
    whole = sorted((folder / "images" / "val" / "1").glob("*.png"))[0]
    cut, empty, missing = tmp_path / "cut.png", tmp_path / "empty", tmp_path / "missing.jpg"
    cut.write_bytes(whole.read_bytes()[:-60])
    empty.mkdir()
    words = (folder / FILES[2], cut, whole, __file__, empty, missing, whole, "--batch", 2, "--npy", tmp_path / "x.npy")
    document = predicted(*words, status=predict.UNREADABLE_STATUS)
    assert [row["image"] for row in document["images"]] == [str(whole)] * 2
    assert document["unreadable"] == [str(empty), str(cut), __file__, str(missing)]
    assert np.load(tmp_path / "x.npy").shape == (2, 1, 28, 28)
    err = capsys.readouterr().err
    assert all(f"warning: {path} cannot be read" in err for path in (cut, __file__, missing))
    assert f"warning: no image found in {empty} or below; .jpg" in err

    (tmp_path / "x.npy").unlink()
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        predict.main([str(folder / FILES[2]), str(cut), str(missing), "--npy", str(tmp_path / "x.npy")])
    with pytest.raises(DataError, match=r"no image found in .*empty or below; .*\.pgm are read"):
        predict.main([str(folder / FILES[2]), str(empty)])
    assert not list(tmp_path.glob("*.npy"))


def test_a_name_that_the_output_cannot_hold(folder, tmp_path, capsys):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")
    Path(odd).write_bytes(next((folder / "images" / "val" / "3").iterdir()).read_bytes())
    document = predicted(folder / FILES[2], odd)
    assert document["images"][0]["image"] == odd
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}/\\udce9.png"


def test_mistakes(folder, tmp_path, seed):
    model, image = str(folder / FILES[2]), str(next((folder / "images" / "val" / "3").iterdir()))
    (tmp_path / "nine.txt").write_text("name\n" * 9)
    (tmp_path / "latin.txt").write_bytes(b"\xe9\n" * 10)
    for words, message in (
        (["--top", "0"], "--top must be at least 1, found 0"),
        (["--batch", "0"], "--batch must be at least 1, found 0"),
        (["--threads", "0"], "--threads must be at least 1, found 0"),
        (["--labels", str(tmp_path / "nine.txt")], "has 9 names, the model has 10 classes"),
        (["--labels", str(tmp_path / "latin.txt")], "is not text in UTF-8"),
        (["--labels", str(tmp_path / "none.txt")], r"none.txt \(No such file"),
        (["--model", "swin_tiny_patch4_window7_224"], "is of swin_micro_digits, not of swin_tiny"),
    ):
        with pytest.raises(HarnessError, match=message):
            predict.main([model, image, *words])
    headless = models.create_model(MICRO, num_classes=0, seed=seed)
    models.save_checkpoint(tmp_path / "headless.pth", headless, models.checkpoint_meta(headless, MICRO))
    with pytest.raises(ModelError, match="has no classification head"):
        predict.main([str(tmp_path / "headless.pth"), image])


def test_logits_that_are_not_finite_name_the_image_and_leave_no_file(folder, tmp_path, monkeypatch):
    """Of the second image in the second batch."""
    images = sorted(map(str, (folder / "images" / "val").rglob("*.jpg")))[:4]
    batches = []

    def broken(self, batch):
        batches.append(len(batch))
        logits = torch.zeros(len(batch), 10)
        logits[1, 3] = float("nan") if len(batches) == 2 else 0
        return logits

    monkeypatch.setattr(evaluate.Predictor, "predict", broken)
    words = ["--batch", "2", "--npy", str(tmp_path / "x.npy"), "--json", str(tmp_path / "x.json")]
    with pytest.raises(HarnessError, match=f"^{re.escape(images[3])}: its logits are not finite; .*engine.safetensors"):
        predict.main([str(folder / FILES[2]), *images, *words])
    assert batches == [2, 2] and not list(tmp_path.iterdir())


def test_the_c_library_takes_the_images_as_docs_runtime_shows(folder, repository, tmp_path, monkeypatch):
    """The same classes, and from swin_run too."""
    from pyharness.c_library import program_path

    monkeypatch.chdir(tmp_path)
    Path("my.engine.safetensors").symlink_to(folder / FILES[2])
    document = predicted(Path("my.engine.safetensors"), folder / "images", "--npy", "images.npy")
    (example,) = re.findall(r"^```python\n(.*?)^```", (repository / "docs/runtime.md").read_text(), re.M | re.S)
    names = {}
    exec(example, names)
    first = [first_class(row) for row in document["images"]]
    assert names["logits"].argmax(axis=1).tolist() == first

    command = [str(program_path()), "my.engine.safetensors", "--images", "images.npy", "--json"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["images"]
    assert [guesses[0]["class"] for guesses in said] == first
