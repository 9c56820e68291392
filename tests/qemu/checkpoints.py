#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Checkpoints of a QEMU that nobody changed: each compared byte by byte with all RAM at the stop, rollbacks to
random ones with what the guest itself checks, snapshots of the running VM, and a restore in a fresh QEMU.

  checkpoints.py BUILD --guest counter|native|disk [--smp N] [--disk ide|ahci|virtio] [--cache MODE] [--vga std]
                 [--rounds N] [--seed S]

A guest that a BIOS boots is also checkpointed while it boots, and reset now and then: that is when QEMU changes its
memory slots.  With --vga std the guest draws, and a VNC viewer asks for changes all the time: what it
was told must be what is in video memory.
"""
import argparse
import os
import random
import time

from vnc import Follower
from qemuvm import PAGE, Bench, QemuVm, need_qemu, seed_from, stopped_snapshot


def first(b, vm):
    """All memory is new; but what was copied while the guest ran is not copied again in the pause."""
    r = b.job("POST", "/v1/vms/vm/snapshots", {})
    assert r["paused_pages"] < vm.mem_bytes // PAGE // 2 or not r["early_pages"], f"{r['paused_pages']} pages in the pause"


def booting(b, vm, rng, count):
    """Checkpoints before the guest has said anything, some milliseconds apart; as stopped_snapshot()."""
    taken = []
    while len(taken) < count and len(vm.numbers()) == vm.since:
        time.sleep(rng.random() * 0.3)
        taken.append(stopped_snapshot(b, vm))
    return taken


def reset(vm):
    vm.monitor.ask("stop")
    vm.since = len(vm.numbers())
    vm.monitor.ask("set-action", reboot="reset")  # in place of -no-reboot
    vm.monitor.ask("system_reset")
    vm.monitor.ask("cont")


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
    b.until(lambda: any(c != "m" for c, n in new.lines()), 120, "the restored guest to go on")
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


class Campaign:
    """Rounds of one VM, and what they came to."""

    def __init__(self, b, vm, rng, resets, follower):
        self.b, self.vm, self.rng, self.resets, self.follower = b, vm, rng, resets, follower
        self.taken = []  # the last eight, as stopped_snapshot()
        self.checkpoints = self.rollbacks = self.at_boot = self.pictures = self.pages = 0

    def keep(self, snaps):
        self.checkpoints += len(snaps)
        self.pages += sum(s["changed_pages"] for s, ram, said in snaps)
        self.taken = (self.taken + snaps)[-8:]

    def boot(self, count):
        snaps = booting(self.b, self.vm, self.rng, count)
        self.at_boot += len(snaps)
        self.keep(snaps)

    def look(self):
        self.vm.monitor.ask("stop")
        self.follower.agrees(self.vm)
        self.vm.monitor.ask("cont")
        self.pictures += 1

    def round(self):
        if self.resets and self.rng.random() < 0.005:
            reset(self.vm)
            self.boot(4)
        if self.rng.random() < 0.4:
            self.vm.wait_lines(self.rng.randrange(1, 3))
        else:
            time.sleep(self.rng.random() * 0.05)  # wherever it is
        self.keep([stopped_snapshot(self.b, self.vm)])
        if self.rng.random() < 0.3:
            self.b.snapshot("vm")
        if self.rng.random() < 0.3:
            rolled_back(self.b, self.vm, *self.rng.choice(self.taken), running=self.rng.random() < 0.3)
            self.rollbacks += 1
        # A text screen's cursor blinks by the clock.
        if self.follower and self.vm.said() and (self.rng.random() < 0.05 or not self.pictures):
            self.look()


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
        vnc = os.path.join(b.dir, "vm.vnc")
        vm = QemuVm(b, "vm", args.guest, mem=args.mem, smp=args.smp, disk=args.disk, cache=args.cache, vga=args.vga,
                    pages=pages, pause=rng.choice([0, 100, 1000]), draw=int(args.vga != "none"),
                    more=["-vnc", f"unix:{vnc}"] if args.vga != "none" else [])
        follower = Follower(vnc) if args.vga != "none" else None
        b.vm_ready("vm", 60)
        c = Campaign(b, vm, rng, args.disk is not None, follower)
        if args.disk:
            c.boot(min(4, args.rounds - 1))
        vm.wait_lines()
        first(b, vm)
        while c.checkpoints < args.rounds:
            c.round()
        if follower:
            follower.close()
        snap, ram, said = rng.choice(c.taken)
        restored(b, vm, snap, said)
        print(f"{c.checkpoints} checkpoints of {args.guest}, -smp {args.smp}: each as memory was, {c.pages} pages changed; "
              f"{c.at_boot} of them while it booted; {c.rollbacks} rollbacks; " +
              (f"{c.pictures} pictures as followed in {follower.updates} updates; " if follower else "") + "1 restore")


if __name__ == "__main__":
    main()
