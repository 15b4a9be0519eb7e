"""Decoder layers of a transformers checkpoint that are skipped, run once or run several times."""
