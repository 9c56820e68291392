# SPDX-License-Identifier: MIT
"""A strict reader of the Prometheus text format, and what `promtool check metrics` would say of it.

read(text) gives {family: Family}; lint(families) a list of complaints; both are tested by tests/unit/promtext.py on
texts that are wrong in one way each.
"""
import re

NAME = re.compile(r"[a-z_:][a-z0-9_:]*\Z")
SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([-+]?[0-9.eE+-]+|[-+]?Inf|NaN)\Z")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|\Z)')
NOT_BASE = ("milliseconds", "microseconds", "nanoseconds", "ms", "us", "ns", "minutes", "hours", "days", "kib", "mib", "gib",
            "kilobytes", "megabytes", "gigabytes", "kb", "mb", "gb", "percent")
PARTS = {"counter": ("",), "gauge": ("",), "summary": ("_sum", "_count", ""), "histogram": ("_bucket", "_sum", "_count")}


class Bad(Exception):
    pass


class Family:
    def __init__(self, name):
        self.name, self.help, self.type, self.samples = name, None, None, []  # samples: (name, {label: value}, number)


def labels_of(text):
    labels, at = {}, 0
    while at < len(text):
        m = LABEL.match(text, at)
        if not m:
            raise Bad(f"labels {{{text}}}")
        if m[1] in labels:
            raise Bad(f"label {m[1]} twice in {{{text}}}")
        labels[m[1]] = m[2]
        at = m.end()
    return labels


def belongs(family, name):
    return name in [family.name + p for p in PARTS[family.type]]


def read(text):
    """Families in their order; Bad, with the line, when it is not the format or lines of a family do not stand together."""
    families, now, seen = {}, None, set()
    if not text.endswith("\n"):
        raise Bad("no newline at the end")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            m = re.match(r"# (HELP|TYPE) (\S+) (.*)\Z", line)
            if m:
                if now is None or now.name != m[2]:
                    if m[2] in families:
                        raise Bad(f"{m[2]} again")
                    now = families[m[2]] = Family(m[2])
                field = m[1].lower()
                if getattr(now, field) is not None or now.samples:
                    raise Bad(f"{m[1]} again, or after samples")
                if field == "type" and m[3] not in PARTS:
                    raise Bad(f"type {m[3]}")
                setattr(now, field, m[3])
                continue
            m = SAMPLE.match(line)
            if not m:
                raise Bad("neither HELP, TYPE nor a sample")
            if now is None or now.type is None or not belongs(now, m[1]):
                raise Bad(f"{m[1]} is not of the family before it")
            labels = labels_of(m[2] or "")
            series = (m[1], tuple(sorted(labels.items())))
            if series in seen:
                raise Bad("this series again")
            seen.add(series)
            now.samples.append((m[1], labels, float(m[3])))
        except Bad as e:
            raise Bad(f"line {number}: {e}: {line}") from None
    return families


def buckets(family):
    """Complaints about a histogram: cumulative, +Inf is the count, sum and count there."""
    by = {}
    for name, labels, value in family.samples:
        key = tuple(sorted((k, v) for k, v in labels.items() if k != "le"))
        by.setdefault(key, []).append((name[len(family.name):], labels.get("le"), value))
    for key, rows in by.items():
        le = [(float(b.replace("+Inf", "inf")), v) for part, b, v in rows if part == "_bucket"]
        count = [v for part, _, v in rows if part == "_count"]
        if le != sorted(le) or [v for _, v in le] != sorted(v for _, v in le):
            yield f"{family.name}{key}: buckets are not cumulative"
        elif not le or le[-1][0] != float("inf") or count != [le[-1][1]]:
            yield f"{family.name}{key}: +Inf is not the count"
        if len([1 for part, _, _ in rows if part == "_sum"]) != 1:
            yield f"{family.name}{key}: no sum"


def lint(families):
    bad = []
    for f in families.values():
        words = f.name.split("_")
        if not NAME.match(f.name) or ":" in f.name or "__" in f.name:
            bad.append(f"{f.name}: not a good name")
        if not f.help or not f.help.endswith(".") or not f.help[0].isalnum():
            bad.append(f"{f.name}: HELP is no sentence")
        if (words[-1] == "total") != (f.type == "counter"):
            bad.append(f"{f.name}: _total is for counters, and only for them")
        if words[-1] in ("sum", "count", "bucket", "info") and not (words[-1] == "info" and f.type == "gauge"):
            bad.append(f"{f.name}: ends like a part of a histogram")
        for w in words:
            if w in NOT_BASE:
                bad.append(f"{f.name}: {w} is no base unit: want seconds, bytes, ratio")
            if w in ("counter", "gauge", "histogram", "summary", "metric"):
                bad.append(f"{f.name}: the type is no part of the name")
        for unit in ("seconds", "bytes", "ratio"):
            if unit in words and words.index(unit) < len(words) - (2 if words[-1] == "total" else 1):
                bad.append(f"{f.name}: the unit goes last")
        for _, labels, value in f.samples:
            if "le" in labels and f.type != "histogram" or any(not NAME.match(l) for l in labels):
                bad.append(f"{f.name}: labels {labels}")
            if f.type != "gauge" and value < 0:
                bad.append(f"{f.name}: below zero")
        if len({tuple(sorted(set(l) - {"le"})) for _, l, _ in f.samples}) > 1:
            bad.append(f"{f.name}: samples with different labels")
        if f.type == "histogram":
            bad.extend(buckets(f))
    return bad


def names(families):
    """All that a query may name."""
    return {f.name + p for f in families.values() for p in PARTS[f.type]}
