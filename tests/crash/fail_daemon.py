#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Whichever allocation or system call of the service fails (in the middle of an attach, a snapshot, a run of a policy, a
request), the service goes on, or ends by itself with a reason; guests find their memory right; nothing that was committed
is lost; and the same works when the failure is over.

For each operation, for n = 1, 1 + STEP, …: the n-th call from its beginning on fails (tests/lib/failcalls.c), until the
operation gets through without meeting it.

  fail_daemon.py BUILD [--step N] [--seed S] [--most N]
"""
import argparse
import http.client
import mmap
import os
import random
import struct
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, seed_from  # noqa: E402

OPTIONS = ["--accel", "sim", "--mem", "4M", "--vcpus", "1", "--rate", "300", "--digest"]


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Nth:
    """The page shared with failcalls."""

    def __init__(self, path):
        with open(path, "wb") as f:
            f.truncate(4096)
        self.f = open(path, "r+b")
        self.m = mmap.mmap(self.f.fileno(), 4096)

    def arm(self, n):
        self.m[8:64] = bytes(56)
        self.m[0:8] = struct.pack("q", n)

    def lift(self):
        """What failed, or None."""
        self.m[0:8] = struct.pack("q", 0)
        return self.m[16:64].split(b"\0")[0].decode() if struct.unpack("Q", self.m[8:16])[0] else None


class Trial:
    def __init__(self, b, nth, rng):
        self.b, self.nth, self.rng = b, nth, rng
        self.done, self.ends, self.kept = {}, 0, set()

    # ---- operations: an exception that tells of a failure is an answer, too ----

    def snapshot(self):
        self.kept.add(self.b.snapshot("web", timeout=40)["id"])

    def attach(self):
        self.b.vm("extra", *OPTIONS)
        self.b.until(lambda: self.b.vm_info("extra")["state"] == "ready", 3, "extra to be attached")

    def policy_run(self):
        runs = self.line()["runs"] + self.line()["skipped"]
        self.b.call("POST", "/v1/policies/p/run", {}, timeout=5)
        self.b.until(lambda: self.line()["runs"] + self.line()["skipped"] > runs and self.line()["state"] == "idle", 5, "a run")

    def policy_put(self):
        self.b.call("PUT", "/v1/policies/q", {"settings": {"every": "1h", "vms": "none", "vm_tags": "x"}}, timeout=5)

    def tag(self):
        self.b.call("PATCH", "/v1/vms/web/tags", {"tags": f"t{self.rng.getrandbits(20)}"}, timeout=5)

    def request(self):
        for path in ("/v1/vms", "/v1/snapshots", "/v1/policies", "/v1/jobs"):
            self.b.get(path, timeout=5)

    def rollback(self):
        self.b.rollback("web", min(self.kept))

    # ---- around them ----

    def line(self):
        return self.b.get("/v1/policies/p")["policy"]["lines"][0]

    def settled(self):
        """It is there again, and has what it is to have."""
        b = self.b
        for vm in [v for v in b.vms if v.name == "extra"]:
            vm.kill()
            b.vms.remove(vm)
        if b.service.poll() is not None:
            code = b.service.returncode
            check(code == 1, f"the service ended with {code}")
            self.ends += 1
            b.start()
        b.until(lambda: self.alive(), 30, "the service to go on")
        for vm in b.vms:
            vm.check()

    def alive(self):
        try:
            vms = {v["name"]: v["state"] for v in self.b.get("/v1/vms")["vms"]}
            there = self.b.get("/v1/policies/p")["policy"]["lines"]
            return vms.get("web") == "ready" and vms.get("extra") != "ready" and there and there[0]["state"] == "idle"
        except (OSError, http.client.HTTPException):
            return False

    def whole(self):
        """A snapshot succeeds, and all that were acknowledged are whole."""
        b = self.b
        b.rollback("web", b.snapshot("web")["id"]) if self.needs_cure() else None
        new = b.snapshot("web")["id"]
        check(b.verify(new).get("digest_matches") is True, f"snapshot {new} is not the guest's memory")
        there = {s["id"] for s in b.snapshots("web")}
        check(self.kept <= there, f"lost: {self.kept - there}")
        for one in self.rng.sample(sorted(self.kept), min(2, len(self.kept))):
            check(b.verify(one).get("digest_matches") is True, f"snapshot {one}")

    def needs_cure(self):
        if not self.b.vm_info("web")["broken"]:
            return False
        self.b.rollback("web", min(self.kept))
        return False

    def run(self, name, step, most):
        """Every step-th call of an operation; how many there were."""
        n, misses, trials = 1 + self.rng.randrange(step), 0, 0
        while misses < 2 and trials < most:
            began = time.monotonic()
            self.nth.arm(n)
            try:
                getattr(self, name)()
                error = None
            except (Failed, OSError, http.client.HTTPException, TimeoutError, RuntimeError, LookupError) as e:
                error = e
            what = self.nth.lift()
            if error is not None and what is None:
                raise error
            misses = 0 if what else misses + 1
            self.settled()
            if time.monotonic() - began > 15:
                print(f"{name}, call {n} ({what}): {error}, and {time.monotonic() - began:.0f} s", flush=True)
            if trials % 8 == 7:
                self.whole()
            n += step
            trials += 1
        self.whole()
        self.done[name] = trials
        return trials


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("--step", type=int, default=1)
    ap.add_argument("--most", type=int, default=100000)
    ap.add_argument("--seed", type=int)
    args = ap.parse_args()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        b.patience = 15
        nth = Nth(os.path.join(b.dir, "fail"))
        b.preload = {"LD_PRELOAD": os.path.join(b.build, "tests", "lib", "libfailcalls.so"),
                     "SNAPD_FAIL_FILE": os.path.join(b.dir, "fail")}
        b.service_args += ["--policies", os.path.join(b.dir, "policies"), "--vm-tags", os.path.join(b.dir, "none"),
                           "--log-level", "warning"]
        b.start()
        b.vm("web", *OPTIONS)
        b.vm_ready("web")
        b.snapctl("policy", "set", "p", "vms=web", "every=1d", "keep_last=2")
        t = Trial(b, nth, rng)
        t.snapshot()
        began = time.monotonic()
        for name in ("request", "tag", "policy_put", "snapshot", "policy_run", "rollback", "attach"):
            t.run(name, args.step, args.most)
        for vm in b.vms:
            vm.stop()
        check(b.stop() == 0, "exit code of the service")
    print(", ".join(f"{name}: {n} trials" for name, n in t.done.items()) +
          f"; the service ended {t.ends} times; {time.monotonic() - began:.0f} s")


main()
