"""benchmarks/peers_cpu.py: rows and their ratios, resuming, forcing instruction sets, peers that are missing, fail or lie,
and real runs of the micro model: against timm eager, and of the int8 peers that are installed. Inductor does not run."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers_cpu
from benchmarks.peers import artefacts, cpuid, memory, methods, plot, rows, runtimes
from benchmarks.peers import isa as isas
from benchmarks.peers.methods import Built, Method, all_methods
from benchmarks.peers.rows import PeerRow
from pyharness import measure, results
from pyharness.config import MICRO_DIGITS
from pyharness.errors import FormatError, HarnessError, run_cli
from pyharness.plots import short_model

MICRO = MICRO_DIGITS.name
META = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "dirty": False, "device": "A CPU, 2 cores", "driver": None,
    "cuda": None, "torch": "2.15.0", "timm": "1.0", "engine": {"backend": "cpu", "isa": "avx2", "version": "0.1.0"},
    "threads": 2, "command": "python x", "versions": {"openvino": "2026.4", "nncf": None},
}  # fmt: skip


def row(method: str, side: str = rows.PEER, **fields: object) -> PeerRow:
    base = {"model": MICRO, "img_size": 28, "batch": 1, "device": "A CPU", "threads": 2, "side": side}
    return PeerRow(**{**base, "method": method, **fields})


def a_group() -> list[PeerRow]:
    """ft_int8 takes 4 ms, fused 2, peers 8 and 3, and one peer is not installed; the third round is twice as slow."""
    samples = {
        name: [base, base, 2 * base]
        for name, base in {"ft_int8": 4.0, "fused_int8": 2.0, "slow": 8.0, "quick": 3.0}.items()
    }
    untimed = [
        row("ft_int8", rows.OURS, precision="int8"),
        row("fused_int8", rows.OURS, precision="int8", version="0.1.0", peak_memory_mb=512.0, model_mb=29.5),
        row("slow", check={"sqnr_db": 125.04, "max_abs": 1.24e-6}),
        row("quick", precision="bf16", isa_forced="partly"),
        row("gone", reason="not installed: gone"),
    ]
    return rows.timed_rows(untimed, samples)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_ratios_are_to_the_fastest_peer_and_to_the_fused_graph() -> None:
    by_name = {r.method: r for r in a_group()}
    assert by_name["quick"].ratio_to_best_peer == 1.0
    assert by_name["slow"].ratio_to_best_peer == pytest.approx(8 / 3)
    assert by_name["fused_int8"].ratio_to_best_peer == pytest.approx(2 / 3)
    assert by_name["fused_int8"].ratio_to_best_peer_quartiles == pytest.approx((2 / 3, 2 / 3))
    assert [by_name[n].ratio_to_fused for n in ("fused_int8", "ft_int8", "quick")] == [1.0, 2.0, 1.5]
    assert by_name["slow"].vs_ft_int8 == 2.0
    assert by_name["quick"].images_per_s == pytest.approx(1000 / 3)
    gone = by_name["gone"]
    assert (gone.latency_ms, gone.ratio_to_best_peer, gone.reason) == (None, None, "not installed: gone")


def test_peers_that_leave_the_forced_instruction_set_are_no_measure_of_it() -> None:
    samples = {"fused_int8": [2.0, 4.0], "free": [3.0, 6.0], "partly": [4.0, 8.0], "kept": [5.0, 10.0]}
    forced = {"fused_int8": "yes", "free": "no", "partly": "partly", "kept": "yes"}
    untimed = [
        row(name, rows.OURS if name == "fused_int8" else rows.PEER, isa="avx2", isa_forced=how)
        for name, how in forced.items()
    ]
    found = {r.method: r for r in rows.timed_rows(untimed, samples)}
    assert found["fused_int8"].ratio_to_best_peer == pytest.approx(2 / 3)
    assert found["fused_int8"].ratio_to_best_forced_peer == pytest.approx(1 / 2)
    assert found["free"].ratio_to_best_forced_peer == pytest.approx(3 / 4)
    text = rows.markdown(results.document_of(META, list(found.values())))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "-50.0 %" in lines["fused_int8 vs best peer that keeps to avx2"] and "free (not forced)" in lines


def test_our_own_methods_are_never_the_best_peer() -> None:
    samples = {"ft_int8": [1.0], "peer": [2.0], "other": [3.0]}
    assert rows.best_peer(samples, ["peer", "other", "never timed"]) == "peer"
    alone = rows.timed_rows([row("ft_int8", rows.OURS)], {"ft_int8": [1.0]})
    assert alone[0].ratio_to_best_peer is None and alone[0].latency_ms["median"] == 1.0


def test_a_file_of_rows_reads_back_and_is_strict(tmp_path: Path) -> None:
    document = rows.write(tmp_path, META, [dataclasses.asdict(r) for r in a_group()])
    assert rows.load(tmp_path) == document
    header = (tmp_path / "peers_cpu.csv").read_text().splitlines()[0]
    assert "latency_ms_median" in header and "check_sqnr_db" in header
    document["rows"][0]["threads"] = "two"
    with pytest.raises(FormatError, match="row 0: threads"):
        results.validate(rows.KIND, document, PeerRow)
    (tmp_path / "peers_cpu.json").write_text("{")
    with pytest.raises(HarnessError, match="not JSON.*--fresh"):
        rows.load(tmp_path)


def test_markdown_names_the_best_peer_and_what_is_missing() -> None:
    document = results.document_of(META, a_group())
    head, full = rows.markdown(document).split(results.REST_OF_FILE)
    lines = {line.split("|")[1].strip(): line for line in head.splitlines() if line.startswith("|")}
    assert "**3.00**" in lines["quick"] and "**" not in lines["slow"] + lines["fused_int8"]
    assert "-33.3 %" in lines["fused_int8 vs best peer"]
    assert lines["gone"].split("|")[2].strip() == "-"
    assert "- `gone` not measured: not installed: gone [Swin micro (digits) batch 1 on 2 (native)]" in head
    assert "openvino 2026.4" in head and "nncf" not in head
    quick, slow = (next(line for line in full.splitlines() if f"| {name} " in line) for name in ("quick", "slow"))
    assert "partly" in quick and "1.00" in quick
    assert "125.0" in slow and "1.2e-06" in slow
    assert full.index("| fused_int8") < full.index("| quick") < full.index("| ft_int8")  # by latency


def test_markdown_explains_the_methods_that_are_in_it() -> None:
    explained = ("pt2e_int8_bf16", "onnxruntime_int8_dynamic", "fused_int8_balanced")
    for present in (explained, explained[:1], ()):
        text = rows.markdown(results.document_of(META, [*a_group(), *(row(name, reason="x") for name in present)]))
        assert {name for name in explained if f"\n`{name}` " in text} == set(present)


def test_matrix_has_a_column_for_each_group() -> None:
    more = [dataclasses.replace(r, batch=8) for r in a_group()] + [dataclasses.replace(r, isa="avx2") for r in a_group()]
    text = rows.markdown(results.document_of(META, [*a_group(), *more]))
    assert "Swin micro (digits), batch 1, 2 threads | Swin micro (digits), batch 8, 2 threads" in text
    assert "Native: every library" in text and "Instruction set `avx2`" in text


def test_pictures(tmp_path: Path) -> None:
    more = [dataclasses.replace(r, isa="avx2", batch=batch) for r in a_group() for batch in (1, 2, 3, 4)]
    document = results.document_of(META, [*a_group(), *more])
    drawn = plot.plot(document, tmp_path)
    assert [path.name for path in drawn] == ["peers_cpu_native.png", "peers_cpu_avx2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plot.plot(results.document_of(META, [row("gone", reason="x")]), tmp_path) == []


def test_a_picture_says_which_bars_are_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    geluless = ("geluless_int8", "fused_int8", "fused_int8_balanced", "fused_int8_tensor")
    assert all(map(plot.is_geluless, geluless))
    assert not any(map(plot.is_geluless, ("ft_int8", "fused_int8_gelu", "fused_int8_gelu_balanced")))
    (tmp_path / "processor.txt").write_text("A CPU of 2026\n")
    figures = []
    monkeypatch.setattr(plot.plots, "save", lambda figure, path: figures.append(figure))
    plot.plot(results.document_of(META, a_group()), tmp_path)
    (figure,) = figures
    assert figure.get_suptitle() == "A CPU of 2026, 2 cores: every library as it chooses"
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == [
        "this engine, int8, the peers' model", "this engine, int8, a GELU-less model", "peers, fp32", "peers, bf16",
    ]  # fmt: skip
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    assert len(set(colours)) == 4
    # slow, ft_int8, quick and fused_int8 from below: the line at 1 ends beneath the last, which is before it.
    assert list(figure.axes[0].lines[0].get_ydata()) == [-0.5, 2.5]


# --- resuming --------------------------------------------------------------------------------------------------------


def test_rows_of_another_machine_or_commit_are_not_mixed(tmp_path: Path) -> None:
    assert rows.resumed(tmp_path, META, fresh=False) == []
    rows.write(tmp_path, META, [dataclasses.asdict(r) for r in a_group()])
    later = {**META, "date": "2027", "threads": 1, "engine": {**META["engine"], "isa": "avx512_vnni"}}
    assert len(rows.resumed(tmp_path, later, fresh=False)) == 5
    for change in ({"commit": "def"}, {"device": "Another"}, {"versions": {}}, {"engine": {"version": "2"}}):
        with pytest.raises(HarnessError, match=f"{next(iter(change))} .* then, .* now.*--fresh"):
            rows.resumed(tmp_path, {**META, **change}, fresh=False)
        assert rows.resumed(tmp_path, {**META, **change}, fresh=True) == []


def test_a_group_is_done_when_all_methods_are_there_and_replaced_as_a_whole() -> None:
    old = [dataclasses.asdict(r) for r in a_group()]
    group = rows.group_of(old[0])
    assert rows.is_done(old, group, ["ft_int8", "gone"])
    assert not rows.is_done(old, group, ["ft_int8", "new"])
    assert not rows.is_done(old, (*group[:3], "avx2"), ["ft_int8"])
    other = dataclasses.asdict(dataclasses.replace(a_group()[0], batch=8))
    kept = rows.merged([*old, other], group, [row("new")])
    assert [(r["method"], r["batch"]) for r in kept] == [("ft_int8", 8), ("new", 1)]


# --- instruction sets ------------------------------------------------------------------------------------------------


def test_the_environment_forces_one_instruction_set_and_clears_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "mask_library", lambda: None)
    dirty = {"SWIN_CPU_ISA": "portable", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "PATH": "/bin"}
    forced = isas.environment_for("avx2", dirty)
    assert forced["SWIN_CPU_ISA"] == "avx2" and forced["ATEN_CPU_CAPABILITY"] == "avx2"
    assert forced["ONEDNN_MAX_CPU_ISA"] == "AVX2" and forced["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert isas.environment_for("native", forced) == {"PATH": "/bin", isas.MARK: "native"}


def test_the_environment_cuts_cpuid_down_where_that_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path("/cache/swin_cpuid_mask-0.so")
    monkeypatch.setattr(cpuid, "mask_library", lambda: library)
    forced = isas.environment_for("avx2", {"LD_PRELOAD": "/lib/own.so"})
    assert forced["LD_PRELOAD"] == f"{library}:/lib/own.so" and forced["SWIN_CPUID_MASK"] == "avx2"
    assert isas.environment_for("avx_vnni", forced)["SWIN_CPUID_MASK"] == "avx_vnni"
    assert isas.environment_for("avx_vnni", forced)["LD_PRELOAD"] == forced["LD_PRELOAD"]
    for isa in ("native", "amx_int8"):
        plain = isas.environment_for(isa, forced)
        assert plain["LD_PRELOAD"] == "/lib/own.so" and "SWIN_CPUID_MASK" not in plain
    assert "LD_PRELOAD" not in isas.environment_for("native", isas.environment_for("avx2", {}))


SEEN = """
import json, torch
from pyharness import engine
variants = engine.cpu_variants()
print(json.dumps([torch.backends.cpu.get_cpu_capability(), variants, engine.engine_info()["isa"]]))
"""


@pytest.fixture(scope="module")
def mask_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = cpuid.mask_library(tmp_path_factory.mktemp("mask"))
    if library is None:
        pytest.skip("CPUID cannot be cut down here (cpuid_fault in /proc/cpuinfo, a C compiler)")
    return library


@pytest.mark.parametrize(
    ("isa", "torch_sees", "gone"),
    [
        ("avx2", "AVX2", {"avx_vnni", "avx512_vnni", "amx_int8"}),
        ("avx_vnni", "AVX2", {"avx512_vnni", "amx_int8"}),
        ("avx512_vnni", "AVX512", {"amx_int8"}),
    ],
)
def test_libraries_see_no_more_than_cpuid_names(mask_library: Path, isa: str, torch_sees: str, gone: set[str]) -> None:
    """No variable of any library is set: PyTorch and the engine go by CPUID alone. Threads inherit it."""
    known = {name for entry in isas.ISAS.values() for name in entry.variables}
    clean = {name: value for name, value in os.environ.items() if name not in known}

    def seen(environment: dict[str, str]) -> list:
        done = subprocess.run(
            [sys.executable, "-c", SEEN], capture_output=True, text=True, env=environment, cwd=results.ROOT
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    everything, best = seen(clean), seen(cpuid.masked(clean, isa, mask_library))
    if isa not in everything[1]:
        pytest.skip(f"no {isa} on this machine")
    assert best[0] == torch_sees and best[2] == isa
    assert set(best[1]) == set(everything[1]) - gone


def test_a_fault_that_is_no_cpuid_still_ends_the_process(mask_library: Path) -> None:
    crash = "import ctypes; ctypes.string_at(0)"
    done = subprocess.run([sys.executable, "-c", crash], env=cpuid.masked(os.environ, "avx2", mask_library))
    assert done.returncode == -signal.SIGSEGV


OWN_HANDLER = """
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
static void on_fault(int number) { puts("own handler"); fflush(stdout); _Exit(7); }
int main(void) {
  unsigned a, b, c, d;
  SET;
  __cpuid_count(7, 0, a, b, c, d);
  puts(b >> 16 & 1 ? "AVX-512" : "none"); /* AVX512F */
  *(volatile int*)8 = 0;
}
"""


@pytest.mark.parametrize(
    "setting", ["signal(SIGSEGV, on_fault)", "struct sigaction s = {0}; s.sa_handler = on_fault; sigaction(SIGSEGV, &s, 0)"]
)
def test_a_handler_of_the_program_comes_after_the_mask(mask_library: Path, tmp_path: Path, setting: str) -> None:
    """As compilers have one: behind it CPUID would be their crash."""
    (tmp_path / "own.c").write_text(OWN_HANDLER.replace("SET;", f"{setting};"), encoding="utf-8")
    subprocess.run(["cc", "-o", str(tmp_path / "own"), str(tmp_path / "own.c")], check=True)
    environment = cpuid.masked(os.environ, "avx2", mask_library)
    done = subprocess.run([str(tmp_path / "own")], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")) == (7, ["none", "own handler", ""])


def test_a_compiler_for_this_machine_sees_no_more(mask_library: Path) -> None:
    """torch.compile calls it with -march=native."""
    command = ["cc", "-march=native", "-dM", "-E", "-x", "c", "/dev/null"]
    environment = cpuid.masked(os.environ, "avx2", mask_library)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "__AVX2__" in done.stdout and "__AVX512F__" not in done.stdout


def test_a_mask_that_is_unknown_is_refused(mask_library: Path) -> None:
    environment = {**cpuid.masked(os.environ, "avx2", mask_library), "SWIN_CPUID_MASK": "sse9"}
    done = subprocess.run([sys.executable, "-c", ""], env=environment, capture_output=True, text=True)
    assert done.returncode == 86 and "SWIN_CPUID_MASK=sse9 is not one of avx2" in done.stderr


def test_a_library_that_cannot_be_preloaded_is_no_mask(mask_library: Path, tmp_path: Path) -> None:
    """LD_PRELOAD ends a path at a space, and a file that is not there is passed over."""
    assert cpuid.mask_library(tmp_path / "with space") is None
    assert list((tmp_path / "with space").iterdir()), "it was compiled, and then not believed"


def test_a_library_that_was_cut_off_is_no_mask(mask_library: Path, tmp_path: Path) -> None:
    (tmp_path / mask_library.name).write_bytes(mask_library.read_bytes()[:100])
    assert cpuid.mask_library(tmp_path) is None


def test_without_a_compiler_there_is_no_mask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert cpuid.mask_library.__wrapped__(tmp_path) is None


def test_the_program_starts_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(os, "execve", lambda *words: started.append(words))
    monkeypatch.setattr(cpuid, "mask_library", lambda: None)
    monkeypatch.setenv(isas.MARK, "native")
    isas.restart_on("native", ["x.py"])
    assert started == []
    isas.restart_on("avx2", ["x.py", "--isa", "avx2"])
    ((program, command, environment),) = started
    assert program == sys.executable and command[1:] == ["x.py", "--isa", "avx2"]
    assert environment["SWIN_CPU_ISA"] == "avx2" and environment[isas.MARK] == "avx2"


@pytest.mark.parametrize(
    ("isa", "kernels", "forced", "by_cpuid"),
    [
        ("native", ("brgemm_avx512_amx_I8",), None, None),
        ("avx2", ("brgemm_avx2_f32", "jit_uni_f32"), "yes", "yes"),
        ("avx2", ("brgemm_avx2_f32", "jit_avx512_f32"), "partly", "partly"),
        ("avx2", ("brgemm_avx2_f32", "gemm_mlas_f32"), "no", "yes"),
        ("avx512_vnni", ("brgemm_avx512_I8",), "yes", "yes"),
        ("avx512_vnni", ("brgemm_avx512_amx_I8",), "no", "no"),
        ("avx2", ("ref_f32",), "unknown", "yes"),
    ],
)
def test_forced_by_the_names_of_kernels(
    isa: str, kernels: tuple[str, ...], forced: str | None, by_cpuid: str | None
) -> None:
    """A name that is beyond the instruction set is believed whatever CPUID said."""
    assert isas.forced_kernels(isa, kernels, False) == forced
    assert isas.forced_kernels(isa, kernels, True) == by_cpuid


def test_what_an_instruction_set_leaves_out() -> None:
    sapphire_rapids = frozenset({"amx_tile", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx2"})
    assert isas.has_bf16("native", sapphire_rapids) and not isas.has_bf16("avx2", sapphire_rapids)
    assert not isas.has_bf16("native", frozenset({"avx2"}))
    assert isas.has_vnni("avx512_vnni", sapphire_rapids) and not isas.has_vnni("avx2", sapphire_rapids)
    assert isas.forced_compiled("avx512_vnni", sapphire_rapids, False) == "no"  # Inductor takes AMX along
    assert isas.forced_compiled("avx512_vnni", sapphire_rapids, True) == "yes"
    assert isas.forced_compiled("avx512_vnni", frozenset({"avx512_vnni"}), False) == "yes"
    assert isas.forced_by_cpuid("avx2", True) == "yes" and isas.forced_by_cpuid("avx2", False) == "no"
    assert isas.forced_by_cpuid("native", False) is None
    assert isas.forced_eager("avx2") == "yes" and isas.forced_eager("native") is None


# --- what is kept, memory --------------------------------------------------------------------------------------------


def test_files_are_made_once_and_whole(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "model").write_bytes(bytes(1500))

    folder = artefacts.kept(tmp_path, "m", {"a": 1}, make)
    assert artefacts.kept(tmp_path, "m", {"a": 1}, make) == folder and len(made) == 1
    assert artefacts.kept(tmp_path, "m", {"a": 2}, make) != folder and len(made) == 2
    assert artefacts.megabytes(folder) == 0.0015
    assert json.loads((folder / "key.json").read_text()) == {"a": 1}

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        artefacts.kept(tmp_path, "m", {"a": 3}, fail)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(HarnessError, match="--work"):
        artefacts.kept(tmp_path / "file", "m", {}, make)


def test_peak_memory_is_the_child_s_own(tmp_path: Path) -> None:
    """Not the parent's: this process holds 400 MB more than a bare Python, and Linux's ru_maxrss would say so."""
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from benchmarks.peers import memory; memory.answer(memory.measure_call(lambda: lambda: bytearray(1)))"
    peak = peers_cpu.peak_memory([sys.executable, "-c", script])
    del ballast
    assert peak is not None and 5 < peak < 200
    grown = script.replace("bytearray(1)", "len(bytes(b'x') * 300_000_000)")
    assert peers_cpu.peak_memory([sys.executable, "-c", grown]) > peak + 250


def test_a_child_that_fails_leaves_memory_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers_cpu.peak_memory([sys.executable, "-c", "raise SystemExit('no')"]) is None
    assert "not measured" in capsys.readouterr().err


def test_memory_of_an_engine_file(setting: methods.Setting, capsys: pytest.CaptureFixture[str]) -> None:
    (words,) = [m.build(setting).alone for m in methods.engine_methods() if m.name == "ft_int8"]
    threads = torch.get_num_threads()
    assert memory.main(words) == 0
    torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out)["peak_memory_mb"] == pytest.approx(memory.peak_mb(), rel=0.05)


def test_memory_of_a_file_needs_no_torch() -> None:
    script = "import sys; from benchmarks.peers import memory, runtimes; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(results.ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
    assert callable(runtimes.onnx_runtime) and callable(runtimes.openvino) and callable(memory.engine)


# --- peers that are missing, fail or lie -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> methods.Setting:
    return peers_cpu.setting_of(MICRO, 2, 1, "native", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def wanted(setting: methods.Setting) -> torch.Tensor:
    with torch.no_grad():
        return setting.model(setting.images)


def test_a_model_at_another_image_size(tmp_path: Path) -> None:
    setting = peers_cpu.setting_of(f"{MICRO}@42x60", 2, 1, "native", tmp_path)
    assert setting.shape == "2x1x42x60" and setting.config.img_size == (42, 60) and setting.name == f"{MICRO}@42x60"
    with torch.no_grad():
        wanted = setting.model(setting.images)
    ready = peers_cpu.prepare(all_methods()["fused_int8"], setting, wanted, "A CPU")
    assert ready.row.model == f"{MICRO}@42x60" and ready.built.call().shape == wanted.shape
    assert short_model("swin_tiny_patch4_window7_224@800x1344") == "Swin-T 800x1344"
    assert short_model("swin_base_patch4_window12_384@768x1152") == "Swin-B 768x1152"
    with pytest.raises(HarnessError, match="--models: '42y' is no image size; give N or HxW"):
        peers_cpu.setting_of(f"{MICRO}@42y", 2, 1, "native", tmp_path)


def peer(build, precision: str = "fp32", packages: tuple[str, ...] = ("torch",), ours: bool = False) -> Method:
    return Method("a_peer", precision, packages, build, ours)


def reason_of(method: Method, setting: methods.Setting, wanted: torch.Tensor) -> str | None:
    ready = peers_cpu.prepare(method, setting, wanted, "A CPU")
    assert (ready.built is None) == (ready.row.reason is not None)
    return ready.row.reason


def test_a_peer_that_is_not_installed_is_named(setting: methods.Setting, wanted: torch.Tensor) -> None:
    method = peer(lambda setting: pytest.fail("was built"), packages=("no_such_package", "torch"))
    assert reason_of(method, setting, wanted) == "not installed: no_such_package"


def test_a_peer_that_breaks_costs_only_its_row(setting: methods.Setting, wanted: torch.Tensor) -> None:
    def build(setting: methods.Setting) -> Built:
        raise RuntimeError("\n\nno kernel\nfor this")

    assert reason_of(peer(build), setting, wanted) == "failed: RuntimeError: no kernel for this"
    with pytest.raises(RuntimeError):  # a fault of ours is no row
        peers_cpu.prepare(peer(build, ours=True), setting, wanted, "A CPU")


@pytest.mark.parametrize(
    ("change", "precision", "reason"),
    [
        (lambda y: y, "fp32", None),
        (lambda y: y.numpy(), "fp32", None),
        (lambda y: y * (1 + 1e-5), "fp32", None),
        (lambda y: y * 1.01, "fp32", "at 40.0 dB against timm's fp32, at least 60 dB"),
        (lambda y: y * 1.01, "bf16", None),
        (lambda y: y * 1.2, "bf16", "at least 20 dB"),
        (lambda y: y * 1.3, "int8", None),  # 10.5 dB
        (lambda y: y * 1.35, "int8", "at 9.1 dB against timm's fp32, at least 10 dB"),
        (lambda y: y * 2, "int8", "at 0.0 dB against timm's fp32, at least 10 dB"),
        (lambda y: y[:1], "int8", r"shape \(1, 10\), \(2, 10\) is needed"),
        (lambda y: y / 0, "int8", "not finite"),
    ],
)
def test_a_peer_that_computes_something_else_is_not_timed(change, precision, reason, setting, wanted) -> None:
    method = peer(lambda setting: Built(lambda: change(setting.model(setting.images))), precision)
    with torch.no_grad():
        found = reason_of(method, setting, wanted)
    assert found is None if reason is None else re.search(reason, found or "")


def test_bf16_needs_the_hardware(setting: methods.Setting) -> None:
    plain = dataclasses.replace(setting, flags=frozenset({"avx2"}))
    by_name = {method.name: method for method in methods.peer_methods()}
    for name in ("compile_tuned_bf16", "pt2e_int8_bf16", "openvino_bf16"):
        with pytest.raises(methods.Unsuitable, match="AVX512-BF16 or AMX is needed"):
            by_name[name].build(plain)


def test_calibration_images_are_others_than_the_timed_ones(setting: methods.Setting) -> None:
    batches = list(setting.calibration())
    assert len(batches) == methods.CALIBRATION_IMAGES and all(b.shape == setting.images.shape for b in batches)
    assert not any(torch.equal(b, setting.images) for b in batches)
    assert not torch.equal(batches[0], batches[1])
    assert all(len(batch) == 1 for batch in setting.calibration(batch=1))


def test_the_peers_model_has_weights_that_matter(tmp_path: Path) -> None:
    """Of timm's initial ones some are at 100 standard deviations, and Swin-V2's norms, last in each branch, are zero."""
    for name in ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"):
        model = peers_cpu.setting_of(name, 1, 1, "native", tmp_path).model
        for key, parameter in model.named_parameters():
            assert parameter.any(), key
            if parameter.dim() > 1 and not key.endswith("logit_scale"):
                assert parameter.abs().max() < 8 * parameter.std(), key


def test_files_are_kept_by_the_models_weights(setting: methods.Setting) -> None:
    model = copy.deepcopy(setting.model)
    assert dataclasses.replace(setting, model=model).key("x") == setting.key("x")
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3
    assert dataclasses.replace(setting, model=model).key("x") != setting.key("x")


# --- this engine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", methods.engine_methods(), ids=lambda method: method.name)
def test_the_engine_runs_the_peers_model(method: Method, setting: methods.Setting, wanted: torch.Tensor) -> None:
    """Or for a GELU-less graph what is left of it without GELU and FC1 bias, another function: 35.0 to 41.9 dB."""
    with torch.no_grad():
        ready = peers_cpu.prepare(method, setting, wanted, "A CPU")
        from_gelu = peers_cpu.check_of(ready.built.call(), wanted, "int8")["sqnr_db"]
    found = ready.row.check["sqnr_db"]
    assert found > 30
    gelu = method.name == "ft_int8" or "_gelu" in method.name
    assert from_gelu == found if gelu else from_gelu < found - 10


def test_an_engine_that_computes_something_else_ends_the_run(setting: methods.Setting, wanted: torch.Tensor) -> None:
    method = peer(lambda setting: Built(lambda: 2 * wanted), "int8", ours=True)
    with pytest.raises(HarnessError, match=r"at 0\.0 dB"):
        peers_cpu.prepare(method, setting, wanted, "A CPU")


# --- the real int8 peers ---------------------------------------------------------------------------------------------


def ready_peer(name: str, setting: methods.Setting, wanted: torch.Tensor) -> peers_cpu.Ready:
    """The peer, built and checked. Skips where it is not installed."""
    method = all_methods()[name]
    if gone := method.missing():
        pytest.skip(f"not installed: {', '.join(gone)}")
    with torch.no_grad():
        ready = peers_cpu.prepare(method, setting, wanted, "A CPU")
    assert ready.row.reason is None and ready.row.precision == "int8"
    return ready


@pytest.mark.parametrize(
    ("name", "least", "without_vnni"),
    [("onnxruntime_int8", 30, 28), ("onnxruntime_int8_dynamic", 30, 30), ("openvino_int8_unsmoothed", 30, 17),
     ("openvino_int8", 10, 10)],
)  # fmt: skip
def test_int8_peers_of_a_file(
    name: str, least: float, without_vnni: float, setting: methods.Setting, wanted: torch.Tensor
) -> None:
    """30.9 to 41.1 dB, with SmoothQuant 14.1; on AVX2 without VNNI the first and the third have 29.5 and 18.3."""
    ready = ready_peer(name, setting, wanted)
    assert ready.row.check["sqnr_db"] > (least if isas.has_vnni(isas.NATIVE, setting.flags) else without_vnni)
    assert 0 < ready.row.model_mb < 0.9 * methods._size(setting.model) and ready.built.alone[1].endswith(("onnx", "xml"))


def test_dynamic_quantization_takes_every_product_with_weights(setting: methods.Setting, wanted: torch.Tensor) -> None:
    file = Path(ready_peer("onnxruntime_int8_dynamic", setting, wanted).built.alone[1])
    graph = pytest.importorskip("onnx").load(file).graph
    weights = {tensor.name for tensor in graph.initializer}
    by_type = {kind: [n for n in graph.node if n.op_type == kind] for kind in ("MatMulInteger", "MatMul", "Gemm", "Conv")}
    assert by_type["MatMulInteger"] and not by_type["Gemm"] and not by_type["Conv"]
    assert not any(set(node.input) & weights for node in by_type["MatMul"])  # attention's


@pytest.mark.parametrize(("name", "dtype"), [("pt2e_int8", torch.float32), ("pt2e_int8_bf16", torch.bfloat16)])
def test_int8_peers_of_pytorch(
    name: str, dtype: torch.dtype, setting: methods.Setting, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the eager backend in Inductor's place, which takes most of a minute."""
    compile_by = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph, options: compile_by(model, backend="eager"))
    ready = ready_peer(name, dataclasses.replace(setting, flags=setting.flags | {"avx512_bf16"}), wanted)
    assert ready.row.check["sqnr_db"] > 25
    assert ready.row.check["precision"] == ("bf16" if dtype == torch.bfloat16 else "f32")
    with torch.no_grad():
        assert ready.built.call().dtype == dtype
    assert not torch.is_autocast_enabled("cpu")


# --- a real run ------------------------------------------------------------------------------------------------------


def test_a_group_of_the_engine_timm_and_a_fake_peer(setting: methods.Setting) -> None:
    calls = []

    def build(setting: methods.Setting) -> Built:
        return Built(lambda: (calls.append(1), setting.model(setting.images))[1], 1.5, details={"precision": "f32"})

    known = peers_cpu.all_methods()
    chosen = [known["ft_int8"], known["timm_fp32"], peer(build), peer(build, packages=("no_such_package",))]
    chosen[3] = dataclasses.replace(chosen[3], name="gone")
    kept: list[float | None] = []
    found = peers_cpu.measure_group(
        chosen, setting, "A CPU", runs=3, seconds=None, memory_of=lambda ready: 100.0,
        keep=lambda rows: kept.extend(row.peak_memory_mb for row in rows if row.latency_ms),
    )  # fmt: skip
    assert kept == [None] * 3  # latencies are kept before memory is measured
    ours, timm, fake, gone = found
    assert (ours.side, timm.side, fake.side) == (rows.OURS, rows.PEER, rows.PEER)
    assert all(r.latency_ms["runs"] == 3 and r.peak_memory_mb == 100.0 for r in (ours, timm, fake))
    best = min(timm, fake, key=lambda row: row.latency_ms["median"])
    assert best.ratio_to_best_peer == 1.0  # the other's is a median of ratios, which three rounds may put below 1
    assert all(row.ratio_to_best_peer > 0 for row in (ours, timm, fake))
    assert ours.check["sqnr_db"] > 25 and timm.check["max_abs"] == 0
    assert fake.check["precision"] == "f32" and fake.model_mb == 1.5 and len(calls) > 3
    assert ours.model_mb > 0.1 and timm.version.startswith("torch ")
    assert gone.latency_ms is None and gone.peak_memory_mb is None and "no_such_package" in gone.reason


def arguments(tmp_path: Path, *words: str) -> list[str]:
    return ["--models", MICRO, "--batch", "1", "--threads", "1", "--runs", "2", "--out", str(tmp_path / "out"),
            "--work", str(tmp_path / "work"), *words]  # fmt: skip


def test_the_program_writes_and_resumes(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(isas.MARK, "native")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # put back afterwards
    before = torch.get_num_threads()
    words = arguments(tmp_path, "--methods", "ft_int8", "timm_fp32", "--no-memory")
    assert peers_cpu.main(words) == 0
    said = capsys.readouterr()
    assert "already there" not in said.err and "ft_int8 vs best peer" in said.out
    document = rows.load(tmp_path / "out")
    assert [r["method"] for r in document["rows"]] == ["ft_int8", "timm_fp32"]
    assert (tmp_path / "out" / "peers_cpu_native.png").is_file()
    assert peers_cpu.main(words) == 0
    assert "already there" in capsys.readouterr().err
    assert rows.load(tmp_path / "out")["rows"] == document["rows"]
    monkeypatch.setattr(measure, "time_alternating", lambda *a, **k: pytest.fail("--prepare timed something"))
    assert peers_cpu.main([*words, "--prepare", "--threads", "2"]) == 0
    torch.set_num_threads(before)


def test_a_forced_instruction_set_reaches_torch_and_the_engine(tmp_path: Path) -> None:
    from pyharness.engine import cpu_variants

    if "avx2" not in cpu_variants():
        pytest.skip("no AVX2 on this machine")
    words = arguments(tmp_path, "--methods", "ft_int8", "--isa", "avx2", "--no-memory")
    program = results.ROOT / "benchmarks" / "peers_cpu.py"
    clean = {k: v for k, v in os.environ.items() if k != isas.MARK}
    done = subprocess.run([sys.executable, str(program), *words], capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    document = rows.load(tmp_path / "out")
    (only,), (this_run,) = document["rows"], document["meta"]["runs_of_this_file"]
    assert (only["isa"], only["isa_forced"]) == ("avx2", "yes")
    assert (this_run["engine_isa"], this_run["torch_isa"]) == ("avx2", "AVX2")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch", "1", "0"], "--batch must be at least 1, found 0"),
        (["--threads", "-1"], "--threads must be at least 1, found -1"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--methods", "nonsense"], "--methods: nonsense unknown; choose from ft_int8"),
    ],
)
def test_mistakes(words: list[str], expected: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(isas.MARK, "native")
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: peers_cpu.main(words))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_takes_the_short_tables_where_it_has_the_markers(repository: Path, tmp_path: Path) -> None:
    shutil.copytree(repository / "results", tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("local"))
    text, tmp_path = (repository / "README.md").read_text(encoding="utf-8"), tmp_path / "cpu-2core"
    # (with what README shows of other machines)
    without = re.sub(r"<!-- begin peers_cpu((?: of \S+)?) -->.*?<!-- end peers_cpu\1 -->\n", "", text, flags=re.DOTALL)
    assert "vs best peer" not in results.readme_with_tables(without, tmp_path)
    marked = without + "\n<!-- begin peers_cpu -->\nold\n<!-- end peers_cpu -->\n"
    (tmp_path / "peers_cpu.md").unlink(missing_ok=True)
    with pytest.raises(FormatError, match="benchmarks/peers_cpu.py writes it"):
        results.readme_with_tables(marked, tmp_path)
    rows.write(tmp_path, META, [dataclasses.asdict(r) for r in a_group()])
    filled = results.readme_with_tables(marked, tmp_path)
    assert "fused_int8 vs best peer" in filled and "\nold\n" not in filled
    assert "in full" not in filled
