"""Loaders: threads over files, sets that live on the device, samplers of classes and pairs, two views per item."""
