"""The pages that people read: their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "patches", "results", "benchmarks", "third_party/FasterTransformer")
    for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files by their path, headings by the anchor that GitHub makes of them."""
    file = ROOT / page
    for target in links_of(file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = file.parent / path if path else file
        assert found.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors_of(found.read_text(encoding="utf-8")), f"{page} links to {target}"


def test_all_pages_are_looked_at() -> None:
    assert {"README.md", "results/README.md", "docs/gpu.md", "patches/README.md"} <= set(PAGES)


def test_what_is_looked_for() -> None:
    assert links_of("[a](b.md#c) ![p](d.png)\n[x](https://e.org) [y][z]") == ["b.md#c", "d.png"]
    assert anchors_of("# What `x` is, and\n```\n# no heading\n```\n## Table 2: a-b\n") == {"what-x-is-and", "table-2-a-b"}


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


def anchors_of(text: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
