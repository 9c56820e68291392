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
        "--json", "--quiet", "--seed", str(seed), "--duration", "0.8"]
patterns = ["hole", "resize", "newid", "merge", "move", "alias", "otherbacking", "remove"]
runs = [["--workload", w] for w in ("sequential", "random", "hotcold", "mix")]
runs += [["--punch", "100", "--punch-pattern", p, "--dimm", "4M"] for p in patterns]
runs += [["--punch", "100", "--punch-pattern", "all", "--dimm", "4M", "--punch-mode", "paused", "--ring", "1024"],
         ["--workload", "sequential", "--writes", "3000", "--duration", "60", "--rate", "10000"],
         ["--epoch-ms", "10", "--ring", "1024", "--punch", "20", "--punch-pattern", "mix"],
         ["--vhost", "500", "--balloon", "500", "--mirror", "10", "--punch", "100", "--punch-pattern", "mix"],
        ["--plain", "--vcpus", "1"]]

print(f"seed {seed} (repeat with SNAPD_SEED={seed})")
for args in runs:
    p = subprocess.run([snapvm, *base, *args], stdout=subprocess.PIPE, text=True, timeout=90,
                       stdin=subprocess.DEVNULL)
    if p.returncode == 77:
        print("skipped: snapvm cannot use /dev/kvm")
        sys.exit(77)
    what = " ".join(args)
    assert p.returncode == 0, f"{what}: exit {p.returncode}: {p.stdout}"
    r = json.loads(p.stdout)
    assert r["ok"] and r["errors"] == 0, f"{what}: {r}"
    assert all(r["writes"]), f"{what}: a vCPU did nothing: {r['writes']}"
    if "--plain" not in args:
        assert r["verified"] and r["device_ok"], f"{what}: nothing was verified: {r}"
    if "--writes" in args:
        assert r["writes"] == [3000, 3000], f"{what}: {r['writes']}"
    if "--mirror" in args:
        assert r["spare_writes"] and r["discards"] and r["mirror_checks"], f"{what}: {r}"
    if "--epoch-ms" in args:
        assert r["epochs"]["total"] > 1 and r["epochs"]["pages"], f"{what}: {r['epochs']}"
    for pattern in patterns:
        if pattern in args:
            assert r["punches"][pattern], f"{what}: {r['punches']}"
    assert r["agent"]["unresolved"] == 0, f"{what}: {r['agent']}"
    print(f"{what}: {sum(r['writes'])} writes, {r['verified']} pages verified, "
          f"{r['punches']['total']} punches, {r['hole_loads'] + r['hole_stores']} accesses in holes")
