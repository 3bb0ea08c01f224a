"""The commands that make bundles and plans."""
