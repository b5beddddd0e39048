"""push, pull and recipes, against a real Hub server."""

import json

import pytest

from optimer_hf.models.layout import weight_digests
from tests.support.hub import ALICE, run_cli


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
def test_the_command_line_pushes_and_pulls_over_both_transports(
    hub, make_vector, name, xet, tmp_path
):
    vector = make_vector("delta", seed=5 + xet)
    pushed = run_cli("push", vector, f"alice/{name}", hub=hub, xet=xet)
    assert pushed.returncode == 0, pushed.stderr
    assert bool(hub.calls("POST /cas/v1/xorbs")) == xet
    assert bool(hub.calls("PUT /_lfs/put")) != xet
    home = str(tmp_path / "home")  # an empty cache: the bytes come from the server
    pulled = run_cli("pull", f"alice/{name}", tmp_path / "back", hub=hub, xet=xet, HF_HOME=home)
    assert pulled.returncode == 0, pulled.stderr
    assert weight_digests(tmp_path / "back") == weight_digests(vector)
    assert ALICE not in pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr


def test_the_command_line_lists_and_shows(hub, make_recipe, name, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from optimer_hf.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "recipes" / "mine" / "study.yaml").write_text("")
    folder, token = make_recipe(), ["--token", ALICE]
    shown = CliRunner().invoke(
        main, ["push", str(folder), f"alice/{name}", "--vectors", "--dry-run", *token]
    )
    assert "would send 5 files" in shown.output
    assert f"to alice/{name}; nothing was sent" in shown.output
    pushed = CliRunner().invoke(
        main, ["push", str(folder), f"alice/{name}", "--vectors", "--format", "json", *token]
    )
    assert json.loads(pushed.stdout)["vectors"][0]["repo_id"] == f"alice/{name}-v0"
    again = CliRunner().invoke(main, ["push", str(folder), f"alice/{name}", "--vectors", *token])
    assert again.output.count("already has everything") == 3
    listed = CliRunner().invoke(main, ["recipes", "list", *token])
    assert "recipes/mine: run it with" in listed.output
    assert f"optimer pull alice/{name}" in listed.output
    pulled = CliRunner().invoke(main, ["pull", f"hf://alice/{name}", *token])
    assert "licence gemma" in pulled.output
    assert f"build it: optimer build {name}/recipe.yaml OUT" in pulled.output
