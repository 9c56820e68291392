#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What VNC shows, with the adapter and without: QEMU finds changed video memory with KVM's dirty log, which the adapter
serves.  A viewer that took only what was told to have changed must have the same picture in the end as one that
asks for all of it, and both the picture of a QEMU without the adapter.  Snapshots are taken meanwhile, and a rollback
shows the picture of then.

  screen.py BUILD
"""
import os
import socket
import struct
import sys
import time

from qemuvm import Bench, QemuVm, need_qemu

STEPS = 120


class Viewer:
    """RFB 3.8, raw rectangles of 32 bits a pixel."""

    def __init__(self, path, seconds=90):
        end = time.monotonic() + seconds
        while True:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(seconds)
            try:
                self.sock.connect(path)
                break
            except OSError:
                self.sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        self.take(12)
        self.sock.sendall(b"RFB 003.008\n")
        self.take(self.take(1)[0])
        self.sock.sendall(b"\1")
        assert self.take(4) == bytes(4)
        self.sock.sendall(b"\1")
        self.resize(*struct.unpack(">HH", self.take(4)))
        self.take(16)
        self.take(struct.unpack(">I", self.take(4))[0])
        self.sock.sendall(struct.pack(">B3xBBBBHHHBBB3x", 0, 32, 24, 0, 1, 255, 255, 255, 16, 8, 0))
        self.sock.sendall(struct.pack(">BxHii", 2, 2, 0, -223))  # raw, and changes of the size
        self.rectangles = 0

    def take(self, n):
        data = b""
        while len(data) < n:
            more = self.sock.recv(n - len(data))
            if not more:
                raise ConnectionError("the VNC server hung up")
            data += more
        return data

    def resize(self, width, height):
        self.width, self.height = width, height
        self.pixels = bytearray(width * height * 4)

    def ask(self, incremental):
        self.sock.sendall(struct.pack(">BBHHHH", 3, incremental, 0, 0, self.width, self.height))

    def rectangle(self):
        x, y, w, h, kind = struct.unpack(">HHHHi", self.take(12))
        if kind == -223:
            self.resize(w, h)
            return
        assert kind == 0, kind
        data = self.take(w * h * 4)
        for row in range(h):
            at = ((y + row) * self.width + x) * 4
            self.pixels[at:at + w * 4] = data[row * w * 4:(row + 1) * w * 4]
        self.rectangles += 1

    def update(self):
        """One update; False: none for a while."""
        self.sock.settimeout(0.3)
        try:
            kind = self.take(1)[0]
        except socket.timeout:
            return False
        self.sock.settimeout(60)
        if kind == 0:
            for _ in range(struct.unpack(">xH", self.take(3))[0]):
                self.rectangle()
        return True

    def follow(self, done, path):
        """Only what has changed, until the guest is done and there is nothing that a second viewer sees
        otherwise; QEMU looks for changes every three seconds at least."""
        self.ask(0)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if self.update():
                self.ask(1)
            elif done():
                end = min(end, time.monotonic() + 12)
                if bytes(self.pixels) == Viewer(path).whole():
                    return bytes(self.pixels)
        raise RuntimeError(f"{path}: a viewer that follows changes sees another picture")

    def whole(self):
        """All of it, whatever was told."""
        self.rectangles = 0
        self.ask(0)
        while not self.rectangles or self.update():
            self.update()
        pixels = bytes(self.pixels)
        self.sock.close()
        return pixels


def shown(b, name, adapter):
    path = os.path.join(b.dir, f"{name}.vnc")
    vm = QemuVm(b, name, "screen", mem=16, disk="ide", vga="std", more=["-vnc", f"unix:{path}"], adapter=adapter,
                pages=STEPS, pause=2000)
    vm.vnc, vm.viewer = path, Viewer(path)
    return vm


def done(vm):
    return any(c == "S" for c, n in vm.lines())


def main():
    need_qemu()
    with Bench(sys.argv[1]) as b:
        b.start()
        plain, ours = shown(b, "plain", False), shown(b, "ours", True)
        b.vm_ready("ours", 90)
        ours.wait_lines(10)
        snap = b.snapshot("ours")
        # QEMU looks at the screen when it sees fit: what the guest drew last may come seconds later.
        end = time.monotonic() + 30
        while True:
            pictures = [vm.viewer.follow(lambda: done(vm), vm.vnc) for vm in (ours, plain)]
            drawn = all(len(set(memoryview(p).cast('I'))) > 30 for p in pictures)
            if drawn and pictures[0] == pictures[1]:
                break
            assert time.monotonic() < end, ("the picture with the adapter differs from that without" if drawn
                                            else "nothing was drawn")
        before = len(ours.lines())
        b.rollback("ours", snap["id"])
        again = ours.viewer.follow(lambda: any(c == "S" for c, n in ours.lines()[before:]), ours.vnc)
        assert again == pictures[0], "after a rollback the picture differs"
        print(f"{STEPS} steps drawn: the same picture, followed or whole, with the adapter and without")


if __name__ == "__main__":
    main()
