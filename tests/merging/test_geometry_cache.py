"""geometry_cache.py: cosines are there even where they cannot be kept."""

from optimer_hf.merging.geometry_cache import read_or_measure


def test_a_report_of_a_study_that_cannot_be_written_to_has_its_cosines(
    make_base, make_tuned, tmp_path, caplog
):
    base = make_base("llama")
    sources = {name: str(make_tuned(base, "llama", seed)) for seed, name in enumerate("ab")}
    (tmp_path / "geometry.json").mkdir()  # in the way; a test that runs as root may write anywhere
    geometry = read_or_measure(sources, str(base.path), "bfloat16", tmp_path / "geometry.json")
    assert len(geometry.cosines) == 1 and "cosines are not cached" in caplog.text
