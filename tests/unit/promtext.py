#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The reader of metrics is strict: each text below is wrong in one way, and must be told so."""
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
import promtext  # noqa: E402

GOOD = """# HELP a_bytes_total Bytes.
# TYPE a_bytes_total counter
a_bytes_total{vm="x \\" y",uid="0"} 12
a_bytes_total{vm="z",uid="0"} 1.5e3
# HELP b_seconds Time.
# TYPE b_seconds histogram
b_seconds_bucket{le="0.1"} 1
b_seconds_bucket{le="+Inf"} 3
b_seconds_sum 0.7
b_seconds_count 3
"""


def edit(old, new):
    assert old in GOOD, old
    return GOOD.replace(old, new)


UNREADABLE = [
    GOOD.rstrip("\n"),
    edit("1.5e3", "x"),
    edit("1.5e3", "1 2"),
    edit('vm="z"', 'vm="x \\" y"'),
    edit('vm="z"', 'vm="z",vm="z"'),
    edit('vm="z"', 'vm="z'),
    edit("counter", "number"),
    edit("# TYPE a_bytes_total counter\n", ""),
    edit("b_seconds_sum", "c_seconds_sum"),
    GOOD + "a_bytes_total 1\n",
    GOOD + "# HELP a_bytes_total Again.\n# TYPE a_bytes_total counter\n",
    GOOD + "# HELP b_seconds Again.\n",
]
UNTIDY = [
    edit("# HELP a_bytes_total Bytes.\n", ""),
    edit("Bytes.", "bytes"),
    GOOD.replace("a_bytes_total", "a_bytes"),
    GOOD.replace("b_seconds", "b_seconds_total"),
    GOOD.replace("b_seconds", "b_ms"),
    GOOD.replace("a_bytes_total", "a_bytes_read_total"),
    GOOD.replace("a_bytes_total", "a_counter_total"),
    GOOD.replace("a_bytes_total", "aBytes_total"),
    edit("12\n", "-12\n"),
    edit('{vm="z",uid="0"}', '{vm="z"}'),
    edit('{vm="z",uid="0"}', '{vm="z",uid="0",le="1"}'),
    edit('{le="0.1"} 1', '{le="0.1"} 4'),
    edit("b_seconds_count 3", "b_seconds_count 4"),
    edit("b_seconds_sum 0.7\n", ""),
    edit('b_seconds_bucket{le="+Inf"} 3\n', ""),
]

assert promtext.lint(promtext.read(GOOD)) == [], promtext.lint(promtext.read(GOOD))
for text in UNREADABLE:
    try:
        promtext.read(text)
    except promtext.Bad:
        continue
    sys.exit(f"was read:\n{text}")
for text in UNTIDY:
    if not promtext.lint(promtext.read(text)):
        sys.exit(f"nothing was said of:\n{text}")
print(f"{len(UNREADABLE)} texts refused, {len(UNTIDY)} complained of")
