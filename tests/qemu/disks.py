#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Memory and disk of one point, with contrib/qemu/disks-at-snapshot: a guest counts in both, and compares before each
step ("E": they are not of one moment).  Snapshots with their disks, rollbacks of the running VM to each of them, and a
restore in a fresh QEMU on a copy of the disk of then.

  disks.py BUILD [--disk ide|ahci|virtio]
"""
import argparse
import json
import os
import shutil
import subprocess
import sys

from qemuvm import Bench, QemuVm, need_qemu, skip

HOOK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "contrib", "qemu", "disks-at-snapshot")


def kept(b, vm, socket):
    """Snapshots of the policy so far, the last of them new."""
    record = socket + ".disks"
    before = sum(1 for _ in open(record)) if os.path.exists(record) else 0
    b.snapctl("policy", "run", "disks")
    b.until(lambda: os.path.exists(record) and sum(1 for _ in open(record)) > before, 60, "the policy's snapshot")
    with open(record) as f:
        return [json.loads(line) for line in f]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--disk", default="virtio", choices=["ide", "ahci", "virtio"])
    args = p.parse_args()
    need_qemu()
    if not shutil.which("qemu-img"):
        skip("no qemu-img")
    with Bench(args.build) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies")]
        b.start()
        socket = os.path.join(b.dir, "hook")
        vm = QemuVm(b, "vm", "writer", mem=16, disk=args.disk, more=["-qmp", f"unix:{socket},server=on,wait=off"])
        b.vm_ready("vm", 60)
        vm.wait_lines(3)
        hook = f"{sys.executable} {HOOK} {socket}"
        b.snapctl("policy", "set", "disks", "vms=vm", "every=1h", "consistency=quiesce", f"pre_hook={hook}", f"post_hook={hook}")
        for _ in range(3):
            points = kept(b, vm, socket)
            vm.wait_lines(3)
        env = dict(b.env, PATH=os.path.join(b.build, "tools") + ":" + os.environ["PATH"])
        for point in (points[0], points[2], points[1]):
            p = subprocess.run([sys.executable, HOOK, socket, "rollback", str(point["snapshot"])], env=env,
                               capture_output=True, text=True, timeout=120)
            assert p.returncode == 0, p.stdout + p.stderr
            vm.wait_lines(4)  # "E" among them: disk and memory are not of one moment
        vm.kill()
        disk = os.path.join(b.dir, "clone.disk")
        subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", points[2]["disks"][0]["then"], disk], check=True)
        os.rename(disk, vm.disk_path)
        new = QemuVm.__new__(QemuVm)
        new.bench, new.name, new.guest, new.mem_bytes, new.smp = b, "restored", vm.guest, vm.mem_bytes, vm.smp
        new.serial, new.qmp_path, new.log = vm.serial, vm.qmp_path, vm.log
        new.start([b.tool("snapctl"), "restore", str(points[2]["snapshot"]), "--name", "restored"], None)
        b.vm_ready("restored", 60)
        new.wait_lines(4)
        print("memory and disk are of one point after 3 rollbacks and a restore")


if __name__ == "__main__":
    main()
