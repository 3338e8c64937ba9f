"""Times of the CPU op and of host work that a change must not lengthen unnoticed; `make bench-regress`."""
