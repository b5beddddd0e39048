"""The cache directory."""

from optimer_hf.files.paths import cache_dir


def test_the_environment_sets_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTIMER_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("OPTIMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "optimer"
