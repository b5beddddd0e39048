"""What the README and docs/ show is true: commands parse, YAML is valid, links lead somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from optimer_hf.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """Return the `optimer` lines of code blocks."""
    return re.findall(r"^ {4,}(optimer .*)$", text, flags=re.M) + re.findall(
        r"^(optimer .*)$", text, flags=re.M
    )


def parse(line: str) -> None:
    """Parse a command line as click would, without running it."""
    words = shlex.split(line, comments=True)[1:]
    group: click.Group = main
    while True:
        name, words = words[0], words[1:]
        found = group.commands.get(name)
        assert found is not None, f"no command {name!r}"
        if not isinstance(found, click.Group):
            break
        group = found
    try:
        found.make_context(name, words)
    except click.ClickException as error:
        raise AssertionError(f"{line}: {error.format_message()}") from None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_shown_is_one(page: Path):
    for line in commands(page.read_text(encoding="utf-8")):
        if not re.search(r"[|\[]", line.split("#")[0]):  # usage lines of the table
            parse(line)


def test_the_check_of_commands_can_fail():
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 20
    for wrong in ("optimer serch a b", "optimer search a b --n-trails 3", "optimer build a"):
        with pytest.raises(AssertionError):
            parse(wrong)


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_every_yaml_shown_is_valid(page: Path, tmp_path: Path):
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, encoding="utf-8")
        result = CliRunner().invoke(main, ["validate", str(path)])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_local_link_leads_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    found = {str(path.relative_to(ROOT / "docs")) for path in PAGES[1:]}
    assert set(pages(config["nav"])) == found
