"""The programs of this package by their names: `python -m pyharness PROGRAM ...`, or `swin-int8 PROGRAM ...` once the
package is installed. In the repository each is a file as well: `python pyharness/PROGRAM.py ...`."""

from __future__ import annotations

if not __package__:  # run as a file or a folder: make `pyharness` importable and say plainly what is missing
    import _script  # noqa: F401

import importlib
import sys
from collections.abc import Sequence

from pyharness.errors import HarnessError, run_cli

PROGRAMS = {
    "quantize": "calibrate a checkpoint after training",
    "convert": "between checkpoints of all formats and engine files",
    "evaluate": "accuracy of checkpoints and engine files",
    "predict": "the likeliest classes of your own photographs",
    "compare": "how far results are from another model's, without labels",
    "distill": "the paper's Algorithm 1: take a model's GELU away",
    "qat": "quantization-aware training of a calibrated model",
    "train": "train a Swin, from random weights or a checkpoint",
    "tune_gemm": "choose each GEMM's kernel on this GPU ahead of time",
    "reproduce_table2": "the paper's Table 2: accuracy and latency of every method",
    "latency_breakdown": "the paper's Table 1: latency of each fused operation",
    "diff_baseline": "what the patch series changes",
    "ablate_distillation": "what each choice of Algorithm 1 is worth",
    "train_teacher": "train the micro Swin that the package carries",
    "results": "print result tables again, write them into README.md and results/README.md",
}
"""Those that most people need first, and what each is for. Kept here so that the list imports nothing."""


def usage() -> str:
    width = max(map(len, PROGRAMS))
    lines = (f"  {name:{width}}  {what}" for name, what in PROGRAMS.items())
    return "\n".join(["usage: swin-int8 PROGRAM ...", "", *lines, "", "swin-int8 PROGRAM --help says more."])


def run(words: Sequence[str]) -> int | None:
    """Run the program that the first of `words` names with the others. HarnessError for an unknown name."""
    if not words or words[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name = words[0].replace("-", "_").removesuffix(".py")
    if name not in PROGRAMS:
        raise HarnessError(f"there is no program {words[0]!r}; choose one of {', '.join(PROGRAMS)}")
    module = importlib.import_module(f"pyharness.{name}")
    sys.argv = [str(module.__file__), *words[1:]]  # what result files and cards say they were made by
    return module.main()


def main() -> None:
    run_cli(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
