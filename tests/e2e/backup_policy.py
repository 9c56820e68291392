#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The whole way, end to end: a policy with a recovery point on two VMs whose memory slots are punched all the time, its
backups in a repository; the host is lost; another, empty one brings the newest snapshots back, and each guest goes on
and finds its own memory right.  Before that: nothing is pruned that is not backed up, unless one says so.

  backup_policy.py BUILD [--accel kvm|sim] [--s3 S3-SERVER] [--seed S]

With --s3 the repository is a bucket of a real S3 server, which is started for it, and encrypted.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from s3server import Server, need_server  # noqa: E402
from snaptest import Bench, Vm, need_accel, seed_from  # noqa: E402

VMS = ("left", "right")


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def js(b, *argv):
    return json.loads(b.snapctl(*argv, "--json").stdout)


def guest(args, seed):
    return ["--accel", args.accel, "--mem", "8M", "--vcpus", "1", "--workload", "random", "--punch", "20", "--digest", "--seed", seed]


def lines(b, policy):
    return {x["vm"]: x for x in js(b, "policy", "show", policy)["policy"]["lines"]}


def held(b, args):
    """A repository that can't be reached holds everything; once it can, nothing is held for long."""
    nowhere = os.path.join(b.dir, "a-file")
    open(nowhere, "w").close()
    b.snapctl("policy", "set", "auto", "vms=left", "every=1s", "keep_last=1", f"backup=file://{nowhere}/x")
    b.until(lambda: lines(b, "auto")["left"]["runs"] >= 3, 60, "three runs")
    line = b.until(lambda: (lambda x: x if x["backup"]["failures"] else None)(lines(b, "auto")["left"]), 60, "a failed backup")
    check("backup:" in line["backup"]["said"], f"{line['backup']}")
    check(line["failures"] == 0 and line["pruned"] == 0, f"the runs are not to suffer: {line}")
    b.snapctl("policy", "pause", "auto")
    said = js(b, "prune", "left", "--keep-last", "1", "--dry-run")["snapshots"]
    check(len(said) >= 3 and all(x["keep"] for x in said) and "back" in said[1]["why"], f"{said}")
    said = js(b, "prune", "left", "--keep-last", "1", "--dry-run", "--unbacked")["snapshots"]
    check([x["keep"] for x in said].count(True) == 1, f"{said}")
    b.snapctl("policy", "set", "auto", "vms=left", "every=1s", "keep_last=1", f"backup=file://{nowhere}/x", "backup_hold=no", "paused=no")
    b.until(lambda: lines(b, "auto")["left"]["pruned"], 60, "what is not to be waited for to be pruned")
    b.snapctl("policy", "rm", "auto")


def backed_up(b, url):
    b.snapctl("policy", "set", "run", "recovery_point=1s", "keep_last=2", f"backup={url}", "backup_keep_last=3")
    for vm in VMS:
        b.until(lambda vm=vm: lines(b, "run").get(vm, {}).get("backup", {}).get("pushed", 0) >= 3, 90, f"backups of {vm}")
    b.until(lambda: all(x["pruned"] for x in lines(b, "run").values()), 60, "what is backed up to be pruned")
    there = js(b, "backup", "list", "--repository", url)["snapshots"]
    check({s["vm"] for s in there} == set(VMS) and all(s["layers"] for s in there), f"{there}")
    return url


def chores(b, url):
    """The repository is pruned and verified by the clock; what is damaged is told by figures and log."""
    def figure(name):
        text = b.metrics()
        return next((float(x.split()[-1]) for x in text.splitlines() if x.startswith(name)), None)
    every = "*:*:*"
    b.snapctl("policy", "set", "chores", "vms=none", "every=1h", f"backup={url}", f"backup_prune={every}",
              f"backup_verify={every}", "backup_verify_data=100%")
    b.until(lambda: figure('snapd_backup_operations_total{operation="prune",result="done"}'), 60, "a prune")
    b.until(lambda: figure("snapd_backup_verified_timestamp_seconds"), 60, "a verification")
    if url.startswith("file://"):
        blobs = os.path.join(url[len("file://"):], "blobs")
        b.snapctl("policy", "pause", "run")  # nothing is forgotten meanwhile
        b.until(lambda: not any(x["backup"]["busy"] for x in lines(b, "run").values()), 60, "pushes to be over")
        # The youngest: others may belong to nothing any more, and wait for a prune.
        victim = max((os.path.join(blobs, x) for x in os.listdir(blobs)), key=os.path.getmtime)
        os.rename(victim, victim + ".away")
        b.until(lambda: figure("snapd_backup_damaged_objects"), 60, "the damage to be found")
        os.rename(victim + ".away", victim)
        with open(os.path.join(b.dir, "snapd.log")) as f:
            check(os.path.basename(victim) in f.read(), "the log names it")
        b.until(lambda: figure("snapd_backup_damaged_objects") == 0, 60, "it to be whole again")
    said = js(b, "policy", "show", "chores")["policy"]["chores"]
    check(set(said) == {"prune", "verify"} and all(x["last_s"] and x["due_s"] for x in said.values()), f"{said}")
    b.snapctl("policy", "rm", "chores")


def host_lost(b):
    """Service and VMMs are killed, the store is gone."""
    b.service.send_signal(signal.SIGKILL)
    for vm in b.vms:
        vm.kill()
    b.service.wait()
    shutil.rmtree(b.store)


def restore(b, snap, name):
    """With the command line that travelled with it."""
    vm = Vm.__new__(Vm)
    vm.bench, vm.name, vm.log = b, name, os.path.join(b.dir, f"vm-{name}.log")
    with open(vm.log, "w") as log:
        vm.process = subprocess.Popen([b.tool("snapctl"), "restore", str(snap), "--name", name], env=b.env,
                                      stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    b.vms.append(vm)
    return vm


def prepare(one, server):
    one.service_args += ["--policies", os.path.join(one.dir, "policies")]
    if server:
        key = os.path.join(server.dir, "backup.key")
        if not os.path.exists(key):
            with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
                f.write(os.urandom(32))
        one.service_args += ["--backup-endpoint", server.endpoint, "--backup-key", key]
        one.env.update(server.env)


def lost_and_back(args, rng, server):
    with Bench(args.build) as b, Bench(args.build) as other:
        for one in (b, other):
            prepare(one, server)
        url = f"s3://{server.bucket}/vms" if server else f"file://{other.dir}/repo"
        b.start()
        for name in VMS:
            b.vm(name, *guest(args, rng.getrandbits(30)))
        for name in VMS:
            b.vm_ready(name)
        if not server:
            held(b, args)
        backed_up(b, url)
        chores(b, url)
        for vm in b.vms:
            vm.check()
        host_lost(b)
        other.start()
        check(js(other, "backup", "verify", "--read-data", "--repository", url)["whole"], "not whole")
        restored = []
        for name in VMS:
            snap = js(other, "backup", "pull", name, "--repository", url)["snapshot"]
            check(other.verify(snap)["digest_matches"], f"{name} is not the guest's memory")
            restored.append(restore(other, snap, f"{name}-again"))
        for vm in restored:
            other.vm_ready(vm.name)
            time.sleep(0.5)
            check(other.verify(other.snapshot(vm.name, self_check=True)["id"])["digest_matches"], "the restored guest's memory")
            vm.stop()  # fails when the guest found its memory wrong
        check(other.stop() == 0, "exit code of the service")
    print("two VMs, one host lost, both back: as their guests remember")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="sim", choices=["kvm", "sim"])
    p.add_argument("--s3", help="the program that starts a server")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    if not args.s3:
        return lost_and_back(args, rng, None)
    need_server()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is stopped then, too
    server = Server(args.s3)
    try:
        lost_and_back(args, rng, server)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
