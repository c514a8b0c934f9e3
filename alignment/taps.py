"""Where the alignment reads the U-Net: `auto`, a block's number from 1, or a module's name.

Which layer was asked in every repository of the field; here it is one setting, resolved once and shown at the start.
"""

from __future__ import annotations

from typing import Protocol

from ..base.errors import RecipeError, suggest


class Tapped(Protocol):
    """What a U-Net says of its taps, in the order of their numbers."""

    def tap_names(self) -> tuple[str, ...]: ...

    def auto_tap(self) -> str: ...

    def tap_shape(self, name: str) -> tuple[int, tuple[int, int]]: ...


def resolve_tap(backbone: Tapped, wanted: str, setting: str = "urepa.align.tap") -> str:
    """The module's name. `last` is the last block. RecipeError CFG-121 if there is no such block."""
    names = backbone.tap_names()
    if wanted == "auto":
        return backbone.auto_tap()
    if wanted == "last":
        return names[-1]
    if wanted.isdigit() and 1 <= int(wanted) <= len(names):
        return names[int(wanted) - 1]
    if wanted in names:
        return wanted
    raise RecipeError(
        f"{setting}: '{wanted}'; allowed are auto, last, 1 to {len(names)}, {names[0]} .. {names[-1]}.{suggest(wanted, names)}",
        code="CFG-121",
    )


def describe_tap(backbone: Tapped, name: str) -> str:
    """`middle.2 (block 6 of 12, 8x8 tokens of width 256)`."""
    names = backbone.tap_names()
    width, (height, length) = backbone.tap_shape(name)
    return f"{name} (block {names.index(name) + 1} of {len(names)}, {height}x{length} tokens of width {width})"
