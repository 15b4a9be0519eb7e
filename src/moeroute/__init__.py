"""Mixture-of-experts and mixture-of-LoRA layers for PyTorch."""
