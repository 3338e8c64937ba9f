"""Adapters for training frameworks.

One module per framework: `lightning`, `accelerate`, `hf` (the Trainer), `timm`. A module imports its framework when it
is imported, and nothing else of the package imports it. `state` is shared by all.
"""
