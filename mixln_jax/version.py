"""The version of this package: run folders and checkpoints say which one wrote them."""

VERSION = "0.3.0"
