"""Model cards: what a file that these programs wrote came from, beside it, for readers and for programs.

Beside `student.safetensors` stand `student.safetensors.card.json` and `student.safetensors.card.md`, the same content
twice. A card names the file's hash, so that a card that was left beside another file is noticed. Each input's own card
is carried over whole (`history`), so the last card tells the chain back to the first checkpoint. What nobody measured
or noted is null in the JSON and "not measured" or "not noted" in the text; nothing is guessed.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyharness import __version__
from pyharness.atomic import atomic_path
from pyharness.errors import HarnessError
from pyharness.measure import ROOT, git_state
from pyharness.swin_blocks import RELU_WITH_FC1_BIAS
from pyharness.tensor_file import load_header

FORMAT = "swin-model-card"
VERSION = 1

PACKAGES = ("torch", "timm", "nvidia-modelopt")
"""Packages whose versions a card names: the results depend on them."""


def card_paths(path: str | Path) -> tuple[Path, Path]:
    """The JSON and the Markdown card of the file or folder `path`: the whole name, then `.card.json`, `.card.md`."""
    path = Path(path)
    return path.with_name(f"{path.name}.card.json"), path.with_name(f"{path.name}.card.md")


def write_card(
    path: str | Path,
    kind: str,
    *,
    meta: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str | Path] | None = None,
    data: str | Path | None = None,
    accuracy: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write both cards of the finished file (or folder) `path`, each atomically; the card.

    `kind` says what it is, in words ("GELU-less student"). `meta` is the file's own meta data, read from the file where
    it is None: model, config, activation, graph, int8_mode, distillation, calibration have a place of their own,
    anything else is kept as it is. `inputs` are the files it was made from, by their role ("weights"); one that is no
    file ("pretrained", "random") is noted by its name. `data` names the images that the program saw, `accuracy` what it
    measured of this very model (for example `{"top1": 99.3, "images": 597}`). `argv`: the program's arguments where
    they are not those of the process.

    HarnessError where `path` or an input cannot be read, or the cards not be written.
    """
    path = Path(path)
    meta = dict(file_meta(path) if meta is None else meta)
    described = {key: meta.pop(key, None) for key in _DESCRIBED}
    config = described.pop("config")
    if isinstance(meta.get("classes"), list):  # a thousand names, in each card of a chain
        meta["classes"] = f"{len(meta['classes'])} names, in the file"
    card = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "file": _file_entry(path),
        "geometry": config,
        **described,
        "data": None if data is None else str(data),
        "accuracy": None if accuracy is None else dict(accuracy),
        "notes": list(notes),
        "meta": meta,
        "inputs": [_input_entry(role, source) for role, source in (inputs or {}).items()],
        "made_by": _made_by(argv),
        "history": _history(Path(source) for source in (inputs or {}).values()),
    }
    card_json, card_md = card_paths(path)
    for target, text in ((card_json, json.dumps(card, indent=2, sort_keys=True) + "\n"), (card_md, to_markdown(card))):
        with atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # of files' names that are no UTF-8
    return card


_DESCRIBED = ("model", "activation", "config", "graph", "int8_mode", "distillation", "calibration")
"""Keys of a file's meta data that have a place of their own in the card."""


def file_meta(path: Path) -> dict[str, Any]:
    """The meta data stored in a checkpoint or an engine file, with geometry, graph and int8_mode; {} where none is."""
    if path.suffix == ".safetensors":
        header = load_header(path, HarnessError)
        meta = json.loads(header.get("meta", "{}"))
        if "config" in header:  # an engine file keeps these beside its meta data
            config = json.loads(header["config"])
            meta |= {"model": config.get("name"), "config": config, "graph": header.get("graph")}
            meta["int8_mode"] = int(header["int8_mode"])
        return meta
    if path.suffix in (".pth", ".pt"):
        from pyharness.checkpoint import load_pickle

        content = load_pickle(path)
        return dict(content.get("meta", {})) if isinstance(content, Mapping) else {}
    return {}


def read_card(path: str | Path) -> dict[str, Any] | None:
    """The card beside `path`, or None: where there is none, it is not readable, or it is of another content."""
    card_json, _ = card_paths(path)
    try:
        card = json.loads(card_json.read_text(encoding="utf-8"))
        matches = card["format"] == FORMAT and card["file"]["sha256"] == sha256(path)
    except (OSError, ValueError, KeyError, TypeError, HarnessError):
        return None
    return card if matches else None


def sha256(path: str | Path) -> str:
    """SHA-256 of a file; of a folder, that of its files' names and hashes in sorted order. HarnessError as reading."""
    path = Path(path)
    try:
        if path.is_dir():
            listing = "".join(f"{f.name} {_digest(f, *_version(f))}\n" for f in _files(path))
            return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
        return _digest(path, *_version(path))
    except OSError as error:
        raise HarnessError(f"cannot read {path} ({error.strerror}); give an existing file") from None


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=64)
def _digest(path: Path, modified: int, size: int) -> str:
    """Hash of a file's content; a file of the same name, time and size is read once."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _hash_parts(file)


def _hash_parts(file) -> str:
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _file_entry(path: Path) -> dict[str, Any]:
    digest = sha256(path)
    size = sum(f.stat().st_size for f in _files(path)) if path.is_dir() else path.stat().st_size
    return {"name": path.name, "sha256": digest, "bytes": size}


def _input_entry(role: str, source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists():
        return {"role": role, "name": str(source), "sha256": None, "bytes": None}
    return {"role": role, **_file_entry(path)}


def _made_by(argv: Sequence[str] | None) -> dict[str, Any]:
    return {
        "program": "swin-int8",
        "version": __version__,
        **git_state(),
        "command": command(argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": {name: _package_version(name) for name in PACKAGES},
    }


def command(argv: Sequence[str] | None = None) -> str:
    """The command that runs, quoted for a shell, with the program's path written from the repository's root."""
    program = Path(sys.argv[0])
    shown = program.relative_to(ROOT) if program.is_absolute() and program.is_relative_to(ROOT) else program
    return shlex.join(["python", str(shown), *(sys.argv[1:] if argv is None else argv)])


def _package_version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _history(sources: Iterable[Path]) -> list[dict[str, Any]]:
    """The cards of the inputs and, before each, of what those were made from; each once, the oldest first."""
    cards: dict[str, dict[str, Any]] = {}
    for source in sources:
        card = read_card(source) if source.exists() else None
        if card:
            for earlier in card.get("history", []):
                cards.setdefault(earlier["file"]["sha256"], earlier)
            cards.setdefault(card["file"]["sha256"], {k: v for k, v in card.items() if k != "history"})
    return list(cards.values())


# --- The text ---------------------------------------------------------------------------------------------------------


def to_markdown(card: Mapping[str, Any]) -> str:
    """The card as Markdown: the same content, for readers."""
    file, made = card["file"], card["made_by"]
    lines = [f"# {file['name']}", "", f"{card['kind']}. The same in JSON: {file['name']}.card.json."]
    lines += ["", "| | |", "|---|---|", *_rows(card), ""]
    if card["geometry"]:
        lines += ["## Geometry", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in card["geometry"].items()]
        lines.append("")
    lines += ["## Made from", ""]
    lines += [f"- {entry['role']}: {_named(entry)}" for entry in card["inputs"]] or ["Nothing noted."]
    lines += ["", "## Made by", "", "```", made["command"], "```", ""]
    state = {True: ", with uncommitted changes", False: "", None: ""}[made["dirty"]]
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    lines.append(f"swin-int8 {made['version']}, commit {made['commit'] or 'not known'}{state}, {made['date']}.")
    lines += [f"Python {made['python']}, {versions}.", ""]
    if card["history"]:
        lines += ["## Before that", ""]
        for earlier in card["history"]:
            lines += [
                f"- {_named(earlier['file'])}: {earlier['kind']}; accuracy {_accuracy(earlier['accuracy'])}. "
                f"`{earlier['made_by']['command']}`"
            ]
        lines.append("")
    return "\n".join(lines)


def _rows(card: Mapping[str, Any]) -> list[str]:
    activation = {
        "relu": "ReLU, no FC1 bias (GELU-less)",
        RELU_WITH_FC1_BIAS: "ReLU with FC1 biases (no INT8 graph runs it)",
        "gelu": "GELU",
    }
    entries = [
        ("sha256", f"`{card['file']['sha256']}`"),
        ("size", f"{card['file']['bytes'] / 1e6:.2f} MB"),
        ("model", card["model"]),
        ("activation", activation.get(card["activation"], card["activation"])),
        ("graph", card["graph"] and f"{card['graph']}, int8_mode {card['int8_mode']}"),
        ("distilled", _options(_step(card, "distillation"))),
        ("calibrated", _options(_step(card, "calibration"))),
        ("images seen", card["data"] or "none, or not noted"),
        ("accuracy", _accuracy(card["accuracy"])),
        *((key, _cell(value)) for key, value in card["meta"].items()),
        *(("note", note) for note in card["notes"]),
    ]
    return [f"| {key} | {value} |" for key, value in entries if value is not None]


def _step(card: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What the card itself or, before it, its history says about a step; a step that was taken once stays true."""
    found = [earlier[name] for earlier in card["history"] if earlier.get(name)]
    return card[name] or (found[-1] if found else None)


def _options(options: Mapping[str, Any] | None) -> str:
    if not options:
        return "no, or not noted"
    return ", ".join(f"{key} {_cell(value)}" for key, value in options.items())


def _accuracy(accuracy: Mapping[str, Any] | None) -> str:
    return "not measured" if not accuracy else _options(accuracy)


def _named(entry: Mapping[str, Any]) -> str:
    return entry["name"] if entry["sha256"] is None else f"{entry['name']} (sha256 `{entry['sha256']}`)"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
