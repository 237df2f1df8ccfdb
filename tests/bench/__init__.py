"""Benchmarks: convtool beside what people use instead, as ratios within one run. `make bench` runs them."""
