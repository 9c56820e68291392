#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What an operator does with any VM, done with a QEMU that has two disks and a network card.

  everyday.py BUILD

`vms` tells of it; snapshots with self-checks, diff, verify, export, backup; a rollback says which disks it left alone;
a policy whose hooks (contrib/qemu/disks-at-snapshot) stop the VM and keep its disks, raw and qcow2, as they are then; two
clones of that at once, on those disks.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

from qemuvm import QEMU, Bench, QemuVm, image, need_qemu, skip, stopped_snapshot

MAC = "52:54:00:01:02:03"
HOOK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "contrib", "qemu", "disks-at-snapshot")


class Everyday(QemuVm):
    """Paths on its command line are of its directory, so that clones do not meet."""

    def __init__(self, b, name, command=None):
        self.dir = os.path.join(b.dir, name)
        os.mkdir(self.dir)
        super().__init__(b, name, mem=16, adapter=False, argv=["env", "-C", self.dir, *(command or self.command(b, name))])
        self.serial, self.qmp_path = os.path.join(self.dir, "serial"), os.path.join(self.dir, "qmp")

    def command(self, b, name):
        with open(os.path.join(b.dir, "raw"), "wb") as f:
            f.write(image(b.build, "native", "img", pages=100, pause=100))
        subprocess.run(["qemu-img", "create", "-qf", "qcow2", os.path.join(b.dir, "qcow2"), "1M"], check=True)
        return [b.launcher, "--vm", name, "--", QEMU, "-m", "16", "-nodefaults", "-display", "none",
                "-serial", "file:serial", "-qmp", "unix:qmp,server=on,wait=off",
                "-qmp", "unix:hook,server=on,wait=off",
                "-drive", f"file={b.dir}/raw,format=raw,if=ide",
                "-blockdev", json.dumps({"driver": "qcow2", "node-name": "q", "file": {
                    "driver": "file", "filename": f"{b.dir}/qcow2"}}), "-device", "virtio-blk-pci,drive=q",
                "-device", f"e1000,mac={MAC},netdev=n", "-netdev", "user,id=n,restrict=on"]


def looked_at(b, vm):
    out = b.snapctl("vms").stdout
    for word in ("QEMU ", "machine pc-i440fx-", "memory blocks", "16.0 MiB"):
        assert word in out, f"{word!r} not in: {out}"
    first = b.snapshot("vm", name="first")["id"]
    vm.wait_lines(3)
    snap, ram, said = stopped_snapshot(b, vm, name="second")  # compared with all RAM
    vm.wait_lines()
    assert "0 missed" in b.snapctl("self-check", "vm").stdout
    assert "differ" in b.snapctl("diff", "vm@first", "vm@second").stdout
    for s in (first, snap["id"]):
        b.verify(s, digest=False)
    b.snapctl("export", "vm@second", os.path.join(b.dir, "exported"))
    with open(os.path.join(b.dir, "exported"), "rb") as f:
        assert f.read() == ram, "the exported file is not as RAM was"
    b.snapctl("backup", "push", "vm@second")
    b.snapctl("delete", "vm@second")
    b.snapctl("backup", "pull", "vm@second", "--name", "from-far")
    out = b.snapctl("rollback", "--other-vm", "vm", "from-far@second").stdout
    for disk in ("raw", "qcow2"):
        assert f"not rolled back: {b.dir}/{disk}\n" in out, out
    vm.wait_lines(3)


def kept_with_disks(b, vm):
    """The policy's snapshot, and {disk: the file that is as it was then}."""
    hook = f"{sys.executable} {HOOK} {vm.dir}/hook"
    b.snapctl("policy", "set", "disks", "vms=vm", "every=1h", "consistency=quiesce", f"pre_hook={hook}", f"post_hook={hook}")
    vm.monitor.status()
    vm.monitor.events.clear()
    b.snapctl("policy", "run", "disks")
    record = f"{vm.dir}/hook.disks"
    b.until(lambda: os.path.exists(record) and os.path.getsize(record), 60, "the policy's snapshot and its disks")
    assert vm.monitor.status() == "running"
    with open(record) as f:
        kept = json.loads(f.readline())
    stopped = [e["event"] for e in vm.monitor.events if e["event"] in ("STOP", "RESUME")]
    assert stopped == ["STOP", "RESUME"], f"the VM is to stand from the disks to the snapshot: {stopped}"
    # QEMU writes to the overlays from now on: what lies below is the copy.
    then = {os.path.basename(d["then"]): d["then"] for d in kept["disks"]}
    assert set(then) == {"raw", "qcow2"} and all(os.path.exists(d["now"]) for d in kept["disks"]), kept
    vm.wait_lines(3)
    return kept["snapshot"], then


def clone(b, snap, then, name, number):
    mine = {}
    for disk, fmt in (("raw", "raw"), ("qcow2", "qcow2")):
        mine[disk] = os.path.join(b.dir, f"{disk}-{name}")
        # -drive format=raw takes no overlay
        subprocess.run(["qemu-img", "convert", "-UO", "raw", "-f", fmt, then[disk], mine[disk]] if fmt == "raw" else
                       ["qemu-img", "create", "-qf", "qcow2", "-b", then[disk], "-F", fmt, mine[disk]], check=True)
    mac = f"52:54:00:01:02:{number:02x}"
    argv = [b.tool("snapctl"), "restore", snap, "--name", name, "--mac", f"{MAC}={mac}",
            "--disk", ",".join(f"{b.dir}/{d}={path}" for d, path in mine.items())]
    said = subprocess.run([*argv, "--print"], env=b.env, capture_output=True, text=True)
    assert mac in said.stdout and "as it is now" not in said.stderr, said
    vm = Everyday(b, name, argv)
    b.vm_ready(name, 60)
    with open(f"/proc/{vm.process.pid}/cmdline") as f:
        words = f.read()
    for word in (mac, *mine.values()):
        assert word in words, f"{word} not in {words}"
    return vm


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    args = p.parse_args()
    need_qemu()
    if not shutil.which("qemu-img"):
        skip("no qemu-img")
    with Bench(args.build) as b:
        b.service_args += ["--backup", f"file://{b.dir}/repository", "--policies", os.path.join(b.dir, "policies")]
        b.start()
        vm = Everyday(b, "vm")
        b.vm_ready("vm")
        vm.wait_lines()
        looked_at(b, vm)
        snap, then = kept_with_disks(b, vm)
        said = subprocess.run([b.tool("snapctl"), "restore", snap, "--name", "x", "--print"], env=b.env,
                              capture_output=True, text=True).stderr
        assert f"{b.dir}/raw is used as it is now" in said, said
        clones = [clone(b, snap, then, name, i) for i, name in enumerate(("one", "two"), 16)]
        for vm in clones:
            vm.wait_lines(2)
            b.snapshot(vm.name)
        assert clones[0].lines()[0] == clones[1].lines()[0], "the clones do not begin at the same point"


if __name__ == "__main__":
    main()
