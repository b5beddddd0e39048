"""mergekit_models.py: every form of a reference names the same model."""

from optimer_hf.merging.mergekit_models import ModelName, model_name


def test_references_of_all_forms_name_the_same_model(world):
    for value in ("./a", "a@main", {"model": "a"}, {"model": {"path": "./a", "revision": "x"}}):
        assert model_name(value, world) == ModelName(str((world / "a").resolve()))
    hub = ModelName("org/name@rev", "you/lora")
    long = {"model": {"path": "org/name", "revision": "rev"}, "lora": "you/lora"}
    assert model_name("org/name@rev+you/lora", world) == model_name(long, world) == hub
    assert hub.long_form == {
        "model": {"path": "org/name", "revision": "rev"},
        "lora": {"path": "you/lora"},
    }
