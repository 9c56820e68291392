#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Guest memory from each kind of file that an agent takes (memfd, shm, hugetlbfs): snapshots equal the guest's own
digest while its memslots are punched, a rollback brings one back, and a restore fills a new VMM's files.  Holes can't
be made in a part of a huge page, so zero pages come another way there.

  backings.py BUILD KIND [--accel kvm|sim] [--seed S]         exit 77: no huge pages to be had on this machine
"""
import argparse
import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, need_accel, seed_from, skip  # noqa: E402

HUGE = "/sys/kernel/mm/hugepages/hugepages-2048kB"
WANT = 48  # two guests of 32M and the odd areas that get backing of their own


def number(name):
    with open(os.path.join(HUGE, name)) as f:
        return int(f.read())


def reserve():
    """Huge pages for the run; returns the number to go back to."""
    try:
        before, free = number("nr_hugepages"), number("free_hugepages")
        if free < WANT:
            with open(os.path.join(HUGE, "nr_hugepages"), "w") as f:
                f.write(str(before + WANT - free))
        if number("free_hugepages") >= WANT:
            return before
        release(before)
    except OSError as e:
        skip(f"cannot reserve huge pages: {e}")
    skip(f"no {WANT} huge pages of 2 MiB to be had")


def release(before):
    with open(os.path.join(HUGE, "nr_hugepages"), "w") as f:
        f.write(str(before))


def equal(b, sel):
    if b.verify(sel).get("digest_matches") is not True:
        raise RuntimeError(f"snapshot {sel} differs from the guest's memory")


def run(b, kind, accel, seed):
    b.start()
    options = ["--accel", accel, "--mem", "16M", "--backing", kind, "--digest", "--rate", "2000", "--seed", seed]
    vm = b.vm("first", *options, "--punch", "50", "--punch-pattern", "mix", "--device", "200")
    b.vm_ready("first")
    snaps = []
    for _ in range(4):
        time.sleep(0.2)
        snaps.append(b.snapshot("first")["id"])
        equal(b, snaps[-1])
    b.rollback("first", snaps[1])
    after = b.snapshot("first")["id"]
    equal(b, after)
    vm.stop()
    second = b.vm("second", *options, "--restore", str(snaps[2]))
    b.vm_ready("second")
    again = b.snapshot("second")["id"]
    equal(b, again)
    second.stop()
    print(f"{kind}: {len(snaps) + 2} snapshots equal, one rolled back to, one restored")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("kind", choices=("memfd", "shm", "hugetlb"))
    ap.add_argument("--accel", default="kvm")
    ap.add_argument("--seed", type=int)
    args = ap.parse_args()
    need_accel(args.accel)
    seed = seed_from(args.seed)
    before = reserve() if args.kind == "hugetlb" else None
    try:
        with Bench(args.build) as b:
            run(b, args.kind, args.accel, seed)
    finally:
        if before is not None:
            release(before)


main()
