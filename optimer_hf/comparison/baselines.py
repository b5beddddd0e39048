"""Baselines that are not weights of the pool of a study: merges by other methods of mergekit,
random vectors of equal norm, and models trained on data mixtures.

A study comes in; a list of models goes out. Each is built when it is scored, as vectors on the base
of the study. Merged LoRA pools of random directions can look good (arXiv 2602.12323), so the random
vectors keep the rank and the norm of every tensor of the real ones.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from optimer_hf.comparison.rows import Contender, RowKind
from optimer_hf.errors import ConfigError, OptimerError, StudyError
from optimer_hf.files.digest import digest
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.reference import reference_from_here
from optimer_hf.files.staging import staged_directory, write_text
from optimer_hf.files.text import first_line
from optimer_hf.merging.mergekit import run_mergekit
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.searching.trial import base_of_study
from optimer_hf.study.config import LARGEST_WEIGHT, By, MergeMethod, StudyConfig, VectorConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.plugins import check_weights, load_baseline
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.vector import DistributionVector, Place, dense_rows

logger = logging.getLogger(__name__)


MERGE_METHODS: dict[MergeMethod, Callable[[int], dict[str, float]]] = {
    # parameters of each of n models, from mergekit's own examples; its defaults otherwise
    "ties": lambda n: {"weight": 1.0, "density": 0.5},
    "dare_ties": lambda n: {"weight": 1 / n, "density": 0.5},
    "model_stock": lambda n: {},
}


@dataclass(frozen=True)
class ModelContender(Contender):
    """A model to compare with. `make` writes its vectors into a scratch directory and returns where
    they are, by the names that `weights` has. `splits` has the groups of those with weights by
    group.
    """

    make: Callable[[Path], dict[str, str]]
    splits: Mapping[str, By] = field(default_factory=dict)


def list_plugins(study: Study) -> tuple[list[Contender], dict[str, str]]:
    """Ask the installed baselines that a study names. Return the rows of those that chose weights,
    and the models of the others, by name.

    Raises ConfigError for one that is not installed, StudyError for one that fails or returns
    neither.
    """
    rows, models, config = [], {}, study.config
    for name in config.baselines.plugins:
        baseline, who = load_baseline(name), f"baseline {name!r}"
        try:
            chosen = baseline(study)
        except OptimerError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StudyError(
                f"{who} failed with {reason}. A baseline gets the study and returns a weight for "
                f"each of {', '.join(config.free)}, or a model."
            ) from error
        if isinstance(chosen, str | Path):
            models[name] = reference_from_here(chosen)
        else:
            anything = dict.fromkeys(config.free, (-LARGEST_WEIGHT, LARGEST_WEIGHT))
            weights = check_weights(chosen, anything, who)
            rounded = {each: round(weight, 6) for each, weight in weights.items()}
            rows.append(Contender("plugin", name, rounded | config.fixed))
    return rows, models


def list_models(
    study: Study,
    mixtures: Mapping[str, str] | None = None,
    *,
    of_plugins: Mapping[str, str] | None = None,
) -> list[ModelContender]:
    """Return the models among the baselines of a study, without building them. Mixtures are those
    in `mixtures`, which maps names to directories, and models of installed baselines those in
    `of_plugins`, which maps names to references.
    """
    config, wanted = study.config, study.config.baselines
    for name, source in wanted.models.items():
        if Path(source).is_absolute() and not Path(source).is_dir():
            raise ConfigError(f"baselines.models: {name!r}: {source}: no such directory.")
    rows = []
    for method in wanted.merge_methods:
        if not config.free_singles or (method == "model_stock" and len(config.free_singles) < 2):
            logger.warning("%s is left out: it needs more vectors that are no mixtures", method)
            continue
        rows.append(_by_method(method, config))
    if wanted.random_vectors:
        rows.append(_random_vectors(config, study.best_trial.weights))
    rows.extend(ready_model("plugin", name, source) for name, source in (of_plugins or {}).items())
    rows.extend(ready_model("model", name, source) for name, source in wanted.models.items())
    rows.extend(ready_model("mixture", name, source) for name, source in (mixtures or {}).items())
    return [add_fixed(model, config) for model in rows]


def ready_model(kind: RowKind, name: str, source: str) -> ModelContender:
    """Return the row of a model that is there already, by its reference."""
    key = f"{name} ({short_digest(source)})"
    return ModelContender(kind, name, {key: 1.0}, lambda scratch: {key: source})


def add_fixed(model: ModelContender, config: StudyConfig) -> ModelContender:
    """Add the vectors that are fixed as a whole, at their weights, which every row has."""
    fixed = config.fixed_parts
    vectors = {name: config.vectors[name] for name in fixed}
    sources = {name: str(vector.source) for name, vector in vectors.items()}
    weights = {weight: value for own in fixed.values() for weight, value in own.items()}
    return replace(
        model,
        weights=model.weights | weights,
        make=lambda scratch: model.make(scratch) | sources,
        splits={**model.splits, **_splits_of(vectors)},
    )


def _splits_of(vectors: Mapping[str, VectorConfig]) -> dict[str, By]:
    return {name: vector.by for name, vector in vectors.items() if vector.by is not None}


def short_digest(source: str) -> str:
    """Return a short digest of the weights of a local model, or of the reference of another."""
    path = Path(source)
    return digest(weight_digests(path) if path.is_dir() else source)[:8]


def _searched_sources(config: StudyConfig) -> dict[str, str]:
    """Return the reference of each searched vector, by name."""
    return {name: str(config.vectors[name].source) for name in config.free_parts}


def _single_sources(config: StudyConfig) -> dict[str, str]:
    """Return the reference of each searched vector with text of its own, by name. Other methods
    merge these: a mixture holds their text again.
    """
    return {name: str(config.vectors[name].source) for name in config.free_singles}


# -- mergekit --------------------------------------------------------------------------------------


def _by_method(method: MergeMethod, config: StudyConfig) -> ModelContender:
    inputs = {name: short_digest(source) for name, source in _single_sources(config).items()}
    parameters = MERGE_METHODS[method](len(inputs))
    drawn_by = [config.search.seed] if method == "dare_ties" else []
    key = f"{method} ({digest([method, parameters, inputs, *drawn_by])[:8]})"

    def make(scratch: Path) -> dict[str, str]:
        out = scratch / method
        _merge_with_mergekit(method, parameters, config, scratch, out)
        return {key: str(out)}

    return ModelContender("method", method, {key: 1.0}, make)


def _merge_with_mergekit(
    method: str, parameters: Mapping[str, float], config: StudyConfig, scratch: Path, out: Path
) -> None:
    """Merge the pool with a method of mergekit in float32. The vectors are first written as whole
    checkpoints, which is what mergekit reads.
    """
    from mergekit.options import MergeOptions

    base, _ = base_of_study(config)
    tuned = []
    for name, source in _single_sources(config).items():
        path = scratch / "vectors" / name
        tuned.append(path)
        if not path.exists():  # another method may have written it
            vector = open_vector(name, source, base)
            write_merged(base, [vector], {name: 1.0}, path, out_dtype="float32")
    merge_config: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base.path),
        "models": [{"model": str(path), "parameters": dict(parameters)} for path in tuned],
        "dtype": "float32",
    }
    file = scratch / f"{method}.yml"
    write_text(file, yaml_text(merge_config))
    options = MergeOptions(random_seed=config.search.seed, write_model_card=False, quiet=True)
    run_mergekit(merge_config, file, out, options)


# -- random vectors --------------------------------------------------------------------------------


def _random_vectors(config: StudyConfig, weights: Mapping[str, float]) -> ModelContender:
    sources = _searched_sources(config)
    seeds = {name: int(digest([config.search.seed, name])[:12], 16) for name in sources}
    key = digest({name: [short_digest(source), seeds[name]] for name, source in sources.items()})[
        :8
    ]
    names = {name: f"random {name} ({key})" for name in sources}

    def make(scratch: Path) -> dict[str, str]:
        (base, _), made = base_of_study(config), {}
        for name, source in sources.items():
            out = scratch / "random" / name
            write_random_like(open_vector(name, source, base), base, out, seed=seeds[name])
            made[names[name]] = str(out)
        return made

    vectors = {names[name]: config.vectors[name] for name in names}
    own = {
        new: weights[old]
        for name in names
        for old, new in zip(
            config.vectors[name].weights_of(name),
            config.vectors[name].weights_of(names[name]),
            strict=True,
        )
    }
    return ModelContender("random", "", own, make, _splits_of(vectors))


def write_random_like(
    vector: DistributionVector, base: ResolvedModel, out: Path, *, seed: int
) -> None:
    """Write a vector of Gaussian noise in which every tensor has the norm of that in `vector`. For
    an adapter, write an adapter of the same rank.
    """
    stored = load_file(vector.path / "adapter_model.safetensors") if _is_lora(vector) else None
    if stored is None:
        extract(_RandomVector(vector, Checkpoint(base.path), seed), base, out)
        return
    generator = torch.Generator().manual_seed(seed)
    for key in sorted(stored):
        if ".lora_A." in key:
            partner = key.replace(".lora_A.", ".lora_B.")
            stored[key], stored[partner] = _random_product(stored[key], stored[partner], generator)
    with staged_directory(out) as staging:
        save_file(stored, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(vector.path / "adapter_config.json", staging)


def _is_lora(vector: DistributionVector) -> bool:
    """Whether an adapter holds nothing but pairs of linear LoRA factors."""
    file = vector.path / "adapter_model.safetensors"
    if vector.kind != "adapter" or not file.exists():
        return False
    names = Checkpoint(vector.path, "adapter_model").names
    return all(".lora_A." in name or ".lora_B.w" in name for name in names)


def _random_product(
    a: torch.Tensor, b: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Gaussian factors [rank, in] and [out, rank] whose product has the norm of b @ a."""
    new_a, new_b = (torch.randn(t.shape, generator=generator) for t in (a, b))
    factor = (_product_norm(a, b) / _product_norm(new_a, new_b)).sqrt()
    return (new_a * factor).to(a.dtype), (new_b * factor).to(b.dtype)


def _product_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm of b @ a, from two Gram matrices [rank, rank]."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class _RandomVector:
    """Noise in place of a vector. Rows are drawn when they are read, always the same."""

    like: DistributionVector
    base: Checkpoint
    seed: int
    kind: str = "delta"

    @property
    def name(self) -> str:
        return self.like.name

    @property
    def path(self) -> Path:
        return self.like.path

    @property
    def names(self) -> frozenset[str]:
        return self.like.names

    @property
    def n_bytes(self) -> int:
        return self.like.n_bytes

    def delta(self, name: str, rows: slice, device: torch.device | str) -> torch.Tensor:
        """Return noise with the norm of these rows, float32."""
        real = dense_rows(self.like, name, rows, self.base.read_rows(name, rows)).float()
        text = digest([self.seed, name, rows.start])
        generator = torch.Generator().manual_seed(int(text[:12], 16))
        noise = torch.randn(real.shape, generator=generator)
        factor: float = real.norm().item() / max(noise.norm().item(), 1e-30)
        return noise.mul_(factor).to(device)

    def load_to(self, place: Place) -> DistributionVector:
        return self
