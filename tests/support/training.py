"""The settings of short runs."""

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
FAST = {"learning_rate": 1e-2, "bf16": False, "save_strategy": "no"}
