#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A stock Linux kernel in a stock QEMU: it boots under the adapter, and its checkpoints, rollbacks and a restore in a fresh
QEMU are sound: each compared byte by byte with all RAM, and the guest checks its own.

  linux.py BUILD [--rounds N] [--tcg]       --tcg: only that kernel and init boot, without adapter or KVM

The kernel is $SNAPD_TEST_KERNEL, or the newest /boot/vmlinuz-*.  It needs a KVM with EPT or NPT: where guest kernels are
emulated they do not come up.
"""
import argparse
import glob
import os

from qemuvm import QEMU, Bench, QemuVm, need_qemu, skip, stopped_snapshot


def need_hardware():
    for path in ("/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"):
        try:
            with open(path) as f:
                if f.read().strip() in ("Y", "1"):
                    return
        except FileNotFoundError:
            pass
    skip("KVM has no EPT or NPT here: a stock kernel does not come up")


def kernel():
    found = sorted(glob.glob("/boot/vmlinuz-*"), key=os.path.getmtime)
    path = os.environ.get("SNAPD_TEST_KERNEL") or (found[-1] if found else None)
    if not path or not os.access(path, os.R_OK):
        skip("no kernel to boot: neither $SNAPD_TEST_KERNEL nor a /boot/vmlinuz-* that can be read")
    return path


def entry(name, mode, data=b""):
    """Of a newc archive; Documentation/driver-api/early-userspace/buffer-format.rst."""
    name = name.encode() + b"\0"
    head = "070701" + "".join(f"{n:08x}" for n in (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0))
    out = head.encode() + name
    return out + bytes(-len(out) % 4) + data + bytes(-len(data) % 4)


def initrd(b):
    path = os.path.join(b.dir, "initrd")
    with open(os.path.join(b.build, "tests", "qemu", "guests", "linux-init"), "rb") as f:
        init = f.read()
    with open(path, "wb") as f:
        f.write(entry("dev", 0o040755) + entry("init", 0o100755, init) + entry("TRAILER!!!", 0))
    return path


class LinuxVm(QemuVm):
    def arguments(self, guest, mem, smp, disk, cache, vga, more, params):
        return [QEMU, *more, "-m", str(mem), "-smp", str(smp), "-nodefaults", "-display", "none", "-no-reboot",
                "-kernel", kernel(), "-initrd", initrd(self.bench), "-append", "console=ttyS0 quiet panic=-1",
                "-serial", f"file:{self.serial}", "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]


def checkpoints(b, rounds):
    b.start()
    vm = LinuxVm(b, "vm", mem=256, smp=2, more=["-accel", "kvm", "-cpu", "host"])
    b.vm_ready("vm")
    vm.wait_lines(3)
    for _ in range(rounds):
        snap, ram, said = stopped_snapshot(b, vm)
        vm.wait_lines(5)
        vm.monitor.ask("stop")
        b.rollback("vm", snap["id"])
        assert bytes(vm.ram()) == ram, f"memory after the rollback to {snap['id']} differs"
        vm.monitor.ask("cont")
        vm.wait_lines(5)
    vm.kill()
    os.unlink(vm.serial)
    new = LinuxVm(b, "new", argv=[b.tool("snapctl"), "restore", str(snap["id"]), "--name", "new"], adapter=False, mem=256)
    new.serial, new.qmp_path = vm.serial, vm.qmp_path
    b.vm_ready("new", 60)
    new.wait_lines(3)
    assert said <= new.lines()[0][1] <= said + 2, f"restored to {said}, it says {new.lines()[:2]}"
    stopped_snapshot(b, new)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--tcg", action="store_true")
    args = p.parse_args()
    if not args.tcg:
        need_qemu()
        need_hardware()
    kernel()
    with Bench(args.build) as b:
        if args.tcg:
            LinuxVm(b, "vm", mem=256, more=["-accel", "tcg"], adapter=False).wait_lines(10, seconds=300)
        else:
            checkpoints(b, args.rounds)
        print(f"{kernel()} boots")


if __name__ == "__main__":
    main()
