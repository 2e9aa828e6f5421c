"""Check that every link of the built pages that stays among them leads somewhere.

Sphinx checks the references that it resolves itself; this looks at what came out: pages, anchors,
pictures, styles and scripts of all HTML files of a folder. ``nox -s docs`` runs it after the build.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LINKING = {"href", "src", "poster"}


@dataclass
class Page(HTMLParser):
    """The anchors of a page, and where it links to."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the anchors and links of an element."""
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif name in LINKING:
                self.links.append(value)


def read(path: Path) -> Page:
    """Parse one page."""
    page = Page()
    page.feed(path.read_text("utf-8"))
    return page


def broken(folder: Path) -> list[str]:
    """The links within a folder that lead nowhere, each with the page that has it."""
    pages = {path.resolve(): read(path) for path in sorted(folder.rglob("*.html"))}
    if not pages:
        return [f"{folder}: no pages"]
    return [
        f"{path.relative_to(folder.resolve())}: {link}"
        for path, page in pages.items()
        for link in page.links
        if not _leads_somewhere(link, path, pages)
    ]


def _leads_somewhere(link: str, path: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True  # elsewhere: `nox -s links`
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target not in pages:
        return target.is_file()
    anchor = unquote(parts.fragment)
    return not anchor or anchor in pages[target].anchors


if __name__ == "__main__":
    found = broken(Path(sys.argv[1]))
    print("\n".join([*found, f"{len(found)} broken links"]))
    sys.exit(1 if found else 0)
