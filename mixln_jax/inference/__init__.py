"""Generation, likelihoods, and the lm-evaluation-harness."""
