#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""snapctl top in a terminal of its own: readable in 80x24 and in less, follows resizes, sorts and scrolls by keys, outlives
the service, and leaves the terminal as it was however it ends; without a terminal, and on a dumb one, no escape sequences.

  top.py BUILD
"""
import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, seed_from  # noqa: E402

HEAD = ["VM", "STATE", "DIRTY/S", "BEHIND", "AGE", "PAUSE", "STILL", "EPO/S", "FUL/S", "JOB"]


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Terminal:
    """A pty, the program in it, and the screen that its sequences make: just those that top may use."""

    def __init__(self, b, *argv, rows=24, cols=80, term="xterm"):
        self.master, slave = pty.openpty()
        self.slave = slave
        self.out, self.alternate, self.hidden, self.lines = "", False, False, []
        self.resize(rows, cols, None)
        self.before = termios.tcgetattr(slave)
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        env = dict(b.env, TERM=term, LC_ALL="C.UTF-8")
        self.p = subprocess.Popen([b.tool("snapctl"), "top", *argv], env=env, stdin=slave, stdout=slave, stderr=slave,
                                  start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def __enter__(self):
        return self

    def __exit__(self, *why):
        if self.p.poll() is None:
            self.p.kill()
            self.p.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows, cols, pid=True):
        self.rows, self.cols = rows, cols
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        if pid:
            self.p.send_signal(signal.SIGWINCH)

    def read(self, seconds=0.2):
        while select.select([self.master], [], [], seconds)[0]:
            self.out += self.decode(os.read(self.master, 65536))
            seconds = 0

    def press(self, keys):
        os.write(self.master, keys.encode())

    def frame(self):
        """The lines of the last whole frame; checks that nothing but known sequences came and that it fits."""
        rest = re.sub(r"\033\[(\?1049[hl]|\?25[hl]|H|K|J|7m|0m)", "", self.out)
        rest = re.sub(r"\033(\[[0-9?]*)?$", "", rest)     # its other half has not come yet
        check("\033" not in rest, f"another escape sequence: {rest!r}")
        frames = re.findall(r"\033\[H(.*?)\033\[J", self.out, re.S)
        if not frames:
            return []
        return [re.sub(r"\033\[[0-9?]*[A-Za-z]", "", line) for line in re.split(r"\r*\n", frames[-1])]

    def until(self, cond, what, seconds=20):
        end = time.monotonic() + seconds
        while True:
            self.read()
            f = self.frame()
            if f and cond(f):
                check(len(f) <= self.rows and all(len(line) <= self.cols for line in f), f"does not fit: {f}")
                return f
            if time.monotonic() > end:
                raise TimeoutError(f"no {what}: {f}")

    def ended(self, code):
        """It has ended with that code and given the terminal back."""
        end = time.monotonic() + 10
        while self.p.poll() is None and time.monotonic() < end:
            self.read(0.05)
        self.read(0.1)
        check(self.p.returncode == code, f"exit {self.p.returncode}, not {code}")
        check(self.out.rindex("\033[?1049l") > self.out.rindex("\033[?1049h"), "the screen is not given back")
        check(self.out.rindex("\033[?25h") > self.out.rindex("\033[?25l"), "the cursor is gone")
        check(termios.tcgetattr(self.slave) == self.before, "the terminal's mode is not what it was")


def names(frame):
    at = [i for i, line in enumerate(frame) if line.startswith("VM")][0]
    return [line.split()[0] for line in frame[at + 1:] if re.match(r"(vm|web)\S+ +(ready|lost|hello|telling)", line)]


def looks(b):
    with Terminal(b, "--delay", "0.1", "--sort", "name") as t:
        f = t.until(lambda f: "3 VMs, 3 ready" in f[0] and "/s" in f[2], "rates")
        check([w.rstrip("*") for w in f[1].split()] == HEAD, f"{f[1]}")
        check("store: " in f[0] and names(f) == ["vm-a", "vm-b", "web-long-name-"], f"{f}")
        check("q: quit" in f[-1], f[-1])
        cells = f[2].split()
        check(cells[1] == "ready" and re.match(r"[0-9.]+", cells[2]), f"{cells}")
        t.press("r")
        t.until(lambda f: names(f)[:1] == ["web-long-name-"], "reverse order")
        t.press("rd")
        t.until(lambda f: "DIRTY/S*" in f[1], "the order by dirty rate")
        t.press("n")
        t.resize(24, 132)
        f = t.until(lambda f: "web-long-name-of-a-vm" in "".join(f), "longer names on a wider screen")
        t.resize(5, 40)
        f = t.until(lambda f: any("VMs 1 to 1 of 3" in line for line in f), "a small screen")
        t.press("j")
        t.until(lambda f: names(f)[:1] == ["vm-b"], "scrolling")
        t.press("jjjjj")
        t.until(lambda f: names(f)[:1] == ["web-long-name-"], "scrolling to the end")
        t.press("k")
        t.until(lambda f: names(f)[:1] == ["vm-b"], "scrolling back")
        t.resize(1, 1)
        t.until(lambda f: len(f) == 1, "the smallest screen")
        t.resize(24, 80)
        t.until(lambda f: len(f) >= 6, "the old size")
        t.press("q")
        t.ended(0)


def ends(b):
    """However it ends, the terminal is as before; Ctrl-Z gives it back for a while."""
    for how, code in (("\x03", 0), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)):
        with Terminal(b, "--delay", "0.1") as t:
            t.until(lambda f: "3 ready" in f[0], "a frame")
            t.press(how) if isinstance(how, str) else t.p.send_signal(how)
            t.ended(code)
    with Terminal(b, "--delay", "0.1") as t:
        t.until(lambda f: "3 ready" in f[0], "a frame")
        t.p.send_signal(signal.SIGTSTP)
        b.until(lambda: open(f"/proc/{t.p.pid}/stat").read().split()[2] == "T", 10, "it to stop")
        t.read(0.1)
        check(t.out.endswith("\033[?1049l") and termios.tcgetattr(t.slave) == t.before, "stopped with the terminal in its hands")
        t.out = ""
        t.p.send_signal(signal.SIGCONT)
        t.until(lambda f: "3 ready" in f[0], "frames after fg")
        check("\033[?1049h" in t.out, "the screen is not taken again")
        t.press("q")
        t.ended(0)


def service_goes(b):
    with Terminal(b, "--delay", "0.1") as t:
        t.until(lambda f: "3 ready" in f[0], "a frame")
        b.stop()
        f = t.until(lambda f: "no service answers" in f[-1] or "did not answer" in f[-1], "word that the service is gone")
        check("3 ready" in f[0], "what was known is gone")
        b.start()
        t.until(lambda f: "3 ready" in f[0] and "q: quit" in f[-1], "figures again", 40)
        t.press("q")
        t.ended(0)


def for_scripts(b):
    p = b.snapctl("top", "--delay", "0.1")
    check("\033" not in p.stdout and "3 VMs, 3 ready" in p.stdout and len(p.stdout.splitlines()) == 5, p.stdout)
    o = json.loads(b.snapctl("top", "--json", "--delay", "0.1", "--sort", "name").stdout)
    check([v["name"] for v in o["vms"]] == ["vm-a", "vm-b", "web-long-name-of-a-vm"] and o["store"]["disk_bytes"] > 0, f"{o}")
    check(o["vms"][0]["dirty_bytes_per_second"] >= 0 and o["vms"][0]["age_seconds"] is None, f"{o['vms'][0]}")
    check(o["vms"][2]["age_seconds"] >= 0 and o["vms"][2]["pause_ns"] > 0, f"{o['vms'][2]}")
    for wrong in (("--delay", "0"), ("--delay", "x"), ("--delay", "nan"), ("--sort", "colour")):
        check(b.snapctl("top", *wrong, check=False).returncode == 2, f"{wrong}")
    with Terminal(b, "--once", "--delay", "0.1") as t:
        t.p.wait(20)
        t.read()
        check("\033" not in t.out and "3 ready" in t.out, f"--once: {t.out!r}")
    with Terminal(b, "--delay", "0.1", term="dumb") as t:
        end = time.monotonic() + 20
        while t.out.count("3 ready") < 3 and time.monotonic() < end:
            t.read()
        check("\033" not in t.out and t.out.count("3 ready") >= 3, f"dumb: {t.out!r}")
        t.press("\x03")
        check(t.p.wait(10) == -signal.SIGINT, "Ctrl-C on a dumb terminal")


def main():
    seed = seed_from(None)
    with Bench(sys.argv[1]) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "none"), "--vm-tags", os.path.join(b.dir, "none")]
        b.start()
        all_vms = ("web-long-name-of-a-vm", "vm-a", "vm-b")
        for name in all_vms:
            b.vm(name, "--accel", "sim", "--mem", "8M", "--rate", "200", "--vcpus", "1", "--seed", seed)
        for name in all_vms:
            b.vm_ready(name)
        b.snapshot("web-long-name-of-a-vm")
        looks(b)
        ends(b)
        for_scripts(b)
        service_goes(b)
    print("top fits, follows, and leaves the terminal as it was")


main()
