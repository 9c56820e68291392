#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Space is given back while everything else runs.

Two VMs take snapshots without a pause.  Beside them, from threads of this program: random snapshots are
deleted and gc runs; others are verified by digest, exported (the file's SHA-256 is that of the guest's
memory), rolled back to with a check, and restored into a new VM, which is snapshotted and verified in turn; a scrub
reads everything again and again, and finds no damage.
Something that was deleted meanwhile may be not found, and a busy service may say so; any other failure
counts.  At the end every snapshot that is left verifies, and deleting most of them gives space back.

  gc_race.py BUILD [--accel kvm|sim] [--seconds N] [--seed S]
"""
import argparse
import base64
import collections
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, Vm, need_accel, seed_from  # noqa: E402

VMS = ("left", "right")
FEW = 4  # so many snapshots are left alone
PAGE = 4096
NOT_FOUND, CONFLICT = 3, 4  # exit codes of snapctl


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def file_digest(path):
    """Of an exported memory file, and what the VMM recorded in the pause."""
    with open(path + ".json") as f:
        state = json.load(f)
    records = {r["name"]: r for r in state["records"] if r["name"] in ("pieces", "note.ram-sha256")}
    pieces = base64.b64decode(records["pieces"]["payload"])
    places = {}
    for gpa, size, at in state["memory"]["map"]:
        places.update((gpa // PAGE + i, at + i * PAGE) for i in range(size // PAGE))
    h = hashlib.sha256()
    with open(path, "rb") as f:
        for home, n, _, _, _ in struct.iter_unpack("<QQIIQ", pieces):
            for gfn in range(home, home + n):
                f.seek(places[gfn])
                h.update(struct.pack("<Q", gfn))
                h.update(f.read(PAGE))
    return h.digest(), base64.b64decode(records["note.ram-sha256"]["payload"])


class Race:
    def __init__(self, b, rng, seconds):
        self.b = b
        self.end = time.monotonic() + seconds
        self.failures, self.lock = [], threading.Lock()
        self.count = dict(snapshots=0, deleted=0, collected=0, verified=0, exported=0, rolled_back=0, restored=0,
                          not_found=0, busy=0)
        self.freed = 0
        self.picked = collections.deque(maxlen=2)
        self.threads = [threading.Thread(target=self.loop, args=(step, random.Random(rng.getrandbits(60)), *args))
                        for step, *args in [(self.snapshot, vm) for vm in VMS] +
                        [(self.delete,), (self.collect,), (self.verify,), (self.export,), (self.roll_back,),
                         (self.restore,)]]

    def add(self, what):
        with self.lock:
            self.count[what] += 1

    def loop(self, step, rng, *args):
        # On a machine that is busy with others, until there was something to race with.
        while not self.failures and time.monotonic() < self.end + (0 if self.freed else 60):
            try:
                step(rng, *args)
            except Failed as e:
                if e.code not in ("not-found", "busy"):
                    self.failures.append(f"{step.__name__}: {e}")
                self.add("not_found" if e.code == "not-found" else "busy")
            except Exception as e:  # noqa: BLE001 - told at the end
                self.failures.append(f"{step.__name__}: {type(e).__name__}: {e}")

    def run(self):
        for t in self.threads:
            t.start()
        for t in self.threads:
            t.join(120)
            check(not t.is_alive(), "a thread hangs")
        check(not self.failures, "; ".join(self.failures))

    def pick(self, rng, vm=None):
        snap = rng.choice(self.b.until(lambda: self.b.snapshots(vm), 20, "a snapshot"))["id"]
        self.picked.append(snap)
        return snap

    # ---- what the threads do, over and over ----

    def snapshot(self, rng, vm):
        self.b.job("POST", f"/v1/vms/{vm}/snapshots", {})
        self.add("snapshots")

    def delete(self, rng):
        snaps = self.b.snapshots()
        if len(snaps) <= FEW:
            time.sleep(0.02)
            return
        ids = [s["id"] for s in snaps]
        read = [snap for snap in self.picked if snap in ids]  # most of all what is being read now
        for snap in set(read + rng.sample(ids, rng.randint(1, len(ids) - FEW))):
            self.b.job("DELETE", f"/v1/snapshots/{snap}")
            self.add("deleted")

    def collect(self, rng):
        self.freed += self.b.job("POST", "/v1/store/gc")["bytes_freed"]
        self.add("collected")
        time.sleep(rng.random() * 0.01)

    def verify(self, rng):
        got = self.b.verify(self.pick(rng))
        check(got["digest_matches"], f"snapshot differs: {got}")
        self.add("verified")

    def export(self, rng):
        path = os.path.join(self.b.dir, "export.img")
        p = self.b.snapctl("export", "--force", str(self.pick(rng)), path, check=False)
        if p.returncode in (NOT_FOUND, CONFLICT):
            raise Failed(0, "not-found" if p.returncode == NOT_FOUND else "busy", p.stderr)
        check(not p.returncode, f"export: exit {p.returncode}: {p.stderr.strip()}")
        got, recorded = file_digest(path)
        check(got == recorded, "an exported file differs from the guest's memory")
        self.add("exported")

    def roll_back(self, rng):
        vm = rng.choice(VMS)
        got = self.b.rollback(vm, self.pick(rng, vm), check=True)
        check(got["checked"], "a rollback was not checked")
        self.add("rolled_back")

    def restore(self, rng):
        snap, name = self.pick(rng), f"restored-{rng.getrandbits(40):x}"
        vm = Vm.__new__(Vm)
        vm.bench, vm.name, vm.log = self.b, name, os.path.join(self.b.dir, f"vm-{name}.log")
        with open(vm.log, "w") as log:
            vm.process = subprocess.Popen([self.b.tool("snapctl"), "restore", str(snap), "--name", name],
                                          env=self.b.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.b.vms.append(vm)
        try:
            self.restored(vm, snap)
        finally:
            vm.kill()

    def restored(self, vm, snap):
        def settled():
            return not vm.alive() or self.b.vm_info(vm.name)["state"] == "ready"
        self.b.until(settled, 30, f"snapshot {snap} to be restored")
        if not vm.alive():
            with open(vm.log) as f:
                text = f.read().strip()
            gone = vm.process.returncode == NOT_FOUND or "no snapshot" in text or "no epoch" in text
            check(gone, f"restore of {snap} ended with {vm.process.returncode}: {text}")
            raise Failed(404, "not-found", text)
        new = self.b.snapshot(vm.name)["id"]
        check(self.b.verify(new)["digest_matches"], "a restored VM's snapshot differs")
        vm.stop()
        self.add("restored")


def used(b):
    return b.get("/v1/store/stats")["bytes_used"]


def settle(b):
    """What is left is whole; without it, space comes back."""
    left = [s["id"] for s in b.snapshots()]
    for snap in left:
        check(b.verify(snap)["digest_matches"], f"snapshot {snap} differs at the end")
    before = used(b)
    for snap in left[:-1]:
        b.snapctl("delete", str(snap))
    told = b.snapctl("store", "gc").stdout
    after = used(b)
    check(after < before, f"{before} bytes used, {after} after deleting all but one snapshot")
    check("given back" in told and not told.startswith("0 B"), f"snapctl store gc says: {told}")
    check(b.verify(left[-1])["digest_matches"], f"snapshot {left[-1]} differs without the others")
    print(f"verified {len(left)} used {before >> 10} KiB, then {after >> 10} KiB; snapctl: {told.strip()}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build, service_args=("--segment", "2M", "--scrub-period", "1s", "--scrub-rate", "20M")) as b:
        b.start()
        vms = [b.vm(name, "--accel", args.accel, "--mem", "16M", "--vcpus", "1", "--workload", "random", "--seed",
                    rng.getrandbits(30), "--digest") for name in VMS]
        for name in VMS:
            b.vm_ready(name)
        race = Race(b, rng, args.seconds)
        race.run()
        check(race.freed, "gc gave nothing back")
        b.until(lambda: b.get("/v1/store/scrub")["last"], 60, "a scrub to get round")
        scrub = b.get("/v1/store/scrub")
        check(not scrub["last"]["nr_damages"] and not (scrub["pass"] or {}).get("nr_damages"), f"the scrub: {scrub}")
        with open(os.path.join(b.dir, "snapd.log")) as f:
            check("scrub: segment" not in f.read(), "the scrub saw damage where gc had been")
        for vm in vms:
            vm.stop()
        settle(b)
        check(b.stop() == 0, "exit code of the service")
    print(" ".join(f"{k} {v}" for k, v in race.count.items()), f"freed {race.freed >> 20} MiB")


if __name__ == "__main__":
    main()
