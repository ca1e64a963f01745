"""Many runs as one study: the same data, the same initial weights, the same budget, and only the named axes apart."""
