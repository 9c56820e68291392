#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: what an operator sets of room is kept: the soft limit is told and policies leave out every second point; at the hard
limit a snapshot fails with the reason and the VM runs on; a snapshot, or a policy, chooses its own compression; a key that is
changed, by snapctl, killed at any point, leaves a store that opens with exactly one of the two.

  room.py BUILD [--seed S]
"""
import argparse
import os
import random
import signal
import struct
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, seed_from  # noqa: E402

BLOCK = 4096
RAW, LZ4, ZSTD = 0, 1, 2


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def codecs(store):
    """{epoch: codecs of the pages that it stored}, of all segments."""
    ret = {}
    where = os.path.join(store, "segments")
    for name in os.listdir(where):
        with open(os.path.join(where, name), "rb") as f:
            data = f.read()
        at = BLOCK
        while at < len(data):
            magic, _, kind, _, header, entries, payload = struct.unpack_from("<IHBBIIQ", data, at)
            if magic != 0x42504e53:
                break
            if kind == 1:
                epoch = struct.unpack_from("<QQ", data, at + 80)
                for i in range(entries):
                    ret.setdefault(epoch, set()).add(data[at + 128 + 32 * i + 28])
            at += header + -(-payload // BLOCK) * BLOCK
    return ret


def start_vm(b, name, rng, *args):
    vm = b.vm(name, "--accel", "sim", "--mem", "8M", "--vcpus", "1", "--workload", "random", "--digest", "--seed",
              rng.getrandbits(30), *args)
    b.vm_ready(name)
    return vm


def compression(b, rng):
    b.service_args = ["--segment", "2M", "--compression", "none", "--policies", os.path.join(b.dir, "policies")]
    os.mkdir(os.path.join(b.dir, "policies"))
    b.start()
    vm = start_vm(b, "web", rng)
    seen, snaps = set(), []
    for how, want in ((None, {RAW}), ("zstd:3", {ZSTD}), ("lz4", {LZ4}), ("none", {RAW})):
        b.snapctl("snapshot", "web", *(["--compression", how] if how else []))
        new = {e: c for e, c in codecs(b.store).items() if e not in seen}
        check(len(new) == 1, f"{how}: epochs {new}")
        (epoch, got), = new.items()
        seen.add(epoch)
        check(got - {RAW} == want - {RAW}, f"{how}: codecs {got}")
    b.snapctl("policy", "set", "p", "vms=web", "every=1h", "compression=zstd")
    b.snapctl("policy", "run", "p", "web", "--wait")
    new = [c for e, c in codecs(b.store).items() if e not in seen]
    check(len(new) == 1 and ZSTD in new[0] and LZ4 not in new[0], f"the policy: {new}")
    for how in ("gzip", "zstd:99"):
        p = b.snapctl("snapshot", "web", "--compression", how, check=False)
        check(p.returncode == 2 or "is no compression" in p.stderr, f"{how}: {p.returncode} {p.stderr}")
        check(b.snapctl("policy", "set", "p", f"compression={how}", check=False).returncode != 0, f"a policy with {how}")
    # What a reader must know is in the index, though the store as such is not compressed.
    with open(os.path.join(b.store, "index", "data.mdb"), "rb") as f:
        index = f.read()
    check(b"lz4\0zstd\0" in index, "the features are not recorded")
    b.stop()
    b.start()
    for snap in b.snapshots("web"):
        check(b.verify(snap["id"])["digest_matches"], f"snapshot {snap['id']} differs")
        snaps.append(snap["id"])
    check(len(snaps) == 5, f"snapshots {snaps}")
    b.snapctl("policy", "rm", "p")
    return vm


def limits(b, vm):
    b.vm_ready("web")
    b.stop()
    used = sum(os.path.getsize(os.path.join(b.store, "segments", f)) for f in os.listdir(os.path.join(b.store, "segments")))
    b.service_args = ["--segment", "2M", "--store-soft-max", str(used - (1 << 20)), "--store-max", str(used + (20 << 20)),
                      "--policies", os.path.join(b.dir, "policies")]
    b.start()
    b.vm_ready("web")
    stats = b.get("/v1/store/stats")
    check(stats["over_soft_limit"] and stats["bytes_soft_limit"] == used - (1 << 20), f"stats: {stats}")
    check("over the soft limit" in b.snapctl("store", "stats").stdout, "store stats")
    check("\nsnapd_store_over_soft_limit 1" in b.metrics(), "metrics")
    b.snapctl("policy", "set", "p", "vms=web", "recovery_point=100ms")

    def thinned():
        line = b.get("/v1/policies/p")["policy"]["lines"]
        return line and line[0]["runs"] >= 2 and line[0]["skipped"] >= 2 and line[0]
    line = b.until(thinned, 60, "points that are taken, and points that are left out")
    check(abs(line["runs"] - line["skipped"]) <= max(line["runs"], line["skipped"]) // 2 + 2, f"not every second one: {line}")
    # On to the hard limit: an error that names it; the VM is unharmed, and all works again with room.
    b.until(lambda: b.get("/v1/policies/p")["policy"]["lines"][0]["failures"], 120, "the hard limit")
    b.snapctl("policy", "rm", "p")
    try:
        for _ in range(20):
            b.snapshot("web", compression="none")
            time.sleep(0.1)
        raise RuntimeError("the hard limit does not hold")
    except Failed as e:
        check(e.code == "no-space" and "the limit of" in e.text, f"at the hard limit: {e}")
    check(b.get("/v1/store/stats")["bytes_on_disk"] <= used + (20 << 20) + b.get("/v1/store/stats")["bytes_index"], "over it")
    vm.check()
    b.stop()
    b.service_args = b.service_args[:2]
    b.start()
    b.vm_ready("web")
    check(b.verify(b.snapshot("web")["id"])["digest_matches"], "after it")
    with open(os.path.join(b.dir, "snapd.log")) as f:
        check(f.read().count("over store_soft_max") >= 1, "not in the log")


def opens(b, key):
    b.service_args = ["--encryption-key", key]
    b.start(wait=False)
    for _ in range(3000):
        if b.service.poll() is not None:
            return False
        try:
            b.get("/v1/version")
            break
        except OSError:
            time.sleep(0.01)
    left = b.snapshots()
    check(len(left) == 1 and b.verify(left[0]["id"])["digest_matches"], "the snapshot differs")
    check(b.stop() == 0, "exit code of the service")
    return True


def rekey(b, rng):
    """Killed at a random moment: the one key or the other, never both, never none."""
    keys = []
    for i in range(2):
        keys.append(os.path.join(b.dir, f"key{i}"))
        with open(keys[-1], "wb") as f:
            f.write(rng.randbytes(32))
        os.chmod(keys[-1], 0o600)
    b.service_args = ["--encryption-key", keys[0]]
    b.start()
    vm = start_vm(b, "sealed", rng)
    b.snapshot("sealed")
    vm.stop()
    b.stop()
    command = [b.tool("snapctl"), "store", "rekey", "--store", b.store]
    wrong = subprocess.run([*command, "--encryption-key", keys[1], "--new-key", keys[0]], stderr=subprocess.PIPE, text=True)
    check(wrong.returncode == 1 and "is not the key of" in wrong.stderr, f"a wrong key: {wrong}")
    check(opens(b, keys[0]), "after a wrong key")
    killed = 0
    for _ in range(4):
        p = subprocess.Popen([*command, "--encryption-key", keys[0], "--new-key", keys[1]], stderr=subprocess.DEVNULL)
        time.sleep(rng.random() * 0.02)
        p.send_signal(signal.SIGKILL)
        killed += p.wait(30) != 0
        if opens(b, keys[1]):
            check(not opens(b, keys[0]), "both keys open it")
            keys.reverse()
        else:
            check(opens(b, keys[0]), "no key opens it")
    subprocess.run([*command, "--encryption-key", keys[0], "--new-key", keys[1]], check=True)
    check(opens(b, keys[1]) and not opens(b, keys[0]), "the key was not changed")
    return killed


def main():
    p = argparse.ArgumentParser()
    p.add_argument("build")
    p.add_argument("--seed", type=lambda s: int(s, 0))
    args = p.parse_args()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        vm = compression(b, rng)
        limits(b, vm)
        vm.stop()
    with Bench(args.build) as b:
        killed = rekey(b, rng)
    print(f"compression, limits and a changed key as documented; {killed} times killed in the middle")


main()
