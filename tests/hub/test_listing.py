"""Recipes on the Hub are listed."""

from optimer_hf import hub as hubs
from tests.support.hub import ALICE


def test_recipes_on_the_hub_are_listed_by_their_tag(hub, make_recipe, name):
    hubs.push(make_recipe(), f"alice/{name}", token=ALICE, vectors=True)
    listed = dict(hubs.list_hub_recipes(token=ALICE))
    assert f"alice/{name}" in listed
    assert f"alice/{name}-v0" not in listed
