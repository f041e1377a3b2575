"""The ablation program: each variant changes what it says, a second run reads the first, and what it writes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from pyharness import ablate_distillation as a
from pyharness.data import DigitsDataset
from pyharness.distill import DistillOptions


def test_each_variant_changes_one_choice():
    found = [replace(a.BASE, **variant.change) for variant in a.VARIANTS]
    assert found[0] == a.BASE == DistillOptions(subset=a.BASE.subset)
    assert all(len(variant.change) == 1 for variant in a.VARIANTS[1:])
    assert len(set(found)) == len({(v.choice, v.chosen) for v in a.VARIANTS}) == len(a.VARIANTS)


def test_another_teacher_package_or_source_is_another_run(tmp_path, monkeypatch):
    before = a.run_folder(a.BASE, tmp_path)
    assert a.run_folder(a.BASE, tmp_path) == before != a.run_folder(replace(a.BASE, seed=1), tmp_path)
    other = tmp_path / "teacher.safetensors"
    other.write_text("another teacher")
    for name, value in (
        ("MICRO_TEACHER", other),
        ("package_versions", lambda: {"torch": "0.0"}),
        ("SOURCES", a.SOURCES[1:]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(a, name, value)
            assert a.run_folder(a.BASE, tmp_path) != before, name


def test_it_measures_writes_and_reads_again(tmp_path, monkeypatch, capsys):
    def digits(train):
        return DigitsDataset(train=True) if train else torch.utils.data.Subset(DigitsDataset(train=False), range(100))

    monkeypatch.setattr(a, "DigitsDataset", digits)
    monkeypatch.setattr(a, "BASE", DistillOptions(subset=0.01))
    monkeypatch.setattr(a, "VARIANTS", (a.VARIANTS[0], a.VARIANTS[-2], a.VARIANTS[-1]))
    arguments = ["--seeds", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert a.main(arguments) == 0
    out = tmp_path / "out"
    document = json.loads((out / "ablation.json").read_text())
    base, average, untrained = document["summary"]
    assert (base["seeds"], base["steps"], base["divergence_vs_base"]) == (2, 4, 1.0)
    assert untrained["steps"] == 0 and untrained["divergence_min"] == untrained["divergence_max"], "the seed trains"
    assert untrained["divergence"] > 2 * base["divergence"] and average["divergence"] != base["divergence"]
    assert base["divergence"] == pytest.approx(sum(r["divergence"] for r in document["rows"][:2]) / 2)
    assert document["rows"][0]["divergence"] != document["rows"][1]["divergence"]
    with open(out / "ablation.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6
    text = (out / "ablation.md").read_text()
    assert text in capsys.readouterr().out and "mean over 2 seeds" in text and "all blocks at once" not in text
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(a, "distill", lambda *args, **more: pytest.fail("distilled again"))
    assert a.main(arguments) == 0
    assert json.loads((out / "ablation.json").read_text())["rows"] == document["rows"]
