"""YAML from outside, read as plain data: no object tags, no alias bombs, no huge files, no key twice.

Only PyYAML's safe loader is used. What it would accept and a recipe must not hold is refused before it builds
anything: `!!python/...` tags, aliases that multiply, keys given twice (the loader keeps the last, silently).
Callers: train/settings.py for recipes, train/secrets.py for credentials.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..base.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_NODES = 50_000
MAX_DEPTH = 50
CORE_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in `path`.

    Raises RecipeError: CFG-006, no such file, not UTF-8, no mapping; CFG-007 with the line, what is not plain data.
    """
    mapping = yaml.safe_load(checked_text(path))
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise RecipeError(f"{path}: a mapping of settings is wanted, not {type(mapping).__name__}", code="CFG-006")
    return mapping


def checked_text(path: Path) -> str:
    """The text of a YAML file that passed all checks."""
    text = _text(path)
    try:
        aliases = sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
        if aliases > MAX_ALIASES:
            raise RecipeError(f"{path}: {aliases} aliases; at most {MAX_ALIASES} are read", code="CFG-007")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML ({getattr(error, 'problem', error)})", code="CFG-007") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: nested deeper than {MAX_DEPTH} levels", code="CFG-007") from error
    if root is not None:
        _check(root, path)
    return text


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(f"{path} line 1: {size} bytes; at most {MAX_BYTES} are read", code="CFG-007")
        with path.open("rb") as handle:
            return handle.read(MAX_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; give the path of a YAML file", code="CFG-006") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8", code="CFG-006") from error


def _check(root: yaml.Node, path: Path) -> None:
    """Refuse tags, double keys, depth, and a document whose aliases expand to more than MAX_NODES nodes."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node, depth: int) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        where = f"{path} line {node.start_mark.line + 1}"
        if id(node) in open_nodes:
            raise RecipeError(f"{where}: an alias inside its own anchor", code="CFG-007")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{where}: nested deeper than {MAX_DEPTH} levels", code="CFG-007")
        if node.tag not in CORE_TAGS and not node.tag.startswith("tag:yaml.org,2002:timestamp"):
            raise RecipeError(f"{where}: tag {node.tag}; only plain values are read, remove it", code="CFG-007")
        open_nodes.add(id(node))
        children = _children(node, where)
        size = 1 + sum(visit(child, depth + 1) for child in children)
        if size > MAX_NODES:
            raise RecipeError(f"{where}: aliases expand to over {MAX_NODES} values", code="CFG-007")
        open_nodes.discard(id(node))
        sizes[id(node)] = size
        return size

    visit(root, 0)


def _children(node: yaml.Node, where: str) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{where}: a key must be a plain word", code="CFG-007")
        line = key.start_mark.line + 1
        if key.value in seen:
            place = f"{where.rsplit(' line ', 1)[0]} line {line}"
            raise RecipeError(
                f"{place}: key '{key.value}' is given twice, first in line {seen[key.value]}; remove one",
                code="CFG-007",
            )
        seen[key.value] = line
    return [part for pair in node.value for part in pair]
