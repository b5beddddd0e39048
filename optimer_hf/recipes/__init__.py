"""recipe.yaml and its lock: written from a study, built into a model, verified."""
