"""The files of a run: its manifest, its lock, and its sealed work files."""
