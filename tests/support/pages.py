"""What the README and docs/ show: a page comes in, out come its sections with the snippets of each.

A section is a chapter of the README or a whole page of docs/. Markdown is read as a browser would,
so a line that looks like a command and is none (a formula, a listing) has to be named by the tests.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "bash", "indented"}


@dataclass(frozen=True)
class Snippet:
    """A block or a span of code: its language, or `indented` and `inline` for those without one;
    '' is what a program printed.
    """

    language: str
    text: str


@dataclass
class Section:
    """A part of a page that a person follows from its begin to its end."""

    name: str
    snippets: list[Snippet] = field(default_factory=list)

    def blocks(self, *languages: str) -> list[str]:
        return [each.text for each in self.snippets if each.language in languages]


def sections() -> list[Section]:
    """Return all sections that show a snippet, in the order of the pages."""
    found: list[Section] = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        found.append(Section(name))
        tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for index, token in enumerate(tokens):
            if name == "README.md" and (token.type, token.tag) == ("heading_open", "h2"):
                found.append(Section(f"{name}: {tokens[index + 1].content}"))
            found[-1].snippets.extend(_snippets(token))
    return [section for section in found if section.snippets]


def _snippets(token: Token) -> Iterator[Snippet]:
    if token.type == "fence":
        yield Snippet(token.info.strip(), token.content)
    elif token.type == "code_block":
        yield Snippet("indented", token.content)
    elif token.type == "inline":
        spans = [child for child in token.children or [] if child.type == "code_inline"]
        yield from (Snippet("inline", span.content) for span in spans)
