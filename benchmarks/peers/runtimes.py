"""ONNX Runtime and OpenVINO without PyTorch: a file of a model in, a call that gives logits out.

PyTorch is not imported here, so that a process that measures their memory holds nothing that they do not need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[], Any]


@dataclass(frozen=True)
class Running:
    """A model ready to run. `kernels`: the names of those it runs, as far as the library tells; `precision`: what it
    says it computes in outside of int8."""

    call: Call
    kernels: tuple[str, ...] = ()
    precision: str | None = None


def onnx_runtime(file: Path, images: np.ndarray, threads: int) -> Running:
    """An ONNX model on ONNX Runtime's CPU provider, all graph optimizations on, `threads` threads within an op."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images}
    return Running(lambda: session.run(None, feed)[0])


def openvino(file: Path, images: np.ndarray, threads: int, precision: str | None = None) -> Running:
    """An ONNX or IR model on OpenVINO's CPU plugin, set for latency, `threads` threads.

    `precision`: "f32" or "bf16" for what is not int8; None leaves it to OpenVINO, which takes bf16 where there is
    AMX or AVX512-BF16.
    """
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    request = compiled.create_infer_request()
    inputs = {0: images}
    notes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kernels = {str(note["primitiveType"].value) for note in notes if "primitiveType" in note}
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return Running(
        lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0], tuple(sorted(kernels)), hint
    )
