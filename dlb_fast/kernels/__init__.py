"""Triton kernels: imported by the first call that needs them, never by ``import dlb_fast``."""
