"""Requests to a real Hub server that fails, refuses, or has moved a repository."""

import pytest
from huggingface_hub import HfApi

from optimer_hf import hub as hubs
from optimer_hf.errors import HubError
from optimer_hf.models.layout import weight_digests
from tests.support.hub import ALICE, BOB


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True}], ids=["503", "dropped"])
def test_a_commit_is_sent_again_after_a_passing_fault(hub, make_vector, name, fault):
    hub.inject("POST .*/commit/main", times=2, **fault)
    done = hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    assert HfApi(token=ALICE).model_info(f"alice/{name}").sha == done.commit


def test_a_used_up_commit_quota_says_when_to_push_again(hub, make_vector, name):
    vector = make_vector("adapter", 11)
    hub.inject(
        "POST .*/commit/main",
        429,
        times=99,
        headers={"RateLimit": '"api";r=12;t=1800'},
        body="You have exceeded our rate limit for repository commits",
    )
    with pytest.raises(HubError, match=r"commits to a repository is used up .* again in 1800 s"):
        hubs.push(vector, f"alice/{name}", token=ALICE)
    hub.faults.clear()
    hub.log.clear()
    assert hubs.push(vector, f"alice/{name}", token=ALICE).commit
    assert not hub.calls("POST /cas/v1/xorbs")  # the weights had arrived before


def test_a_push_waits_for_a_request_quota(hub, make_vector, name):
    hub.inject("GET /api/models/alice", 429, times=1, headers={"RateLimit": '"api";r=0;t=2'})
    assert hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE).commit


@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("hf_nobody", "alice/x", r"token is wrong or missing \(401\).*hf auth login"),
        ("hf_alice_read", "alice/x", r"for reading only.*write access"),
        (ALICE, "not a name", "not a valid repository name"),
        (ALICE, "base", "expected a repository as OWNER/NAME"),
    ],
)
def test_a_refused_push_says_what_to_do(hub, make_vector, token, repo, said):
    with pytest.raises(HubError, match=said):
        hubs.push(make_vector("adapter"), repo, token=token, licence="mit")


def test_a_push_without_the_right_to_write_points_to_a_proposal(hub, make_vector, name):
    hubs.push(make_vector("adapter", 1), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match=r"may not write.*--create-pr"):
        hubs.push(make_vector("adapter", 2), f"alice/{name}", token=BOB)


def test_a_refused_pull_says_what_to_do(hub, make_vector, name, tmp_path):
    with pytest.raises(HubError, match="404"):
        hubs.pull("alice/none-such", tmp_path / "out", token=ALICE)
    hubs.push(make_vector("adapter"), f"alice/{name}", token=ALICE)
    with pytest.raises(HubError, match="there is no such revision"):
        hubs.pull(f"alice/{name}@v9", tmp_path / "out", token=ALICE)
    HfApi(token=ALICE).update_repo_settings(f"alice/{name}", gated="auto")
    with pytest.raises(HubError, match=r"is gated \(403\)"):
        hubs.pull(f"alice/{name}", tmp_path / "out", token=BOB)
    assert not (tmp_path / "out").exists()


def test_a_renamed_repository_is_found_with_a_warning(hub, make_vector, name, tmp_path, caplog):
    vector = make_vector("adapter")
    hubs.push(vector, f"alice/{name}", token=ALICE)
    HfApi(token=ALICE).move_repo(f"alice/{name}", f"alice/{name}-new")
    pulled = hubs.pull(f"alice/{name}", tmp_path / "back", token=ALICE)
    assert pulled.repo_id == f"alice/{name}-new"
    assert f"is now called alice/{name}-new" in caplog.text
    assert weight_digests(tmp_path / "back") == weight_digests(vector)
