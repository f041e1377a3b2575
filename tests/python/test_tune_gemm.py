"""tune_gemm.py as far as it runs without a GPU: its shapes are the engine's, and what it prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_helpers import PADDED
from v2_configs import MICRO as MICRO_V2

from pyharness import tune_gemm
from pyharness.config import GRAPHS, MICRO_DIGITS, SwinConfig
from pyharness.engine import SwinInt8
from pyharness.errors import EngineError
from pyharness.random_engine import random_engine_file
from pyharness.tune_gemm import Shape, config_of_name, gemm_shapes


@pytest.mark.parametrize("config", [MICRO_DIGITS, PADDED], ids=lambda c: c.name)
@pytest.mark.parametrize("int8_mode", [1, 2])
def test_shapes_are_those_the_engine_runs(int8_mode: int, config: SwinConfig) -> None:
    wanted = gemm_shapes(config, 3, int8_mode)
    assert len(set(wanted)) == len(wanted)
    found = set()
    for graph in GRAPHS:
        engine = SwinInt8.from_engine_file(random_engine_file(config, graph, int8_mode))
        for op in engine.ops(3):
            if op.name.endswith("_gemm") and op.shape.startswith("M="):
                m, n, k = (int(word.split("=")[1]) for word in op.shape.split())
                size = (op.bytes_written // (m * n)) * 8
                relu = graph == "geluless_int8" and op.name == "fc1_gemm"
                found.add(Shape(m, n, k, f"s{size}" + ("_relu" if relu else "")))
    assert found == {shape for shape in wanted if not shape.output.startswith("channels_")}


@pytest.mark.parametrize("config", [MICRO_DIGITS, PADDED, MICRO_V2], ids=["v1", "v1 padded", "v2"])
def test_shapes_of_the_fused_graph_are_those_the_engine_runs(config: SwinConfig) -> None:
    outputs = {"qkv": ["s8"], "proj_norm": [], "mlp_norm": ["relu", "add_f16"]}  # of an operation's products
    if config.version == 2:
        outputs = {"qkv": [], "proj_norm": ["f32"], "mlp_norm": ["relu", "f32"]}
    found = set()
    for op in SwinInt8.from_engine_file(random_engine_file(config, "fused_int8")).ops(3):
        rows = re.match(r"M=(\d+) ", op.shape)
        for output, (n, k) in zip(outputs.get(op.name, []), re.findall(r"N=(\d+) K=(\d+)", op.shape)):
            found.add(Shape(int(rows[1]), int(n), int(k), f"channels_{output}"))
    relu = {shape for shape in gemm_shapes(config, 3) if shape.output.startswith("channels_")}
    gelu = {shape for shape in relu if shape.output == "channels_gelu"}
    assert found == relu - gelu
    assert {(s.m, s.n, s.k) for s in gelu} == {(s.m, s.n, s.k) for s in found if s.output == "channels_relu"}


def test_every_published_model_has_shapes_a_library_takes() -> None:
    for name in ("swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384"):
        shapes = gemm_shapes(config_of_name(name), 128)
        assert len(shapes) == 4 * (5 + 4) + 3
        assert all(s.n % 16 == 0 and s.k % 16 == 0 for s in shapes)
    assert shapes[0] == Shape(128 * 96 * 96, 3 * 192, 192, "s8")


class FakeOps:
    """Stands for torch.ops.swin_int8: answers as swin::tune_gemm does."""

    def __init__(self, saved: str = "", runs: bool = True) -> None:
        self.saved, self.runs, self.calls = saved, runs, []

    def tune_gemm(self, m: list[int], n: list[int], k: list[int], output: list[str], again: bool) -> str:
        self.calls.append((m, n, k, output, again))
        shape: dict[str, Any] = {
            "tuned": again, "m": m[0], "n": n[0], "k": k[0], "output": output[0],
            "best": [{"provider": "cutlass", "candidate": "tile", "state": "", "us": 12.5}] if self.runs else [],
            "offered": {"cublaslt": 3, "cutlass": 2}, "proven": {"cublaslt": 0, "cutlass": 2 if self.runs else 0},
            "refused": [
                {"provider": "cublaslt", "candidate": "algo1", "why": "2 of 9 bytes differ on rounding ties"},
                {"provider": "cublaslt", "candidate": "algo2", "why": "the same"},
            ],
            "chosen": "cutlass" if self.runs else None, "candidate": "tile" if self.runs else None,
            "us": 12.5 if self.runs else None,
        }  # fmt: skip
        return json.dumps(
            {"config": "/c/gemm.json", "saved": self.saved, "device": "Fake", "sm": 90, "versions": "cutlass 4", "shapes": [shape]}
        )


@pytest.fixture
def fake_ops(monkeypatch: pytest.MonkeyPatch) -> FakeOps:
    ops = FakeOps()
    monkeypatch.setattr(tune_gemm, "need_cuda_engine", lambda: None)
    monkeypatch.setattr(torch.ops, "swin_int8", ops)
    monkeypatch.delenv("SWIN_GEMM_CONFIG", raising=False)
    return ops


def test_a_run(fake_ops: FakeOps, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", MICRO_DIGITS.name, "--batch", "2", "4", "--again", "--json", str(tmp_path / "all.json")]
    assert tune_gemm.main(words) == 0
    shapes = dict.fromkeys(gemm_shapes(MICRO_DIGITS, 2) + gemm_shapes(MICRO_DIGITS, 4))
    assert [(m[0], n[0], k[0], output[0]) for m, n, k, output, _ in fake_ops.calls] == [
        (s.m, s.n, s.k, s.output) for s in shapes
    ]
    assert all(again for *_, again in fake_ops.calls)
    text = capsys.readouterr().out
    assert "| 392 | 96 | 32 | s8 | cutlass tile | 0.2 | - (0/3) | 12.5 (2/2) |" in text
    assert "cublaslt algo1: 2 of 9 bytes differ on rounding ties (and 1 more)" in text
    assert text.rstrip().endswith("Config file: /c/gemm.json")
    kept = json.loads((tmp_path / "all.json").read_text())
    assert kept["device"] == "Fake" and len(kept["shapes"]) == len(shapes)


def test_a_stopped_run_keeps_its_table(fake_ops: FakeOps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*words: object) -> str:
        if len(fake_ops.calls) == 2:
            raise KeyboardInterrupt
        return FakeOps.tune_gemm(fake_ops, *words)

    monkeypatch.setattr(fake_ops, "tune_gemm", tune)
    with pytest.raises(KeyboardInterrupt):
        tune_gemm.main(["--model", MICRO_DIGITS.name, "--batch", "2", "--json", str(tmp_path / "all.json")])
    assert len(json.loads((tmp_path / "all.json").read_text())["shapes"]) == 2


@pytest.mark.parametrize(("saved", "runs", "expected"), [("disk full", True, "NOT written"), ("", False, "nothing")])
def test_what_went_wrong_is_the_status(
    fake_ops: FakeOps, saved: str, runs: bool, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_ops.saved, fake_ops.runs = saved, runs
    assert tune_gemm.main(["--model", MICRO_DIGITS.name, "--batch", "1"]) == 1
    assert expected in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="built without the CUDA backend|finds no GPU"):
        tune_gemm.main(["--model", MICRO_DIGITS.name])
