"""A group of commands that imports the module of a command only when the command is used."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click


class Entry(NamedTuple):
    """A command in the table of its group: the module with the function of its name, and the line
    that describes it in the help of the group.
    """

    module: str
    summary: str


class LazyGroup(click.Group):
    """A click group made from a table: section -> name of a command -> Entry."""

    def __init__(
        self, *arguments: Any, sections: Mapping[str, Mapping[str, Entry]], **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.sections = sections
        self.entries = {name: entry for each in sections.values() for name, entry in each.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands in the table, in its order, and then of those that were
        added to the group.
        """
        return [*self.entries, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command, or return None if there is no command of this name."""
        if cmd_name not in self.entries:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(self.entries[cmd_name].module)
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of a command line; for an unknown one, suggest the most similar."""
        name, known = args[0], self.list_commands(ctx)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            close = get_close_matches(name, known)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under the titles of their sections."""
        for title, entries in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in entries.items()])
