#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""VMMs killed (-9) at random moments: of each, the service makes a snapshot whose memory, exported, is byte for
byte what the RAM files held at its death; no VM can become it.  What only its rings knew is found in them, and what
nothing knew in its memory.  None is made of a VMM that ends by itself, nor with post_mortem off.

  post_mortem.py BUILD [--accel kvm|sim] [--kills N] [--seed S]

The test opens the VMM's memfds through /proc, so it has the truth; which file is which block shows by content:
no two hold the same.
"""
import argparse
import json
import os
import random
import re
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, Failed, need_accel, seed_from  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def ram_files(pid):
    """Descriptors of our own, to write as well, of all its memfds but the dirty sets."""
    fds = []
    for n in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{n}"
        try:
            link = os.readlink(path)
        except OSError:
            continue
        if link.startswith("/memfd:") and "snapd-" not in link:
            fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    check(fds, "the VMM has no memfd")
    return fds


def content(fd):
    size = os.fstat(fd).st_size
    return b"".join(os.pread(fd, 1 << 22, at) for at in range(0, size, 1 << 22))


def compare(b, snap, image, files):
    """Each block of the image is one of the files, in all its pieces."""
    b.snapctl("export", str(snap["id"]), image)
    with open(image, "rb") as f:
        memory = f.read()
    with open(image + ".json") as f:
        state = json.load(f)
    pieces = next(r["decoded"] for r in state["records"] if r["name"] == "pieces")
    page = state["snapshot"]["page_size"]
    for block in {p["block"] for p in pieces}:
        own = [p for p in pieces if p["block"] == block]

        def same(data):
            return all(memory[p["home_gfn"] * page:(p["home_gfn"] + p["pages"]) * page].ljust(p["pages"] * page, b"\0")
                       == data[p["block_page"] * page:(p["block_page"] + p["pages"]) * page] for p in own)
        check(any(same(data) for data in files), f"block {block} of snapshot {snap['id']} is what no RAM file was")
    os.unlink(image)
    os.unlink(image + ".json")


def post_mortems(b):
    return [s for s in b.snapshots("web") if s["post_mortem"]]


def disturb(b, rng):
    """A snapshot under way when it dies, now and then."""
    def take():
        try:
            b.snapshot("web")
        except (Failed, OSError, TimeoutError):
            pass
    t = threading.Thread(target=take) if rng.random() < 0.6 else None
    if t:
        t.start()
    return t


def rings_tell(b, args, rng, nr):
    """What only the rings knew is taken from them: the comparison with the store finds nothing more."""
    vm = b.vm("web", "--accel", args.accel, "--mem", "8M", "--vcpus", "2", "--workload", "random",
              "--harvest-us", "200000", "--seed", rng.getrandbits(30), nice=10)
    b.vm_ready("web")
    b.snapshot("web")
    b.until(lambda: re.search(r'^snapd_vm_pending_entries{[^}]*vm="web"[^}]*} [1-9]', b.metrics(), re.M), 30,
            "entries in its rings")
    vm.kill()
    made = b.until(lambda: [s for s in post_mortems(b) if s["id"] > nr], 30, "a post-mortem image")
    pages, missed = map(int, re.search(r"ring_pages (\d+), missed_pages (\d+)", made[0]["note"]).groups())
    check(pages and not missed, f"rings had {pages} pages, and did not tell of {missed}")
    return made[0]["id"]


def memory_tells(b, args, rng, nr):
    """What was reset and not published yet is in neither a set nor a ring: the comparison with the store finds it."""
    vm = b.vm("web", "--accel", args.accel, "--mem", "8M", "--vcpus", "2", "--workload", "random", "--rate", "50",
              "--seed", rng.getrandbits(30), nice=10)
    b.vm_ready("web")
    fds = ram_files(vm.process.pid)
    b.snapshot("web")
    vm.process.send_signal(signal.SIGSTOP)
    largest = max(fds, key=lambda fd: os.fstat(fd).st_size)
    for page in rng.sample(range(os.fstat(largest).st_size >> 12), 16):
        os.pwrite(largest, rng.randbytes(8), page << 12 | 0xff8)
    vm.kill()
    made = b.until(lambda: [s for s in post_mortems(b) if s["id"] > nr], 30, "a post-mortem image")
    missed = int(re.search(r"missed_pages (\d+)", made[0]["note"])[1])
    check(missed, "nothing was found by the comparison")
    compare(b, made[0], os.path.join(b.dir, "image"), [content(fd) for fd in fds])
    for fd in fds:
        os.close(fd)
    return made[0]["id"]


def kill_once(b, args, rng, nr):
    vm = b.vm("web", "--accel", args.accel, "--mem", "8M", "--vcpus", "2", "--workload", "random", "--device", "200",
              "--harvest-us", "200000", "--seed", rng.getrandbits(30), nice=10)
    b.vm_ready("web")
    # A VMM that waits for a processor may have told of its vCPUs and not yet of its memory.
    b.until(lambda: b.vm_info("web")["ram_bytes"] >= 4 << 20, 30, "its memory")
    fds = ram_files(vm.process.pid)
    if rng.random() < 0.7:
        b.snapshot("web")
    time.sleep(rng.random() * 0.1)
    t = disturb(b, rng)
    time.sleep(rng.random() * 0.05)
    vm.kill()
    if t:
        t.join()
    made = b.until(lambda: [s for s in post_mortems(b) if s["id"] > nr], 30, "a post-mortem image")
    check(len(made) == 1, f"one image a death: {made}")
    compare(b, made[0], os.path.join(b.dir, "image"), [content(fd) for fd in fds])
    b.snapctl("export", str(made[0]["id"]), os.path.join(b.dir, "again"), "--force")
    b.snapctl("import", os.path.join(b.dir, "again"), "--name", f"copy-{made[0]['id']}")
    b.call("PATCH", f"/v1/snapshots/{made[0]['id']}", {"pinned": True})
    b.call("PATCH", f"/v1/snapshots/{made[0]['id']}", {"pinned": False})
    check(b.get(f"/v1/snapshots/{made[0]['id']}")["snapshot"]["post_mortem"], "a pin changes nothing else")
    check(b.snapshots(f"copy-{made[0]['id']}")[0]["post_mortem"], "an imported copy is what it was")
    for fd in fds:
        os.close(fd)
    check(not b.verify(made[0]["id"]).get("recorded_digest"), "no digest of the VMM's")
    return made[0]["id"]


def refusals(b, args, rng, image):
    vm = b.vm("web", "--accel", args.accel, "--mem", "8M", "--vcpus", "2", "--seed", rng.getrandbits(30))
    b.vm_ready("web")
    p = b.snapctl("rollback", "web", str(image), check=False)
    check(p.returncode and "post-mortem" in p.stderr, f"rollback: exit {p.returncode}: {p.stderr}")
    check(b.vm_info("web")["state"] == "ready" and not b.vm_info("web")["broken"], "the VM runs on")
    gone = b.vm("web2", "--accel", args.accel, "--mem", "8M", "--vcpus", "2", env={"SNAPD_RESTORE": str(image)})
    check(gone.process.wait(30) != 0, "a restore of it")
    with open(gone.log) as f:
        check("post-mortem" in f.read(), "the VMM is told why")
    shown = b.snapctl("show", str(image)).stdout
    check("post-mortem" in shown and "post-mortem" in b.snapctl("list", "--flat").stdout, "marked in show and list")
    vm.stop()


def none_made(b, args, rng, end):
    before = len(post_mortems(b))
    vm = b.vm("web", "--accel", args.accel, "--mem", "8M", "--seed", rng.getrandbits(30))
    b.vm_ready("web")
    b.snapshot("web")
    end(vm)

    def over():
        try:
            return b.vm_info("web")["state"] == "gone"
        except Failed:
            return True
    b.until(over, 40, "the VM to be gone")
    b.stop()        # nothing is left under way
    b.start()
    check(len(post_mortems(b)) == before, "no image is made")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--kills", type=int, default=4)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build, service_args=["--post-mortem", "on"]) as b:
        b.start()
        image = 0
        for _ in range(args.kills):
            image = kill_once(b, args, rng, image)
        image = memory_tells(b, args, rng, rings_tell(b, args, rng, image))
        refusals(b, args, rng, image)
        none_made(b, args, rng, lambda vm: vm.stop())
        b.service_args = ["--post-mortem", "off"]
        b.stop()
        b.start()
        none_made(b, args, rng, lambda vm: vm.kill())
        b.stop()
    print(f"{args.kills} dead VMMs: memory as it was")


if __name__ == "__main__":
    main()
