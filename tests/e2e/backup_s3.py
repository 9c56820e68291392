#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: what was pushed to a bucket is whole, whoever died or failed meanwhile.

A VM that leaves a digest of its memory in each snapshot; two services with stores of their own, one bucket of Ceph's
gateway.  Each round takes a snapshot, pushes it, and meanwhile kills the pusher, the gateway or the disk (kill -9, at
a random instant), or makes the server refuse (503), or has both services push at once.  Then the push is done again,
the other service pulls, and the digest must be the VM's.  At the end objects are damaged: each is told, none comes
back as a snapshot.  No log and no command line has the secret.

  backup_s3.py BUILD S3-SERVER [--rounds N] [--seed N]
"""
import argparse
import json
import os
import random
import signal
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import snaptest  # noqa: E402
from image import random_image  # noqa: E402
from s3server import Server, need_server  # noqa: E402


def push(b, *ids):
    return b.job("POST", "/v1/backup/push", {"snapshots": [str(i) for i in ids]})["pushed"]


def pull_and_check(b, name):
    """The memory's digest is the one that the VM left in the snapshot."""
    got = b.job("POST", "/v1/backup/pull", {"snapshot": name})
    checked = b.verify(got["snapshot"])
    assert checked["digest_matches"], checked
    return got


def in_background(fn):
    """Its end is awaited by join(); a failure is expected."""
    def run():
        try:
            fn()
        except (OSError, snaptest.Failed, snaptest.http.client.HTTPException):
            pass
    t = threading.Thread(target=run)
    t.start()
    return t


def kill_pusher(a, server):
    a.service.kill()
    a.service.wait()
    a.start()
    a.vm_ready("guest")


def kill_gateway(a, server):
    server.kill("rgw")
    server.start()


def kill_disk(a, server):
    server.kill("osd")
    server.start()


def storm(a, server):
    server.overload(1)
    time.sleep(0.3)
    server.overload(1024)


def faults(a, b, server, rng, rounds):
    """Returns the name of the last snapshot."""
    for i in range(rounds):
        fault = (kill_pusher, kill_gateway, kill_disk, storm)[i % 4]
        snap = a.snapshot("guest")["id"]
        t = in_background(lambda: push(a, snap))
        time.sleep(rng.uniform(0, 0.5))
        fault(a, server)
        t.join()
        name = push(a, snap)[0]["name"]
        pull_and_check(b, name)
        print(f"{fault.__name__}: {name[:12]} is whole", flush=True)
    return name


def resumed(server, prefix, key_file, rng, other):
    """Kill -9 in the middle of a push: the next one sends what is missing, and nothing that had arrived."""
    with snaptest.Bench(sys.argv[1], service_args=options(server, prefix, key_file) + ["--backup-rate", str(16 << 20)]) as c:
        c.env.update(server.env)
        c.start()

        def image_of(stored):
            image = random_image(rng, pages=16384, stored=stored, vm="large")
            path = image.write(os.path.join(c.dir, "image"))
            snap = json.loads(c.snapctl("import", path, "--name", "large", "--json").stdout)["snapshot"]
            os.unlink(path)
            return image, snap
        push(c, image_of(100)[1])  # so that there is a base: without one all packs are looked at in any case
        image, snap = image_of(14000)
        before, bytes_before = len(server.keys(f"{prefix}/packs/")), server.bytes(prefix)
        needed = len(set(image.pages.values())) * 4096  # they do not compress
        slack = needed // 64 + (64 << 10)  # tables, map, state, manifest: far less than a pack
        t = in_background(lambda: push(c, snap))
        c.until(lambda: len(server.keys(f"{prefix}/packs/")) >= before + 2, 60, "two packs to arrive")
        c.service.kill()
        c.service.wait()
        t.join()
        arrived, put = server.bytes(prefix), server.bytes_put()
        c.start()
        said = push(c, snap)[0]
        missing, sent = needed - (arrived - bytes_before), server.bytes_put() - put
        assert said["base"] and said["pages_known"] and not said["already"], said
        assert sent <= missing + slack and said["bytes_sent"] <= missing + slack, (sent, missing, said)
        got = other.job("POST", "/v1/backup/pull", {"snapshot": said["name"]})
        assert other.verify(got["snapshot"])["digest"] == image.digest()
        print(f"killed and resumed: {sent} bytes for {missing} missing ones, {said['pages_known']} pages had arrived", flush=True)


def two_at_once(a, b):
    mine, other = a.snapshot("guest")["id"], b.snapshot("other")["id"]
    t = in_background(lambda: push(b, other))
    first = push(a, mine)[0]["name"]
    t.join()
    second = push(b, other)[0]["name"]
    pull_and_check(b, first)
    pull_and_check(a, second)


def swap(server, keys):
    x, y = server.get(keys[0]), server.get(keys[1])
    server.put(keys[0], y)
    server.put(keys[1], x)
    return lambda: (server.put(keys[0], x), server.put(keys[1], y))


def change(server, key, fn):
    data = server.get(key)
    server.put(key, fn(data))
    return lambda: server.put(key, data)


def remove(server, key):
    data = server.get(key)
    server.delete(key)
    return lambda: server.put(key, data)


def damages(a, server, rng, prefix):
    """In a repository where nobody was killed: each object is one that some snapshot needs."""
    url = f"s3://{server.bucket}/{prefix}"
    for _ in range(2):
        a.job("POST", "/v1/backup/push", {"snapshots": [str(a.snapshot("guest")["id"])], "repository": url})

    def flipped(data):
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]

    for room in ("packs", "blobs", "snapshots"):
        keys = server.keys(f"{prefix}/{room}/")
        key = rng.choice(keys)
        kinds = {"changed": lambda: change(server, key, flipped), "missing": lambda: remove(server, key),
                 "cut off": lambda: change(server, key, lambda d: d[:rng.randrange(len(d))]),
                 "swapped": lambda: swap(server, rng.sample(keys, 2))}
        for kind, damage in kinds.items():
            if room == "snapshots" and kind == "missing":  # that is what forget does
                continue
            undo = damage()
            p = a.snapctl("backup", "verify", "--read-data", "--repository", url, check=False)
            assert p.returncode == 5, f"{kind} of {room}: exit {p.returncode}: {p.stdout} {p.stderr}"
            undo()
    p = a.snapctl("backup", "verify", "--read-data", "--repository", url, check=False)
    assert p.returncode == 0, p.stdout + p.stderr


def wrong_key(server, prefix, key_file):
    """Another key, and none: refused, with the reason."""
    other = key_file + ".other"
    with open(other, "wb") as f:
        f.write(os.urandom(32))
    os.chmod(other, 0o600)
    for args in (["--backup-key", other], []):
        with snaptest.Bench(sys.argv[1], service_args=options(server, prefix, None) + args) as c:
            c.env.update(server.env)
            c.start()
            p = c.snapctl("backup", "list", check=False)
            assert p.returncode and "key" in p.stderr, (p.returncode, p.stderr)


def options(server, prefix, key_file):
    return ["--backup", f"s3://{server.bucket}/{prefix}", "--backup-endpoint", server.endpoint] + \
        (["--backup-key", key_file] if key_file else [])


def doctor(server, prefix, key_file, *benches):
    """Tells whether the repository can be used, and how not."""
    def found(b):
        checks = json.loads(b.snapctl("doctor", "--json", check=False).stdout)["checks"]
        return next(c for c in checks if c["check"] == "backup")
    for b in benches:
        f = found(b)
        assert f["health"] == "good" and "encrypted" in f["found"] and "clock" in f["found"], f
    with snaptest.Bench(sys.argv[1], service_args=options(server, prefix, key_file)) as c:
        c.env.update(server.env, AWS_SECRET_ACCESS_KEY="wrong")
        c.start()
        f = found(c)
        assert f["health"] == "bad" and f["mend"], f
        c.stop()
        c.env.update(server.env)
        c.service_args = []
        c.start()
        f = found(c)
        assert f["health"] == "good" and "none" in f["found"], f
        c.stop()
        c.service_args = options(server, "nothing-yet", key_file)
        c.start()
        f = found(c)
        assert f["health"] == "poor" and "push" in f["mend"], f


def no_secrets(server, *benches):
    for b in benches:
        with open(f"/proc/{b.service.pid}/cmdline", "rb") as f:
            assert server.secret.encode() not in f.read()
        for name in os.listdir(b.dir):
            if name.endswith(".log"):
                with open(os.path.join(b.dir, name), "rb") as f:
                    assert server.secret.encode() not in f.read(), name


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("server")
    ap.add_argument("--rounds", type=int, default=4)
    ap.add_argument("--seed", type=int)
    args = ap.parse_args()
    need_server()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is stopped then, too
    rng = random.Random(snaptest.seed_from(args.seed))
    server = Server(args.server)
    try:
        key_file = os.path.join(server.dir, "backup.key")
        with open(key_file, "wb") as f:
            f.write(os.urandom(32))
        os.chmod(key_file, 0o600)
        opts = options(server, "vms", key_file)
        with snaptest.Bench(args.build, service_args=opts) as a, snaptest.Bench(args.build, service_args=opts) as b:
            for bench, name in ((a, "guest"), (b, "other")):
                bench.env.update(server.env)
                bench.start()
                bench.vm(name, "--mem", "8M", "--accel", "sim", "--workload", "random", "--rate", 1000, "--digest")
                bench.vm_ready(name)
            faults(a, b, server, rng, args.rounds)
            two_at_once(a, b)
            resumed(server, "vms", key_file, rng, b)
            damages(a, server, rng, "whole")
            wrong_key(server, "vms", key_file)
            doctor(server, "vms", key_file, a, b)
            no_secrets(server, a, b)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
