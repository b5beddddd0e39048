"""The versions of the packages that results depend on."""

from importlib.metadata import version

PACKAGES = (
    "optimer-hf",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "mergekit",
    "smac",
    "lm-eval",
)


def versions() -> dict[str, str]:
    """Return the versions that a file records of what made it, by package."""
    return {package: version(package) for package in PACKAGES}
