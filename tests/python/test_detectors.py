"""Backbones out of detectors' checkpoints: names, the order of a downsample's inputs, norms, and how they pad."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from quant_helpers import one_thread
from test_formats import source_of
from torch.nn import functional

from pyharness import models
from pyharness.checkpoint import to_microsoft_layout
from pyharness.config import MICRO_DIGITS
from pyharness.convert import main
from pyharness.detector_format import backbone_of, is_detector
from pyharness.errors import CheckpointError
from pyharness.model_card import read_card

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

MICRO = MICRO_DIGITS.name
CONFIG = dataclasses.replace(MICRO_DIGITS, num_classes=0, pad_first=True)
KINDS = pytest.mark.parametrize("kind", ["microsoft", "mm"])


def unfold_order(channels: int) -> torch.Tensor:
    """Which input of Microsoft's downsample each input of one on torch.nn.Unfold is, int64 [4 * channels]."""
    numbered = torch.arange(4 * channels, dtype=torch.float64)  # as Microsoft's code gathers them: x0, x1, x2, x3
    image = torch.zeros(1, channels, 2, 2, dtype=torch.float64)
    for place, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        image[0, :, row, column] = numbered[place * channels : (place + 1) * channels]
    return functional.unfold(image, 2, stride=2).flatten().long()


def detector_of(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A detector's state dict around the Swin of `state` (timm's layout, no head), with norms of all stages, buffers, a
    neck and a head."""
    out = {}
    for name, tensor in to_microsoft_layout(state).items():
        if kind == "mm":
            if ".downsample." in name:
                tensor = tensor[..., unfold_order(tensor.shape[-1] // 4)]
            for ours, theirs in (
                ("patch_embed.proj.", "patch_embed.projection."), ("layers.", "stages."), (".attn.", ".attn.w_msa."),
                (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
            ):  # fmt: skip
                name = name.replace(ours, theirs)
        stages = sum(f"layers.{i}.blocks.0.norm1.weight" in state for i in range(9))
        name = name.replace("norm.", f"norm{stages - 1}.") if name.startswith("norm.") else name
        out[f"backbone.{name}"] = tensor.clone()
    attention = "stages.0.blocks.0.attn.w_msa" if kind == "mm" else "layers.0.blocks.0.attn"
    out[f"backbone.{attention}.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    out |= {"backbone.norm0.weight": torch.ones(32), "backbone.norm0.bias": torch.zeros(32)}
    return out | {"neck.lateral_convs.0.conv.weight": torch.ones(2, 2), "roi_head.bbox_head.fc_cls.weight": torch.ones(3, 2)}


def test_an_unfolded_downsample_computes_the_same(seed):
    """Against torch.nn.Unfold itself, with its norm and its reduction in its own order."""
    torch.manual_seed(seed)
    c, image = 6, torch.randn(2, 6, 4, 8)
    norm, reduction = torch.randn(2, 4 * c), torch.randn(2 * c, 4 * c)
    gathered = functional.unfold(image, 2, stride=2).transpose(1, 2)
    wanted = functional.linear(functional.layer_norm(gathered, (4 * c,), *norm), reduction)
    stage = "stages.0.downsample"
    theirs = {f"{stage}.norm.weight": norm[0], f"{stage}.norm.bias": norm[1], f"{stage}.reduction.weight": reduction}
    state, _ = backbone_of({f"backbone.{name}": t for name, t in theirs.items()})
    x = image.permute(0, 2, 3, 1)
    parts = [x[:, row::2, column::2] for row, column in [(0, 0), (1, 0), (0, 1), (1, 1)]]  # as Microsoft's code does
    ours = torch.cat(parts, -1).flatten(1, 2)
    affine = state["layers.0.downsample.norm.weight"], state["layers.0.downsample.norm.bias"]
    found = functional.linear(functional.layer_norm(ours, (4 * c,), *affine), state["layers.0.downsample.reduction.weight"])
    torch.testing.assert_close(found, wanted)


@KINDS
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_detectors_backbone_comes_in(kind, wrapped, tmp_path, capsys, seed):
    source = source_of(CONFIG, seed)
    state = detector_of(source.model.state_dict(), kind)
    assert is_detector(state)
    path, out = tmp_path / "det.pth", tmp_path / "swin.safetensors"
    content = {"state_dict": state, "meta": {"config": "model = dict()", "epoch": 12}} if wrapped else state
    torch.save(content, path)
    assert main(["to-timm", str(path), str(out), "--model", MICRO]) == 0
    printed = capsys.readouterr().out
    whose = "mmdetection's" if kind == "mm" else "Microsoft's"
    assert f"a backbone under {whose} names, without norm0, neck, roi_head" in printed
    model, meta = models.load_model(out)
    assert models.config_of(model, MICRO) == CONFIG and meta["config"]["pad_first"] is True
    for name, tensor in source.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert "without norm0, neck, roi_head" in " ".join(read_card(out)["notes"])
    again = models.create_model(MICRO, weights=path, img_size=(60, 44))
    assert models.config_of(again, MICRO).pad_first and again.num_classes == 0


def test_a_classifier_of_mmpretrain_keeps_its_head(tmp_path, seed):
    source = source_of(dataclasses.replace(CONFIG, num_classes=4), seed)
    state = detector_of({k: t for k, t in source.model.state_dict().items() if not k.startswith("head.")}, "mm")
    state = {name: t for name, t in state.items() if name.startswith("backbone.") and "norm0" not in name}
    state |= {f"head.fc.{name}": getattr(source.model.head.fc, name).detach() for name in ("weight", "bias")}
    torch.save({"state_dict": state}, tmp_path / "c.pth")
    model, meta = models.load_model(tmp_path / "c.pth", MICRO)
    assert meta["backbone"] == "a backbone under mmdetection's names"
    assert all(torch.equal(model.state_dict()[name], t) for name, t in source.model.state_dict().items())


def test_the_backbone_alone_without_its_prefix(tmp_path, seed):
    source = source_of(CONFIG, seed)
    state = detector_of(source.model.state_dict(), "mm")
    alone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    torch.save(alone, tmp_path / "b.pth")
    model, _ = models.load_model(tmp_path / "b.pth", MICRO)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in source.model.state_dict().items())


@pytest.mark.parametrize("layout", [dict, to_microsoft_layout], ids=["timm", "microsoft"])
def test_a_classifier_within_another_model_pads_as_it_did(layout, tmp_path, seed):
    source = source_of(dataclasses.replace(CONFIG, pad_first=False), seed)
    state = {f"backbone.{name}": t for name, t in layout(source.model.state_dict()).items()}
    torch.save(state | {"projector.weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    model, meta = models.load_model(tmp_path / "w.pth", MICRO)
    assert not models.config_of(model, MICRO).pad_first and meta["backbone"].endswith("without projector")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in source.model.state_dict().items())


@KINDS
def test_what_is_missing_or_too_much_is_named(kind, tmp_path, seed):
    source = source_of(CONFIG, seed)
    state = detector_of(source.model.state_dict(), kind)
    path = tmp_path / "det.pth"
    for damaged, message in (
        ({k: t for k, t in state.items() if "norm1." not in k or ".blocks." in k}, r"missing \(2\): norm.bias, norm.weight"),
        ({**state, "backbone.absolute_pos_embed": torch.zeros(1, 32, 4, 4)}, r"unexpected \(1\): absolute_pos_embed"),
        ({k: t for k, t in state.items() if "downsample.norm" not in k}, r"missing \(2\): layers.1.downsample.norm.bias"),
    ):
        torch.save(damaged, path)
        with pytest.raises(CheckpointError, match=message):
            models.load_model(path, MICRO)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"give the model's timm name \(--model\). It shows embed_dim 32, depths \[2, 2\]"):
        models.load_model(path)


def test_other_files_are_no_detectors(seed):
    state = source_of(MICRO_DIGITS, seed).model.state_dict()
    for names in (state, to_microsoft_layout(state), {"backbone.conv1.weight": 0}, {"backbone.layer1.0.attn.w": 0}):
        assert not is_detector(names)


def test_a_downsample_of_no_multiple_of_four_is_left_for_the_loader():
    name = "stages.0.downsample.norm.weight"
    state, _ = backbone_of({name: torch.arange(6.0)})
    assert torch.equal(state["layers.0.downsample.norm.weight"], torch.arange(6.0))
