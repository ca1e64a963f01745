"""The mesh, the rules that map logical axes to it, global arrays, and the processes of a run."""
