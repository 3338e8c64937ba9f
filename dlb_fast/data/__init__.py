"""Data for training with the last mini-batch: plan, samplers, loaders, datasets, transforms of a view.

The first H rows of a batch repeat the last H rows of the batch before, in the same order; the criterion checks this by
the sample ids. This package does not import the losses.
"""

from __future__ import annotations

from dlb_fast.data.batch import Batch
from dlb_fast.data.datasets.arrays import ArrayDataset, cifar, digits, stratified_split, synthetic
from dlb_fast.data.datasets.folder import ImageFolder, ListFile, TinyImageNet
from dlb_fast.data.datasets.noise import subset, with_label_noise
from dlb_fast.data.datasets.open import MapDataset, load_into_memory, open_dataset
from dlb_fast.data.datasets.source import SampleError
from dlb_fast.data.datasets.tar import TarShards
from dlb_fast.data.decode.decode import DecodeError, ImageDecoder
from dlb_fast.data.loaders.overlap import OverlapLoader
from dlb_fast.data.loaders.pipeline import LoaderTimeout
from dlb_fast.data.loaders.resident import ResidentLoader
from dlb_fast.data.loaders.sampled import EvalLoader, SampledLoader
from dlb_fast.data.loaders.two_views import TwoViews, pair_halves
from dlb_fast.data.plan import OverlapPlan
from dlb_fast.data.rng import ViewRng, ViewRngs, view_key
from dlb_fast.data.sampler import (
    ClassBatchSampler,
    HalfBatchSampler,
    IndexedDataset,
    OverlapBatchSampler,
    PlanSampler,
    SampleIndex,
    ViewPairSampler,
    collate_overlap,
    collate_rows,
)
from dlb_fast.data.transforms.crops import (
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
from dlb_fast.data.transforms.erasing import Cutout, RandomErasing
from dlb_fast.data.transforms.mixing import Mix
from dlb_fast.data.transforms.rand_augment import RandAugment

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
    "ImageDecoder",
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
    "PlanSampler",
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
    "TwoViews",
    "ViewPairSampler",
    "ViewRng",
    "ViewRngs",
    "cifar",
    "collate_overlap",
    "collate_rows",
    "digits",
    "eval_transform",
    "load_into_memory",
    "open_dataset",
    "pair_halves",
    "stratified_split",
    "subset",
    "synthetic",
    "train_transform",
    "view_key",
    "with_label_noise",
]
