"""Draw docs/op_sequences.svg: the operations of one Swin block in both graphs, side by side.

    .venv/bin/python scripts/draw_op_sequences.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).resolve().parent.parent / "docs" / "op_sequences.svg"

# Name, kind, and what the op does. The kinds: s8 GEMM, or fused operation in floating point between two GEMMs.
BASELINE = (
    ("norm1_shift_partition", "fused", "LayerNorm, cyclic shift, windows, Q"),
    ("qkv_gemm", "gemm", "s8 x s8 -> s8"),
    ("qkv_bias", "fused", "dQ, + bias, split into Q K V, Q"),
    ("qk_gemm", "gemm", "Q Kᵀ per window and head -> s8"),
    ("softmax", "fused", "dQ, scale, + position bias, + mask, softmax, Q"),
    ("pv_gemm", "gemm", "P V per window and head -> s8"),
    ("proj_gemm", "gemm", "s8 x s8 -> s8"),
    ("proj_bias_residual_norm2", "fused", "dQ, + bias, unshift, + residual, LayerNorm, Q"),
    ("fc1_gemm", "gemm", "s8 x s8 -> s8"),
    ("fc1_bias_gelu", "fused", "dQ, + bias, GELU, Q"),
    ("fc2_gemm", "gemm", "s8 x s8 -> s8"),
    ("fc2_bias_residual", "fused", "dQ, + bias, + residual"),
)

CHANGED = {
    "fc1_gemm": ("changed", "s8 x s8, ReLU in the epilogue, straight to FC2's input scale"),
    "fc1_bias_gelu": ("removed", "gone, with the FC1 bias and one quantization"),
}

STYLES = {  # fill, stroke, dash
    "gemm": ("#DFF0E3", "#2E7D4F", ""),
    "fused": ("#FDEBD3", "#B4690E", "6 3"),
    "changed": ("#A9DDB8", "#14532D", ""),
    "removed": ("none", "#8A8A8A", "3 4"),
}

WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, TOP, MARGIN = 980, 440, 44, 16, 74, 24
SANS, MONOSPACE = "Helvetica, Arial, DejaVu Sans, sans-serif", "Menlo, Consolas, DejaVu Sans Mono, monospace"
LEFT, RIGHT = MARGIN, WIDTH - MARGIN - BOX_WIDTH


def text(x: float, y: float, content: str, size: int, *, weight: str = "normal", fill: str = "#1A1A1A",
         anchor: str = "start", family: str = SANS) -> str:  # fmt: skip
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(content)}</text>'
    )


def box(x: float, y: float, name: str, kind: str, does: str) -> list[str]:
    fill, stroke, dash = STYLES[kind]
    colour = "#6B6B6B" if kind == "removed" else "#1A1A1A"
    return [
        f'<rect x="{x}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{fill}" stroke="{stroke}" '
        f'stroke-width="{2.5 if kind == "changed" else 1.4}"' + (f' stroke-dasharray="{dash}"' if dash else "") + "/>",
        text(x + 12, y + 19, name, 15, weight="bold", fill=colour, family=MONOSPACE),
        text(x + 12, y + 36, does, 13, fill=colour),
    ]


def arrow(x: float, top: float, bottom: float, label: str) -> list[str]:
    return [
        f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom - 2}" stroke="#444444" stroke-width="1.4" '
        'marker-end="url(#head)"/>',
        text(x + 9, (top + bottom) / 2 + 4, label, 11, fill="#444444"),
    ]


def column(x: float, ops: list[tuple[str, str, str]]) -> list[str]:
    """Boxes from top to bottom; the arrows carry the type that is stored between two operations."""
    parts: list[str] = []
    centre = x + BOX_WIDTH / 2
    for index, (name, kind, does) in enumerate(ops):
        y = TOP + index * (BOX_HEIGHT + GAP)
        parts += box(x, y, name, kind, does)
        below = ops[index + 1][1] if index + 1 < len(ops) else None
        if below == "removed":  # the data passes where the operation was
            parts += arrow(x + BOX_WIDTH - 60, y + BOX_HEIGHT, y + 2 * (BOX_HEIGHT + GAP), "s8")
        elif below and kind != "removed":
            parts += arrow(centre, y + BOX_HEIGHT, y + BOX_HEIGHT + GAP, "s8")
    end = TOP + len(ops) * (BOX_HEIGHT + GAP) - GAP
    return parts + arrow(centre, end, end + 26, "residual stream, to the next block")


def legend(y: float) -> list[str]:
    entries = (
        ("gemm", "INT8 GEMM"),
        ("fused", "fused operation in floating point"),
        ("changed", "changed by the patch series"),
        ("removed", "removed by it"),
    )
    parts, x = [], float(MARGIN)
    for kind, label in entries:
        fill, stroke, dash = STYLES[kind]
        parts.append(
            f'<rect x="{x:g}" y="{y}" width="22" height="14" rx="3" fill="{fill}" stroke="{stroke}" stroke-width="1.4"'
            + (f' stroke-dasharray="{dash}"' if dash else "") + "/>"
        )  # fmt: skip
        parts.append(text(x + 30, y + 12, label, 13))
        x += 54 + 6.5 * len(label)
    return [*parts, text(x, y + 12, "Q quantize, dQ dequantize", 13)]


def picture() -> str:
    patched = [(name, *CHANGED.get(name, (kind, does))) for name, kind, does in BASELINE]
    height = TOP + len(BASELINE) * (BOX_HEIGHT + GAP) + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img">',
        "<title>Operations of one Swin block: FT INT8 and GELU-less INT8</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#444444"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#FFFFFF"/>',
        text(LEFT + BOX_WIDTH / 2, 34, "FT INT8 (baseline)", 19, weight="bold", anchor="middle"),
        text(LEFT + BOX_WIDTH / 2, 56, "12 operations, 6 of them GEMMs", 13, anchor="middle", fill="#444444"),
        text(RIGHT + BOX_WIDTH / 2, 34, "GELU-less INT8 (patched)", 19, weight="bold", anchor="middle"),
        text(RIGHT + BOX_WIDTH / 2, 56, "11 operations, 6 of them GEMMs", 13, anchor="middle", fill="#444444"),
        *column(LEFT, list(BASELINE)),
        *column(RIGHT, patched),
        *legend(height - 28),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    TARGET.write_text(picture(), encoding="utf-8")
    print(TARGET.relative_to(TARGET.parent.parent))


if __name__ == "__main__":
    main()
