"""Every program: starts as a file and as a module, explains itself, and answers a user's mistake with one line."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyharness.data import DATA_HELP
from pyharness.errors import HarnessError, run_cli

PROGRAMS = (
    "ablate_distillation",
    "compare",
    "convert",
    "diff_baseline",
    "distill",
    "evaluate",
    "latency_breakdown",
    "predict",
    "qat",
    "quantize",
    "reproduce_table2",
    "results",
    "train",
    "train_teacher",
    "tune_gemm",
)

TINY = "swin_tiny_patch4_window7_224"

MISTAKES = {
    "ablate_distillation": (["--seeds", "0"], "--seeds must be at least 1, found 0"),
    "compare": (["/no/such/file.pth", "b"], "/no/such/file.pth"),
    "convert": (["show", "/no/such/file.safetensors"], "/no/such/file.safetensors"),
    "diff_baseline": (["--runs", "0"], "--runs must be at least 1, found 0"),
    "distill": (["--out", "{tmp}", "--subset", "0"], "subset"),
    "evaluate": (["/no/such/file.pth"], "/no/such/file.pth"),
    "latency_breakdown": (["--batch", "-3"], "--batch must be at least 1, found -3"),
    "predict": (["/no/such/file.pth", "photo.jpg"], "/no/such/file.pth"),
    "qat": (["/no/such/file.safetensors", "--out", "{tmp}"], "/no/such/file.safetensors"),
    "quantize": (["--weights", "/no/such/file.pth", "--out", "{tmp}/out.pth"], "/no/such/file.pth"),
    "reproduce_table2": (["--weights", "a=/no/such/file.pth"], "there is no file /no/such/file.pth"),
    "results": (["{tmp}"], "reproduce.sh"),
    "train": (["--out", "{tmp}", "--data", "procedural:colours=3"], "'colours=3' is not understood"),
    "train_teacher": (["--epochs", "0"], "--epochs"),
    "tune_gemm": (["--batch", "8", "0"], "--batch must be at least 1, found 0"),
}


def run(repository: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=repository, capture_output=True, text=True, env={**os.environ, **environment}
    )


def answer_to(program: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and stderr of `program` run in this process."""
    main = importlib.import_module(f"pyharness.{program}").main
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: main(argv))
    return stop.value.code, capsys.readouterr().err


def test_no_program_is_left_out(repository: Path) -> None:
    files = (repository / "pyharness").glob("*.py")
    assert sorted(f.stem for f in files if "run_cli(main)" in f.read_text()) == list(PROGRAMS)


def test_the_package_names_every_program(repository: Path) -> None:
    """And needs none of the packages that these need for that: -S hides all installed ones."""
    from pyharness.__main__ import PROGRAMS as named

    assert sorted(named) == list(PROGRAMS)
    done = run(repository, "-S", "-m", "pyharness", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in PROGRAMS)
    without = run(repository, "-S", "-m", "pyharness")
    assert (without.returncode, without.stdout, without.stderr) == (2, "", done.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_usage_names_the_program_however_it_was_started(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/bin/swin-int8", program])
    assert importlib.import_module(f"pyharness.{program}").build_parser().prog == f"{program}.py"


def test_a_program_by_its_name(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "-m", "pyharness", "tune-gemm", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: tune_gemm.py")
    done = run(repository, "-m", "pyharness", "results", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read")
    for folder in ("pyharness", "pyharness/__main__.py"):
        assert run(repository, folder, "results", "--help").stdout.startswith("usage: results.py")
    made = tmp_path / "x.safetensors"
    done = run(repository, "-m", "pyharness", "convert", "random", "--model", "swin_micro_digits", "--graph", "fused_int8", str(made))
    assert done.returncode == 0, done.stderr
    command = json.loads(Path(f"{made}.card.json").read_text())["made_by"]["command"]
    assert command.startswith("python pyharness/convert.py random --model swin_micro_digits")
    done = run(repository, "-m", "pyharness", "quantise")
    assert done.returncode == 2
    assert re.fullmatch(r"error: there is no program 'quantise'; choose one of quantize, convert, .*results\n", done.stderr)


HELPS = """
import json, os, runpy, sys
import torch

said = {}
for program in sys.argv[1:]:
    streams = [os.memfd_create(name) for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream, number)
        sys.argv = [f"pyharness/{program}.py", "--help"]
        sys.path[0] = "pyharness"
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code or 0)  # PyTorch takes long to be taken down
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said[program] = status, *(os.pread(stream, 1 << 20, 0).decode() for stream in streams)
print(json.dumps(said))
"""
"""Every program started as a file, each in a process of its own, which all have PyTorch from the same import."""


@pytest.fixture(scope="module")
def helps(repository: Path) -> dict[str, tuple[int, str, str]]:
    done = run(repository, "-c", HELPS, *PROGRAMS)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_the_file(helps: dict[str, tuple[int, str, str]], program: str) -> None:
    status, out, err = helps[program]
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: {program}.py")
    assert "%(" not in out and "%%" not in out


HEAVY = ("matplotlib", "modelopt", "pandas", "sklearn", "timm", "torchvision")
"""Packages whose import takes seconds; of such, a program's help may load torch alone."""

IMPORTS = """
import importlib, sys, traceback

heavy, modules = (words.split() for words in sys.argv[1:])
importers = {}

class Watch:
    def find_spec(package, *_):
        if package in heavy:
            for frame, line in traceback.walk_stack(None):
                module = frame.f_globals.get("__name__", "")
                if module.startswith(("pyharness.", "benchmarks.")):
                    importers[package] = f"{module}, line {line}"
                    break

sys.meta_path.insert(0, Watch)
for module in modules:
    importlib.import_module(module).build_parser()
print(*(f"{package} by {importers.get(package)}" for package in heavy if package in sys.modules), sep="; ")
"""
"""Says which heavy packages were loaded, and by which line of ours."""


def test_help_loads_no_heavy_package(repository: Path) -> None:
    modules = [
        f"{file.parent.name}.{file.stem}"
        for folder in ("pyharness", "benchmarks")
        for file in sorted((repository / folder).glob("*.py"))
        if "def build_parser" in file.read_text()
    ]
    assert {f"pyharness.{program}" for program in PROGRAMS} < set(modules)
    done = run(repository, "-c", IMPORTS, " ".join(HEAVY), " ".join(modules))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\n", f"loaded before it is needed: {done.stdout}"


def test_every_program_that_takes_images_tells_the_same_words() -> None:
    told = {}
    for program in PROGRAMS:
        parser = importlib.import_module(f"pyharness.{program}").build_parser()
        for action in parser._actions:
            if "--data" in action.option_strings:
                told[program] = action.help
    assert sorted(told) == ["compare", "distill", "evaluate", "qat", "quantize", "reproduce_table2", "train"]
    assert all(DATA_HELP in text for text in told.values())


def test_as_a_module_and_from_another_folder(repository: Path, tmp_path: Path) -> None:
    assert run(repository, "-m", "pyharness.results", "--help").returncode == 0
    done = run(tmp_path, str(repository / "pyharness" / "results.py"), str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistake_is_one_line(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, expected = MISTAKES[program]
    status, text = answer_to(program, [word.replace("{tmp}", str(tmp_path)) for word in argv], capsys)
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", text), text
    assert expected in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--weights", "nonsense"], "--weights needs MODEL=FILE, found 'nonsense'"),
        (["--models", "swin_micro_digits", "--weights", f"{TINY}={__file__}"], "not among --models"),
        (["--models", TINY, "--student", f"{TINY}={__file__}"], "its teacher is needed too"),
        (["--models", TINY, "--weights", f"{TINY}={__file__}"], "give --data DIR"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--models", "resnet18"], "resnet18"),
    ],
)
def test_mistakes_in_reproduce_table2(
    argv: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = answer_to("reproduce_table2", [*argv, "--out", str(tmp_path)], capsys)
    assert status == 2 and expected in text and text.count("\n") == 1


def test_wrong_option_is_argparses_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = answer_to("latency_breakdown", ["--nonsense"], capsys)
    assert status == 2 and "unrecognized arguments: --nonsense" in text


def test_a_missing_package_is_one_line_before_any_import_fails(repository: Path) -> None:
    """As with the system's Python: -S and -E hide all installed packages."""
    done = run(repository, "-S", "-E", "pyharness/distill.py", "--help")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* has no .*torch.*bash scripts/build_ft\.sh.*\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("error", "status"), [(HarnessError("found x, need y"), 2), (KeyboardInterrupt(), 130)]
)
def test_run_cli(error: BaseException, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_cli(main)
    assert stop.value.code == status
    assert capsys.readouterr().err in ("error: found x, need y\n", "interrupted\n")


ABORTS_AT_ITS_END = """
import atexit, os
from pyharness.errors import HarnessError, run_cli

def main():
    raise HarnessError("found x, need y")

atexit.register(os.abort)
run_cli(main)
"""


@pytest.mark.parametrize(("processes", "status"), [("2", 2), ("1", -signal.SIGABRT)])
def test_one_of_several_processes_ends_at_once(repository: Path, processes: str, status: int) -> None:
    """What PyTorch does while Python ends cannot change the status; a process alone ends as any program."""
    done = run(repository, "-c", ABORTS_AT_ITS_END, WORLD_SIZE=processes)
    assert done.returncode == status
    assert done.stderr.startswith("error: found x, need y\n")


@pytest.mark.parametrize("program", sorted({*PROGRAMS} - {"distill", "evaluate", "qat", "results"}))
def test_a_program_of_one_process_is_not_started_by_torchrun(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would write the same files. results.py writes tables of what is there, in a moment."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    argv = [word.replace("{tmp}", str(tmp_path)) for word in MISTAKES[program][0]]
    with pytest.raises(HarnessError, match="one of 2 processes, and this program takes one alone; start it with python"):
        importlib.import_module(f"pyharness.{program}").main(argv)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_cli(main)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise HarnessError("x")

    monkeypatch.setenv("SWIN_TRACEBACK", "1")
    with pytest.raises(HarnessError):
        run_cli(main)


def test_files_names_need_not_be_utf8(repository, tmp_path):
    """The file, its cards and the line that says so are written all the same."""
    out = os.fsencode(tmp_path) + b"/caf\xe9.safetensors"
    words = [sys.executable, "pyharness/convert.py", "random", "--graph", "fused_int8", out]
    done = subprocess.run(words, cwd=repository, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"wrote " + os.fsencode(tmp_path) + b"/caf\\udce9.safetensors (")
    assert "caf?.safetensors" in Path(os.fsdecode(out + b".card.md")).read_text(encoding="utf-8")
