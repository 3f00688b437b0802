"""How long each op takes beside what a user would run in its place, and the evidence for it.

`python -m benchmarks run` measures, `python -m benchmarks report` renders what was measured, `pytest benchmarks` shows
the same rounds through pytest-benchmark. An op joins with one file, test_<op>.py, that declares a Bench.
"""
