#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: on a disk that is really full a snapshot fails with one line that says why, and the VM is unharmed; deleting in the
middle and gc make room, and then a snapshot is whole again, as are those that stayed.

  full_disk.py BUILD      (in a mount namespace of its own: a small tmpfs is the disk)
"""
import argparse
import os
import random
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, seed_from, skip  # noqa: E402


MOVES = 1500  # of the guest between two snapshots; it rests meanwhile


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def fill(b, vm):
    """Snapshots until one fails; the reason."""
    for _ in range(100):
        vm.move(MOVES)
        p = b.snapctl("snapshot", "web", check=False)
        if p.returncode:
            return p
    raise RuntimeError("the disk does not get full")


def run(b, rng):
    b.service_args = ["--segment", "2M", "--compression", "none"]
    b.start()
    vm = b.vm("web", "--accel", "sim", "--mem", "8M", "--vcpus", "1", "--workload", "random", "--digest", "--seed",
              rng.getrandbits(30), lockstep=True)
    b.vm_ready("web")
    for _ in range(2):
        p = fill(b, vm)
        check(p.returncode == 1 and p.stderr.count("\n") == 1 and "No space left on device" in p.stderr, f"full: {p}")
        check(b.snapctl("snapshot", "web", check=False).returncode == 1, "there is room all at once")
        vm.check()
        ids = [s["id"] for s in b.snapshots("web")]
        check(len(ids) > 2, f"snapshots: {ids}")
        for i in ids[1:-1]:
            b.snapctl("delete", str(i))
        b.snapctl("store", "gc")
        vm.move(MOVES)
        b.snapctl("snapshot", "web")
        vm.check()
        for snap in b.snapshots("web"):
            check(b.verify(snap["id"])["digest_matches"], f"snapshot {snap['id']} differs")
        b.snapctl("delete", str(ids[-1]))
        b.snapctl("store", "gc")
    p = b.snapctl("store", "check", "--read-data", check=False)
    check(p.returncode == 0, f"check: {p}")
    vm.stop()
    b.stop()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("build")
    p.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--seed", type=lambda s: int(s, 0))
    args = p.parse_args()
    if not args.inside:
        if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL).returncode:
            skip("may not mount")
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv, "--inside"])
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        os.mkdir(b.store, 0o700)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=44m,mode=700", "tmpfs", b.store], check=True)
        try:
            run(b, rng)
        finally:
            subprocess.run(["umount", "--lazy", b.store], check=True)
    print("a full disk: refused with the reason, and room made by deleting in the middle")


main()
