"""Build the adapter of a recipe: one LoRA adapter with the weighted sum of its LoRA vectors."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.files.reference import Reference
from optimer_hf.files.staging import staged_directory
from optimer_hf.merging.adapters import Truncation, add_adapters, truncate, write_adapter
from optimer_hf.merging.tokenizer import open_tokenizer
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import VECTOR_FILE, ResolvedModel, copy_tokenizer
from optimer_hf.models.resolve import resolve_model
from optimer_hf.recipes.build import read_lock
from optimer_hf.recipes.record import Ingredient, Recipe
from optimer_hf.vectors.delta import describe_vector
from optimer_hf.vectors.groups import weights_of_parts
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.lora import Product, read_products
from optimer_hf.vectors.lora_config import read_options
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.splitting import idle_weights, split_pool
from optimer_hf.vectors.vector import DistributionVector


@dataclass(frozen=True)
class BuiltAdapter:
    """An adapter that was built: its rank, the ranks of the vectors in it, and what was left out of
    their sum.
    """

    rank: int
    ranks: dict[str, int]
    truncation: Truncation

    def describe(self) -> str:
        """Return rank and error in a sentence."""
        parts = " + ".join(f"{name} {rank}" for name, rank in self.ranks.items())
        if self.rank >= sum(self.ranks.values()):
            return f"rank {self.rank} ({parts}); the sum is exact"
        left_out = self.truncation
        return (
            f"rank {self.rank} of {sum(self.ranks.values())} ({parts}); truncation leaves out "
            f"{100 * left_out.error:.3g} % of the sum, at most {100 * left_out.largest:.3g} % of a "
            f"tensor ({left_out.tensor})"
        )


def build_adapter(
    path: Path, out: Path, *, rank: int | None = None, out_dtype: str = "float32"
) -> BuiltAdapter:
    """Build the weighted sum of the LoRA vectors of a recipe as one PEFT adapter in `out`, with its
    vector.json, and return its rank and error.

    `rank` truncates the sum (None: the sum of the ranks, exact). `out_dtype` is the dtype of the
    factors. Raises ModelError if base or vectors are not the locked ones, or if a vector with a
    weight is no LoRA adapter; nothing is written then.
    """
    recipe = Recipe.read(path)
    if recipe.vocabulary != "base":
        raise ModelError(
            f"{path}: vocabulary: found {recipe.vocabulary!r}. The merge has rows of tokens that "
            "its base lacks, and an adapter adds none. Build the model instead, without --as "
            "adapter."
        )
    base = resolve_model(recipe.base_model)
    read_lock(path.with_suffix(".lock.json"), recipe, base)
    checkpoint = Checkpoint(base.path)
    used = {name: each for name, each in recipe.vectors.items() if each.is_used}
    products, options = {}, dict[str, Any]()
    for name, ingredient in used.items():
        adapter, fields = _open_adapter(name, ingredient, base, checkpoint)
        products[name], options = adapter, fields | options
    ranks = {
        name: max(p.a.shape[0] for p in adapter.values()) for name, adapter in products.items()
    }
    total, left_out = add_adapters(products, dict.fromkeys(products, 1.0)), Truncation()
    if rank is not None and rank < sum(ranks.values()):
        total, left_out = truncate(total, rank)
    tokenizer = open_tokenizer(base, recipe.tokenizer_reference)
    options |= _name_of_base(recipe.base_model)
    with staged_directory(out) as staging:
        write_adapter(total, staging, checkpoint, options, DTYPES[out_dtype])
        if tokenizer is not None:
            copy_tokenizer(tokenizer.path, staging)
        record = describe_vector(staging, base, name=recipe.name, kind="adapter")
        record.write(staging / VECTOR_FILE)
    sizes = sum(ranks.values())
    return BuiltAdapter(sizes if rank is None else min(rank, sizes), ranks, left_out)


def _open_adapter(
    name: str, ingredient: Ingredient, base: ResolvedModel, checkpoint: Checkpoint
) -> tuple[dict[str, Product], dict[str, Any]]:
    """Return the products of a vector, scaled by its weights, and the fields of its config that its
    sum keeps.
    """
    vector = open_vector(name, ingredient.source, base)
    if vector.kind != "adapter":
        raise ModelError(
            f"vector {name!r} ({vector.path}): is a {vector.kind}, and only LoRA adapters add up "
            "to an adapter. Build the model instead, without --as adapter."
        )
    options = read_options(vector.path, f"vector {name!r}")
    kept = {key: options[key] for key in ("task_type", "fan_in_fan_out") if options.get(key)}
    products = read_products(vector.path, checkpoint, name)
    weights = _weights_by_tensor(vector, ingredient, base, products)
    scaled = {
        target: replace(product, scale=weights[target] * product.scale)
        for target, product in products.items()
        if weights[target]
    }
    return scaled, kept


def _weights_by_tensor(
    vector: DistributionVector, ingredient: Ingredient, base: ResolvedModel, names: Iterable[str]
) -> dict[str, float]:
    """Return the weight of each tensor in `names`, which a vector moves."""
    own, groups = ingredient.weights_of(vector.name), ingredient.groups
    if groups is None:
        return dict.fromkeys(names, own[vector.name])
    split = {vector.name: groups}
    weights = weights_of_parts(own, split, layers_for(split, base))
    pool = split_pool([vector], split, base, idle=idle_weights(own))
    return {tensor: weights[part.name] for part in pool for tensor in part.names}


def _name_of_base(reference: str) -> dict[str, str | None]:
    """Return the fields of an adapter's config that name its base."""
    ref = Reference(reference)
    if ref.path is not None or ref.package is not None:
        return {"base_model_name_or_path": str(ref.path or reference)}
    repo_id, revision = ref.repo
    return {"base_model_name_or_path": repo_id, "revision": revision}
