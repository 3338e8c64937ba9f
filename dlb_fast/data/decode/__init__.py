"""Image bytes to pixels."""
