#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Bad input from every side: a one-line error with the reason, the documented exit code, and nothing
committed is lost.

Truncated and bit-flipped segments and index; garbage and half messages on both sockets; a wrong protocol
version; a store of another program; a second service; a full disk.

  bad_input.py BUILD [--accel kvm|sim] [--seed S]
"""
import argparse
import glob
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, need_accel, seed_from  # noqa: E402

CRASH_SIGNALS = {-4, -6, -7, -8, -11}


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def one_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return len(lines) == 1


def boot(b, args, name="guest", seed=1):
    vm = b.vm(name, "--accel", args.accel, "--mem", "16M", "--vcpus", "2", "--workload", "random",
              "--seed", seed, "--digest")
    b.vm_ready(name)
    return vm


def service_refuses(b, store, extra=()):
    """Start a service on a store that it must refuse; returns its last line."""
    p = subprocess.run([b.tool("snapd"), "--store", store, "--socket", os.path.join(b.dir, "x.sock"),
                        "--agent-socket", os.path.join(b.dir, "xa.sock"), *extra],
                       env=b.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       text=True, timeout=20, errors="replace")
    check(p.returncode not in CRASH_SIGNALS, f"the service crashed ({p.returncode}) on {store}: {p.stdout}")
    check(p.returncode != 0, f"the service accepted {store}")
    return p.stdout.strip().splitlines()[-1]


def sockets(b, args, rng):
    """Garbage on both sockets does not disturb the VM that is there."""
    for path, kind in ((b.api_socket, socket.SOCK_STREAM), (b.agent_socket, socket.SOCK_SEQPACKET)):
        for i in range(60):
            s = socket.socket(socket.AF_UNIX, kind)
            s.settimeout(0.4)
            try:
                s.connect(path)
                n = rng.choice([0, 1, 7, 16, 100, 4096, 60000])
                data = rng.randbytes(n)
                if i % 3 == 0 and n >= 16:      # a well-formed header, then rubbish
                    data = struct.pack("<IHHQ", n, rng.choice([1, 2, 3, 5, 64, 999]), 0, 0) + data[16:]
                if data:
                    s.send(data)
                if i % 4 == 0:
                    s.recv(4096)
            except OSError:
                pass
            s.close()
    hello = struct.pack("<IHHQHHI", 4680, 1, 0, 0, 99, 0, 0).ljust(4680, b"\0")
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.settimeout(5)
    s.connect(b.agent_socket)
    s.send(hello)
    answer = s.recv(65536)
    s.close()
    check(len(answer) == 0 or struct.unpack("<IH", answer[:6])[1] in (33, 64), "a wrong version was not refused")
    for line in (b"GET /v1/vms HTTP/1.1\r\nHost: x\r\n", b"\0\1\2", b"POST /v1/vms/guest/snapshots HTTP/1.1\r\n"
                 b"Content-Length: 99999999999\r\n\r\n", b"GET /../../etc/passwd HTTP/1.1\r\n\r\n"):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.connect(b.api_socket)
        s.send(line)
        s.close()
    check(b.vm_info("guest")["state"] == "ready", "garbage on a socket disturbed the VM")
    snap = b.snapshot("guest")
    check(b.verify(snap["id"])["digest_matches"], "digest after garbage")


def exit_codes(b):
    for want, argv in ((2, ["nonsense"]), (2, ["snapshot"]), (2, ["list", "--wat"]), (3, ["show", "99999"]),
                       (3, ["snapshot", "no-such-vm"]), (3, ["verify", "guest@nope"])):
        p = b.snapctl(*argv, check=False)
        check(p.returncode == want, f"snapctl {argv}: exit {p.returncode}, not {want}")
        check(p.stderr.strip(), f"snapctl {argv} says nothing")
        if want == 3:
            check(one_line(p.stderr), f"snapctl {argv} is not one line: {p.stderr}")
    p = b.snapctl("--socket", "/nonexistent.sock", "vms", check=False)
    check(p.returncode == 1 and one_line(p.stderr) and "/nonexistent.sock" in p.stderr, f"no service: {p.stderr}")


def damaged_segments(b, args, rng, snaps):
    """Flip bits and cut segments of a copy: verify says corrupt, others stay whole."""
    b.stop()
    found = 0
    for _ in range(12):
        copy = os.path.join(b.dir, "copy")
        shutil.copytree(b.store, copy)
        seg = rng.choice(sorted(glob.glob(os.path.join(copy, "segments", "*.seg"))))
        used = 2 << 20
        if rng.random() < 0.3:
            os.truncate(seg, rng.randrange(0, used))
        else:
            with open(seg, "r+b") as f:
                for _ in range(rng.choice([1, 64])):
                    f.seek(rng.randrange(4096, used))
                    byte = f.read(1)
                    f.seek(-1, 1)
                    f.write(bytes([byte[0] ^ (1 << rng.randrange(8))]))
        orig, b.store = b.store, copy
        try:
            b.start(wait=False)
            try:
                b.until(lambda: b.get("/v1/version"), 10, "the service")
            except RuntimeError:
                check(b.service.returncode not in CRASH_SIGNALS, f"crash on a damaged segment: {b.service.returncode}")
                found += 1
                continue
            for snap, digest in snaps:
                p = b.snapctl("verify", "--digest", str(snap), check=False)
                check(p.returncode in (0, 5), f"verify of damaged data: exit {p.returncode}: {p.stderr}")
                if p.returncode == 5:
                    found += 1
                    check(one_line(p.stderr), f"not one line: {p.stderr}")
            b.stop()
        finally:
            b.store = orig
            shutil.rmtree(copy)
    check(found, "no damage was ever noticed")
    b.start()
    for snap, digest in snaps:
        check(b.verify(snap)["digest"] == digest, "the original store changed")
    return found


def damaged_index(b, rng, snaps):
    b.stop()
    data = os.path.join("index", "data.mdb")
    size = os.path.getsize(os.path.join(b.store, data))
    refused = 0
    for i in range(40):
        copy = os.path.join(b.dir, "copy")
        os.makedirs(copy)
        shutil.copytree(os.path.join(b.store, "index"), os.path.join(copy, "index"))
        os.symlink(os.path.join(b.store, "segments"), os.path.join(copy, "segments"))
        path = os.path.join(copy, data)
        if i % 4 == 0:
            os.truncate(path, rng.randrange(0, size))
        else:
            with open(path, "r+b") as f:
                for _ in range(rng.choice([1, 8, 200])):
                    f.seek(rng.randrange(size))
                    f.write(rng.randbytes(1))
        orig, b.store = b.store, copy
        try:
            b.start(wait=False)
            try:
                b.until(lambda: b.get("/v1/version"), 10, "the service")
            except RuntimeError:
                code = b.service.returncode
                check(code not in CRASH_SIGNALS, f"crash on a damaged index: {code}")
                refused += 1
                continue
            try:
                for s in b.snapshots():
                    p = b.snapctl("verify", "--digest", str(s["id"]), check=False)
                    check(p.returncode in (0, 1, 3, 5), f"verify: exit {p.returncode}: {p.stderr}")
            except Failed:
                refused += 1
            b.stop()
        finally:
            b.store = orig
            shutil.rmtree(copy)
    check(refused, "no damage of the index was noticed")
    b.start()
    for snap, digest in snaps:
        check(b.verify(snap)["digest"] == digest, "the original store changed")
    return refused


def full_disk(args, build):
    """A store on a small tmpfs: the epoch fails with the reason, the VM and what is committed stay."""
    with Bench(build) as b:
        os.mkdir(b.store)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "snapd-test", b.store]).returncode:
            print("full disk: skipped: cannot mount a tmpfs here")
            return
        try:
            b.service_args = ["--segment", "4M", "--compression", "none"]
            b.start()
            vm = boot(b, args)
            good = []
            failed = None
            for _ in range(400):
                try:
                    snap = b.snapshot("guest")
                    good.append(snap["id"])
                except Failed as e:
                    failed = e
                    break
            check(failed, "96 MiB never became full")
            check("space" in failed.text.lower() or "full" in failed.text.lower(), f"unclear: {failed.text}")
            for _ in range(20):  # what a failed epoch took is free again: a smaller one may fit
                p = b.snapctl("snapshot", "guest", "--json", check=False)
                if p.returncode:
                    break
                good.append(json.loads(p.stdout)["snapshot"]["id"])
            check(p.returncode == 1 and one_line(p.stderr), f"full disk: exit {p.returncode}: {p.stderr}")
            vm.check()
            for s in good:
                check(b.verify(s)["digest_matches"], f"snapshot {s} after the disk was full")
            b.service.kill()
            b.service.wait()
            b.start()
            check({s["id"] for s in b.snapshots("guest")} == set(good), "snapshots after a restart on a full disk")
            b.vm_ready("guest")
            vm.stop()
            b.stop()
            print(f"full disk: {len(good)} snapshots kept; the next one said: {failed.text}")
        finally:
            if b.service and b.service.poll() is None:
                b.service.kill()
                b.service.wait()
            subprocess.run(["umount", "-l", b.store])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    # Small segments: every damage is done to a copy.
    with Bench(args.build, service_args=["--segment", "4M"]) as b:
        b.start()
        vm = boot(b, args, seed=rng.getrandbits(30))
        sockets(b, args, rng)
        exit_codes(b)
        second = service_refuses(b, b.store)
        print(f"second service: {second}")
        other = os.path.join(b.dir, "other")
        os.makedirs(os.path.join(other, "index"))
        with open(os.path.join(other, "index", "data.mdb"), "wb") as f:
            f.write(rng.randbytes(65536))
        print(f"not a store: {service_refuses(b, other)}")
        snaps = []
        for _ in range(6):
            snap = b.snapshot("guest")["id"]
            snaps.append((snap, b.verify(snap)["digest"]))
        vm.stop()
        print(f"damaged segments: noticed {damaged_segments(b, args, rng, snaps)} times")
        print(f"damaged index: refused {damaged_index(b, rng, snaps)} of 40")
        b.stop()
    full_disk(args, args.build)


if __name__ == "__main__":
    main()
