#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Checkpoints of a QEMU that nobody changed: each compared byte by byte with all RAM at the stop, rollbacks to
random ones with what the guest itself checks, snapshots of the running VM, and a restore in a fresh QEMU.

  checkpoints.py BUILD --guest counter|native|disk [--smp N] [--disk ide|ahci|virtio] [--cache MODE] [--vga std]
                 [--rounds N] [--seed S]
"""
import argparse
import random

from qemuvm import PAGE, Bench, QemuVm, need_qemu, seed_from, stopped_snapshot


def first(b, vm):
    """All memory is new; but what was copied while the guest ran is not copied again in the pause."""
    r = b.job("POST", "/v1/vms/vm/snapshots", {})
    assert r["paused_pages"] < vm.mem_bytes // PAGE // 2 or not r["early_pages"], f"{r['paused_pages']} pages in the pause"


def rolled_back(b, vm, snap, ram, said, running):
    """Memory is that of the snapshot; the guest goes on behind what it had said then."""
    if not running:
        vm.monitor.ask("stop")
    before, cut = len(vm.lines()), vm.cut()
    b.rollback(vm.name, snap["id"])
    if running:
        before = len(vm.lines())
    else:
        assert bytes(vm.ram()) == ram, f"{vm.name}: memory after the rollback to {snap['id']} differs"
        vm.monitor.ask("cont")
    # What is said last from here on is of after the rollback: the first vCPU's, of which snapshots keep the number.
    b.until(lambda: [n for c, n in vm.lines()[before:] if c != "m"], 90, "the first vCPU to say something")
    # The line on its way when it stopped is said again, or was cut in two: then its first part and the
    # rest of the line that was on its way when the snapshot was taken may look like one.
    first = [n for c, n in vm.lines()[before:] if c != "m"][0]
    if not running and not cut:
        assert said <= first <= said + 2, f"{vm.name}: rolled back to {said}, it says {first}"


def restored(b, vm, snap, said):
    p = b.snapctl("restore", str(snap["id"]), "--name", "restored", "--print")
    assert "snapd-qemu" in p.stdout and "-m" in p.stdout, p.stdout
    vm.kill()
    new = restart(b, vm, snap)
    b.vm_ready("restored")
    b.until(lambda: any(c != "m" for c, n in new.lines()), 60, "the restored guest to go on")
    first = [n for c, n in new.lines() if c != "m"][0]
    assert said <= first <= said + 2, f"restored to {said}, it says {first}"
    stopped_snapshot(b, new)
    new.kill()


def restart(b, vm, snap):
    """`snapctl restore` becomes QEMU; its files are those of the VM that was."""
    new = QemuVm.__new__(QemuVm)
    new.bench, new.name, new.guest, new.mem_bytes, new.smp = b, "restored", vm.guest, vm.mem_bytes, vm.smp
    new.serial, new.qmp_path, new.log = vm.serial, vm.qmp_path, vm.log
    new._monitor = new._ram = None
    new.start([b.tool("snapctl"), "restore", str(snap["id"]), "--name", "restored"], None)
    return new


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--guest", default="native", choices=["counter", "native", "disk"])
    p.add_argument("--smp", type=int, default=1)
    p.add_argument("--disk", choices=["ide", "ahci", "virtio"])
    p.add_argument("--cache", default="none")
    p.add_argument("--vga", default="none")
    p.add_argument("--mem", type=int, default=16)
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_qemu()
    rng = random.Random(seed_from(args.seed))
    pages = {"counter": 100, "native": 1200, "disk": 0}[args.guest]
    with Bench(args.build) as b:
        b.start()
        vm = QemuVm(b, "vm", args.guest, mem=args.mem, smp=args.smp, disk=args.disk, cache=args.cache, vga=args.vga,
                    pages=pages, pause=rng.choice([0, 100, 1000]))
        b.vm_ready("vm", 60)
        vm.wait_lines()
        first(b, vm)
        taken = []
        for i in range(args.rounds):
            vm.wait_lines(rng.randrange(1, 4))
            taken = (taken + [stopped_snapshot(b, vm)])[-8:]
            if rng.random() < 0.3:
                vm.wait_lines()
                b.snapshot("vm")
            if rng.random() < 0.5:
                rolled_back(b, vm, *rng.choice(taken), running=rng.random() < 0.3)
        snap, ram, said = rng.choice(taken)
        restored(b, vm, snap, said)
        print(f"{args.rounds} checkpoints of {args.guest}, -smp {args.smp}: each as memory was")


if __name__ == "__main__":
    main()
