"""Continual pre-training with the HF Trainer and PEFT."""
