"""Commands for recipes: recipe, build, verify, ratios."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optimer_hf.cli.options import (
    FLOATS,
    FORMAT,
    INPUT,
    MOST_TOKENS,
    PATH,
    RECIPE,
    STUDY,
    TRAIN_FILE,
    LoadingCommand,
    echo,
)
from optimer_hf.errors import ConfigError


@click.command(cls=LoadingCommand, epilog="Example: optimer recipe my-study recipe.yaml")
@click.argument("study_dir", type=STUDY)
@click.argument("recipe_yaml", type=PATH)
@click.option(
    "--vanilla",
    is_flag=True,
    help="Write mergekit_config.yml, for mergekit alone, even if that needs deltas/ beside it.",
)
@click.option(
    "--pick",
    type=click.IntRange(min=1, max=10_000),
    help="Point of the Pareto front to write, as `optimer search` numbers them.",
)
@click.option(
    "--derived-from", metavar="REPO@COMMIT", help="Recipe on the Hub that this one continues."
)
def recipe(study_dir: Path, recipe_yaml: Path, **options: Any) -> None:
    """Write the best merge of a study as recipe.yaml with its lock, merge configs and figures.

    STUDY_DIR contains the study. RECIPE_YAML is the file to write; the others go beside it.
    """
    from optimer_hf.recipes.from_study import recipe_of_study

    written = recipe_of_study(study_dir, recipe_yaml, **options)
    echo(recipe_yaml)
    echo(written.describe(), err=True)


@click.command(cls=LoadingCommand, epilog="Example: optimer build recipe.yaml merged")
@click.argument("recipe_yaml", type=RECIPE)
@click.argument("out", type=PATH)
@click.option(
    "--out-dtype", type=click.Choice(FLOATS), help="Dtype to write in (default: the recipe's)."
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weights file.")
@click.option(
    "--device", default="cpu", show_default=True, help="Device for the arithmetic: cpu or cuda."
)
@click.option(
    "--as",
    "form",
    type=click.Choice(["model", "adapter"]),
    default="model",
    show_default=True,
    help="What to build: a model, or one LoRA adapter for PEFT and vLLM from LoRA vectors.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1, max=2**16),
    help="Largest rank of the adapter (default: the sum of the ranks, which is exact).",
)
def build(
    recipe_yaml: Path, out: Path, form: str, rank: int | None, out_dtype: str | None, **options: Any
) -> None:
    """Build the merged model of a recipe, or its adapter, and write it to OUT.

    RECIPE_YAML is the file, or a directory with one, such as that of a study or a run. Base and
    vectors are downloaded if they are not on this disk, checked against the lock of the recipe, and
    added with its weights. OUT gets the weights as safetensors with config, tokenizer, recipe and
    lock, whole or not at all. It has to be new or empty, or to contain the model of this recipe,
    which is then kept. With --as adapter, OUT gets a LoRA adapter instead, in float32 unless
    --out-dtype says otherwise.
    """
    if form == "adapter":
        from optimer_hf.recipes.adapter import build_adapter

        built = build_adapter(recipe_yaml, out, rank=rank, out_dtype=out_dtype or "float32")
        echo(out)
        echo(built.describe(), err=True)
        return
    if rank is not None:
        raise ConfigError("--rank: goes with --as adapter. Leave it out to build a model.")
    from optimer_hf.recipes.build import build as build_recipe

    build_recipe(recipe_yaml, out, out_dtype=out_dtype, **options)
    echo(out)


@click.command(cls=LoadingCommand, epilog="Example: optimer verify recipe.yaml merged")
@click.argument("recipe_yaml", type=RECIPE)
@click.argument("model", type=PATH)
def verify(recipe_yaml: Path, model: Path) -> None:
    """Check a built model against the lock of its recipe.

    RECIPE_YAML is the file, or a directory with one, such as that of a study or a run. MODEL is
    what `optimer build` wrote.
    """
    from optimer_hf.recipes.build import verify as verify_model

    verify_model(recipe_yaml, model)
    echo(f"{model}: the weights are those of {recipe_yaml}")


@click.command(epilog="Example: optimer ratios my-study train-*.yaml --out retrain.yaml")
@click.argument("source", type=INPUT)
@click.argument("train_yaml", type=TRAIN_FILE, nargs=-1)
@click.option("--out", type=PATH, help="Train file to write, for the mixture of the TRAIN_YAMLs.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=MOST_TOKENS),
    help="Length of the mixture in tokens (default: the sum over its vectors).",
)
@click.option(
    "--tokens", multiple=True, metavar="NAME=N", help="Number of tokens a vector was trained on."
)
@click.option(
    "--without",
    multiple=True,
    metavar="NAME",
    help="Vector without a corpus of its own, such as an instruction vector.",
)
@FORMAT
def ratios(
    source: Path, train_yaml: tuple[Path, ...], out: Path | None, output: str, **options: Any
) -> None:
    """Turn the weights of a study directory or a recipe.yaml (SOURCE) into mixture ratios.

    Given the train files of its vectors (TRAIN_YAML ...) and --out, it also writes the train file
    that retrains with these ratios.
    """
    from optimer_hf.recipes.ratios import describe_check, ratios_of

    result = ratios_of(source, train_yaml, out=out, **options)
    if output == "json":
        check = {} if result.check is None else {"check": asdict(result.check)}
        echo(json.dumps(asdict(result.ratios) | check, indent=2))
        return
    for name, share in result.ratios.shares.items():
        echo(f"{name}: {100 * share:.2f} %  (weight {result.weights[name]:g})")
    for name in result.mixtures:
        echo(
            f"{name}: shared out, as it was trained on a mixture  (weight {result.weights[name]:g})"
        )
    for name in result.ratios.left_out:
        echo(f"{name}: left out ({result.reasons[name]})")
    if result.check is not None:
        echo(describe_check(result.check))
    if out is not None:
        echo(f"train it: optimer train {out} OUT", err=True)
