"""The mesh, the rules from logical axes to it, and global arrays."""
