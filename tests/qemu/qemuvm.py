# SPDX-License-Identifier: MIT
"""A QEMU under the launcher, with one of our guests, and what its memory, its serial line and its
monitor tell: the truth with which snapshots are compared."""
import array
import json
import mmap
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import snaptest  # noqa: E402
from snaptest import Failed, need_accel, seed_from, skip  # noqa: E402,F401

QEMU = "qemu-system-x86_64"
PAGE = 4096
FIRST_SECTOR = 128
END = 2**64 - 1  # the GPA of a memory stream's last extent


def need_qemu():
    need_accel("kvm")
    if not shutil.which(QEMU):
        skip(f"no {QEMU}")


def image(build, name, how, pages=64, pause=0, cpus=1, sectors=1024, draw=0):
    """A guest as meson built it, with its parameters: how = "rom" or "img"."""
    with open(os.path.join(build, "tests", "qemu", "guests", f"{name}.{how}"), "rb") as f:
        data = bytearray(f.read())
    assert data[512:520] == b"PARAMS!!"
    struct.pack_into("<5I", data, 520, pages, pause, cpus, sectors, draw)
    if how == "img":
        data += bytes(FIRST_SECTOR * 512 - len(data))
        for i in range(FIRST_SECTOR, FIRST_SECTOR + sectors):
            data += struct.pack("<I", i) + bytes(508)
    return bytes(data)


class Bench(snaptest.Bench):
    def __init__(self, build, **kw):
        super().__init__(build, **kw)
        self.launcher = os.path.join(self.build, "adapters", "qemu", "snapd-qemu")
        self.env["SNAPD_QEMU"] = self.launcher


class Monitor:
    """QMP, one request at a time."""

    def __init__(self, path, seconds=60):
        end = time.monotonic() + seconds
        while True:
            try:
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.sock.settimeout(seconds)
                self.sock.connect(path)
                break
            except OSError:
                self.sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
        self.file = self.sock.makefile("r")
        self.events = []
        json.loads(self.file.readline())
        self.ask("qmp_capabilities")

    def line(self):
        text = self.file.readline()
        if not text:
            raise ConnectionError("QEMU's monitor hung up")
        return json.loads(text)

    def ask(self, command, fds=(), **arguments):
        text = json.dumps({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([text], rights)
        while True:
            got = self.line()
            if "event" in got:
                self.events.append(got)
            elif "error" in got:
                raise RuntimeError(f"{command}: {got['error']['desc']}")
            else:
                return got["return"]

    def status(self):
        return self.ask("query-status")["status"]

    def wait_event(self, name, match=lambda data: True):
        while True:
            for e in self.events:
                if e["event"] == name and match(e.get("data", {})):
                    self.events.remove(e)
                    return e.get("data", {})
            got = self.line()
            if "event" in got:
                self.events.append(got)

    def close(self):
        self.file.close()
        self.sock.close()


class QemuVm:
    """guest: counter, native (both as firmware: they start at once), disk, screen (SeaBIOS boots
    them).  disk: None, ide, ahci, virtio; more: further arguments."""

    def __init__(self, bench, name, guest="native", mem=64, smp=1, disk=None, cache="none", vga="none", more=(),
                 adapter=True, env=None, argv=None, launcher=(), pass_fds=(), **params):
        self.bench, self.name, self.guest, self.smp = bench, name, guest, smp
        self.mem_bytes = mem << 20
        self.serial = os.path.join(bench.dir, f"{name}.serial")
        self.log = os.path.join(bench.dir, f"{name}.log")
        self.qmp_path = os.path.join(bench.dir, f"{name}.qmp")
        self.disk_path = os.path.join(bench.dir, f"{name}.disk")
        if argv is None:
            argv = self.arguments(guest, mem, smp, disk, cache, vga, more, dict(params, cpus=smp))
        if adapter:
            argv = [bench.launcher, "--vm", name, *launcher, "--", *argv]
        self.start(argv, env, pass_fds)

    def arguments(self, guest, mem, smp, disk, cache, vga, more, params):
        how = "img" if disk else "rom"
        with open(self.disk_path, "wb") as f:
            f.write(image(self.bench.build, guest, how, **params))
        argv = [QEMU, "-accel", "kvm", "-m", str(mem), "-smp", str(smp), "-nodefaults", "-display", "none", "-vga", vga,
                "-no-reboot", "-serial", f"file:{self.serial}", "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        if not disk:
            argv += ["-bios", self.disk_path]
        elif disk == "ide":
            argv += ["-drive", f"file={self.disk_path},format=raw,if=ide,cache={cache}"]
        else:
            argv += ["-drive", f"file={self.disk_path},format=raw,if=none,id=d,cache={cache}"]
            argv += ["-device", "virtio-blk-pci,drive=d"] if disk == "virtio" else \
                ["-device", "ahci,id=a", "-device", "ide-hd,bus=a.0,drive=d"]
        return argv + list(more)

    def start(self, argv, env, pass_fds=()):
        self._monitor = self._ram = None
        self._read, self._lines, self._numbers = 0, [], []
        self.since = 0  # of how many numbers it was reset last
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=dict(self.bench.env, **(env or {})), pass_fds=pass_fds)
        self.bench.vms.append(self)

    # ---- as snaptest.Vm ----

    def alive(self):
        return self.process.poll() is None

    def kill(self):
        if self.alive():
            self.process.kill()
        self.process.wait()
        if self._monitor:
            self._monitor.close()
            self._monitor = None
        self._ram = None

    # ---- the serial line ----

    def lines(self):
        """Whole lines so far, as (letter, number): read once, as there are many in the end."""
        try:
            with open(self.serial, "rb") as f:
                if os.fstat(f.fileno()).st_size < self._read:
                    self._read, self._lines, self._numbers = 0, [], []
                f.seek(self._read)
                text = f.read()
        except FileNotFoundError:
            return []
        text = text[:text.rfind(b"\n") + 1]
        self._read += len(text)
        more = [(m[1].decode(), int(m[2], 16)) for m in re.finditer(rb"^(\w) ([0-9a-f]{8})\n", text, re.M)]
        assert not any(c == "E" for c, n in more), f"{self.name}: the guest found its memory wrong: {more[-3:]}"
        self._lines += more
        self._numbers += [n for c, n in more if c != "m"]
        return self._lines

    def cut(self):
        """It stopped in the middle of a line."""
        with open(self.serial, "rb") as f:
            return not f.read().endswith(b"\n")

    def said(self):
        """The last number since a reset, or 0; of the first vCPU."""
        return (self.numbers()[self.since:] or [0])[-1]

    def numbers(self):
        self.lines()
        return self._numbers

    def wait_lines(self, more=1, seconds=90):
        """Until the first vCPU has said so many numbers more than now."""
        want = len(self.numbers()) + more
        end = time.monotonic() + seconds
        while len(self.numbers()) < want:
            if not self.alive():
                raise RuntimeError(f"{self.name} ended with {self.process.returncode}: " + open(self.log).read()[-500:])
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name}: {len(self.numbers())} lines, not {want}")
            time.sleep(0.005)
        return self.lines()

    # ---- the monitor ----

    @property
    def monitor(self):
        if not self._monitor:
            self._monitor = Monitor(self.qmp_path)
        return self._monitor

    # ---- memory ----

    def ram(self):
        """Guest RAM, all of it: a mapping of QEMU's memfd."""
        if not self._ram:
            for fd in os.listdir(f"/proc/{self.process.pid}/fd"):
                path = f"/proc/{self.process.pid}/fd/{fd}"
                try:
                    is_ram = "memfd:memory-backend-memfd" in os.readlink(path) and os.stat(path).st_size == self.mem_bytes
                except FileNotFoundError:
                    continue
                if is_ram:
                    with open(path, "r+b") as f:
                        self._ram = mmap.mmap(f.fileno(), self.mem_bytes, prot=mmap.PROT_READ)
                    break
            else:
                raise RuntimeError(f"{self.name}: QEMU has no memfd of {self.mem_bytes} bytes")
        return self._ram


def memory(bench, sel, length):
    """A snapshot's memory from GPA 0 on, as the service streams it: extents, what none covers is zero."""
    stream, out, at = memoryview(bench.raw(f"/v1/snapshots/{sel}/memory")), bytearray(length), 0
    while True:
        gpa, n = struct.unpack_from("<QQ", stream, at)
        at += 16
        if gpa == END:
            return out
        assert gpa + n <= length, f"memory at 0x{gpa:x} + 0x{n:x}, where the VM has 0x{length:x} bytes"
        out[gpa:gpa + n] = stream[at:at + n]
        at += n


def same(bench, sel, ram, what):
    """The snapshot's memory is these bytes, from GPA 0 on."""
    got = memory(bench, sel, len(ram))
    if got != ram:
        bad = [i for i in range(0, len(ram), PAGE) if got[i:i + PAGE] != ram[i:i + PAGE]]
        raise RuntimeError(f"{what}: {len(bad)} pages differ, the first at 0x{bad[0]:x}")


def stopped_snapshot(bench, vm, name=None):
    """Stop, snapshot, compare with all RAM, go on; the snapshot, RAM's bytes, the last number said."""
    vm.monitor.ask("stop")
    said = vm.said()
    snap = bench.snapshot(vm.name, **({"name": name} if name else {}))
    ram = bytes(vm.ram())
    same(bench, snap["id"], ram, f"{vm.name}@{snap['id']}")
    assert vm.monitor.status() in ("paused", "postmigrate"), "a VM that was stopped goes on after a snapshot"
    vm.monitor.ask("cont")
    return snap, ram, said
