"""What the paper measures on a model: layer by layer while it trains, and on a checkpoint."""
