"""A study.yaml or a mergekit YAML -> norms, cosines and ranks of the pool that it names."""

from pathlib import Path

from optimer_hf.files.reading import read_yaml
from optimer_hf.merging.geometry import Geometry, measure_pool
from optimer_hf.merging.mergekit_keys import is_for_mergekit
from optimer_hf.merging.mergekit_pool import is_union, tokenizer_of
from optimer_hf.merging.mergekit_search import pool_to_search
from optimer_hf.merging.mergekit_yaml import read_merge_config
from optimer_hf.merging.union import open_base
from optimer_hf.models.resolve import resolve_base
from optimer_hf.searching.trial import base_of_study, sources_of
from optimer_hf.study.config import StudyConfig


def measure_file(path: Path, dtype: str | None = None) -> tuple[Geometry, dict[str, str]]:
    """Return the geometry of the vectors that can be merged into the base that a file names, and by
    name why others cannot. `dtype` is that of the merge (None: the one in the file, or bfloat16).
    """
    if not is_for_mergekit(read_yaml(path)):
        study = StudyConfig.read(path)
        base, _ = base_of_study(study)
        return measure_pool(sources_of(study), base, dtype or study.dtype)
    data = read_merge_config(path)
    reference, sources = pool_to_search(data, path)
    base = resolve_base(reference)
    if is_union(data):
        base, _ = open_base(base, sources, tokenizer_of(data, path), "union")
    given = data.get("out_dtype") or data.get("dtype")
    return measure_pool(sources, base, dtype or given or "bfloat16")
