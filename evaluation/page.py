"""What every page we write shares: one self-contained HTML file that asks nothing of a network.

page.html is the shell (head, shared style, shared script); a page brings a fragment with its own `<noscript>`, `<style>`
and `<script>`. A content policy allows exactly the page's own style and script by their hashes. The data stand as JSON in
an inert block with `<`, `>` and `&` escaped; the script puts text in by textContent only, and characters that would change
direction or hide are spelt out. Callers: report.py, thoughts_report.py, images_report.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHELL = Path(__file__).with_name("page.html")


def render(fragment: Path, page: Mapping[str, Any], *, images: bool = False) -> str:
    """The page as text: shell, fragment, the hashes of their style and script, and the data. `images`: pictures that stand
    in the data (data: addresses) may be shown; none from elsewhere ever.

    `page` holds JSON values with `title` (text), `facts` ([name, value] pairs) and `notes` (texts) among them; numbers
    that JSON lacks become null.
    """
    own = fragment.read_text(encoding="utf-8")
    template = SHELL.read_text(encoding="utf-8")
    for mark, tag in (("@NOSCRIPT@", "noscript"), ("@STYLE@", "style"), ("@SCRIPT@", "script")):
        template = template.replace(mark, _between(own, f"<{tag}>", f"</{tag}>").lstrip("\n"), 1)
    style = _between(template, "<style>", "</style>")
    script = _between(template, "<script>", "</script>")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        f"{'img-src data:; ' if images else ''}base-uri 'none'; form-action 'none'"
    )
    encoded = json.dumps(_visible_all(page), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return template.replace("@POLICY@", policy, 1).replace("@DATA@", encoded, 1)


def visible(text: str) -> str:
    """Controls, direction overrides and other format characters as `\\u202e`; line breaks and letters unchanged."""

    def hidden(character: str) -> bool:
        return unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co"} and character != "\n"

    return "".join(f"\\u{ord(c):04x}" if hidden(c) else c for c in text)


def _visible_all(value: Any) -> Any:
    """The JSON value with all texts made visible and null for numbers that JSON lacks."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(str(key)): _visible_all(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_visible_all(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _between(text: str, start: str, end: str) -> str:
    first = text.index(start) + len(start)
    return text[first : text.index(end, first)]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
