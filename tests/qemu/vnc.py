# SPDX-License-Identifier: MIT
"""What a VNC viewer sees of a QEMU, and what is on its screen."""
import os
import select
import socket
import struct
import threading
import time


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

    def whole(self):
        """All of it, whatever was told."""
        self.rectangles = 0
        self.ask(0)
        while not self.rectangles or self.update():
            self.update()
        pixels = bytes(self.pixels)
        self.sock.close()
        return pixels


class Follower:
    """A viewer, on a thread of its own, that asks for changes from beginning to end: so QEMU looks at its dirty log
    of video memory all the time."""

    def __init__(self, path):
        self.path, self.viewer = path, Viewer(path)
        self.updates, self.error, self.ends = 0, None, False
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        try:
            self.viewer.ask(0)
            while not self.ends:
                if not select.select([self.viewer.sock], [], [], 0.1)[0]:
                    continue
                with self.lock:
                    self.viewer.update()
                self.updates += 1
                self.viewer.ask(1)
        except Exception as e:  # noqa: BLE001: told by agrees()
            self.error = e

    def picture(self):
        """Width, height and the pixels' bytes, red, green, blue, as followed."""
        with self.lock:
            v = self.viewer
            return v.width, v.height, rgb(v.pixels)

    def agrees(self, vm, seconds=30):
        """Of a VM that stands: what was followed is what is in video memory.  QEMU tells of it when it sees fit."""
        end = time.monotonic() + seconds
        while (got := self.picture()) != (wanted := screendump(vm)):
            assert not self.error, f"{vm.name}: the VNC server: {self.error}"
            if time.monotonic() > end:
                bad = [i // 3 for i in range(0, len(wanted[2]), 3) if got[2][i:i + 3] != wanted[2][i:i + 3]]
                whole = Viewer(self.path)
                raise RuntimeError(f"{vm.name}: a viewer that follows changes has another picture: {got[:2]} and {wanted[:2]}, "
                                   f"{len(bad)} pixels differ, from {bad[0]} to {bad[-1]}; one that asks for all of it "
                                   f"has {'this' if rgb(whole.whole()) == got[2] else 'that'}")
            time.sleep(0.02)
        return wanted

    def close(self):
        self.ends = True
        self.thread.join()
        self.viewer.sock.close()


def rgb(pixels):
    """Of 32 bits a pixel: blue, green, red, nothing."""
    out = bytearray(len(pixels) // 4 * 3)
    for i in range(3):
        out[i::3] = pixels[2 - i::4]
    return bytes(out)


def screendump(vm):
    """Width, height and the pixels' bytes, red, green, blue: at 32 bits a pixel, video memory as it is."""
    path = os.path.join(vm.bench.dir, f"{vm.name}.ppm")
    vm.monitor.ask("screendump", filename=path)
    with open(path, "rb") as f:
        assert f.readline() == b"P6\n"
        width, height = map(int, f.readline().split())
        f.readline()
        return width, height, f.read()
