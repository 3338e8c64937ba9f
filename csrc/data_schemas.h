// The schemas of the ops of the data, `dlb_fast::resized_crops_` and `gathered_views_`, as in dlb_fast/data/compiled.py.
#pragma once

#define DLB_VIEW_SCHEMA(n) \
  "int row" n ", int top" n ", int left" n ", int height" n ", int width" n ", bool flip" n
#define DLB_CROPS_SCHEMA                                                                            \
  "resized_crops_(Tensor image, Tensor(a!) images, " DLB_VIEW_SCHEMA("") ", Tensor(b!)? images_b, " \
  DLB_VIEW_SCHEMA("_b") ") -> ()"
#define DLB_GATHER_SCHEMA "gathered_views_(Tensor images, Tensor places, Tensor table, Tensor(a!) out) -> ()"
