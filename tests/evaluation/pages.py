"""What the tests of our pages share: hostile texts, a parser, the list of what a page asks for, a browser."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<!--<script>",
    "a\u202eb\u2066c\u200bd\x00e",
    "&lt;b&gt;",
    "\u2028",
]


class Page(HTMLParser):
    """Tags with attributes, and the text of the data block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.data += data if self.inside else ""


def outside(text: str) -> set[str]:
    """The addresses in a page, after asserting that it loads nothing, injects nothing and that its policy is strict."""
    page = Page(text)
    loading = {"src", "href", "action", "data", "srcset", "background", "poster"}
    assert not [tag for tag, attributes in page.tags if loading & set(attributes)]
    assert not [tag for tag, _ in page.tags if tag in {"link", "iframe", "object", "embed", "img", "base", "form"}]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", text)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    return set(re.findall(r"https?://[^\"'\s)]+", text))


def browse(path: Path, profile: Path) -> str:
    """The page as Chromium has it after its script ran."""
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--no-first-run",
        *(f"--disable-{name}" for name in quiet),
    ]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
