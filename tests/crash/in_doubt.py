#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: when the disk fails in the one write that makes a commit valid, the service ends with the reason and code 1, is
started again, and nothing that was committed is lost; the VM runs on, attaches again, and its memory is right.

  in_doubt.py BUILD [--rounds N] [--seed S]
"""
import argparse
import http.client
import mmap
import os
import random
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, seed_from  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def doubt(b, page, kept):
    """A snapshot whose commit's meta page fails; then the next start."""
    page[64:72] = struct.pack("q", 1)
    try:
        b.snapshot("web", timeout=30)
        raise RuntimeError("a commit was acknowledged whose meta page failed")
    except (Failed, OSError, http.client.HTTPException):
        pass
    check(b.service.wait(30) == 1, f"the service ended with {b.service.returncode}")
    b.start()
    b.vm_ready("web")
    have = {s["id"] for s in b.snapshots("web")}
    check(kept <= have, f"lost: {kept - have}")
    kept |= have | {b.snapshot("web")["id"]}


def main():
    p = argparse.ArgumentParser()
    p.add_argument("build")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--seed", type=lambda s: int(s, 0))
    args = p.parse_args()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        path = os.path.join(b.dir, "fail")
        with open(path, "wb") as f:
            f.truncate(4096)
        with open(path, "r+b") as f:
            page = mmap.mmap(f.fileno(), 4096)
        b.preload = {"LD_PRELOAD": os.path.join(b.build, "tests", "lib", "libfailcalls.so"), "SNAPD_FAIL_FILE": path}
        b.start()
        vm = b.vm("web", "--accel", "sim", "--mem", "4M", "--vcpus", "1", "--rate", "300", "--digest", "--seed",
                  rng.getrandbits(30))
        b.vm_ready("web")
        kept = {b.snapshot("web")["id"]}
        for _ in range(args.rounds):
            doubt(b, page, kept)
        for snap in sorted(kept):
            check(b.verify(snap)["digest_matches"], f"snapshot {snap} differs")
        with open(os.path.join(b.dir, "snapd.log")) as f:
            said = f.read().count("the disk failed in a commit")
        check(said == args.rounds, f"told {said} times, not {args.rounds}")
        vm.stop()
        check(b.stop() == 0, "exit code of the service")
    print(f"{args.rounds} commits in doubt: {len(kept)} snapshots whole")


main()
