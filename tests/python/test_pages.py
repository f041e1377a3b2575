"""The pages that people read: their links lead somewhere, and the programs take the options in their commands."""

from __future__ import annotations

import importlib
import re
import shlex
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


COMMANDS = [
    (page, command)
    for page in PAGES
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for command in re.findall(r"^(?:python|torchrun [^\n]*?) pyharness/[^\n]*", block.replace("\\\n", " "), re.MULTILINE)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_programs_take_the_options_of_documented_commands(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word.startswith("pyharness/"))
    module = importlib.import_module(words[start].removesuffix(".py").replace("/", "."))
    try:
        module.build_parser().parse_args([word for word in words[start + 1 :] if word != "..."])
    except SystemExit as stop:
        assert stop.code == 0, command


def test_commands_are_found() -> None:
    assert {"README.md", "docs/troubleshooting.md", "docs/training.md"} <= {page for page, _ in COMMANDS}
    assert len(COMMANDS) > 40 and any("--layers" in command for _, command in COMMANDS)


def test_what_is_looked_for() -> None:
    assert links_of("[a](b.md#c) ![p](d.png)\n[x](https://e.org) [y][z]") == ["b.md#c", "d.png"]
    assert anchors_of("# What `x` is, and\n```\n# no heading\n```\n## Table 2: a-b\n") == {"what-x-is-and", "table-2-a-b"}


def links_of(text: str) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)


def anchors_of(text: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
