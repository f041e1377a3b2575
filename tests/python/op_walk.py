"""Walks the golden reference along a forward pass of the engine: every operation is checked on the engine's own inputs.

So an error shows where it is made, and the rounding of a float16 residual stream, which changes int8 values by the
thousand further on, hides nothing.
"""

from __future__ import annotations

from unittest import mock

import torch
from op_targets import Target
from torch import Tensor

from pyharness import reference
from pyharness.engine import SwinInt8
from pyharness.engine_file import EngineFile
from pyharness.reference import Node, Quantized, ReferenceSwin, ResidualQuantized


def outputs_by_node(model: SwinInt8, images: Tensor) -> dict[Node, list[Tensor]]:
    """What every operation of `model` wrote, without the columns of padding behind the scores."""
    found = {}
    for op, outputs in model.trace(images):
        node = Node(op.stage if op.stage >= 0 else None, op.block if op.block >= 0 else None, op.name)
        if op.name in ("qk_gemm", "softmax"):
            outputs = [out[..., : out.shape[2]] for out in outputs]
        found[node] = [out.cpu() for out in outputs]
    return found


def walk(file: EngineFile, images: Tensor, model: SwinInt8, target: Target, record_ties) -> Tensor:
    """The logits at the end of the walk; AssertionError naming the first operation that is wrong.

    int8 results equal up to rounding ties, int32 ones exactly; floating-point ones up to one rounding to their type.
    """
    reference_model = ReferenceSwin(file)
    weights = reference_model._weights

    class Walker(reference._Recorder):
        def at(self, stage: int, block: int | None = None) -> Walker:
            return Walker(self._trace, self._follow, stage, block)

        def __call__(self, op: str, value):
            node = Node(self._stage, self._block, op)
            found = self._follow[node]
            try:
                return self._adopted(node, value, found)
            except AssertionError as error:
                raise AssertionError(f"{node}: {error}") from None

        def _adopted(self, node: Node, value, found: list[Tensor]):
            if isinstance(value, ResidualQuantized):
                residual = found[0].reshape(value.residual.shape)
                target.close(residual, value.residual, rtol=1e-5, atol=1e-5)
                prefix = f"layers.{node.stage}.blocks.{node.block}.norm2."
                quant = reference_model._scales(node.stage, node.block).quant("fc1_input")
                # What is normalized (Swin-V2: quantized) is the residual stream as it is stored.
                normed = residual
                if file.config.version == 1:
                    normed = reference.layer_norm(residual, weights[prefix + "weight"], weights[prefix + "bias"])
                exact = reference.quantize(normed, quant).exact
                return ResidualQuantized(residual.double(), self._quantized(exact, found[1]))
            if isinstance(value, Quantized):
                return self._quantized(value.exact, found[0], value.q)
            out = found[0].reshape(value.shape)
            if out.dtype == torch.int32:
                assert torch.equal(out, value), "accumulators differ"
                return out
            target.close(out, value, rtol=1e-5, atol=1e-5)
            return out.double()

        @staticmethod
        def _quantized(exact: Tensor, found: Tensor, own: Tensor | None = None) -> Quantized:
            found = found.reshape(exact.shape)
            own = reference._round_clamp(exact).q if own is None else own
            off = found != own
            assert (found.int() - own.int()).abs().max() <= 1, "an int8 value is off by more than one"
            assert reference.near_tie(exact)[off].all(), "an int8 value is off by one away from a tie"
            record_ties(int(off.sum()), off.numel())
            return Quantized(found, exact)

    follow = outputs_by_node(model, images)
    with mock.patch.object(reference, "_Recorder", Walker):
        return reference_model(images.cpu(), follow=follow)
