#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What VNC shows, with the adapter and without: QEMU finds changed video memory with KVM's dirty log, which the adapter
serves.  A viewer that took only what was told to have changed must have the same picture in the end as one that
asks for all of it, and both the picture of a QEMU without the adapter.  Snapshots are taken meanwhile, and a rollback
shows the picture of then.

  screen.py BUILD
"""
import os
import sys
import time

from qemuvm import Bench, QemuVm, need_qemu
from vnc import Viewer

STEPS = 120


def follow(viewer, done, path):
    """Only what has changed, until the guest is done and there is nothing that a second viewer sees
    otherwise; QEMU looks for changes every three seconds at least."""
    viewer.ask(0)
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if viewer.update():
            viewer.ask(1)
        elif done():
            end = min(end, time.monotonic() + 12)
            if bytes(viewer.pixels) == Viewer(path).whole():
                return bytes(viewer.pixels)
    raise RuntimeError(f"{path}: a viewer that follows changes sees another picture")


def shown(b, name, adapter, pause=2000):
    path = os.path.join(b.dir, f"{name}.vnc")
    vm = QemuVm(b, name, "screen", mem=16, disk="ide", vga="std", more=["-vnc", f"unix:{path}"], adapter=adapter,
                pages=STEPS, pause=pause)
    vm.vnc, vm.viewer = path, Viewer(path)
    return vm


def done(vm):
    return any(c == "S" for c, n in vm.lines())


def in_the_middle(b):
    """A guest that has drawn part of its picture when it is snapshotted, however slow the machine is."""
    for pause in 16000, 64000, 256000:
        vm = shown(b, f"ours-{pause}", True, pause)
        b.vm_ready(vm.name, 90)
        vm.wait_lines(10)
        snap = b.snapshot(vm.name)
        if not done(vm):
            return vm, snap
        vm.kill()
    raise RuntimeError("the guest was always done before its snapshot")


def main():
    need_qemu()
    with Bench(sys.argv[1]) as b:
        b.start()
        plain, (ours, snap) = shown(b, "plain", False), in_the_middle(b)
        # QEMU looks at the screen when it sees fit: what the guest drew last may come seconds later.
        end = time.monotonic() + 30
        while True:
            pictures = [follow(vm.viewer, lambda: done(vm), vm.vnc) for vm in (ours, plain)]
            drawn = all(len(set(memoryview(p).cast('I'))) > 30 for p in pictures)
            if drawn and pictures[0] == pictures[1]:
                break
            assert time.monotonic() < end, ("the picture with the adapter differs from that without" if drawn
                                            else "nothing was drawn")
        before = len(ours.lines())
        b.rollback(ours.name, snap["id"])
        again = follow(ours.viewer, lambda: any(c == "S" for c, n in ours.lines()[before:]), ours.vnc)
        assert again == pictures[0], "after a rollback the picture differs"
        print(f"{STEPS} steps drawn: the same picture, followed or whole, with the adapter and without")


if __name__ == "__main__":
    main()
