"""Corpus files -> records -> batches. Never touches a device: it takes process numbers and returns NumPy arrays."""
