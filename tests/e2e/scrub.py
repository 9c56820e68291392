#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: the scrub reads every byte, names each damage wherever an operator looks, and goes on where it was after a restart.

  scrub.py BUILD [--seed S] [--flips N]
"""
import argparse
import ctypes
import json
import os
import random
import struct
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from image import random_image  # noqa: E402
from snaptest import Bench, seed_from  # noqa: E402

BLOCK = 4096
IDLE = 3 << 13


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Trial:
    def __init__(self, b, rng):
        self.b, self.rng = b, rng

    def start(self, *args):
        self.b.service_args = ["--segment", "2M", *args]
        self.b.start()

    def scrub(self, *argv, code=0):
        p = self.b.snapctl("store", "scrub", "--json", *argv, check=False)
        check(p.returncode == code, f"scrub {argv}: exit {p.returncode}, not {code}: {p.stderr}")
        return json.loads(p.stdout) if p.stdout else None

    def metric(self, name):
        for line in self.b.metrics().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise RuntimeError(f"no metric {name}")

    # ---- what can be damaged: (file, offset) of every byte that means something ----

    def batches(self):
        where = os.path.join(self.b.store, "segments")
        for name in sorted(os.listdir(where)):
            path = os.path.join(where, name)
            with open(path, "rb") as f:
                block = 1
                while block * BLOCK < os.path.getsize(path):
                    f.seek(block * BLOCK)
                    head = f.read(128)
                    magic, _, kind, _, header, entries, payload = struct.unpack_from("<IHBBIIQ", head)
                    if magic != 0x42504e53:
                        break
                    yield path, kind, block * BLOCK, header, payload
                    block += header // BLOCK + -(-payload // BLOCK)

    def places(self):
        """One of each kind of batch in header and payload, and some more."""
        kinds = {}
        for batch in self.batches():
            kinds.setdefault(batch[1], []).append(batch)
        check({1, 2, 4, 5} <= set(kinds), f"kinds of batches: {sorted(kinds)}")
        for some in kinds.values():
            path, kind, at, header, payload = self.rng.choice(some)
            yield path, at + self.rng.randrange(120), f"header of a batch of kind {kind}"
            if kind != 1:
                yield path, at + header + self.rng.randrange(payload), f"payload of kind {kind}"
        # The stored bytes of a page: its record says where.
        path, _, at, header, _ = self.rng.choice(kinds[1])
        with open(path, "rb") as f:
            f.seek(at + 128 + 24)
            offset, len_codec = struct.unpack("<II", f.read(8))
        yield path, at + header + offset + self.rng.randrange(len_codec >> 8), "a page"

    def flip(self, path, offset):
        with open(path, "r+b") as f:
            f.seek(offset)
            byte = f.read(1)[0]
            f.seek(offset)
            f.write(bytes([byte ^ 1 << self.rng.randrange(8)]))
        return byte

    def put_back(self, path, offset, byte):
        with open(path, "r+b") as f:
            f.seek(offset)
            f.write(bytes([byte]))

    # ---- cases ----

    def finds_everything(self, flips):
        self.start("--scrub-period", "off", "--scrub-rate", "0")
        for i in range(2):
            image = random_image(self.rng, vm=f"vm{i}").write(os.path.join(self.b.dir, f"{i}.img"))
            self.b.snapctl("import", image)
        got = self.scrub("--status")
        check(got["state"] == "off" and got["pass"] is None and got["last"] is None, f"at first: {got}")
        got = self.scrub("--now", "--wait")
        stats = self.b.get("/v1/store/stats")
        check(got["last"]["nr_damages"] == 0 and got["last"]["pages"] == stats["pages_stored"] > 0, f"a whole store: {got}")
        whole = sum(header + payload for _, _, _, header, payload in self.batches())
        check(got["last"]["bytes"] == whole, f"{got['last']['bytes']} bytes read of {whole}")
        check(stats["scrub_ended_s"] == 0 or stats["scrub_damages"] == 0, f"stats: {stats}")
        places = list(self.places())
        for path, offset, what in places if flips is None else self.rng.sample(places, flips):
            byte = self.flip(path, offset)
            got = self.scrub("--now", "--wait", code=5)
            check(got["last"]["nr_damages"] >= 1, f"{what} at {path} {offset}: not found: {got}")
            number = os.path.basename(path)[:8]
            check(any(number in d["text"] for d in got["last"]["damages"]), f"{what}: its segment is not named: {got}")
            self.put_back(path, offset, byte)
        # Seen wherever one looks, also after a restart, until a pass finds nothing.
        self.b.stop()
        self.start("--scrub-period", "off", "--scrub-rate", "0")
        check(self.b.get("/v1/store/stats")["scrub_damages"] >= 1, "stats")
        check("damages" in self.b.snapctl("store", "stats").stdout, "store stats")
        check("the last scrub found" in self.b.snapctl("store", "check").stdout, "store check")
        check(self.metric("snapd_scrub_damages") >= 1, "metrics")
        self.scrub(code=5)
        with open(os.path.join(self.b.dir, "snapd.log")) as f:
            check("scrub: segment" in f.read(), "no line in the log")
        self.scrub("--now", "--wait")
        check(self.metric("snapd_scrub_damages") == 0 and self.metric("snapd_scrub_passes_total") == 1, "metrics afterwards")

    def goes_on(self):
        """Stopped in the middle, paused, cancelled: each page is read once."""
        self.b.stop()
        self.start("--scrub-period", "off", "--scrub-rate", "2M")
        self.scrub("--now")
        self.b.until(lambda: (self.scrub()["pass"] or {"pages": 0})["pages"] > 0, 60, "a segment to be read")
        began = self.scrub()["pass"]["began_s"]
        self.b.stop()
        with open(os.path.join(self.b.store, "scrub.json")) as f:
            kept = json.load(f)
        check(kept["active"] and kept["next"] > 0, f"not kept: {kept}")
        self.start("--scrub-period", "off", "--scrub-rate", "0")
        got = self.scrub("--wait")
        check(got["last"]["began_s"] == began, f"another pass: {got}")
        check(got["last"]["pages"] == self.b.get("/v1/store/stats")["pages_stored"], f"not each page once: {got}")

        self.b.stop()
        self.start("--scrub-period", "1s", "--scrub-rate", "1")
        self.b.until(lambda: self.scrub()["state"] == "running", 60, "a pass that begins by itself")
        check(self.scrub("--pause")["state"] == "paused", "not paused")
        self.b.stop()
        self.start("--scrub-period", "1s", "--scrub-rate", "0")
        check(self.scrub("--wait")["state"] == "paused", "not paused any more")
        passes = self.metric("snapd_scrub_passes_total")
        self.scrub("--resume")
        self.b.until(lambda: self.metric("snapd_scrub_passes_total") > passes, 60, "a pass to end")
        self.b.stop()
        self.start("--scrub-period", "off", "--scrub-rate", "1")
        self.scrub("--now")
        check(self.scrub("--cancel")["state"] == "off", "not cancelled")
        self.b.until(lambda: self.scrub()["pass"] is None, 60, "the pass to be dropped")
        self.scrub("--cancel", code=3)
        self.scrub("--now", "--pause", code=2)

    def is_idle(self):
        """Behind everyone else's reads."""
        tasks = f"/proc/{self.b.service.pid}/task"
        for task in os.listdir(tasks):
            with open(f"{tasks}/{task}/comm") as f:
                if f.read().strip() == "scrub":
                    got = ctypes.CDLL(None).syscall({"x86_64": 252, "aarch64": 31}[os.uname().machine], 1, int(task))
                    check(got >> 13 == IDLE >> 13, f"I/O class {got >> 13}")
                    return
        raise RuntimeError("there is no thread of that name")

    def bad_file(self):
        self.b.stop()
        for text in ("", '{"version": 2}'):
            with open(os.path.join(self.b.store, "scrub.json"), "w") as f:
                f.write(text)
            self.start()
            check(self.scrub()["state"] == "idle" and self.scrub()["next_s"] > time.time() + 86400 * 29, f"after {text!r}")
            self.b.stop()


def main():
    p = argparse.ArgumentParser()
    p.add_argument("build")
    p.add_argument("--seed", type=lambda s: int(s, 0))
    p.add_argument("--flips", type=int)
    args = p.parse_args()
    with Bench(args.build) as b:
        t = Trial(b, random.Random(seed_from(args.seed)))
        t.finds_everything(args.flips)
        t.is_idle()
        t.goes_on()
        t.bad_file()
    print("every byte read, each damage named, nothing read twice")


main()
