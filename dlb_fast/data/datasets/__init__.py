"""Datasets in memory, in folders, lists and tar files; label noise; checking files."""
