#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Backups in a repository: what is pushed on one host comes back on another, empty one, page for page; only what
changed is sent; the service dies at random moments of a push and of a pull and nothing is lost or sent twice;
two hosts push at once; what is forgotten goes after the grace time and nothing else; each kind of damage is named
with object and snapshot; a wrong key opens nothing; pipes.

  backup.py BUILD [--accel kvm|sim] [--kills N] [--every-damage] [--guest-only] [--url s3://…] [--seed S]
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from image import random_image  # noqa: E402
from snaptest import Bench, need_accel, seed_from  # noqa: E402

CORRUPT = 5


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def js(b, *argv, code=0):
    p = b.snapctl("backup", *argv, "--json", check=False)
    check(p.returncode == code, f"backup {argv}: exit {p.returncode}, not {code}: {p.stderr} {p.stdout[-400:]}")
    return json.loads(p.stdout) if p.stdout.strip() else {}


def fails(b, code, *argv):
    p = b.snapctl("backup", *argv, check=False)
    check(p.returncode == code and len(p.stderr.strip().splitlines()) == 1,
          f"backup {argv}: exit {p.returncode}, not {code}: {p.stderr}")
    return p.stderr


def whole(b, snap):
    check(b.verify(snap).get("digest_matches") is True, f"snapshot {snap} is not the guest's memory")


def running_vm(args, b, other, rng):
    """A guest that writes all the time: full, increments, and on the other host, each the guest's own memory."""
    vm = b.vm("web", "--accel", args.accel, "--mem", "32M", "--vcpus", "1", "--workload", "random", "--digest",
              "--seed", rng.getrandbits(30))
    b.vm_ready("web")
    snaps = [b.snapshot("web", name=f"s{i}", tags="auto,x", note="a note") for i in range(3)]
    got = js(b, "push", *[str(s["id"]) for s in snaps])["pushed"]
    check([p["base"] is None for p in got] == [True, False, False], f"bases: {got}")
    check(js(b, "push", "web@s1")["pushed"][0]["already"], "pushed twice")
    vm.stop()
    pulled = [js(other, "pull", f"web@s{i}") for i in (0, 2)]
    for snap, r in zip((snaps[0], snaps[2]), pulled):
        whole(other, r["snapshot"])
        mine = other.get(f"/v1/snapshots/{r['snapshot']}")["snapshot"]
        check(all(mine[k] == snap[k] for k in ("name", "note", "tags", "taken_ns", "state_bytes")), f"{mine} {snap}")
    check(js(other, "pull", "web@s2")["already"], "pulled twice")
    restored = other.vm("again", "--accel", args.accel, "--mem", "32M", "--vcpus", "1", "--workload", "random", "--digest",
                        env={"SNAPD_RESTORE": str(pulled[1]["snapshot"])})
    other.vm_ready("again")
    whole(other, other.snapshot("again")["id"])
    restored.stop()
    check(js(b, "verify", "--read-data")["whole"], "not whole")


def bases(args, b, other, rng):
    """What a push builds on: an ancestor that is gone here, too, as long as the epochs since it are known; a relative
    on another branch; and nothing once this host's cache was lost, which costs a look at all pages, and no bytes."""
    vm = b.vm("thin", "--accel", args.accel, "--mem", "16M", "--vcpus", "1", "--workload", "random", "--digest",
              "--rate", "200", "--seed", rng.getrandbits(30))
    b.vm_ready("thin")
    pages = 16 << 8
    snaps, names, changed = [], [], []

    def take(push=True):
        got = b.job("POST", "/v1/vms/thin/snapshots", {})
        snaps.append(got["snapshot"]["id"])
        changed.append(got["pages"])
        p = js(b, "push", str(snaps[-1]))["pushed"][0] if push else {"name": None}
        names.append(p["name"])
        return p

    def looked(p):
        return p["pages_read"] + p["pages_zero"]

    def forget(*which):
        b.snapctl("delete", *(str(snaps[i]) for i in which))
        b.snapctl("store", "gc")
    take(push=False)
    check(take()["base"] is None, "a base out of nowhere")
    b.rollback("thin", str(snaps[0]))
    p = take()  # 2: its ancestor was not pushed, its relative was
    differ = b.job("GET", f"/v1/snapshots/{snaps[2]}/diff?with={snaps[1]}")["pages"]
    check(p["base"] == names[1] and looked(p) == differ, f"a relative, {differ} pages differ: {p}")
    take(push=False)  # 3
    forget(2)  # and what it changed is 3's now
    p = take()  # 4
    check(p["base"] == names[2] and looked(p) <= sum(changed[2:]), f"an ancestor that is deleted, {changed}: {p}")
    p = js(b, "push", str(snaps[3]))["pushed"][0]
    check(p["base"] == names[2] and looked(p) <= sum(changed[2:4]), f"between the two, {changed}: {p}")
    forget(0, 1, 3, 4)
    b.stop()
    shutil.rmtree(os.path.join(b.store, "backup"))
    b.start()
    b.vm_ready("thin")
    p = take()  # 5
    check(p["base"] is None and looked(p) >= pages and p["pages_known"], f"no cache: {p}")
    vm.stop()
    for name in names[1], names[2], names[4], names[5]:
        whole(other, js(other, "pull", name)["snapshot"])


class Images:
    """Made-up snapshots: as many as wanted, without a VM."""

    def __init__(self, b, rng):
        self.b, self.rng, self.digests = b, rng, {}

    def make(self, vm, pages=1024, stored=700):
        image = random_image(self.rng, pages=pages, stored=stored, vm=vm)
        path = image.write(os.path.join(self.b.dir, f"image-{self.rng.getrandbits(40):x}"))
        snap = json.loads(self.b.snapctl("import", path, "--name", vm, "--json").stdout)["snapshot"]
        os.unlink(path)
        self.digests[snap] = image.digest()
        return snap

    def same(self, other, snap, pulled):
        check(other.verify(pulled)["digest"] == self.digests[snap], f"{snap} came back as something else")


def killed(b, rng, argv, timeout=60):
    """The service dies while a verb runs, and starts again."""
    p = subprocess.Popen([b.tool("snapctl"), "backup", *argv], env=b.env, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.random() ** 2 * 0.4)
    b.stop(signal.SIGKILL)
    p.wait(timeout)
    b.start()


def kills(args, b, other, images, rng):
    """Every push that is done again goes on where it was: in all not more is sent than once, but for what was under way."""
    for i in range(args.kills):
        snap = images.make(f"killed{i}", pages=4096, stored=3000)
        for _ in range(2):
            killed(b, rng, ["push", str(snap)])
        r = js(b, "push", str(snap))["pushed"][0]
        check(r["already"] or r["pages_sent"] + r["pages_known"] == r["pages_read"], f"{r}")
        killed(other, rng, ["pull", f"killed{i}"])
        pulled = js(other, "pull", f"killed{i}")["snapshot"]
        images.same(other, snap, pulled)
    check(js(b, "verify")["whole"], "not whole after kills")


def two_hosts(b, other, images, rng):
    """Both push what is theirs, at once; equal pages of the other one are not sent again."""
    theirs = Images(other, rng)
    mine_snap, other_snap = images.make("left"), theirs.make("right")
    results = {}

    def push(who, snap):
        results[who.dir] = js(who, "push", str(snap))
    threads = [threading.Thread(target=push, args=a) for a in ((b, mine_snap), (other, other_snap))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    check(len(results) == 2, "a push failed")
    images.same(other, mine_snap, js(other, "pull", "left")["snapshot"])
    theirs.same(b, other_snap, js(b, "pull", "right")["snapshot"])
    # The same memory under another name, on the other host: nothing but maps is sent.
    copy = js(other, "pull", "left", "--name", "copy")["snapshot"]
    r = js(other, "push", str(copy))["pushed"][0]
    check(not r["pages_sent"] and r["pages_known"] == r["pages_read"], f"sent again: {r}")


def forget(b, other, images):
    """Gone for everyone at once; what only it had is pruned later (pruned())."""
    gone, kept = images.make("gone"), images.make("kept")
    js(b, "push", str(gone), str(kept))
    check("would forget" in b.snapctl("backup", "forget", "gone", "--dry-run").stdout, "dry run")
    check(js(b, "forget", "gone")["forgotten"] == 1, "not forgotten")
    fails(other, 3, "pull", "gone")
    return gone, kept


def prune(b):
    """What prune says is what is gone; whatever others do meanwhile is over."""
    packs = js(b, "status")["rooms"]["packs"]["objects"]
    r = js(b, "prune")
    check(js(b, "status")["rooms"]["packs"]["objects"] == packs - r["packs_deleted"], f"{packs} packs, {r}")
    return r


def pruned(b, other, images, gone, kept):
    """After the grace time, and in two prunes; a push after them sends again what they took."""
    end = time.monotonic() + 60
    while not prune(b)["packs_deleted"]:
        check(time.monotonic() < end, "nothing was pruned")
        time.sleep(0.2)
    check(js(b, "verify", "--read-data")["whole"], "too much was pruned")
    images.same(other, kept, js(other, "pull", "kept")["snapshot"])
    r = js(b, "push", str(gone))["pushed"][0]
    check(not r["already"] and r["pages_sent"], "what was pruned is sent again")
    images.same(other, gone, js(other, "pull", "gone")["snapshot"])
    lines = js(b, "forget", "--keep-last", "1", "--vm", "web")["snapshots"]
    check([x["keep"] for x in lines].count(True) == 1, f"{lines}")


def damages(b, repo, images, every):
    """Each kind, of a pack and of a blob: named, with the snapshot; and mended by putting the object back."""
    snap = images.make("hurt")
    name = js(b, "push", str(snap))["pushed"][0]["name"]
    label = f"hurt@{name[:12]}"

    def objects(room):
        return sorted((os.path.join(repo, room, f) for f in os.listdir(os.path.join(repo, room))), key=os.path.getmtime)
    packs, blobs = objects("packs"), objects("blobs")
    saved = {p: open(p, "rb").read() for p in packs + blobs}

    def put(path, data):
        if data is None:
            os.unlink(path)
            return
        with open(path + ".new", "wb") as f:
            f.write(data)
        os.rename(path + ".new", path)

    def damaged(path, data, kind, *more):
        put(path, data)
        r = js(b, "verify", *more, code=CORRUPT)
        put(path, saved[path])
        want = os.path.relpath(path, repo)
        check([d["object"] for d in r["damages"]] == [want] and r["damages"][0]["kind"] == kind and
              label in r["damages"][0]["snapshots"], f"{want}: {r['damages']}")

    pack, blob = packs[-1], blobs[-1]
    other_pack, other_blob = packs[0], blobs[0]
    damaged(pack, None, "missing")
    damaged(blob, None, "missing")
    for path in (pack, blob):
        damaged(path, saved[path][:-1], "corrupt")
        damaged(path, saved[path][:110] + bytes([saved[path][110] ^ 1]) + saved[path][111:], "corrupt")
        for length in (50, 0) if every else ():
            damaged(path, saved[path][:length], "corrupt")
    damaged(pack, saved[other_pack], "corrupt")
    if every:
        damaged(blob, saved[other_blob], "corrupt")
    at = len(saved[pack]) - 100
    flipped = saved[pack][:at] + bytes([saved[pack][at] ^ 0x40]) + saved[pack][at + 1:]
    damaged(pack, flipped, "corrupt", "--read-data")
    put(pack, flipped)
    check(js(b, "verify")["whole"], "the structure alone reads no data")
    put(pack, saved[pack])
    manifest = os.path.join(repo, "snapshots", name)
    text = open(manifest, "rb").read()
    put(manifest, text[:-3])
    shutil.rmtree(os.path.join(b.store, "backup"))
    b.stop()
    b.start()
    p = b.snapctl("backup", "list", check=False)
    check(p.returncode == CORRUPT and f"snapshots/{name}" in p.stderr, f"list: {p.returncode} {p.stderr}")
    put(manifest, text)
    return pack, flipped, saved[pack], name


def pull_damaged(other, hurt):
    pack, flipped, good, name = hurt
    with open(pack, "wb") as f:
        f.write(flipped)
    said = fails(other, CORRUPT, "pull", name[:8])
    check(os.path.basename(pack) in said and "hurt" in said, said)
    with open(pack, "wb") as f:
        f.write(good)
    check(not [s for s in other.snapshots("hurt")], "a damaged snapshot became visible")


def pipes(b, other, images):
    snap = images.make("piped")
    out = subprocess.Popen([b.tool("snapctl"), "backup", "push", str(snap), "--stdout"], env=b.env, stdout=subprocess.PIPE)
    p = subprocess.run([other.tool("snapctl"), "backup", "pull", "--stdin", "--json"], env=other.env, stdin=out.stdout,
                       stdout=subprocess.PIPE, timeout=60)
    check(not out.wait(20) and not p.returncode, "a pipe failed")
    images.same(other, snap, json.loads(p.stdout)["snapshot"])


def encrypted(args, rng):
    """Sealed with a key that another host must have; nothing of the pages is in the bucket."""
    with Bench(args.build) as b, Bench(args.build) as other:
        key, wrong = os.path.join(b.dir, "key"), os.path.join(b.dir, "wrong")
        for path, byte in ((key, b"k"), (wrong, b"w")):
            with open(path, "wb") as f:
                f.write(byte * 40)
            os.chmod(path, 0o600)
        url = f"file://{b.dir}/repo"
        b.service_args += ["--backup", url, "--backup-key", key]
        b.start()
        images = Images(b, rng)
        snap = images.make("secret", pages=512, stored=100)
        js(b, "push", str(snap))
        check(js(b, "status")["encrypted"] and js(b, "verify", "--read-data")["whole"], "sealed")
        for room in ("packs", "blobs", "snapshots"):
            for f in os.listdir(os.path.join(b.dir, "repo", room)):
                with open(os.path.join(b.dir, "repo", room, f), "rb") as o:
                    check(b"secret" not in o.read(), "a name in the clear")
        other.service_args += ["--backup", url]
        for more, what in ([], "is encrypted"), (["--backup-key", wrong], "is not the key"):
            other.service_args = ["--backup", url, *more]
            other.start()
            check(what in fails(other, CORRUPT, "verify") and what in fails(other, CORRUPT, "pull", "secret"), what)
            other.stop()
        other.service_args = ["--backup", url, "--backup-key", key]
        other.start()
        images.same(other, snap, js(other, "pull", "secret")["snapshot"])


def refused(b):
    fails(b, 2, "push")
    fails(b, 2, "frobnicate")
    fails(b, 2, "list", "--repository", "ftp://x")
    fails(b, 2, "forget")
    fails(b, 3, "push", "12345678")
    fails(b, 3, "pull", "nobody")
    fails(b, 3, "list", "--repository", f"file://{b.dir}/nowhere")


def everything(args, b, other, rng, repo):
    """The grace time passes during other steps."""
    images = Images(b, rng)
    gone, kept = forget(b, other, images)
    running_vm(args, b, other, rng)
    prune(b)  # the manifest goes by this one, and packs are marked
    bases(args, b, other, rng)
    refused(b)
    two_hosts(b, other, images, rng)
    kills(args, b, other, images, rng)
    pipes(b, other, images)
    pruned(b, other, images, gone, kept)
    if not args.url:
        pull_damaged(other, damages(b, repo, images, args.every_damage))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="sim", choices=["kvm", "sim"])
    p.add_argument("--kills", type=int, default=2)
    p.add_argument("--every-damage", action="store_true", help="not one of each kind alone")
    p.add_argument("--guest-only", action="store_true", help="what depends on the accelerator")
    p.add_argument("--url")
    p.add_argument("--option", action="append", default=[], help="more options of the service")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_accel(args.accel)
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b, Bench(args.build) as other:
        repo = os.path.join(b.dir, "repo")
        for one in (b, other):
            one.service_args += ["--backup", args.url or f"file://{repo}", "--backup-grace", "2", *args.option]
            one.start()
        if args.guest_only:
            running_vm(args, b, other, rng)
        else:
            everything(args, b, other, rng, repo)
        check(js(b, "verify", "--read-data")["whole"], "not whole at the end")
        check(b.stop() == 0 and other.stop() == 0, "exit code of a service")
    if not args.url and not args.guest_only:
        encrypted(args, rng)
    print("a guest, pushed and pulled" if args.guest_only else
          "pushed, pulled, killed, forgotten, pruned, damaged, sealed: as documented")


if __name__ == "__main__":
    main()
