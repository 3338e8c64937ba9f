"""Data for training with the last mini-batch: plan, samplers, loaders, datasets, per-view augmentation.

This room knows nothing of losses. Both keep one sentence: the first H rows of a batch are the last H rows of the one
before, in the same order; sample ids let the other side check it.
"""

from __future__ import annotations

from dlb_fast.data.batch import Batch
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.sampler import IndexedDataset, OverlapBatchSampler, SampleIndex, collate_overlap
from dlb_fast.data.view_rng import ViewRng, ViewRngs, view_key

__all__ = [
    "Batch",
    "IndexedDataset",
    "OverlapBatchSampler",
    "OverlapPlan",
    "SampleIndex",
    "ViewRng",
    "ViewRngs",
    "collate_overlap",
    "view_key",
]
