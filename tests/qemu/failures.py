#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""QEMU dies, or its monitor falls silent, at each step of a snapshot and of a rollback: a proxy between the adapter
and QEMU's monitor does it when the step's command comes by.  The job fails with a reason, the service and what it
has stored are sound; and where QEMU comes back, the VM runs, or is paused and says so.

  failures.py BUILD killed|silent [--all] [--seed S]       --all: each step; else two that are drawn
"""
import argparse
import random
import threading

from proxy import ProxiedVm
from qemuvm import Bench, Failed, need_qemu, seed_from, stopped_snapshot

SNAPSHOT = ["query-migrate", "stop", "migrate-set-capabilities", "getfd", "migrate", "cont"]
ROLLBACK = ["stop", "add-fd", "blockdev-add", "snapshot-load", "job-dismiss", "blockdev-del", "cont"]
AFTERWARDS = ("job-dismiss", "blockdev-del", "cont")  # the state is saved or loaded by then


def begin(b, name):
    vm = ProxiedVm(b, name, mem=16, pages=300, pause=100)
    b.vm_ready(name, 60)
    vm.wait_lines()
    return vm, stopped_snapshot(b, vm)[0]


def attempt(b, vm, what, snap):
    """The error's text, or None: done all the same."""
    try:
        if what == "snapshot":
            b.snapshot(vm.name, timeout=150)
        else:
            b.rollback(vm.name, snap["id"])
    except Failed as e:
        assert e.args[0].strip(), "no reason"
        return str(e)
    return None


def killed(b, number, what, step):
    vm, snap = begin(b, f"vm{number}")
    vm.proxy.arm(step, vm.process.kill)
    error = attempt(b, vm, what, snap)
    assert vm.proxy.hit.is_set(), f"{what}: {step} never came"
    assert error or step == "cont", f"{what} of a QEMU that was killed at {step} succeeded"
    vm.kill()
    return f"{what}, killed at {step}: {error}"


def silent(b, number, what, step):
    vm, snap = begin(b, f"vm{number}")
    vm.proxy.arm(step, "hold")
    error = attempt(b, vm, what, snap)
    assert vm.proxy.hit.is_set(), f"{what}: {step} never came"
    assert error or step in AFTERWARDS, f"{what} without an answer to {step} succeeded"
    vm.proxy.release()
    if what == "snapshot":
        vm.wait_lines(3)  # it runs
    else:
        b.until(lambda: attempt(b, vm, what, snap) is None, 60, "a rollback that mends it")
        vm.wait_lines(3)
    b.until(lambda: attempt(b, vm, "snapshot", snap) is None, 60, "snapshots to work again")
    stopped_snapshot(b, vm)
    vm.kill()
    return f"{what}, silent at {step}: {error}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("how", choices=["killed", "silent"])
    p.add_argument("--all", action="store_true")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_qemu()
    rng = random.Random(seed_from(args.seed))
    steps = [("snapshot", s) for s in SNAPSHOT] + [("rollback", s) for s in ROLLBACK]
    if not args.all:
        steps = rng.sample(steps, 2)
    results, broken = [], []

    def one(number, what, step):
        try:
            results.append((killed if args.how == "killed" else silent)(b, number, what, step))
        except Exception as e:  # noqa: BLE001: told below, of all threads
            broken.append(f"{what}, {args.how} at {step}: {type(e).__name__} {e}")

    with Bench(args.build) as b:
        b.start()
        # What waits for time limits can wait at the same time; the rest one after the other.
        threads = [threading.Thread(target=one, args=(i, *s)) for i, s in enumerate(steps)]
        for t in threads:
            t.start()
            if args.how == "killed":
                t.join()
        for t in threads:
            t.join()
        for line in results + broken:
            print(line)
        assert not broken
        for snap in b.snapshots():
            b.verify(snap["id"], digest=False)
        assert b.service.poll() is None
        print(f"{len(steps)} steps, {len(b.snapshots())} snapshots sound")


if __name__ == "__main__":
    main()
