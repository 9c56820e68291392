#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""snapd is killed (-9) at random instants while it makes snapshots, 200 times.

After each restart: every acknowledged snapshot is there; one that was committed but whose answer was
lost may be there, and is then whole; the guest ran on while nobody served it.  At the end every
snapshot verifies by digest, and the guest found no error in its memory.

  kill_service.py BUILD [--accel kvm|sim] [--kills N] [--seed S]
"""
import argparse
import os
import random
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, need_accel, seed_from  # noqa: E402


def one(b, rng, acked, figures):
    # The instant: anywhere from before the request is read to after the commit.
    job = b.call("POST", "/v1/vms/guest/snapshots", {})["job"]
    time.sleep(rng.random() * rng.choice([0.03, 0.1, 0.3, 0.6]))
    try:
        job = b.get(f"/v1/jobs/{job['id']}")["job"]
    except (OSError, Failed):
        pass
    done = job["state"] == "done"
    if done:
        acked.append(job["result"]["snapshot"]["id"])
        figures["acknowledged"] += 1
    b.service.kill()
    b.service.wait()
    b.start()
    b.vm_ready("guest")
    have = {s["id"] for s in b.snapshots("guest")}
    lost = set(acked) - have
    if lost:
        raise RuntimeError(f"acknowledged snapshots lost: {sorted(lost)}")
    extra = have - set(acked)
    if len(extra) > (0 if done else 1):
        raise RuntimeError(f"snapshots nobody asked for: {sorted(extra)}")
    for snap in extra:
        figures["committed_unanswered"] += 1
        acked.append(snap)
    if acked:
        r = b.verify(acked[-1])
        if not r["digest_matches"]:
            raise RuntimeError(f"snapshot {acked[-1]} differs from memory: {r}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--kills", type=int, default=200)
    p.add_argument("--limit", type=float, default=280)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    figures = dict(kills=0, acknowledged=0, committed_unanswered=0)
    with Bench(args.build) as b:
        b.start()
        vm = b.vm("guest", "--accel", args.accel, "--mem", "16M", "--vcpus", "2", "--workload", "random",
                  "--seed", rng.getrandbits(30), "--digest", "--punch", "30", "--punch-pattern", "mix")
        b.vm_ready("guest")
        acked = []
        end = time.monotonic() + args.limit
        while figures["kills"] < args.kills:
            if time.monotonic() > end:
                raise RuntimeError(f"only {figures['kills']} kills in {args.limit} s")
            one(b, rng, acked, figures)
            figures["kills"] += 1
            vm.check()
        for snap in acked:
            if not b.verify(snap)["digest_matches"]:
                raise RuntimeError(f"snapshot {snap} differs from memory at the end")
        vm.stop()
        b.stop()
    print(" ".join(f"{k} {v}" for k, v in figures.items()), f"verified {len(acked)}")


if __name__ == "__main__":
    main()
