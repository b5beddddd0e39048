"""A record as a training run writes it."""

from optimer_hf.vectors.training_record import TrainingRecord

RECORD = TrainingRecord.model_validate(
    {
        "config_sha256": "c",
        "name": "ja",
        "base_model": "base",
        "corpus": {"name": "ja.jsonl", "n_tokens": 64, "n_documents": 2, "sha256": "s"},
        "training": {
            "block_size": 32,
            "max_tokens": None,
            "lora": None,
            "trainer": {},
            "seed": 0,
            "mixed_precision": "no",
            "n_steps": 2,
            "n_tokens": 64,
            "losses": [2.0, 1.0],
            "seconds": 1.0,
        },
        "versions": {"torch": "x"},
    }
)
