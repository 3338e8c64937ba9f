"""Data for training with the last mini-batch: plan, samplers, loaders, datasets, per-view augmentation.

This room knows nothing of losses. Both keep one sentence: the first H rows of a batch are the last H rows of the one
before, in the same order; sample ids let the other side check it.
"""

from __future__ import annotations

from dlb_fast.data.arrays import ArrayDataset, cifar, digits, stratified_split, synthetic
from dlb_fast.data.augment import (
    NORMALISATION,
    CenterCrop,
    Compose,
    Flip,
    PadCrop,
    RandomResizedCrop,
    Resize,
    eval_transform,
    train_transform,
)
from dlb_fast.data.batch import Batch
from dlb_fast.data.class_batches import ClassBatchSampler, ViewPairSampler, collate_rows
from dlb_fast.data.datasets import MapDataset, load_into_memory, open_dataset, subset, with_label_noise
from dlb_fast.data.erasing import Cutout, RandomErasing
from dlb_fast.data.errors import DecodeError, LoaderTimeout, SampleError
from dlb_fast.data.evaluation import EvalLoader
from dlb_fast.data.files import ImageFolder, TinyImageNet
from dlb_fast.data.list_file import ListFile
from dlb_fast.data.mixing import Mix
from dlb_fast.data.overlap_loader import OverlapLoader
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.rand_augment import RandAugment
from dlb_fast.data.resident import ResidentLoader
from dlb_fast.data.sampled_loader import SampledLoader
from dlb_fast.data.sampler import IndexedDataset, OverlapBatchSampler, SampleIndex, collate_overlap
from dlb_fast.data.tar_shards import TarShards
from dlb_fast.data.tracked import TrackedLoader
from dlb_fast.data.two_views import HalfBatchSampler, TwoViews, pair_halves
from dlb_fast.data.view_rng import ViewRng, ViewRngs, view_key

__all__ = [
    "NORMALISATION",
    "ArrayDataset",
    "Batch",
    "CenterCrop",
    "ClassBatchSampler",
    "Compose",
    "Cutout",
    "DecodeError",
    "EvalLoader",
    "Flip",
    "HalfBatchSampler",
    "ImageFolder",
    "IndexedDataset",
    "ListFile",
    "LoaderTimeout",
    "MapDataset",
    "Mix",
    "OverlapBatchSampler",
    "OverlapLoader",
    "OverlapPlan",
    "PadCrop",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "ResidentLoader",
    "Resize",
    "SampleError",
    "SampleIndex",
    "SampledLoader",
    "TarShards",
    "TinyImageNet",
    "TrackedLoader",
    "TwoViews",
    "ViewPairSampler",
    "ViewRng",
    "ViewRngs",
    "cifar",
    "collate_overlap",
    "collate_rows",
    "digits",
    "eval_transform",
    "open_dataset",
    "pair_halves",
    "load_into_memory",
    "stratified_split",
    "subset",
    "synthetic",
    "train_transform",
    "view_key",
    "with_label_noise",
]
