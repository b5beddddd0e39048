"""The command `optimer cache`: list and remove what was written once to be used again."""

from datetime import UTC, datetime

import click

from optimer_hf.cli.options import echo
from optimer_hf.cli.tables import echo_markdown


@click.command(epilog="Example: optimer cache --remove --unused 30")
@click.option("--remove", is_flag=True, help="Remove what is listed.")
@click.option(
    "--unused",
    type=click.FloatRange(min=0, max=10_000),
    default=0,
    metavar="DAYS",
    help="List only what nobody has asked for in so many days.",
)
def cache(remove: bool, unused: float) -> None:
    """List the converted GGUF files and the bases with more tokens in the cache, with their sizes.

    They are in $OPTIMER_CACHE, and are written again when they are needed. Remove none that a
    search or a build is reading.
    """
    from optimer_hf.files.cache import list_cache, remove_cached
    from optimer_hf.files.paths import cache_dir
    from optimer_hf.files.text import markdown_table

    entries = list_cache(unused)
    if not entries:
        echo(f"{cache_dir()}: nothing" + (f" unused for {unused:g} days" if unused else ""))
        return
    rows = [
        [
            each.path.name,
            each.kind,
            f"{each.n_bytes / 1e9:.2f} GB",
            f"{datetime.fromtimestamp(each.used, UTC):%Y-%m-%d}",
        ]
        for each in entries
    ]
    echo_markdown(markdown_table(["name", "kind", "size", "last used"], rows))
    total = sum(each.n_bytes for each in entries)
    echo(f"{cache_dir()}: {total / 1e9:.2f} GB in {len(entries)} directories")
    if not remove:
        return
    for each in entries:
        if not remove_cached(each):
            echo(f"{each.path}: another process is writing it, so it stays")
        else:
            echo(f"{each.path}: removed")
