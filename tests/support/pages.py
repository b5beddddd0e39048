"""Split the README and docs/ into sections, each with its snippets of code.

A section is a chapter of the README or a whole page of docs/. Markdown is read as in a browser, so
tests must name the lines that look like commands but are not (formulas, listings).
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
    """A block or a span of code with its language.

    Blocks and spans without one are `indented` and `inline`; '' is the output of a program.
    """

    language: str
    text: str


@dataclass
class Section:
    """A part of a page that a reader follows from beginning to end."""

    name: str
    snippets: list[Snippet] = field(default_factory=list)

    def blocks(self, *languages: str) -> list[str]:
        return [each.text for each in self.snippets if each.language in languages]


def sections() -> list[Section]:
    """Return all sections with a snippet, in the order of the pages."""
    sections: list[Section] = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        sections.append(Section(name))
        tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for index, token in enumerate(tokens):
            if name == "README.md" and (token.type, token.tag) == ("heading_open", "h2"):
                sections.append(Section(f"{name}: {tokens[index + 1].content}"))
            sections[-1].snippets.extend(_snippets(token))
    return [section for section in sections if section.snippets]


def _snippets(token: Token) -> Iterator[Snippet]:
    if token.type == "fence":
        yield Snippet(token.info.strip(), token.content)
    elif token.type == "code_block":
        yield Snippet("indented", token.content)
    elif token.type == "inline":
        spans = [child for child in token.children or [] if child.type == "code_inline"]
        yield from (Snippet("inline", span.content) for span in spans)
