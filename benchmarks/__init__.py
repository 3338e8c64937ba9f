"""Measurements. Every figure is written with its command, hardware, versions, commit, n and spread."""
