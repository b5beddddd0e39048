"""Tokens, paths and the name of this machine are not published."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from optimer_hf.errors import HubError
from optimer_hf.hub.leaks import refuse_private
from optimer_hf.hub.publication import choose_files


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer_config.json", '{"auth": "hf_%s"}' % ("a" * 34)),
        ("tokenizer.json", '{"model": "hf_%s"}' % ("a" * 34)),
        ("LICENSE", "signed: hf_" + "a" * 34),
        ("generation_config.json", '{"cache": "~/models/x"}'),
        ("generation_config.json", '{"cache": "file:///models/x"}'),
        ("adapter_config.json", '{"base_model_name_or_path": "/scratch/ann/gemma"}'),
    ],
)
def test_secrets_are_found_in_every_kind_of_file(make_vector, file, text):
    vector = make_vector("adapter")
    (vector / file).write_text(text)
    with pytest.raises(HubError, match=rf"{file}: .*contains a (token|path)"):
        choose_files(vector)


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a1" * 17,
        "api_org_" + "Ab" * 17,
        "hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJyZWFkIjp0cnVl",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN",
        "sk-proj-" + "x9" * 20,
        "AKIA" + "ABCD1234EFGH5678",
        "ghp_" + "a" * 36,
        "github_pat_" + "a" * 40,
        "glpat-" + "b" * 20,
        "xoxb-1234567890-abc",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize("file", ["tokenizer.json", "README.md", "vector.json"])
def test_tokens_of_every_known_form_are_refused(file, token):
    text = json.dumps({"note": f"made with {token}"})
    with pytest.raises(HubError, match="contains a token") as error:
        refuse_private(Path(file), text.encode())
    assert token not in str(error.value)


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "SOME_TOKEN"])
def test_the_values_of_secret_variables_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "0123456789abcdef" * 2)
    monkeypatch.setenv("SSH_KEY_PATH", "/home/someone/key")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("TOKENIZER_NAME", "google/gemma-3-270m")
    with pytest.raises(HubError, match=rf"contains the value of {name} \(012\.\.\.\)"):
        refuse_private(Path("recipe.yaml"), b"note: 0123456789abcdef0123456789abcdef")
    refuse_private(Path("recipe.yaml"), b"note: false, 0123456789, google/gemma-3-270m")
    refuse_private(Path("recipe.yaml"), b"corpus: sk-en-translation-corpus-of-web-pages-v1")


def test_the_token_in_use_is_refused_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-company-token")
    with pytest.raises(HubError, match=r"contains the (token in use|value of HF_TOKEN)"):
        refuse_private(Path("README.md"), b"see plain-company-token")


@pytest.mark.parametrize("field", ["api_key", "wandb_api_key", "hub_token", "auth.password"])
def test_a_field_that_is_called_a_secret_is_refused(field):
    data = {field: "5f" * 20}
    with pytest.raises(HubError, match=rf"{field}: contains a secret, judging by its name"):
        refuse_private(Path("results.json"), json.dumps(data).encode())
    refuse_private(
        Path("results.json"), json.dumps({"eos_token": "<eos>", "commit": "5f" * 20}).encode()
    )


def test_a_path_in_the_header_of_weights_is_found(make_vector):
    from safetensors.torch import save_file

    vector = make_vector("adapter")
    weights = vector / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"trained_in": "/scratch/ann/run"})
    with pytest.raises(HubError, match=r"trained_in: contains a path"):
        choose_files(vector)
