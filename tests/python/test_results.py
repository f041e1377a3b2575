"""results.py and plots.py: what the schema refuses, files that round-trip, what tables and pictures show."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from pyharness import plots, results
from pyharness.errors import FormatError, HarnessError
from pyharness.results import Table1Row, Table2Row

TINY = "swin_tiny_patch4_window7_224"


def stats(median: float) -> dict[str, float]:
    return {"median": median, "p10": 0.9 * median, "p90": 1.2 * median, "mean": median, "runs": 20}


@pytest.fixture
def meta() -> dict:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef" * 2 + "01234567",
        "dirty": False,
        "device": "Test CPU, 2 cores",
        "driver": None,
        "cuda": None,
        "torch": "2.15.0",
        "engine": {"backend": "cpu", "isa": "avx2"},
        "threads": 2,
        "command": "python pyharness/reproduce_table2.py",
        "latency_ms": {"ft_int8": stats(60.0), "geluless_int8": stats(54.0), "fused_int8": stats(30.0)},
        "ceilings": {"copy_gb_s": 20.0, "s8_gop_s": 600.0, "f32_gflop_s": 120.0},
    }


@pytest.fixture
def table2_rows() -> list[Table2Row]:
    def row(model: str, method: str, ratio: float, top1: float | None) -> Table2Row:
        measured = top1 is not None
        return Table2Row(
            model=model,
            img_size=28 if measured else 224,
            batch=1,
            device="Test CPU, 2 cores",
            method=method,
            top1=top1,
            top5=100.0 if measured else None,
            top1_interval95=(top1 - 1, min(100.0, top1 + 0.5)) if measured else None,
            n_eval=597 if measured else None,
            latency_ms=stats(10 * ratio),
            images_per_s=100 / ratio,
            vs_ft_int8=ratio,
            vs_ft_int8_quartiles=(ratio - 0.01, ratio + 0.01),
            gemm_providers=None if method == "fp32" else {"s8": "avx2"},
        )

    return [
        row("swin_micro_digits", "fp32", 2.0, 98.83),
        row("swin_micro_digits", "ft_int8", 1.0, 98.66),
        row("swin_micro_digits", "geluless_int8", 0.875, 98.49),
        row("swin_micro_digits", "geluless_int8_no_kd", 0.875, 41.21),
        row("swin_micro_digits", "fused_int8_gelu", 0.625, 98.66),
        row("swin_micro_digits", "fused_int8", 0.5, 98.49),
        row(TINY, "fp32", 2.5, None),
        row(TINY, "ft_int8", 1.0, None),
        row(TINY, "geluless_int8", 0.88, None),
    ]


@pytest.fixture
def table1_rows() -> list[Table1Row]:
    def row(graph: str, op: str, kind: str, drop: float | None) -> Table1Row:
        return Table1Row(
            model=TINY, batch=1, graph=graph, op=op, kind=kind, calls=12, drop_ms=drop,
            drop_ms_quartiles=None if drop is None else (drop - 0.1, drop + 0.1),
            share=None if drop is None else drop / 60, direct_ms=3.3, direct_share=0.055,
            bytes_read=10**6, bytes_written=2 * 10**6, operations=10**7, ceiling="copy", ceiling_share=0.5,
        )  # fmt: skip

    rows = []
    for graph in ("ft_int8", "geluless_int8"):
        ops = [op for op in results.FUSED_OPS if graph == "ft_int8" or op != "fc1_bias_gelu"]
        rows += [row(graph, op, "fused", 4.0 + index) for index, op in enumerate(ops)]
        rows.append(row(graph, "fc1_gemm", "gemm", None))
    rows += [row("fused_int8", op, "fused", 3.0) for op in ("attention", "proj_norm", "mlp_norm", "patch_merge_norm")]
    return [*rows, row("fused_int8", "qkv", "gemm", None)]


# --- schema and files ------------------------------------------------------------------------------------------------


def test_files_round_trip(tmp_path: Path, meta: dict, table2_rows: list[Table2Row]) -> None:
    written = results.write_table(tmp_path, "table2", meta, table2_rows)
    assert results.load_table(tmp_path, "table2") == written
    as_tuples = [{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in written["rows"]]
    assert [Table2Row(**row) for row in as_tuples] == table2_rows
    with open(tmp_path / "table2.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row.method for row in table2_rows]
    assert float(rows[0]["latency_ms_median"]) == 20.0
    assert rows[6]["top1"] == rows[6]["top1_interval95_0"] == rows[6]["gemm_providers_s8"] == ""
    assert "top1_interval95" not in rows[0] and "gemm_providers" not in rows[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table2.csv", "table2.json", "table2.md"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", None, "model is null"),
        ("batch", "1", "batch is '1'; int"),
        ("batch", True, "batch is True; int"),
        ("top1", float("nan"), "top1 is nan"),
        ("top1", 101.0, "top1 is 101.0; a percentage"),
        ("top1_interval95", [1.0], r"top1_interval95 is \[1.0\]"),
        ("latency_ms", {"median": None}, "latency_ms is"),
        ("surprise", 1, "unknown fields: surprise"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, message: str, meta: dict, table2_rows: list) -> None:
    document = results.document_of(meta, table2_rows)
    results.validate("table2", document)
    document["rows"][2][field] = value
    with pytest.raises(FormatError, match=f"row 2.*{message}"):
        results.validate("table2", document)


def test_a_missing_field_is_named(meta: dict, table2_rows: list) -> None:
    document = results.document_of(meta, table2_rows)
    del document["rows"][1]["n_eval"]
    with pytest.raises(FormatError, match="row 1.*n_eval"):
        results.validate("table2", document)
    with pytest.raises(FormatError, match="meta lacks threads"):
        results.validate("table2", {"meta": {k: v for k, v in meta.items() if k != "threads"}, "rows": []})


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read .*reproduce.sh"), ('{"meta": {', "not JSON"), ("[]", "found no"), ("{}", "found no")],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "table2.json").write_text(content)
    with pytest.raises(FormatError, match=message):
        results.load_table(tmp_path, "table2")


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, meta: dict, table2_rows: list) -> None:
    results.write_table(tmp_path, "table2", meta, table2_rows)
    before = (tmp_path / "table2.json").read_bytes()
    with pytest.raises(ValueError):
        results.write_json(tmp_path / "table2.json", {"value": float("inf")})
    assert (tmp_path / "table2.json").read_bytes() == before


# --- Markdown --------------------------------------------------------------------------------------------------------


def cells(text: str, *keys: str) -> list[str]:
    """The cells of the one table row that has all of `keys` as cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    found = [row for row in rows if set(keys) <= set(row)]
    assert len(found) == 1, f"{len(found)} rows with {keys}"
    return found[0]


def test_table2_shows_measured_claimed_and_published_apart(meta: dict, table2_rows: list) -> None:
    text = results.markdown_table2(results.document_of(meta, table2_rows))
    header = cells(text, "model", "method")
    tiny = dict(zip(header, cells(text, TINY, "geluless_int8")))
    assert tiny["vs FT INT8"] == "-12.0 %"
    assert tiny["top-1 % (95 % interval)"] == tiny["images"] == "-", "what was not measured is a dash"
    assert tiny["latency ms (p10 to p90)"] == "8.80 (7.92 to 10.6)"
    assert tiny["the paper claims"] == "-12 %, < 0.5 points top-1 lost"
    assert tiny["FT published"] == ""
    assert cells(text, TINY, "ft_int8")[-1] == "80.75 %; 8.17 ms"
    micro = dict(zip(header, cells(text, "swin_micro_digits", "geluless_int8_no_kd")))
    assert micro["top-1 % (95 % interval)"] == "41.21 (40.21 to 41.71)"
    assert micro["the paper claims"].startswith("(ImageNet models")
    assert cells(text, "swin_micro_digits", "ft_int8")[header.index("vs FT INT8")] == "baseline"
    fused = dict(zip(header, cells(text, "swin_micro_digits", "fused_int8")))
    assert fused["vs FT INT8"] == "-50.0 %" and fused["the paper claims"] == fused["FT published"] == ""
    assert "Test CPU, 2 cores; 2 threads; engine cpu avx2" in text and "commit 0123456789ab" in text


def test_uncommitted_changes_are_said(meta: dict) -> None:
    assert "with local changes" in results.conditions({**meta, "dirty": True})
    assert "no git" in results.conditions({**meta, "commit": None, "dirty": None})


def test_table1_shows_every_graph(meta: dict, table1_rows: list) -> None:
    text = results.markdown_table1(results.document_of(meta, table1_rows))
    assert cells(text, "fc1_bias_gelu")[:5] == ["fc1_bias_gelu", "fused", "12", "8.00", "13.3 %"]
    graphs = text.split("`geluless_int8`")
    assert cells(graphs[0], "fc1_gemm")[3:5] == ["-", "-"]
    assert "fc1_bias_gelu" not in graphs[1]
    assert "`fused_int8`" in text and cells(text, "mlp_norm")[:5] == ["mlp_norm", "fused", "12", "3.00", "5.0 %"]
    assert "20.0 GB/s" in text and "Softmax and GELU" in text


def test_the_papers_claims_are_the_papers() -> None:
    sizes = {"tiny": 12, "small": 11, "base": 11, "large": 13}
    found = {size: results.PUBLISHED[f"swin_{size}_patch4_window7_224"].paper_drop for size in sizes}
    assert found == sizes


def test_columns_line_up_as_plain_text() -> None:
    lines = results.markdown_table(("a", "long header"), [("1", "x"), ("123456", "y")], right=[0]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("| -----: |") and lines[2].startswith("|      1 |")


# --- README ----------------------------------------------------------------------------------------------------------


def test_published_figures_are_of_some_weights_alone() -> None:
    """Of the same model with other weights there are none."""
    small, large = "swin_small_patch4_window7_224", "swin_large_patch4_window7_224"
    assert results.published(small) == results.published(f"{small}.ms_in1k") == results.PUBLISHED[small]
    assert results.published(f"{small}.ms_in22k_ft_in1k") is None is results.published("swin_micro_digits")
    assert results.published(f"{large}.ms_in22k_ft_in1k") == results.PUBLISHED[large]
    assert results.paper_claim(f"{small}.ms_in22k_ft_in1k", "geluless_int8").startswith("(ImageNet models")


def test_figures_of_imagenet_stand_in_brackets_beside_other_images(meta: dict, table2_rows: list) -> None:
    document = results.document_of(meta, table2_rows)
    plain = results.markdown_table2(document)
    assert "| -12 %, < 0.5 points top-1 lost" in plain and "(ImageNet: " not in plain and "Images: " not in plain
    document["meta"]["data"] = "procedural:classes=20"
    text = results.markdown_table2(document)
    assert "| (ImageNet: -12 %, < 0.5 points top-1 lost)" in text and "Images: procedural:classes=20. " in text
    assert "| (ImageNet: 80.75 %; 8.17 ms)" in text and "(ImageNet: (" not in text
    document["meta"]["data_models"] = ["swin_one", "swin_two"]
    assert "Images of swin_one, swin_two: procedural:classes=20. " in results.markdown_table2(document)
    document["meta"]["data"] = "a/folder"
    assert "(ImageNet: " not in results.markdown_table2(document)


def test_pages_are_written_in_a_checkout_alone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(HarnessError, match=r"README\.md \(No such file.*for a checkout"):
        results.main([str(tmp_path), "--readme"])


def test_a_block_of_the_readme_is_replaced_and_nothing_else() -> None:
    text = "head\n<!-- begin x -->\nold\n<!-- end x -->\ntail\n"
    once = results.replace_block(text, "x", "new\n")
    assert once == "head\n<!-- begin x -->\nnew\n<!-- end x -->\ntail\n"
    assert results.replace_block(once, "x", "new\n") == once


@pytest.mark.parametrize("text", ["", "<!-- begin x -->", "<!-- end x --><!-- begin x -->", "<!-- begin x -->" * 2])
def test_a_readme_without_the_markers_is_an_error(text: str) -> None:
    with pytest.raises(FormatError, match="begin x"):
        results.replace_block(text, "x", "new")


def test_a_readme_takes_another_machines_table_from_the_folder_beside(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "results" / "cpu-2core", tmp_path / "here")
    text = (repository / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- begin \w+ of .*? -->\n.*?<!-- end \w+ of .*? -->\n", "", text, flags=re.DOTALL)
    marked = text + "<!-- begin peers_cpu of there -->\nold\n<!-- end peers_cpu of there -->\n"
    with pytest.raises(FormatError, match=r"there/peers_cpu\.md .*benchmarks/peers_cpu\.py writes it"):
        results.readme_with_tables(marked, tmp_path / "here")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "peers_cpu.md").write_text(f"its rows\n{results.REST_OF_FILE}rest\nall of them\n")
    filled = results.readme_with_tables(marked, tmp_path / "here")
    assert filled.endswith("<!-- begin peers_cpu of there -->\nits rows\n<!-- end peers_cpu of there -->\n")
    assert results.readme_with_tables(text, tmp_path / "here") == text
    with pytest.raises(FormatError, match="table3 is none of diff_baseline, peers_cpu"):
        results.readme_with_tables(text + "<!-- begin table3 of there -->\n<!-- end table3 of there -->\n", tmp_path / "here")


@pytest.mark.parametrize("page", results.PAGES)
def test_pages_hold_the_committed_results(repository: Path, page: str) -> None:
    """Their tables are those of results/cpu-2core, and those named so of the folders beside it, to the letter."""
    text = (repository / page).read_text(encoding="utf-8")
    assert text == results.with_tables(page, repository / "results" / "cpu-2core")
    assert text.count("<!-- begin ") >= 2


# --- plots -----------------------------------------------------------------------------------------------------------


def assert_png_with_content(path: Path, least_colours: int) -> None:
    from PIL import Image

    with Image.open(path) as image:
        assert image.width > 600 and image.height > 300
        colours = image.convert("RGB").quantize(64).getcolors()
    drawn = [count for count, _ in colours if count > 200]
    assert len(drawn) >= least_colours, f"{path.name} shows {len(drawn)} colours"


def test_pictures_show_every_method_and_op(tmp_path: Path, meta: dict, table2_rows: list, table1_rows: list) -> None:
    drawn = plots.plot_table2(results.document_of(meta, table2_rows), tmp_path)
    assert [path.name for path in drawn] == ["table2_accuracy.png", "table2_latency.png"]
    plots.plot_breakdown(results.document_of(meta, table1_rows), tmp_path / "table1.png")
    assert_png_with_content(tmp_path / "table2_accuracy.png", least_colours=6)
    assert_png_with_content(tmp_path / "table2_latency.png", least_colours=7)
    assert_png_with_content(tmp_path / "table1.png", least_colours=9)


def test_a_bar_that_dwarfs_the_others_is_cut_and_says_by_how_much(
    tmp_path: Path, meta: dict, table2_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = copy.deepcopy(results.document_of(meta, table2_rows))
    timed = [row for row in document["rows"] if row["vs_ft_int8"] is not None]
    for row in timed:
        row["vs_ft_int8"] = 12.25 if row["method"] == "fp32" else 0.75
    timed[0]["latency_ms"]["median"] = 1234.5
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    assert plots.plot_latency_bars(document, tmp_path / "bars.png")
    axis = figures[0].axes[0]
    assert {bar.get_height() for bar in axis.patches} == {75.0, plots.TALLEST}
    words = [text.get_text() for text in axis.texts]
    cut = [row for row in timed if row["method"] == "fp32"]
    assert cut and sum(word.endswith("\n12.2x FT") for word in words) == len(cut)
    assert words[0].splitlines()[0] == "1234"


def test_latencies_below_a_millisecond_are_in_microseconds(
    tmp_path: Path, meta: dict, table2_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = copy.deepcopy(results.document_of(meta, table2_rows))
    timed = [row for row in document["rows"] if row["vs_ft_int8"] is not None]
    for row in timed:
        row["latency_ms"]["median"] = 0.06891 if row["model"] == timed[0]["model"] else 40.6
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    assert plots.plot_latency_bars(document, tmp_path / "bars.png")
    axis = figures[0].axes[0]
    assert axis.get_xticklabels()[0].get_text().endswith(", µs")
    assert {text.get_text().splitlines()[0] for text in axis.texts} <= {"68.9", "40.6"}


@pytest.mark.parametrize(("slowest", "scale"), [(4.9, "linear"), (5.1, "log")])
def test_latencies_far_apart_are_on_a_log_scale(
    tmp_path: Path, meta: dict, table2_rows: list, monkeypatch: pytest.MonkeyPatch, slowest: float, scale: str
) -> None:
    document = copy.deepcopy(results.document_of(meta, table2_rows))
    for row in (row for row in document["rows"] if row["latency_ms"]):
        row["latency_ms"] |= dict.fromkeys(("median", "p10", "p90"), slowest if row["method"] == "fp32" else 1.0)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    assert plots.plot_accuracy_latency(document, tmp_path / "accuracy.png")
    axis = figures[0].axes[0]
    assert axis.get_xscale() == scale
    handles, words = axis.get_legend_handles_labels()
    markers = {label: marker for label, _, marker in plots.METHOD_STYLES.values()}
    assert words and [handle.get_marker() for handle in handles] == [markers[word] for word in words]


def test_values_of_the_breakdown_fit_into_their_segments(
    tmp_path: Path, meta: dict, table1_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = copy.deepcopy(results.document_of(meta, table1_rows))
    dropped = [row for row in document["rows"] if row["drop_ms"] is not None]
    whole = document["meta"]["latency_ms"][dropped[0]["graph"]]["median"]
    dropped[0]["drop_ms"], dropped[1]["drop_ms"], dropped[2]["drop_ms"] = 0.01 * whole, 0.3 * whole, -0.1 * whole
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plots.plot_breakdown(document, tmp_path / "table1.png")
    axis = figures[0].axes[0]
    words = [text.get_text() for text in axis.texts]
    assert f"{0.3 * whole:.2g}" in words and f"{0.01 * whole:.2g}" not in words and "0" not in words
    assert "drops below zero are not drawn" in axis.get_xlabel()


def test_every_method_and_op_has_a_look_of_its_own() -> None:
    styles = [plots.METHOD_STYLES[method] for method in results.METHODS]
    assert all(len(set(column)) == len(styles) for column in zip(*styles))
    ops = [*results.FUSED_OPS, *results.FUSED_GRAPH_OPS]
    assert len({plots.OP_STYLES[op] for op in ops}) == len(ops)
    assert all(plots.OP_STYLES[v2] == plots.OP_STYLES[v1] for v1, v2 in zip(results.FUSED_OPS, results.FUSED_OPS_V2))


def test_a_picture_without_figures_is_left_out(tmp_path: Path, meta: dict, table2_rows: list) -> None:
    document = copy.deepcopy(results.document_of(meta, table2_rows))
    for row in document["rows"]:
        row["top1"] = None
    assert [path.name for path in plots.plot_table2(document, tmp_path)] == ["table2_latency.png"]


def test_json_has_null_not_nan(tmp_path: Path, meta: dict, table2_rows: list) -> None:
    results.write_table(tmp_path, "table2", meta, table2_rows)
    text = (tmp_path / "table2.json").read_text()
    assert "NaN" not in text and json.loads(text)["rows"][6]["top1"] is None
