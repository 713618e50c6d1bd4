"""The pages of this repository, taken apart: code blocks, code within a line, links and anchors."""

import re
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "shards/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


class Block(NamedTuple):
    """A block of code: its language, its text and its place, such as README.md:111."""

    language: str
    text: str
    place: str


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def lines_of(page: Path) -> list[tuple[int, str, str | None]]:
    """Every line of a page as (number, text, language of its block); language None: the line is prose. Fences are left out."""
    found, language = [], None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            language = None if language is not None else line.removeprefix("```").strip()
        elif language is None and line.startswith("    "):
            found.append((number, line.strip(), "bash"))  # an indented block has no language of its own
        else:
            found.append((number, line, language))
    assert language is None, f"{name_of(page)}: the last fence is not closed"
    return found


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page: lines of one language that follow each other."""
    found: list[Block] = []
    last = 0
    for number, line, language in lines_of(page):
        if language is not None and found and number == last + 1 and found[-1].language == language:
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{line}\n")
        elif language is not None:
            found.append(Block(language, f"{line}\n", f"{name_of(page)}:{number}"))
        last = number if language is not None else 0
    return found


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return "\n".join(line for _, line, language in lines_of(page) if language is None)


def code_in_prose(page: Path) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", prose(page))


def links(page: Path) -> list[tuple[Path, str]]:
    """The relative links of a page as (path, anchor); the anchor is empty if there is none."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    relative = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in relative]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)
