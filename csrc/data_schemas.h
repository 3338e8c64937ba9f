// The schema of the data's op, `dlb_fast::resized_crops_`, as in dlb_fast/data/transforms/crops.py.
#pragma once

#define DLB_VIEW_SCHEMA(n) \
  "int row" n ", int top" n ", int left" n ", int height" n ", int width" n ", bool flip" n
#define DLB_CROPS_SCHEMA                                                                            \
  "resized_crops_(Tensor image, Tensor(a!) images, " DLB_VIEW_SCHEMA("") ", Tensor(b!)? images_b, " \
  DLB_VIEW_SCHEMA("_b") ", Tensor? table) -> ()"
