"""The command `optimer cache`: list and remove what was written once to be used again."""

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
    help="List only what has not been used for DAYS days.",
)
def cache(remove: bool, unused: float) -> None:
    """List the converted GGUF files and the bases with more tokens in the cache, with their sizes.

    They are in $OPTIMER_CACHE, and are written again when they are needed. Remove none that a
    search or a build is reading.
    """
    from optimer_hf.files.paths import cache_dir
    from optimer_hf.models.cache import list_cache, remove_cached, to_markdown

    entries = list_cache(unused)
    if not entries:
        echo(f"{cache_dir()}: nothing" + (f" unused for {unused:g} days" if unused else ""))
        return
    echo_markdown(to_markdown(entries))
    total = sum(each.n_bytes for each in entries) / 1e9
    echo(f"{cache_dir()}: {total:.2f} GB in {len(entries)} directories")
    for each in entries if remove else ():
        is_gone = remove_cached(each)
        echo(f"{each.path}: {'removed' if is_gone else 'stays, as a process is writing it'}")
