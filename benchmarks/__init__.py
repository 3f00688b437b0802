"""Measure each op beside what a user would run in its place, and keep the evidence.

`python -m benchmarks run` measures, `python -m benchmarks report` renders what was measured. `pytest benchmarks` times
the same rows by pytest-benchmark. An op joins with one file, test_<op>.py, that declares a Bench.
"""
