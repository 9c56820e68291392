#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""snapvm by itself, without a service: in every workload, and while its memslots change in every
way, the guest finds its memory as it wrote it.

  snapvm.py SNAPVM ACCEL          ACCEL: kvm or sim; exit 0, 1, or 77: no KVM here
"""
import json
import os
import random
import subprocess
import sys

snapvm, accel = sys.argv[1:3]
seed = int(os.environ.get("SNAPD_SEED") or random.getrandbits(31))
base = ["--accel", accel, "--socket", "/nonexistent/agent.sock", "--mem", "16M", "--device", "500",
        "--json", "--quiet", "--seed", str(seed)]
patterns = ["hole", "resize", "newid", "merge", "move", "alias", "otherbacking", "remove"]
runs = [["--workload", w] for w in ("sequential", "random", "hotcold", "mix")]
runs += [["--punch", "100", "--punch-pattern", p, "--dimm", "4M"] for p in patterns]
runs += [["--punch", "100", "--punch-pattern", "all", "--dimm", "4M", "--punch-mode", "paused", "--ring", "1024"],
         ["--workload", "sequential", "--writes", "3000", "--duration", "60", "--rate", "10000"],
         ["--epoch-ms", "10", "--ring", "1024", "--punch", "20", "--punch-pattern", "mix"],
         ["--vhost", "500", "--balloon", "500", "--mirror", "10", "--punch", "100", "--punch-pattern", "mix"],
        ["--plain", "--vcpus", "1"]]



def run(args, seconds):
    """The figures of one run, in which nothing may be wrong."""
    p = subprocess.run([snapvm, *base, "--duration", str(seconds), *args], stdout=subprocess.PIPE, text=True,
                       timeout=90, stdin=subprocess.DEVNULL)
    if p.returncode == 77:
        print("skipped: snapvm cannot use /dev/kvm")
        sys.exit(77)
    what = " ".join(args)
    assert p.returncode == 0, f"{what}: exit {p.returncode}: {p.stdout}"
    r = json.loads(p.stdout)
    assert r["ok"] and r["errors"] == 0, f"{what}: {r}"
    assert r["agent"]["unresolved"] == 0, f"{what}: {r['agent']}"
    if "--writes" in args:
        assert r["writes"] == [3000, 3000], f"{what}: {r['writes']}"
    return r


def idle(args, r):
    """What the run was for and did not get to."""
    if not all(r["writes"]):
        yield "a vCPU did nothing"
    if "--plain" not in args and not (r["verified"] and r["device_ok"]):
        yield "nothing was verified"
    if "--mirror" in args and not (r["spare_writes"] and r["discards"] and r["mirror_checks"]):
        yield "nothing was mirrored"
    if "--epoch-ms" in args and not (r["epochs"]["total"] > 1 and r["epochs"]["pages"]):
        yield "no epochs"
    for pattern in patterns:
        if pattern in args and not r["punches"][pattern]:
            yield f"no memslot change '{pattern}'"


print(f"seed {seed} (repeat with SNAPD_SEED={seed})")
for args in runs:
    for seconds in (0.8, 3, 12):  # a busy machine gets to all of it later
        r = run(args, seconds)
        missing = list(idle(args, r))
        if not missing:
            break
    what = " ".join(args)
    assert not missing, f"{what}: {', '.join(missing)}: {r}"
    print(f"{what}: {sum(r['writes'])} writes, {r['verified']} pages verified, "
          f"{r['punches']['total']} punches, {r['hole_loads'] + r['hole_stores']} accesses in holes")
