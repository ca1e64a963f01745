"""Other projects' weights, in and out."""
