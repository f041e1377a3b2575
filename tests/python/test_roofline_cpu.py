"""benchmarks/roofline_cpu.py: bounds, shares and sums from canned operations, and one real run of the micro model."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from benchmarks import roofline_cpu
from benchmarks.roofline_cpu import Conditions, Round
from pyharness import engine
from pyharness.config import MICRO_DIGITS
from pyharness.engine import OpInfo
from pyharness.errors import EngineError
from pyharness.latency_breakdown import Ceilings

CEILINGS = {"copy_gb_s": 10.0, "s8_gop_s": 400.0, "f32_gflop_s": 100.0}
OF = Conditions("m", 1, 2, "avx2", "ft_int8")


def op(name: str, kind: str, megabytes: float, mop: float) -> OpInfo:
    return OpInfo(name, kind, 0, 0, "", int(megabytes * 0.75e6), int(megabytes * 0.25e6), int(mop * 1e6))


OPS = [
    op("qkv_gemm", "gemm", 1, 400),  # 0.1 ms of copying, 1 ms of arithmetic
    op("softmax", "fused", 5, 10),  # 0.5 ms of copying, 0.1 ms of arithmetic
    op("qkv_gemm", "gemm", 30, 400),  # 3 ms of copying
]
DIRECT = [2.0, 1.0, 4.0]


def rows() -> list[roofline_cpu.RooflineRow]:
    return roofline_cpu.rows_of(OPS, DIRECT, Ceilings(10.0, 400.0, 100.0), OF)


def test_calls_are_summed_and_bounded_one_by_one() -> None:
    gemm, softmax = rows()
    assert (gemm.op, gemm.calls, gemm.direct_ms, gemm.isa) == ("qkv_gemm", 2, 6.0, "avx2")
    assert gemm.bound_ms == pytest.approx(4.0)  # not max(3.1, 2.0), the bound of the sums
    assert gemm.ceiling == "copy" and gemm.ceiling_share == pytest.approx(4 / 6)
    assert gemm.intensity == pytest.approx(800 / 31)
    assert gemm.attained_gop_s == pytest.approx(800 / 6)
    assert softmax.bound_ms == pytest.approx(0.5) and softmax.intensity == pytest.approx(2.0)


def test_gemms_against_every_integer_ceiling() -> None:
    ceilings = {**CEILINGS, "u8s8_gop_s": 800.0}
    shares = roofline_cpu.shares_of_ceilings(OPS, [Round(DIRECT, ceilings)])
    found = roofline_cpu.gemm_summary(rows(), shares)
    assert found["gemm_ms"] == 6.0 and found["time_share"] == pytest.approx(6 / 7)
    assert found["attained_gop_s"] == pytest.approx(800 / 6)
    assert found["of_ceiling"] == {"s8_gop_s": pytest.approx(1 / 3), "u8s8_gop_s": pytest.approx(1 / 6)}
    assert found["bound_share"] == pytest.approx(4 / 6)
    assert roofline_cpu.gemm_summary([], {})["attained_gop_s"] == 0
    assert roofline_cpu.shares_of_ceilings([], [Round([], ceilings)]) == {}


def test_a_neighbour_only_lowers_a_ceiling() -> None:
    after = {"copy_gb_s": 12.0, "s8_gop_s": 300.0, "f32_gflop_s": 100.0}
    assert roofline_cpu.highest([CEILINGS, after]) == {"copy_gb_s": 12.0, "s8_gop_s": 400.0, "f32_gflop_s": 100.0}


def test_a_share_is_of_the_ceiling_of_its_own_round() -> None:
    """A neighbour halves the ceilings and the operations' speed from the first round's end on."""
    speed = iter([1.0, 1.0, 0.5, 0.5, 0.5])  # of the ceilings and of the operations in turn

    def ceilings_now() -> dict[str, float]:
        now = next(speed)
        return {name: value * now for name, value in CEILINGS.items()}

    def times_now() -> list[float]:
        now = next(speed)
        return [ms / now for ms in DIRECT]

    rounds = roofline_cpu.time_rounds(times_now, ceilings_now, 2)
    assert [entry.ceilings["s8_gop_s"] for entry in rounds] == [300.0, 200.0]  # 400 and 200 around the first
    assert roofline_cpu.median_times(rounds) == [3.0, 1.5, 6.0]
    of_first, of_second = 800 / 6 / 300, 800 / 12 / 200
    assert roofline_cpu.shares_of_ceilings(OPS, rounds) == {"s8_gop_s": pytest.approx((of_first + of_second) / 2)}


def test_ceilings_of_one_height_share_a_label() -> None:
    found = roofline_cpu.ceiling_labels({"s8_gop_s": 400.0, "u8_gop_s": 410.0, "f32_gflop_s": 100.0})
    assert found == [("u8, s8 410 GOP/s", 410.0), ("f32 100 GOP/s", 100.0)]


def test_a_label_is_clear_of_points_names_and_lines() -> None:
    within, size = (0.0, 0.0, 300.0, 200.0), (60.0, 10.0)
    point = (100.0, 100.0)
    disc = (95.0, 95.0, 105.0, 105.0)
    alone = roofline_cpu.free_place(point, 5.0, size, within, [disc], [])
    assert alone == pytest.approx((110, 95, 170, 105))  # right beside it
    line = [(x, 100.0) for x in range(300)]
    second = roofline_cpu.free_place(point, 5.0, size, within, [disc], line, [alone])
    assert second[1] > 100 or second[3] < 100
    assert second[0] >= 170 or second[2] <= 110 or second[1] >= 105 or second[3] <= 95
    assert min(second) >= 0 and second[2] <= 300 and second[3] <= 200


def test_names_in_a_picture_do_not_overprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyharness import plots

    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    # Three operations of nearly one place, as the GEMMs of a graph are.
    kinds = {"a": "gemm", "b": "gemm", "attention": "fused"}
    ops = [op(name, kind, 1, 400 + i) for i, (name, kind) in enumerate(kinds.items())]
    made = roofline_cpu.rows_of(ops, [2.0, 2.0, 2.0], Ceilings(10.0, 400.0, 100.0), OF)
    meta = {"model": "m", "threads": 2, "device": "A CPU, 2 cores", "ceilings": {"avx2": CEILINGS}}
    rows_of_it = [dataclasses.asdict(row) for row in made]
    assert roofline_cpu.plot({"meta": meta, "rows": rows_of_it}, tmp_path) == [tmp_path / "roofline_cpu_b1.png"]
    figures[0].draw_without_rendering()
    axis = figures[0].axes[0]
    names = [text for text in axis.texts if text.get_text() in kinds]
    boxes = [text.get_bbox_patch().get_window_extent() for text in names]
    assert len(boxes) == 3
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    # As Table 1 has it, attention is a fused operation.
    words = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert words == ["GEMM", "fused operation (attention: its GEMMs within)"]


def test_an_unknown_instruction_set() -> None:
    with pytest.raises(EngineError, match="--isa: mmx not on this machine; the engine has .*portable"):
        roofline_cpu.chosen_variants(["mmx"])
    assert roofline_cpu.chosen_variants(["portable"]) == ["portable"]


def test_other_scales_are_shown_where_they_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", MICRO_DIGITS.name, "--runs", "2", "--batch", "1", "--graphs", "fused_int8", "--out", str(tmp_path)]
    variants = [name for name in ("avx2", "portable") if name in engine.cpu_variants()]
    assert roofline_cpu.main([*words, "--isa", *variants]) == 0
    said = capsys.readouterr().out
    for scales in ("balanced", "tensor"):
        assert (f"| avx2     | fused_int8_{scales} " in said) == ("avx2" in variants)
        assert f"| portable | fused_int8_{scales}" not in said
    assert "| portable | fused_int8 " in said


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", MICRO_DIGITS.name, "--runs", "2", "--batch", "1", "2", "--isa", "portable", "--graphs", "ft_int8"]
    assert roofline_cpu.main([*words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| portable | ft_int8 |" in said and "in full" not in said
    assert {path.name for path in tmp_path.iterdir()} == {
        "roofline_cpu.json", "roofline_cpu.csv", "roofline_cpu.md", "roofline_cpu_b1.png", "roofline_cpu_b2.png",
    }  # fmt: skip
    text = (tmp_path / "roofline_cpu.md").read_text()
    assert "`ft_int8` on portable, batch 2:" in text and "| softmax " in text
    assert "medians of 2 rounds" in text
