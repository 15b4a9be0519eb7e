"""Grouped ops for mixtures of experts and of LoRA."""
