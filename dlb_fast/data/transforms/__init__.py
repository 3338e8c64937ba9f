"""Transforms of a view, and what is done to a whole batch: normalising, erasing, mixing."""
