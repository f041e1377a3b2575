"""The three measuring programs and the pipeline behind them, on the micro model with a short distillation."""

from __future__ import annotations

import ast
import functools
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from pyharness import convert, diff_baseline, engine, latency_breakdown, pipeline, reproduce_table2, results
from pyharness.compare import compare_logits
from pyharness.config import ENGINE_GRAPHS, FUSED_GRAPH
from pyharness.diff_baseline import diffstat, side_by_side
from pyharness.engine import OpInfo
from pyharness.engine_file import load_engine_file
from pyharness.errors import CheckpointError, DataError, FormatError, HarnessError
from pyharness.evaluate import EvalResult
from pyharness.fused_reference import FusedReferenceSwin
from pyharness.latency_breakdown import WHOLE, Ceilings, GraphTiming
from pyharness.models import MICRO_TEACHER, checkpoint_meta, load_model, make_geluless, save_checkpoint
from pyharness.pipeline import Inputs, Pipeline
from pyharness.reference import ReferenceSwin

MICRO = "swin_micro_digits"
SHORT = {"subset": 0.1, "epochs_per_block": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folder that the tests of this module share, as the programs do."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def short_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "DIGITS_DISTILLATION", SHORT)


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def those_that_run(names: tuple[str, ...]) -> list[str]:
    """`names` of methods or graphs without those of the fused graph where this engine has none."""
    return [name for name in names if not name.startswith("fused") or engine.runs_graph(FUSED_GRAPH)]


# --- pipeline --------------------------------------------------------------------------------------------------------


def test_steps_are_made_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Pipeline(Inputs(MICRO), work).engine_path("geluless_int8")
    assert "make the GELU-less student" in capsys.readouterr().err
    written = first.stat().st_mtime_ns
    again = Pipeline(Inputs(MICRO), work).engine_path("geluless_int8")
    assert again == first and again.stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""
    assert load_engine_file(first).meta["input"] == {"mean": [0.305], "std": [0.325]}


def test_other_options_or_sources_are_another_step(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> Path:
        return Pipeline(Inputs(MICRO), work)._folder("student", {"lr": 0.01})

    before = folder()
    assert folder() == before != Pipeline(Inputs(MICRO), work)._folder("student", {"lr": 0.02})
    monkeypatch.setattr(pipeline, "SOURCES", pipeline.SOURCES[1:])
    assert folder() != before


def imported_by(file: Path) -> set[str]:
    """The harness's modules that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "pyharness":
            found |= {each.name for each in node.names if file.with_name(f"{each.name}.py").is_file()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyharness."):
            found.add(node.module.split(".")[1])
    return found


def test_the_sources_are_what_the_steps_import(repository: Path) -> None:
    found, new = set(), set(pipeline.STEPS)
    while new:
        found |= new
        read = new - set(pipeline.NO_SOURCES)
        new = set().union(*(imported_by(repository / "pyharness" / f"{name}.py") for name in read)) - found
    assert sorted(found - set(pipeline.NO_SOURCES)) == sorted(pipeline.SOURCES), "add it to SOURCES or to NO_SOURCES"
    assert sorted(found - set(pipeline.SOURCES)) == sorted(pipeline.NO_SOURCES)


def test_another_version_of_a_package_is_another_step(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = pipeline.package_versions()
    assert {"nvidia-modelopt", "timm", "torch"} <= versions.keys() and all(versions.values())
    before = Pipeline(Inputs(MICRO), work)._folder("student", {})
    monkeypatch.setattr(pipeline, "package_versions", lambda: {**versions, "timm": "0.0"})
    assert Pipeline(Inputs(MICRO), work)._folder("student", {}) != before


def png_of(size: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), 9).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_that_were_mended_added_or_sorted_anew_are_another_step(kind: str, tmp_path: Path) -> None:
    files = {f"c{label}/{number}.png": png_of(8) for label in range(10) for number in range(2)}

    def folder(images: dict[str, bytes]) -> Path:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        for name, content in images.items():
            path = tmp_path / "data" / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if kind == "tar":
            with tarfile.open(tmp_path / "data" / "all_train.tar", "w") as tar:
                tar.add(tmp_path / "data" / "train", "")
            shutil.rmtree(tmp_path / "data" / "train")
        inputs = Inputs(MICRO, weights=MICRO_TEACHER, data=tmp_path / "data")
        return Pipeline(inputs, tmp_path / "work")._folder("student", {})

    before = folder(files)
    assert folder(files) == before
    found = [
        folder({**files, "c3/1.png": png_of(8)[:-9]}),
        folder({**files, "c3/2.png": png_of(8)}),
        folder({name.replace("c3/1", "c4/2"): content for name, content in files.items()}),
    ]
    assert len({before, *found}) == 4


def test_random_weights_without_a_checkpoint() -> None:
    tiny = Pipeline(Inputs("swin_tiny_patch4_window7_224"))
    assert not tiny.inputs.has_weights and tiny.config.depths == (2, 2, 6, 2)
    with pytest.raises(DataError, match="give --data DIR"):
        Pipeline(Inputs("swin_tiny_patch4_window7_224", weights=Path(__file__)))
    with pytest.raises(HarnessError, match="cannot read /none"):
        pipeline.file_digest(Path("/none"))


def test_threads_come_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), pipeline.threads(1):
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


# --- Table 2 ---------------------------------------------------------------------------------------------------------


def test_table2_of_the_micro_model(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--models", MICRO, "--runs", "4", "--batch", "2", "--limit", "200", "--threads", "1"]
    assert reproduce_table2.main([*argv, "--out", str(tmp_path), "--work", str(work)]) == 0
    document = results.load_table(tmp_path, "table2")
    assert document["meta"]["engine"]["backend"] == "cpu" and document["meta"]["threads"] == 1
    rows = {row["method"]: row for row in document["rows"]}
    assert list(rows) == those_that_run(results.METHODS)
    for row in rows.values():
        assert (row["model"], row["img_size"], row["batch"], row["n_eval"]) == (MICRO, 28, 2, 200)
        assert row["top1_interval95"][0] < row["top1"] <= row["top1_interval95"][1]
        assert row["latency_ms"]["runs"] == 4
        assert row["images_per_s"] == pytest.approx(2000 / row["latency_ms"]["median"])
    assert rows["ft_int8"]["vs_ft_int8"] == 1.0
    assert rows["fp32"]["gemm_providers"] is None and rows["ft_int8"]["gemm_providers"]["s8"].startswith("cpu ")
    assert rows["fp32"]["top1"] > 96 and abs(rows["fp32"]["top1"] - rows["ft_int8"]["top1"]) < 2
    assert rows["geluless_int8_no_kd"]["top1"] < rows["geluless_int8"]["top1"], "distillation must help"
    assert results.markdown_table2(document) in capsys.readouterr().out
    assert (tmp_path / "table2_accuracy.png").exists() and (tmp_path / "table2_latency.png").exists()
    assert not (work / MICRO / "partial").exists(), "what evaluations keep goes once the table is written"


@pytest.mark.parametrize("program", [reproduce_table2, latency_breakdown])
def test_the_fused_graphs_weights_are_what_the_processor_is_best_at(program) -> None:
    parser = program.build_parser()
    found = {
        isa: reproduce_table2.weight_scales_of(parser.parse_args([]), {"isa": isa})
        for isa in ("portable", "avx2", "avx_vnni", "avx512_vnni", "amx_int8", "neon_i8mm", "sm_90")
    }
    assert found.pop("avx2") == "balanced" and set(found.values()) == {"channel"}
    for scales in ("channel", "tensor"):
        asked = parser.parse_args(["--weight-scales", scales])
        assert reproduce_table2.weight_scales_of(asked, {"isa": "avx2"}) == scales


def test_other_weight_scales_are_another_file_and_are_said(work: Path, tmp_path: Path) -> None:
    files = {s: Pipeline(Inputs(MICRO, weight_scales=s), work).engine_path("fused_int8_gelu") for s in ("channel", "tensor")}
    assert files["channel"].name == "engine_fused_int8.safetensors"
    assert files["tensor"].name == "engine_fused_int8_tensor.safetensors"
    assert files["channel"].read_bytes() != files["tensor"].read_bytes()
    ft = {Pipeline(Inputs(MICRO, weight_scales=s), work).engine_path("ft_int8") for s in ("channel", "tensor")}
    assert len(ft) == 1
    said = "The fused graph's weights: `--weight-scales tensor`"
    for program, table, options in ((reproduce_table2, "table2", ["--models", MICRO, "--limit", "32"]),
                                    (latency_breakdown, "table1", ["--model", MICRO])):  # fmt: skip
        for scales in ("channel", "tensor"):
            argv = [*options, "--runs", "2", "--threads", "1", "--weight-scales", scales, "--work", str(work)]
            assert program.main([*argv, "--out", str(tmp_path)]) == 0
            document = results.load_table(tmp_path, table)
            text = getattr(results, f"markdown_{table}")(document)
            assert document["meta"]["weight_scales"] == scales and (said in text) == (scales == "tensor")


def test_what_a_model_was_counted_for_stays_until_the_table_is_whole(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--models", MICRO, "--runs", "2", "--limit", "64", "--threads", "1", "--out", str(tmp_path), "--work", str(work)]

    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(reproduce_table2.gc, "collect", stop)  # behind the first model's rows
        reproduce_table2.main(argv)
    assert list((work / MICRO / "partial").iterdir())
    capsys.readouterr()
    assert reproduce_table2.main(argv) == 0
    assert "fp32: 2 of 2 batches are done; going on" in capsys.readouterr().err
    assert not (work / MICRO / "partial").exists()


def test_a_killed_evaluation_of_table2_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyharness.evaluate.SAVE_SECONDS", 0)
    made = Pipeline(Inputs(MICRO), tmp_path)
    seen: list[int] = []

    def counted(images: torch.Tensor, stop: int) -> torch.Tensor:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(len(images))
        return made.teacher(images)

    def run(stop: int, limit: int) -> EvalResult:
        seen.clear()
        methods = {"fp32": reproduce_table2.Predictor(functools.partial(counted, stop=stop))}
        todo = reproduce_table2.evaluations(made, methods, limit)
        return reproduce_table2.evaluate(made, methods, todo)["fp32"]

    whole = run(-1, 200)
    assert len(seen) == 7 and whole.n == 200
    shutil.rmtree(tmp_path / MICRO / "partial")
    with pytest.raises(KeyboardInterrupt):
        run(3, 200)
    assert run(-1, 200) == whole and len(seen) == 4
    assert run(-1, 100).n == 100 and len(seen) == 4, "of other images nothing is taken over"


def test_table2_says_whose_images_those_of_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["--models", MICRO, "--data", "/nonexistent/imagenet", "--out", str(tmp_path), "--work", str(tmp_path)]
    message = "--data /nonexistent/imagenet: no model here would be evaluated.* Add --weights MODEL=FILE, or leave"
    with pytest.raises(HarnessError, match=message):
        reproduce_table2.main(argv)
    monkeypatch.setattr(reproduce_table2, "rows_of", lambda *args: ([], lambda: None))
    monkeypatch.setattr("pyharness.plots.plot_table2", lambda *args: [])
    for data, models in (([], []), (["--weights", f"{MICRO}={MICRO_TEACHER}", "--data", "procedural"], [MICRO])):
        more = ["swin_tiny_patch4_window7_224", *data, "--out", str(tmp_path), "--work", str(tmp_path)]
        assert reproduce_table2.main(["--models", MICRO, *more]) == 0
        assert results.load_table(tmp_path, "table2")["meta"]["data_models"] == models


def test_table2_without_weights_has_no_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "has_weights", False)
    argv = ["--models", MICRO, "--runs", "2", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert reproduce_table2.main(argv) == 0
    rows = results.load_table(tmp_path, "table2")["rows"]
    without = tuple(name for name in results.METHODS if name != "geluless_int8_no_kd")
    assert [row["method"] for row in rows] == those_that_run(without)
    assert all(row["top1"] is None and row["n_eval"] is None for row in rows)
    assert not (tmp_path / "work").exists() and not (tmp_path / "table2_accuracy.png").exists()


def test_methods_of_a_graph_that_the_engine_lacks_are_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names, cpu = ("fp32", "ft_int8", "fused_int8_gelu", "fused_int8"), torch.device("cpu")
    monkeypatch.setattr(engine, "runs_graph", lambda graph, device, version: True)
    assert reproduce_table2.names_that_run(names, cpu) == list(names)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(engine, "runs_graph", lambda graph, device, version: graph != FUSED_GRAPH)
    assert reproduce_table2.names_that_run(names, cpu) == ["fp32", "ft_int8"]
    assert reproduce_table2.names_that_run(ENGINE_GRAPHS, cpu) == ["ft_int8", "geluless_int8"]
    assert "the engine has no fused_int8 on cpu: no rows for it" in capsys.readouterr().err
    monkeypatch.setattr(engine, "runs_graph", lambda graph, device, version: version == 1)
    assert reproduce_table2.names_that_run(names, cpu, 2) == ["fp32", "ft_int8"]
    assert "the engine has no fused_int8 on cpu for Swin-V2: no rows for it" in capsys.readouterr().err


@pytest.mark.parametrize(("fused", "ft"), [("fused_int8_gelu", "ft_int8"), ("fused_int8", "geluless_int8")])
def test_the_fused_graph_runs_the_same_checkpoint_and_loses_less(fused: str, ft: str, work: Path) -> None:
    """By the golden models, against the fp32 model each was calibrated from."""
    made = Pipeline(Inputs(MICRO), work)
    assert made.calibrated_path(fused) == made.calibrated_path(ft)
    file = made.engine_file(fused)
    assert file.graph == FUSED_GRAPH and file.gelu == (ft == "ft_int8")
    assert made.engine_path(fused).parent == made.engine_path(ft).parent
    floating = made.teacher if file.gelu else load_model(made.student_path(distilled=True))[0]
    images = torch.stack([made.dataset(train=False)[i][0] for i in range(48)])
    with torch.inference_mode():
        expected = floating(images)
    found = {fused: FusedReferenceSwin(file)(images), ft: ReferenceSwin(made.engine_file(ft))(images)}
    sqnr = {name: compare_logits("fp32", expected, name, logits).sqnr_db for name, logits in found.items()}
    assert sqnr[fused] > sqnr[ft] > 25


def test_random_files_of_the_fused_methods_have_their_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "has_weights", False)
    made = Pipeline(Inputs(MICRO, int8_mode=2))
    assert made.engine_file("fused_int8_gelu").gelu and not made.engine_file("fused_int8").gelu


def test_random_files_have_the_weight_scales_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inputs, "has_weights", False)
    for method, graph in (("fused_int8", FUSED_GRAPH), ("ft_int8", "ft_int8")):
        channel, tensor = (
            Pipeline(Inputs(MICRO, weight_scales=scales)).engine_file(method).tensors for scales in ("channel", "tensor")
        )
        same = all(torch.equal(a, b) for a, b in zip(channel, tensor, strict=True))
        assert same == (graph != FUSED_GRAPH)


def test_a_students_checkpoint_is_taken(work: Path, tmp_path: Path) -> None:
    student = tmp_path / "student.safetensors"
    shutil.copy(Pipeline(Inputs(MICRO), work).student_path(distilled=True), student)
    given = Pipeline(Inputs(MICRO, student=student), tmp_path)
    assert given.student_path(distilled=True) == student
    assert given.calibrated_path("geluless_int8").is_file()
    assert [path.name.split("-")[0] for path in (tmp_path / MICRO).iterdir()] == ["calibrated_geluless_int8"]


def test_a_student_of_other_images_than_its_teachers_is_refused(tmp_path: Path) -> None:
    model, _ = load_model(MICRO_TEACHER)
    make_geluless(model)
    student = tmp_path / "student.safetensors"
    for mean, fits in ((None, True), (0.305, True), (0.9, False)):
        meta = checkpoint_meta(model, MICRO) | ({} if mean is None else {"input": {"mean": [mean], "std": [0.325]}})
        save_checkpoint(student, model, meta)
        given = Pipeline(Inputs(MICRO, student=student), tmp_path / str(mean))
        if fits:
            assert given.student_path(distilled=True) == student
            continue
        message = r"student\.safetensors: says .*'mean': \[0\.9\].*swin_micro_digits\.safetensors come in with .*0\.305"
        with pytest.raises(CheckpointError, match=message):
            given.calibrated_path("geluless_int8")


def test_hugging_face_folders_are_taken_as_weights_and_as_students(work: Path, tmp_path: Path) -> None:
    student = Pipeline(Inputs(MICRO), work).student_path(distilled=True)
    for source, name in ((MICRO_TEACHER, "teacher"), (student, "student")):
        assert convert.main(["to-hf", str(source), str(tmp_path / name)]) == 0
    data = ["--data", "procedural:classes=10,size=28,train=100,val=20"]
    words = ["--models", MICRO, "--weights", f"{MICRO}={tmp_path}/teacher", "--student", f"{MICRO}={tmp_path}/student"]
    args = reproduce_table2.build_parser().parse_args([*words, *data])
    (inputs,) = reproduce_table2.inputs_from(args)
    made = Pipeline(inputs, tmp_path / "work")
    assert made.calibrated_path("geluless_int8").is_file()
    expected = load_model(MICRO_TEACHER)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.teacher.state_dict().items())

    before = made._folder("calibrated", {}, inputs.student)
    pipeline.file_digest.cache_clear()
    (tmp_path / "student" / "config.json").write_text("{}")
    assert made._folder("calibrated", {}, inputs.student) != before
    (tmp_path / "student" / "config.json").unlink()
    with pytest.raises(HarnessError, match=r"student is a folder without config\.json; give a checkpoint or a Hug"):
        reproduce_table2.inputs_from(args)


def test_what_is_read_with_a_file_of_a_hugging_face_folder_counts(tmp_path: Path) -> None:
    assert convert.main(["to-hf", str(MICRO_TEACHER), str(tmp_path / "hf")]) == 0
    weights = tmp_path / "hf" / "model.safetensors"

    def digests() -> tuple[str, str, str]:
        pipeline.file_digest.cache_clear()
        inputs = Inputs(MICRO, weights=weights, data="procedural:classes=10,train=8,val=8")
        made = Pipeline(inputs, tmp_path / "work")
        methods = {"fp32": reproduce_table2.Predictor(made.teacher)}
        table = reproduce_table2.evaluations(made, methods, None)["fp32"].identity["weights"]
        return made._folder("calibrated", {}).name, table, pipeline.checkpoint_digest(weights)

    before = digests()
    assert digests() == before and before[1] == before[2]
    processor = tmp_path / "hf" / "preprocessor_config.json"
    processor.write_text(json.dumps({**load(processor), "image_mean": [0.9]}))
    other = digests()
    assert all(a != b for a, b in zip(before, other))
    config = tmp_path / "hf" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert all(a != b for a, b in zip(other, digests()))

    part = weights.rename(tmp_path / "hf" / "part-1.safetensors")
    (tmp_path / "hf" / "part-2.safetensors").write_bytes(b"1")
    named = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(named))
    whole = pipeline.checkpoint_digest(part)
    pipeline.file_digest.cache_clear()
    (tmp_path / "hf" / "part-2.safetensors").write_bytes(b"2")
    assert pipeline.checkpoint_digest(part) != whole
    alone = shutil.copy(MICRO_TEACHER, tmp_path / "alone.safetensors")
    assert pipeline.checkpoint_digest(Path(alone)) == pipeline.file_digest(MICRO_TEACHER)


# --- Table 1 ---------------------------------------------------------------------------------------------------------


def op(name: str, kind: str, read: int, written: int, operations: int) -> OpInfo:
    return OpInfo(name, kind, 0, 0, "", read, written, operations)


def test_a_row_sums_its_calls() -> None:
    ops = [op("softmax", "fused", 10**6, 10**6, 10), op("fc1_gemm", "gemm", 10, 10, 10**9)] * 2
    samples = {WHOLE: [10.0, 12.0, 20.0], "softmax": [8.0, 9.0, 18.0]}
    ceilings = Ceilings(copy_gb_s=10.0, s8_gop_s=500.0, f32_gflop_s=100.0)
    timing = GraphTiming(ops, [0.4, 3.0, 0.6, 5.0], samples)
    rows = latency_breakdown.rows_of(timing, ceilings, MICRO, 1, "ft_int8")
    softmax, gemm = rows
    assert (softmax.op, softmax.calls, softmax.drop_ms, softmax.share) == ("softmax", 2, 2.0, pytest.approx(2 / 12))
    assert softmax.direct_ms == pytest.approx(1.0) and softmax.direct_share == pytest.approx(1 / 9)
    assert (softmax.bytes_read, softmax.bytes_written, softmax.operations) == (2 * 10**6, 2 * 10**6, 20)
    # 2 MB at 10 GB/s are 0.2 ms a call, 1 GOP at 500 GOP/s 2 ms.
    assert (softmax.ceiling, softmax.ceiling_share) == ("copy", pytest.approx(0.4))
    assert (gemm.ceiling, gemm.ceiling_share) == ("s8", pytest.approx(0.5))
    assert gemm.drop_ms is gemm.share is gemm.drop_ms_quartiles is None


def test_the_operations_of_a_gemm_within_a_fused_op_are_int8() -> None:
    ceilings = Ceilings(copy_gb_s=10.0, s8_gop_s=500.0, f32_gflop_s=100.0)
    assert ceilings.bound_ms(op("mlp_norm", "fused", 10, 10, 10**9)) == (pytest.approx(2.0), "s8")
    assert ceilings.bound_ms(op("fc1_bias_gelu", "fused", 10, 10, 10**9)) == (pytest.approx(10.0), "f32")


def test_the_highest_ceiling_counts() -> None:
    assert Ceilings(1.0, 5.0, 3.0).highest(Ceilings(2.0, 4.0, 3.0)) == Ceilings(2.0, 5.0, 3.0)


def test_table1_of_the_micro_model(work: Path, tmp_path: Path) -> None:
    argv = ["--model", MICRO, "--runs", "3", "--batch", "2", "--out", str(tmp_path), "--work", str(work)]
    assert latency_breakdown.main(argv) == 0
    document = results.load_table(tmp_path, "table1")
    graphs = list(dict.fromkeys(row["graph"] for row in document["rows"]))
    assert graphs == those_that_run(ENGINE_GRAPHS)
    by_graph = {graph: [r for r in document["rows"] if r["graph"] == graph] for graph in graphs}
    fused = {graph: [r["op"] for r in rows if r["kind"] == "fused"] for graph, rows in by_graph.items()}
    expected = [op for op in results.FUSED_OPS if op != "reduction_dequantize"]
    assert [op for op in fused["ft_int8"] if op != "reduction_dequantize"] == expected
    assert set(fused["ft_int8"]) - set(fused["geluless_int8"]) == {"fc1_bias_gelu"}
    calls = {row["op"]: row["calls"] for row in by_graph["ft_int8"]}
    assert calls["softmax"] == calls["fc1_gemm"] == 4 and calls["patch_merge_norm"] == calls["head"] == 1
    if FUSED_GRAPH in by_graph:
        calls = {row["op"]: row["calls"] for row in by_graph[FUSED_GRAPH]}
        assert [calls[op] for op in results.FUSED_GRAPH_OPS] == [4, 4, 4, 4, 1]
    for rows in by_graph.values():
        assert sum(row["direct_share"] for row in rows) == pytest.approx(1)
        assert all((row["drop_ms"] is not None) == (row["kind"] == "fused") for row in rows)
    assert set(document["meta"]["ceilings"]) == {"copy_gb_s", "s8_gop_s", "f32_gflop_s"}
    assert (tmp_path / "table1.png").exists()


def test_table1_keeps_the_graphs_it_has_when_it_is_stopped(work: Path, tmp_path: Path, monkeypatch) -> None:
    time_graph = latency_breakdown.time_graph

    def stopped_at_the_second(pipeline, graph, *rest):
        if graph != ENGINE_GRAPHS[0]:
            raise KeyboardInterrupt
        return time_graph(pipeline, graph, *rest)

    monkeypatch.setattr(latency_breakdown, "time_graph", stopped_at_the_second)
    argv = ["--model", MICRO, "--runs", "1", "--batch", "1", "--out", str(tmp_path), "--work", str(work)]
    with pytest.raises(KeyboardInterrupt):
        latency_breakdown.main(argv)
    document = results.load_table(tmp_path, "table1")
    assert {row["graph"] for row in document["rows"]} == {ENGINE_GRAPHS[0]} == set(document["meta"]["latency_ms"])


# --- the patch series ------------------------------------------------------------------------------------------------

PATCH = """\
Subject: one idea

---
 a.cc | 4 ++--
diff --git a/src/a.cc b/src/a.cc
--- a/src/a.cc
+++ b/src/a.cc
@@ -1,4 +1,4 @@
 kept
-- a removed line that looks like a header
+++ b/an added line that looks like a header
 kept
-old
+new
@@ -9 +9,2 @@ void f() {
-one
+two
+three
\\ No newline at end of file
diff --git a/src/new.h b/src/new.h
--- /dev/null
+++ b/src/new.h
@@ -0,0 +1,1 @@
+only
--
2.40.0
"""


def test_diffstat_counts_hunks_not_headers(tmp_path: Path) -> None:
    (tmp_path / "series").write_text("# the series\n0001-x.patch\n\n")
    (tmp_path / "0001-x.patch").write_text(PATCH)
    found = [(c.patch, c.file, c.added, c.removed) for c in diffstat(tmp_path)]
    assert found == [("0001-x.patch", "src/a.cc", 4, 3), ("0001-x.patch", "src/new.h", 1, 0)]


def test_a_broken_series_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="series"):
        diffstat(tmp_path)
    (tmp_path / "series").write_text("# nothing\n")
    with pytest.raises(FormatError, match="lists no patch"):
        diffstat(tmp_path)
    (tmp_path / "series").write_text("0001-x.patch\n")
    with pytest.raises(FormatError, match="0001-x.patch.*not whole"):
        diffstat(tmp_path)
    (tmp_path / "0001-x.patch").write_text("Subject: nothing\n")
    with pytest.raises(FormatError, match="changes no file"):
        diffstat(tmp_path)


def test_the_series_is_small(repository: Path) -> None:
    """Under 150 changed lines, as the project asks of itself; git counts the same."""
    changes = diffstat(repository / "patches")
    assert sum(c.added + c.removed for c in changes) < 150
    names = list(dict.fromkeys(c.patch for c in changes))
    for name in names:
        done = subprocess.run(
            ["git", "apply", "--numstat", f"patches/{name}"], cwd=repository, capture_output=True, text=True, check=True
        )
        counted = {tuple(map(int, line.split("\t")[:2])) + (line.split("\t")[2],) for line in done.stdout.splitlines()}
        assert counted == {(c.added, c.removed, c.file) for c in changes if c.patch == name}


def test_side_by_side() -> None:
    assert side_by_side(["a", "b", "c"], ["a", "c"]) == [("a", "a"), ("b", ""), ("c", "c")]
    assert side_by_side(["a", "x"], ["a", "y"]) == [("a", "a"), ("x", ""), ("", "y")]
    assert side_by_side([], ["a"]) == [("", "a")]


def test_logit_differences() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    b = torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    found = compare_logits("a", a, "b", b)
    assert (found.max_abs, found.mean_abs, found.top1_agreement) == (0.5, 0.125, 100.0)
    assert found.sqnr_db == pytest.approx(20.0)
    assert compare_logits("a", a, "b", a).sqnr_db is None
    assert compare_logits("a", a, "b", -a).top1_agreement == 50.0


def test_diff_baseline_of_the_micro_model(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--latency-model", MICRO, "--runs", "3", "--out", str(tmp_path), "--work", str(work)]
    assert diff_baseline.main(argv) == 0
    document = load(tmp_path / "diff_baseline.json")
    assert ["fc1_bias_gelu", ""] in document["ops"]
    assert sum(1 for left, right in document["ops"] if left != right) <= 3
    pairs = {(d["reference"], d["other"]): d for d in document["logits"]["differences"]}
    for graph in ("ft_int8", "geluless_int8"):
        own = pairs[f"fake-quantized {graph}", f"engine {graph}"]
        assert own["sqnr_db"] > 25 and own["top1_agreement"] > 98
    assert document["logits"]["top1"]["fp32"] >= 97
    text = (tmp_path / "diff_baseline.md").read_text()
    assert text in capsys.readouterr().out and "fc1_bias_gelu" in text
