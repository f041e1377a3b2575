"""Which quantizers cost a calibrated model its accuracy: what each makes of its input, and what leaving it out gains.

`compare.py --layers` runs this. A model of units (blocks and patch mergings) runs once on a batch of images; a variant
that leaves a quantizer of a unit out starts from what that unit was given then. The unit itself runs variant by
variant, what follows it on several of them as one batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyharness import results
from pyharness.errors import HarnessError
from pyharness.fakequant import FakeQuantSwin
from pyharness.ft_format import DISABLED_BY_FT, SCALE_FIELDS
from pyharness.fused_fakequant import ChannelRounding

ROWS = 64
"""Images that what follows a unit runs on at once: those of several variants together."""

TOP = 20
"""Quantizers in the printed table; files have all."""

_FIELDS = tuple(scale for scale in SCALE_FIELDS if scale.quantizer and scale.name not in DISABLED_BY_FT)

KINDS = tuple(scale.name for scale in _FIELDS)
"""Names of quantizers within a block or patch merging, in the order of FasterTransformer's scale list."""

GROUPS = {
    "weights": tuple(kind for kind in KINDS if kind.endswith("_weight")),
    "activations": tuple(kind for kind in KINDS if not kind.endswith("_weight")),
}
"""Words for many kinds."""


# --- What comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """What the logits' SQNR against the reference gains by something left out, in dB, and its standard error, as the
    images' own gains tell it. Null where nothing is left of the error, or there is but one image."""

    gain_db: float | None
    error_db: float | None


@dataclass(frozen=True)
class QuantizerRow(Gain):
    """A quantizer: SQNR of its result against its input in dB (null where they are equal), and the percentage of values
    that it clips. `block` is null for a patch merging's."""

    name: str
    kind: str
    stage: int
    block: int | None
    sqnr_db: float | None
    clipped: float


@dataclass(frozen=True)
class KindRow(Gain):
    """All quantizers of a kind together: their number, and the least SQNR among them."""

    kind: str
    count: int
    least_sqnr_db: float | None


@dataclass(frozen=True)
class UnitRow(Gain):
    """A block or, with `block` null, patch merging. SQNR in dB of its result: `own_db` against the same without its
    quantizers, on the input that it has in the quantized model; `stream_db` against that in the checkpoint without any
    quantizer. The gain is that of leaving all of its quantizers out."""

    stage: int
    block: int | None
    own_db: float | None
    stream_db: float | None


@dataclass(frozen=True)
class Layers:
    """SQNR of the logits in dB, of the quantized model and of the same without its quantizers, and the tables."""

    logits_db: float | None
    floating_db: float | None
    images: int
    units: list[UnitRow]
    kinds: list[KindRow]
    quantizers: list[QuantizerRow]


@dataclass
class Ratio:
    """Sums of a signal's and an error's squares."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, found: Tensor) -> None:
        self.signal += float(exact.double().square().sum())
        self.noise += float((exact.double() - found.double()).square().sum())

    @property
    def db(self) -> float | None:
        """None where there is no error, or nothing to be in error."""
        return decibels(self.signal, self.noise)


def decibels(signal: float, noise: float) -> float | None:
    """10 log10(signal / noise); None unless both are above zero."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def gain_of(before: Tensor, after: Tensor) -> Gain:
    """By the squared error of each image's logits, float64 [N], before and after.

    The gain is 10 log10(sum before / sum after). To first order an image moves it by (its share of `before` - its share
    of `after`) * 10 / ln 10: N such independent summands give the standard error.
    """
    gain = decibels(float(before.sum()), float(after.sum()))
    if gain is None or len(before) < 2:
        return Gain(gain, None)
    moved = before / before.sum() - after / after.sum()
    n = len(before)
    return Gain(gain, 10 / math.log(10) * math.sqrt(n / (n - 1) * float(moved.square().sum())))


# --- The measurement --------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """Stands in a quantizer's place: measures it where `watching`, and leaves it out where not `on`.

    A weight is rounded once. `ratio`, `clipped` and `values` are of all inputs while watching.
    """

    def __init__(self, quantizer: nn.Module, *, of_weight: bool) -> None:
        super().__init__()
        self.quantizer, self.of_weight = quantizer, of_weight
        self.on, self.watching = True, False
        self.ratio, self.clipped, self.values = Ratio(), 0, 0
        self._rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x
        if self._rounded is not None:
            return self._rounded
        y = self.quantizer(x)
        if self.watching:
            self.ratio.add(x, y)
            self.clipped += clipped(self.quantizer, x)
            self.values += x.numel()
            if self.of_weight:
                self._rounded = y
        return y


def clipped(quantizer: nn.Module, x: Tensor) -> int:
    """How many values of x are beyond what rounds into `quantizer`'s range."""
    if isinstance(quantizer, ChannelRounding):
        return quantizer.clipped(x)
    amax = getattr(quantizer, "_amax", None)
    if amax is None:  # steps of the row's own largest
        return 0
    scaled = (x * (127 / amax)).round()
    return int(((scaled > 127) | (scaled < -128)).sum())


@dataclass
class Unit:
    """A block or patch merging and its quantizers by kind, and what was seen of it."""

    module: nn.Module
    stage: int
    block: int | None
    probes: dict[str, Probe]
    names: dict[str, str]
    own: Ratio = field(default_factory=Ratio)
    stream: Ratio = field(default_factory=Ratio)


class LayerAnalysis:
    """What `Layers` says, of a fake-quantized model whose quantizers are all at work and whose weights are not rounded
    (`model_in_graph` with `keep_weights`); it is changed for good. `kinds` are those that are left out one by one.
    """

    def __init__(self, model: FakeQuantSwin, kinds: Sequence[str] = KINDS) -> None:
        self.model = model
        self.units = list(_units(model))
        present = [kind for kind in KINDS if any(kind in unit.probes for unit in self.units)]
        self.kinds = [kind for kind in present if kind in kinds]
        if not self.kinds:
            raise HarnessError(
                f"the graph has no quantizer of the kinds {', '.join(kinds)}; it has {', '.join(present)}"
            )
        for unit in self.units:
            unit.probes = {kind: probe for kind, probe in unit.probes.items() if kind in kinds}
        self._all = [probe for probe in model.modules() if isinstance(probe, Probe)]
        self._signal = 0.0
        self._errors: dict[Any, list[Tensor]] = {}

    def described(self) -> str:
        """What is left out, in words."""
        count = sum(len(unit.probes) for unit in self.units)
        return f"leaving out {count} quantizers, {len(self.kinds)} kinds and {len(self.units)} blocks"

    def steps(self) -> int:
        """How many pieces of work `run` does of a batch."""
        return 1 + len(self.kinds) + len(self.units)

    def passes(self) -> float:
        """How many times as long as a forward pass the work on a batch takes, where all units take as long."""
        units = len(self.units)
        variants = sum((1 + len(unit.probes)) * (units - at) / units for at, unit in enumerate(self.units))
        firsts = (min(at for at, unit in enumerate(self.units) if kind in unit.probes) for kind in self.kinds)
        return 2 + sum((units - first) / units for first in firsts) + variants

    @torch.inference_mode()
    def run(self, images: Tensor, reference: Tensor) -> Iterator[None]:
        """Measure on images f32 [B, C, H, W] with reference logits f32 [B, K]; yields after each piece of work."""
        reference = reference.double()
        self._signal += float(reference.square().sum())
        embedded = self.model.patch_embed(images)
        with _off(self._all):
            floating = self._follow(0, embedded)
        self._note("floating", self._logits(floating[-1]), reference)
        for probe in self._all:
            probe.watching = True
        quantized = self._follow(0, embedded)
        for probe in self._all:
            probe.watching = False
        self._note("quantized", self._logits(quantized[-1]), reference)
        for unit, exact, found in zip(self.units, floating, quantized):
            unit.stream.add(exact, found)
        del floating
        yield
        given = [embedded, *quantized[:-1]]
        for kind in self.kinds:
            left = [unit.probes[kind] for unit in self.units if kind in unit.probes]
            first = next(at for at, unit in enumerate(self.units) if kind in unit.probes)
            with _off(left):
                self._note(kind, self._logits(self._follow(first, given[first])[-1]), reference)
            yield
        for at, unit in enumerate(self.units):
            self._leave_out(at, unit, given[at], quantized[at], reference)
            yield

    def _leave_out(self, at: int, unit: Unit, x: Tensor, quantized: Tensor, reference: Tensor) -> None:
        """The variants of unit number `at`, which makes `quantized` of x."""
        variants: list[tuple[Any, list[Probe]]] = [((at, kind), [probe]) for kind, probe in unit.probes.items()]
        variants.append(((at, None), [p for p in unit.module.modules() if isinstance(p, Probe)]))
        together = max(1, ROWS // len(x))
        for start in range(0, len(variants), together):
            part, found = variants[start : start + together], []
            for (_, kind), probes in part:
                with _off(probes):
                    found.append(unit.module(x))
                if kind is None:
                    unit.own.add(found[-1], quantized)
            logits = self._logits(self._follow(at + 1, torch.cat(found))[-1])
            for (key, _), own in zip(part, logits.split(len(x))):
                self._note(key, own, reference)

    def _follow(self, first: int, x: Tensor) -> list[Tensor]:
        """What units number `first` and on give, the first of them from x; x itself where there is none."""
        found = [x]
        for unit in self.units[first:]:
            found.append(unit.module(found[-1]))
        return found[1:] or found

    def _logits(self, x: Tensor) -> Tensor:
        """Logits [B, K], or features, of what the last unit gives."""
        x = self.model.norm(x).mean((1, 2))
        return x if self.model.head is None else self.model.head(x)

    def _note(self, key: Any, logits: Tensor, reference: Tensor) -> None:
        self._errors.setdefault(key, []).append((logits.double() - reference).square().sum(1))

    def result(self) -> Layers:
        """Of all images so far. HarnessError where the quantized model has no error, or its logits are not finite."""
        errors = {key: torch.cat(found) for key, found in self._errors.items()}
        before = errors["quantized"]
        if not before.isfinite().all():
            raise HarnessError("the quantized model's logits are not finite; its weights or scales are broken")
        if not before.any():
            raise HarnessError("the quantized model's logits are equal to the reference's; there is nothing to explain")
        quantizers = [
            QuantizerRow(
                **asdict(gain_of(before, errors[at, kind])), name=unit.names[kind], kind=kind, stage=unit.stage,
                block=unit.block, sqnr_db=probe.ratio.db, clipped=100 * probe.clipped / probe.values,
            )
            for at, unit in enumerate(self.units)
            for kind, probe in unit.probes.items()
        ]  # fmt: skip
        kinds = []
        for kind in self.kinds:
            own = [row for row in quantizers if row.kind == kind]
            known = [row.sqnr_db for row in own if row.sqnr_db is not None]
            kinds.append(KindRow(**asdict(gain_of(before, errors[kind])), kind=kind, count=len(own),
                                 least_sqnr_db=min(known, default=None)))  # fmt: skip
        units = [
            UnitRow(**asdict(gain_of(before, errors[at, None])), stage=unit.stage, block=unit.block,
                    own_db=unit.own.db, stream_db=unit.stream.db)
            for at, unit in enumerate(self.units)
        ]  # fmt: skip
        return Layers(
            logits_db=decibels(self._signal, float(before.sum())),
            floating_db=decibels(self._signal, float(errors["floating"].sum())),
            images=len(before),
            units=units,
            kinds=sorted(kinds, key=_gain, reverse=True),
            quantizers=sorted(quantizers, key=_gain, reverse=True),
        )


def _gain(row: Gain) -> float:
    return math.inf if row.gain_db is None else row.gain_db


@contextlib.contextmanager
def _off(probes: Sequence[Probe]) -> Iterator[None]:
    """Within the context, `probes` are left out."""
    for probe in probes:
        probe.on = False
    try:
        yield
    finally:
        for probe in probes:
            probe.on = True


def _units(model: FakeQuantSwin) -> Iterator[Unit]:
    """The units of `model` in order, every quantizer of which has a Probe in its place from now on."""
    for index, stage in enumerate(model.layers):
        for number, block in enumerate(stage.blocks):
            yield _unit(block, index, number, f"layers.{index}.blocks.{number}.", "")
        if stage.downsample is not None:
            yield _unit(stage.downsample, index, None, f"layers.{index}.downsample.", "downsample.")


def _unit(module: nn.Module, stage: int, block: int | None, prefix: str, own: str) -> Unit:
    """`prefix` is what the names of its quantizers begin with, `own` what those of its fields do."""
    unit = Unit(module, stage, block, {}, {})
    for scale in _FIELDS:
        if scale.quantizer.startswith("downsample.") != bool(own):
            continue
        path = scale.quantizer.removeprefix(own)
        parent, _, name = path.rpartition(".")
        place = module.get_submodule(parent)
        quantizer = getattr(place, name, None)
        if quantizer is None or isinstance(quantizer, nn.Identity):  # not in this graph
            continue
        probe = Probe(quantizer, of_weight=name == "_weight_quantizer")
        setattr(place, name, probe)
        unit.probes[scale.name], unit.names[scale.name] = probe, prefix + path
    return unit


def chosen_kinds(text: str | None) -> tuple[str, ...]:
    """The kinds that a list with commas names: KINDS' own words and those of GROUPS; all where it is None.
    HarnessError for another word."""
    if text is None:
        return KINDS
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in KINDS and word not in GROUPS]
    if unknown or not words:
        raise HarnessError(
            f"--kinds {text}: {', '.join(unknown) or 'nothing'} is no kind of quantizer; give a list with commas of "
            f"{', '.join((*GROUPS, *KINDS))}"
        )
    chosen = {kind for word in words for kind in GROUPS.get(word, (word,))}
    return tuple(kind for kind in KINDS if kind in chosen)


# --- Tables -----------------------------------------------------------------------------------------------------------


def place_name(stage: int, block: int | None) -> str:
    """`2.5`: block 5 of stage 2; `2 merge`: the patch merging behind it."""
    return f"{stage} merge" if block is None else f"{stage}.{block}"


def _place(row: Mapping[str, Any]) -> str:
    return place_name(row["stage"], row["block"])


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _gained(row: Mapping[str, Any]) -> str:
    gain, error = row["gain_db"], row["error_db"]
    if gain is None:
        return "all"
    return f"{gain:+.2f}" + ("" if error is None else f" ± {error:.2f}")


def markdown_layers(document: Mapping[str, Any], top: int | None = None) -> str:
    """Three tables: kinds and quantizers by gain, of the latter the first `top`, and units in the model's order."""
    kinds = results.markdown_table(
        ("all of a kind", "quantizers", "least SQNR dB", "gain dB"),
        [(row["kind"], str(row["count"]), _db(row["least_sqnr_db"]), _gained(row)) for row in document["kinds"]],
        right=(1, 2, 3),
    )
    units = results.markdown_table(
        ("block", "own SQNR dB", "stream SQNR dB", "gain dB"),
        [(_place(row), _db(row["own_db"]), _db(row["stream_db"]), _gained(row)) for row in document["units"]],
        right=(1, 2, 3),
    )
    shown = document["quantizers"][:top]
    quantizers = results.markdown_table(
        ("block", "quantizer", "SQNR dB", "clipped %", "gain dB"),
        [
            (_place(row), row["kind"], _db(row["sqnr_db"]), f"{row['clipped']:.3f}", _gained(row))
            for row in shown
        ],
        right=(2, 3, 4),
    )  # fmt: skip
    left = len(document["quantizers"]) - len(shown)
    rest = f"{left} quantizers more, each of which gains less, are in the files of --out.\n" if left else ""
    return (
        f"Logits of {document['file']}, fake-quantized as {document['graph']}, against {document['reference']}: "
        f"{_db(document['logits_db'])} dB; without its quantizers: {_db(document['floating_db'])} dB.\n\n"
        f"{kinds}\n{units}\n{quantizers}{rest}\n"
        "gain: of the logits' SQNR by leaving that alone out, ± its standard error over the images; what is within "
        "two or three of these is none.\n"
        "SQNR of a quantizer: of its result against its input; clipped: values beyond its range. own: a block's result "
        "against the same without its quantizers; stream: against that of the model without any.\n"
    )


def write_layers(folder: Path, document: Mapping[str, Any]) -> None:
    """layers.json, layers.md and layers.png in `folder`, each as a whole or not at all."""
    from pyharness.plots import plot_layers

    results.write_json(folder / "layers.json", document)
    results.write_text(folder / "layers.md", markdown_layers(document) + f"\n{conditions(document)}\n")
    plot_layers(document, folder / "layers.png")


def conditions(document: Mapping[str, Any]) -> str:
    """One line on what was measured, and how long it took."""
    return f"{document['images']} images of {document['data']}; {document['seconds']:.0f} s."
