"""holdfast: fault-tolerant training for PyTorch. See README.md; the names below are the public ones."""
