"""Commands that show how good a merge is: evaluate, compare, report, check-overlap."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_hf.cli.options import (
    FORMAT,
    INPUT,
    PATH,
    SCORED_FILE,
    STUDY,
    LoadingCommand,
    dtype,
    echo,
)
from optimer_hf.cli.tables import echo_markdown

if TYPE_CHECKING:
    from optimer_hf.scoring.overlap import TermOverlap


@click.command(
    cls=LoadingCommand, epilog="Example: optimer evaluate google/gemma-3-270m objective.yaml"
)
@click.argument("model")
@click.argument("objective", type=SCORED_FILE)
@dtype("Dtype to load the model in.")
@click.option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
    help="Spread a model that is larger than one GPU over all of them, and host memory.",
)
@click.option(
    "--engine",
    default="transformers",
    show_default=True,
    help="Engine to score with, as in a study: vllm, or '{name: vllm, max_model_len: 4096}'.",
)
@FORMAT
def evaluate(model: str, objective: Path, engine: str, output: str, **options: Any) -> None:
    """Score a model on every term of an objective file.

    MODEL is a directory or a Hub id, OBJECTIVE a YAML file with `terms`.
    """
    from optimer_hf.study.engine import engine_of

    chosen = engine_of(engine)
    from optimer_hf.searching.one_model import evaluate_model  # takes seconds to import

    scored = evaluate_model(model, objective, engine=chosen, **options)
    if output == "json":
        fields = {each.label: {"score": each.score, "n_items": each.n_items} for each in scored}
        echo(json.dumps(fields, indent=2))
        return
    for each in scored:
        limited = " (limited)" if each.limited else ""
        echo(f"{each.label}: {each.metric} {each.score:.4f} on {each.n_items} items{limited}")


@click.command(cls=LoadingCommand, epilog="Example: optimer compare my-study --all")
@click.argument("study_dir", type=STUDY)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Add TIES, DARE-TIES, Model Stock, and random vectors of equal norm.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=MODEL",
    help="Add a model trained from the base, for instance on a data mixture.",
)
@click.option("--figure", type=PATH, help="Draw the result as a figure (.png, .svg, .pdf).")
@FORMAT
def compare(study_dir: Path, output: str, figure: Path | None, **options: Any) -> None:
    """Score the baselines and the merge of a finished study on its sealed test.

    STUDY_DIR contains the study, and gets the scores.
    """
    from optimer_hf.comparison.results_file import results_of
    from optimer_hf.comparison.sealed import compare_study
    from optimer_hf.comparison.tables import to_markdown
    from optimer_hf.report.page import prepare_figure_path, write_sealed_figure

    if figure is not None:
        prepare_figure_path(figure)
    comparison = compare_study(study_dir, **options)
    if figure is not None:
        write_sealed_figure(comparison, figure)
    if output == "json":
        echo(results_of(comparison).model_dump_json(indent=2))
    else:
        echo_markdown(to_markdown(comparison).rstrip())
        echo(f"see it: optimer report {study_dir}", err=True)


@click.command(cls=LoadingCommand, epilog="Example: optimer report my-study")
@click.argument("study_dir", type=STUDY)
@click.argument("out", type=PATH, required=False)
@click.option("--figures", type=PATH, help="Directory that also gets every figure as PNG.")
@click.option(
    "--no-vectors", is_flag=True, help="Leave out the cosines, which read every vector once."
)
def report(study_dir: Path, out: Path | None, figures: Path | None, no_vectors: bool) -> None:
    """Write one HTML page about a study, finished or not: what it found, how certain, at what cost.

    STUDY_DIR contains the study. The page goes to OUT (default: report.html in STUDY_DIR).
    """
    from optimer_hf.report.page import report_study

    page, panels = report_study(study_dir, out, figures=figures, vectors=not no_vectors)
    for panel in panels:
        echo(f"{panel.title}: {panel.conclusion}")
    echo(page, err=True)


@click.command(cls=LoadingCommand, epilog="Example: optimer check-overlap train.jsonl study.yaml")
@click.argument("files", type=INPUT, nargs=-1, required=True)
@click.option(
    "--n",
    type=click.IntRange(min=1, max=1000),
    default=13,
    show_default=True,
    help="Length of a match: in words, or in characters in scripts without spaces.",
)
@click.option(
    "--text-field", default="text", show_default=True, help="Field of a JSONL line with the text."
)
@FORMAT
def check_overlap(files: tuple[Path, ...], n: int, text_field: str, output: str) -> None:
    """Look for the items of objectives in training corpora; the exit status is 1 if one is found.

    FILES are corpora (JSONL, text, train.yaml) and objectives (objective.yaml, study.yaml with its
    sealed test), in any order. Items shorter than a match, but of at least 8 units, must match as a
    whole.
    """
    from optimer_hf.experiment.overlap_files import overlap_of_files

    terms = overlap_of_files(files, n=n, text_field=text_field)
    if output == "json":
        fields = [asdict(term) | {"share": term.share} for term in terms]
        echo(json.dumps(fields, indent=2, ensure_ascii=False))
    else:
        _print_overlap(terms)
    if any(term.overlaps for term in terms):
        raise SystemExit(1)


def _print_overlap(terms: "list[TermOverlap]") -> None:
    from optimer_hf.scoring.overlap import to_markdown

    echo_markdown(to_markdown(terms))
    for term in terms:
        for each in term.overlaps[:5]:
            where = f"document {each.document} of {each.corpus}"
            echo(f"{term.term}: item {each.item} and {where}: {each.ngram}", err=True)
