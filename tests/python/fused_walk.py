"""Holds a forward pass of the fused graph to the golden model, every operation on the inputs it was given in that pass.

As op_walk.py for the FT graphs: an error shows where it is made, and neither a rounding tie nor the type of the
residual stream hides it or passes for one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyharness.engine import SwinInt8
from pyharness.engine_file import EngineFile
from pyharness.fused_reference import FusedReferenceSwin, Quantized, Stream, difference
from pyharness.reference import Node

Outputs = Mapping[Node, list[Tensor]]
"""What every operation of a forward pass wrote."""


def outputs_by_node(model: SwinInt8, images: Tensor) -> Outputs:
    """The outputs of a forward pass of the engine."""
    found = {}
    for op, outputs in model.trace(images):
        node = Node(op.stage if op.stage >= 0 else None, op.block if op.block >= 0 else None, op.name)
        found[node] = [out.cpu() for out in outputs]
    return found


def outputs_of(trace: Mapping[Node, object]) -> Outputs:
    """The outputs of a pass of the golden model as the engine would write them, in float32: for tests of the walk."""
    found = {}
    for node, value in trace.items():
        if isinstance(value, Stream):
            found[node] = [value.residual.float()] + ([] if value.quantized is None else [value.quantized.q])
        else:
            found[node] = [value.q if isinstance(value, Quantized) else value.float()]
    return found


def golden_logits(file: EngineFile, images: Tensor, outputs: Outputs) -> Tensor:
    """The golden logits for `images`, every operation computed from the other pass's inputs as far as they are right."""
    return FusedReferenceSwin(file)(images.cpu(), follow=outputs)


def walk(file: EngineFile, images: Tensor, outputs: Outputs, record_ties) -> Tensor:
    """`golden_logits`; AssertionError naming the first operation whose outputs are wrong, are missing or too many."""
    trace: dict[Node, object] = {}
    logits = FusedReferenceSwin(file)(images.cpu(), trace, outputs)
    assert list(outputs) == list(trace), f"the operations are {list(outputs)}, not {list(trace)}"
    for node, value in trace.items():
        parts = [(value, 0.0)]
        if isinstance(value, Stream):
            parts = [(value.residual, value.slack)] + ([] if value.quantized is None else [(value.quantized, 0.0)])
        assert len(parts) == len(outputs[node]), f"{node} writes {len(outputs[node])} tensors, not {len(parts)}"
        for (own, slack), found in zip(parts, outputs[node]):
            wrong = difference(own, found, slack)
            what = "int8 values" if isinstance(own, Quantized) else "values"
            assert not wrong.any(), f"{node}: {int(wrong.sum())} of {wrong.numel()} {what} are wrong"
            if isinstance(own, Quantized):
                assert found.dtype == torch.int8
                record_ties(int((found.reshape(own.q.shape) != own.q).sum()), own.q.numel())
    return logits
