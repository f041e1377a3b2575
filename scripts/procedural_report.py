#!/usr/bin/env python3
"""The picture and the figures of docs/data.md, "The procedural set".

    .venv/bin/python scripts/procedural_report.py [--classes 100] [--out docs/procedural.png]

Draws a contact sheet, measures what simple statistics make of the set (which must be little: else it asks nothing of
a network), and how fast this machine draws.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pyharness import procedural  # noqa: E402
from pyharness.atomic import atomic_path  # noqa: E402

SHEET_CLASSES, SHEET_SAMPLES, SHEET_SIZE = 16, 8, 72
TRAIN, TEST, SIZE = 10_000, 2_000, 64


def draw_sheet(path: Path, classes: int) -> None:
    """A row of `SHEET_SAMPLES` training images for each of `SHEET_CLASSES` classes spread over all."""
    from PIL import Image

    labels = procedural.labels_of(torch.arange(classes * SHEET_SAMPLES), classes)
    rows = []
    for k in range(SHEET_CLASSES):
        label = k * (classes - 1) // (SHEET_CLASSES - 1)
        images, _ = procedural.render((labels == label).nonzero().flatten(), size=SHEET_SIZE, classes=classes)
        rows.append(torch.cat(list(images), dim=2))
        print(f"row {k + 1}: {procedural.class_name(label)}")
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().byte()
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.numpy()).quantize(64).save(temporary, optimize=True)


def features(images: Tensor) -> dict[str, Tensor]:
    """What a look at pixels or colours alone sees: [B, F] by name."""
    small = F.adaptive_avg_pool2d(images, 16)
    codes = ((images * 4).long().clamp(max=3) * torch.tensor([16, 4, 1]).view(1, 3, 1, 1)).sum(1).flatten(1)
    colours = torch.stack([code.bincount(minlength=64) for code in codes]).float() / codes.shape[1]
    grey = (images * torch.tensor(procedural.GREY).view(1, 3, 1, 1)).sum(1).flatten(1)
    levels = torch.stack([(g * 32).long().clamp(max=31).bincount(minlength=32) for g in grey]).float() / grey.shape[1]
    return {"16x16 pixels": small.flatten(1), "colour histogram": colours, "grey histogram": levels}


def nearest_mean(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    means = torch.stack([train[labels == c].mean(0) for c in range(classes)])
    return torch.cdist(test, means).argmin(1)


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, classes: int, decay: float) -> Tensor:
    """Multinomial logistic regression, full batch, L-BFGS."""
    layer = torch.nn.Linear(train.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(train), labels) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer(test).argmax(1)


def report_baselines(classes: int) -> None:
    found = {}
    for split, count in (("train", TRAIN), ("val", TEST)):
        parts = [
            procedural.render(range(begin, min(begin + 500, count)), split=split, size=SIZE, classes=classes)
            for begin in range(0, count, 500)
        ]
        seen = [features(images) for images, _ in parts]
        found[split] = {k: torch.cat([f[k] for f in seen]) for k in seen[0]}, torch.cat([y for _, y in parts])
    (train, labels), (test, truth) = found["train"], found["val"]
    print(f"{classes} classes, chance {100 / classes:.2f} %; {TRAIN} training images, {TEST} others, {SIZE}x{SIZE}")
    for name in train:
        mean, std = train[name].mean(0), train[name].std(0) + 1e-6
        a, b = (train[name] - mean) / std, (test[name] - mean) / std
        answers = {"nearest mean": nearest_mean(a, labels, b, classes)}
        for decay in (1e-3, 1e-2, 1e-1):
            answers[f"logistic regression, decay {decay:g}"] = linear_probe(a, labels, b, classes, decay)
        for method, answer in answers.items():
            print(f"{name}, {method}: {100 * (answer == truth).float().mean():.2f} %", flush=True)


def report_speed() -> None:
    for size, count in ((28, 512), (56, 256), (224, 32)):
        procedural.render(range(4), size=size)
        wall, cpu = time.perf_counter(), time.process_time()
        procedural.render(range(count), size=size)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{size}x{size}: {count / wall:.0f} images/s; {count / cpu:.0f} per second of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "procedural.png")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    draw_sheet(args.out, args.classes)
    report_speed()
    report_baselines(args.classes)


if __name__ == "__main__":
    main()
