"""One run's folder: facts, checkpoints, metrics, outcome; and how to open it again. Knows no model."""
