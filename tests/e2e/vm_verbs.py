#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""snapctl's verbs on a running VM: vms, snapshot, list as a tree with a fork, rollback (also by short name, also
with a check), restore from the recorded command line, export and import, and what goes wrong with them.

  vm_verbs.py BUILD [--accel kvm|sim] [--seed S]
"""
import argparse
import json
import os
import random
import re
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Vm, need_accel, seed_from  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def bad(b, code, *argv):
    p = b.snapctl(*argv, check=False)
    check(p.returncode == code and len(p.stderr.strip().splitlines()) == 1,
          f"snapctl {argv}: exit {p.returncode}, not {code}: {p.stderr}")


def js(b, *argv):
    return json.loads(b.snapctl(*argv, "--json").stdout)


def equal(b, sel):
    check(js(b, "verify", "--digest", sel).get("digest_matches") is True, f"{sel} differs from the guest's memory")


def restored(b, sel, name):
    """`snapctl restore` becomes the VMM."""
    vm = Vm.__new__(Vm)
    vm.bench, vm.name, vm.log = b, name, os.path.join(b.dir, f"vm-{name}.log")
    with open(vm.log, "a") as log:
        vm.process = subprocess.Popen([b.tool("snapctl"), "restore", sel, "--name", name], stdout=log, stderr=log,
                                      stdin=subprocess.DEVNULL, env=b.env)
    b.vms.append(vm)
    b.vm_ready(name)
    return vm


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        b.start()
        vm = b.vm("web", "--accel", args.accel, "--mem", "16M", "--vcpus", "2", "--workload", "random",
                  "--seed", rng.getrandbits(30), "--digest", "--device", "50")
        b.vm_ready("web")
        check([v["name"] for v in js(b, "vms")["vms"]] == ["web"], "vms")
        bad(b, 3, "list", "nobody")
        check(len(b.snapctl("list", "web").stdout.splitlines()) == 1, "a VM without snapshots")
        for i in (1, 2, 3):
            s = js(b, "snapshot", "web", "--name", f"s{i}", "--note", f"number {i}", "--tag", "a,b")["snapshot"]
            check(s["name"] == f"s{i}" and s["note"] == f"number {i}" and s["vm"] == "web", f"snapshot: {s}")
            equal(b, f"web@s{i}")
        bad(b, 4, "snapshot", "web", "--name", "s1")
        bad(b, 3, "rollback", "web", "s9")
        check(js(b, "rollback", "--check", "web", "s2").get("checked") is True, "rollback --check")
        found = js(b, "self-check", "web")["self_check"]
        check(found["complete"] and not found["missed"] and found["checked"], f"a self-check: {found}")
        bad(b, 3, "self-check", "nobody")
        b.snapctl("rollback", "web", "web@s1")
        check(": 0 missed" in b.snapctl("snapshot", "web", "--name", "after", "--self-check").stdout,
              "a snapshot with a self-check")
        equal(b, "web@after")
        tree = b.snapctl("list", "--tree", "web").stdout.splitlines()
        check([line.split("  20")[0] for line in tree] == ["web", "├─ 1 s1", "│  ├─ 2 s2", "│  └─ 3 s3", "└─ 4 after"], f"{tree}")
        check(js(b, "diff", "web@s1", "web@s3")["pages"] > 0, "diff")

        other = restored(b, "web@s3", "web2")
        b.snapctl("snapshot", "web2", "--name", "r1")
        equal(b, "web2@r1")
        check("web2@" in b.snapctl("list", "--tree").stdout, "the restored VM's snapshot in the tree")
        image = os.path.join(b.dir, "s3.img")
        b.snapctl("export", "web@s3", image)
        bad(b, 4, "import", image, "--name", "web")
        b.snapctl("import", image)
        equal(b, "web-imported")
        check(js(b, "verify", "--digest", "web-imported")["digest"] == js(b, "verify", "--digest", "web@s3")["digest"],
              "the imported snapshot differs")
        bad(b, 4, "rollback", "web", "web-imported")
        b.snapctl("rollback", "--other-vm", "--check", "web", "web-imported")
        shown = b.snapctl("show", "web@s3").stdout
        records = re.findall(r"^ +(?:\d+ x )?([a-z0-9_.]+) +version", shown, re.M)
        check(len(records) > 5 and len(records) == len(set(records)), f"records: {shown}")
        for line in ("snapd_vm_harvested_entries_total{vm=\"web\"", "snapd_jobs_ended_total{kind=\"rollback\",state=\"done\"} 3"):
            check(line in b.metrics(), f"no {line} in /metrics")
        other.stop()
        vm.stop()
        b.until(lambda: not js(b, "vms")["vms"] or "ready" not in [v["state"] for v in js(b, "vms")["vms"]], 20, "VMs to go")
        check(b.snapctl("snapshot", "web", check=False).returncode in (3, 4), "snapshot of a VM that is gone")
        check(b.stop() == 0, "exit code of the service")
    print("every verb on a running VM as documented")


if __name__ == "__main__":
    main()
