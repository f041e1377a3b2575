"""The README's first table, from the peers' result files of several machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyharness.errors import FormatError
from pyharness.glance import at_a_glance, device_title


def row(method: str, ms: float | None, side: str = "ours", **more: Any) -> dict[str, Any]:
    return {
        "isa": "native", "model": "swin_tiny_patch4_window7_224", "batch": 1, "threads": 2, "method": method, "side": side,
        "latency_ms": ms and {"median": ms}, "isa_forced": None, "ratio_to_best_peer": None,
        "ratio_to_best_forced_peer": None, "vs_ft_int8": None, **more,
    }  # fmt: skip


def a_group(**more: Any) -> list[dict[str, Any]]:
    return [
        row("ft_int8", 9, **more),
        row("geluless_int8", 8, vs_ft_int8=0.8, ratio_to_best_peer=0.4, **more),
        row("fused_int8", 5, ratio_to_best_peer=0.25, ratio_to_best_forced_peer=0.2, **more),
        row("fused_int8_gelu", 6, ratio_to_best_peer=0.3125, ratio_to_best_forced_peer=0.25, **more),
        row("fused_int8_balanced", 4, ratio_to_best_peer=0.2, ratio_to_best_forced_peer=0.16, **more),
        row("fused_int8_gelu_balanced", 5, ratio_to_best_peer=0.25, ratio_to_best_forced_peer=0.2, **more),
        row("openvino_int8", 20, "peer", **more),
        row("timm_fp32", 70, "peer", **more),
        row("openvino_bf16", None, "peer", **more),
    ]


def written(
    folder: Path, rows: list[dict[str, Any]], date: str = "2026-01-01", device: str = "A CPU, 2 cores", **isas: str
) -> Path:
    folder.mkdir()
    runs = [{"isa": isa, "engine_isa": engine} for isa, engine in isas.items()]
    document = {"meta": {"device": device, "date": date, "runs_of_this_file": runs}, "rows": rows}
    (folder / "peers_cpu.json").write_text(json.dumps(document))
    return folder


def lines_of(*folders: Path) -> list[list[str]]:
    table = at_a_glance(folders).split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_a_row_for_each_group_on_the_most_threads(tmp_path: Path) -> None:
    rows = [*a_group(isa="avx2"), *a_group(threads=1), *a_group(batch=8), *a_group()]
    found = lines_of(written(tmp_path / "there", rows, avx2="avx2", native="amx_int8"))
    first = ["[A CPU](results/there)", "AMX", "Swin-T", "1", "openvino_int8", "20.0", "6.00", "3.20x", "5.00", "4.00x", "1.25x", "-", "-"]
    assert found[:2] == [first, [*first[:3], "8", *first[4:]]]
    # On AVX2 the steps made for it.
    assert found[2:] == [[first[0], "AVX2 alone", *first[2:6], "5.00*", "4.00x", "4.00*", "5.00x", "1.25x", "-", "-"]]


def test_balanced_steps_are_for_both_or_for_neither(tmp_path: Path) -> None:
    rows = [row for row in a_group(isa="avx2") if row["method"] != "fused_int8_gelu_balanced"]
    (line,) = lines_of(written(tmp_path / "there", rows, avx2="avx2"))
    assert line[6:10] == ["6.00", "3.20x", "5.00", "4.00x"]


def test_accuracy_stands_beside_speed(tmp_path: Path) -> None:
    decibels = {"openvino_int8": 21.9, "fused_int8_gelu": 34.6}
    rows = [{**r, "check": {"sqnr_db": decibels[r["method"]]} if r["method"] in decibels else None} for r in a_group()]
    (line,) = lines_of(written(tmp_path / "there", rows, native="amx_int8"))
    assert line[-2:] == ["22", "35"]


def test_a_peer_that_does_not_keep_to_the_instructions_is_passed_over(tmp_path: Path) -> None:
    rows = [r for r in a_group(isa="avx2") if "balanced" not in r["method"]]
    rows += [row("onnxruntime_int8", 10, "peer", isa="avx2", isa_forced="no")]
    (line,) = lines_of(written(tmp_path / "there", rows, avx2="avx2"))
    assert line[4:] == ["openvino_int8", "20.0", "6.00", "4.00x", "5.00", "5.00x", "1.25x", "-", "-"]


def test_machines_stand_one_below_the_other(tmp_path: Path) -> None:
    folders = [written(tmp_path / name, a_group(), device=name, native="avx512_vnni") for name in ("b", "a")]
    assert [line[:2] for line in lines_of(*folders)] == [
        ["[b](results/b)", "AVX-512 VNNI"], ["[a](results/a)", "AVX-512 VNNI"],
    ]  # fmt: skip


def test_generations_of_one_name_stand_apart(tmp_path: Path) -> None:
    for name in ("zen4", "zen5"):
        written(tmp_path / name, a_group(), device="AMD EPYC, 2 cores", native="avx512_vnni")
        (tmp_path / name / "processor.txt").write_text(f"AMD EPYC, {name}\n")
    found = [line[0] for line in lines_of(tmp_path / "zen4", tmp_path / "zen5")]
    assert found == ["[AMD EPYC, zen4](results/zen4)", "[AMD EPYC, zen5](results/zen5)"]


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")])
def test_the_later_of_two_measurements_counts(tmp_path: Path, order: tuple[str, str]) -> None:
    written(tmp_path / "old", [*a_group(), *a_group(batch=8)], date="2026-01-01", native="avx2", avx2="avx2")
    written(tmp_path / "new", [*a_group(), *a_group(isa="avx2")], date="2026-02-01", native="avx2", avx2="avx2")
    lines = lines_of(*(tmp_path / name for name in order))
    assert sorted((line[0], line[1], line[3]) for line in lines) == [
        ("[A CPU](results/new)", "AVX2", "1"),
        ("[A CPU](results/new)", "AVX2 alone", "1"),
        ("[A CPU](results/old)", "AVX2", "8"),
    ]


def test_one_model_alone_and_links_from_another_folder(tmp_path: Path) -> None:
    other = [{**r, "model": "swin_base_patch4_window7_224"} for r in a_group()]
    folder = written(tmp_path / "there", [*a_group(), *other], native="avx2")
    assert len(lines_of(folder)) == 2
    (line,) = at_a_glance([folder], "Swin-B", root="").splitlines()[2:3]
    assert "| [A CPU](there) |" in line and "| Swin-B |" in line
    assert "Swin-T" not in at_a_glance([folder], "Swin-B")
    with pytest.raises(FormatError, match="measured Swin-X; tables call models as in Swin-T"):
        at_a_glance([folder], "Swin-X")


def test_a_group_without_peers_has_no_row(tmp_path: Path) -> None:
    alone = [r for r in a_group(batch=8) if r["side"] == "ours"]
    assert len(lines_of(written(tmp_path / "there", [*alone, *a_group()], native="avx2"))) == 1


def test_a_folder_without_peers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"peers_cpu\.json .*benchmarks/peers_cpu\.py writes it"):
        at_a_glance([tmp_path])
    for content, message in (('{"rows": [', "is not JSON"), ("[]", "no measured peers"), ('{"meta": {}}', "no measured peers")):
        (tmp_path / "peers_cpu.json").write_text(content)
        with pytest.raises(FormatError, match=rf"{message}.*benchmarks/peers_cpu\.py writes it anew"):
            at_a_glance([tmp_path])


def test_a_title_has_the_name_of_processor_txt_and_the_cores(tmp_path: Path) -> None:
    assert device_title(tmp_path, "A CPU (family 1 model 2), 2 cores") == "A CPU (family 1 model 2), 2 cores"
    (tmp_path / "processor.txt").write_text("A CPU, Zen 9\n")
    assert device_title(tmp_path, "A CPU (family 1 model 2), 2 cores") == "A CPU, Zen 9, 2 cores"
    assert device_title(tmp_path, "A CPU") == "A CPU, Zen 9"
