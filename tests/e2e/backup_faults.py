#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Backups as an operator sets them up and as networks treat them, on a real S3 server behind a proxy of ours: TLS by an
authority of one's own, the bucket in the host's name; credentials from each place where they may be, and from none that
they may not; errors, resets and answers that are cut off come to nothing; a server that is silent can be left; a clock that is
wrong is told; progress; and no secret in a log, a command line or what a hook is given.

  backup_faults.py BUILD S3-SERVER [--seed N]
"""
import argparse
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
import snaptest  # noqa: E402
from image import random_image  # noqa: E402
from s3proxy import Proxy, authority  # noqa: E402
from s3server import Server, need_server  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Places:
    """The server, the proxy, and what is needed to reach them."""

    def __init__(self, tool):
        self.server = Server(tool)
        self.dir = self.server.dir
        self.ca, cert, key = authority(self.dir, ["s3.localhost", "*.s3.localhost"])
        self.proxy = Proxy(self.server.endpoint, cert, key)
        self.endpoint = f"https://s3.localhost:{self.proxy.port}"
        self.url = f"s3://{self.server.bucket}/vms"
        self.region = self.server.vars["S3_REGION"]

    def write(self, name, text):
        path = os.path.join(self.dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as f:
            f.write(text)
        return path

    def keys(self, section, secret=None):
        return (f"[{section}]\naws_access_key_id = {self.server.vars['S3_ACCESS_KEY']}\n"
                f"aws_secret_access_key = {secret or self.server.secret}\n")

    def bench(self, build, *options, env=None, ca=True, endpoint=None, style="virtual"):
        b = snaptest.Bench(build, service_args=["--backup", self.url, "--backup-endpoint", endpoint or self.endpoint,
                                                "--backup-style", style, *(["--backup-ca", self.ca] if ca else []), *options])
        for name in [n for n in b.env if n.startswith("AWS_")]:
            del b.env[name]
        b.env.update({"HOME": b.dir, "AWS_REGION": self.region}, **(self.server.env if env is None else env))
        return b

    def stop(self):
        self.proxy.stop()
        self.server.stop()


def image(b, rng, name, pages):
    made = random_image(rng, pages=pages, stored=pages, vm=name)
    path = made.write(os.path.join(b.dir, name))
    snap = json.loads(b.snapctl("import", path, "--name", name, "--json").stdout)["snapshot"]
    return snap, made.digest()


def refused(b, *words):
    """One line that has those words."""
    b.start()
    p = b.snapctl("backup", "list", check=False)
    check(p.returncode and len(p.stderr.strip().splitlines()) == 1 and all(w in p.stderr for w in words), f"{words}: {p.stderr}")


def credentials(build, at):
    """Each place is enough alone; a wrong key elsewhere shows which one was taken."""
    right, wrong = at.keys("default"), at.keys("default", "wrong")
    config = f"[profile other]\nregion = {at.region}\n" + at.keys("profile other").split("\n", 1)[1]
    at.write("credentials.d/s3-credentials", right)
    both = at.write("both", wrong + at.keys("other"))
    shared = {"AWS_SHARED_CREDENTIALS_FILE": at.write("shared", right)}
    ways = [
        (dict(at.server.env, AWS_SHARED_CREDENTIALS_FILE=both), []),
        (shared, []),
        ({"CREDENTIALS_DIRECTORY": os.path.join(at.dir, "credentials.d"), "AWS_SHARED_CREDENTIALS_FILE": both}, []),
        ({"AWS_SHARED_CREDENTIALS_FILE": both, "AWS_PROFILE": "other"}, []),
        ({"AWS_SHARED_CREDENTIALS_FILE": both}, ["--backup-profile", "other"]),
        ({"AWS_CONFIG_FILE": at.write("config", config), "AWS_PROFILE": "other"}, []),
        (dict(at.server.env, AWS_SECRET_ACCESS_KEY="wrong"), ["--backup-credentials", at.write("named", right)]),
    ]
    for env, options in ways:
        with at.bench(build, *options, env=env) as b:
            b.start()
            check(b.snapctl("backup", "list", "--json").returncode == 0, f"{env} {options}")
    with at.bench(build, env={}) as b:
        refused(b, "credentials")
    with at.bench(build, "--backup-profile", "nobody", env=shared) as b:
        refused(b, "nobody")
    with at.bench(build, env={"AWS_SHARED_CREDENTIALS_FILE": both}) as b:
        refused(b, "key")


def reached(build, at):
    with at.bench(build, ca=False) as b:
        refused(b, "not trusted")
    with at.bench(build, endpoint="http://192.0.2.1", ca=False) as b:
        refused(b, "https")
    for style, endpoint in (("path", at.endpoint), ("path", at.server.endpoint), ("auto", at.server.endpoint)):
        with at.bench(build, endpoint=endpoint, style=style) as b:
            b.start()
            check(json.loads(b.snapctl("backup", "list", "--json").stdout)["snapshots"], style)


def storm(a, other, at, rng):
    """Of what goes wrong in a third of all requests nothing is left but repeats."""
    snap, digest = image(a, rng, "storm", 3000)
    at.proxy.faults = 0
    at.proxy.fault = lambda method, path: rng.choice([None] * 8 + ["500", "503", "reset", "cut"])
    a.snapctl("backup", "push", str(snap))
    got = json.loads(other.snapctl("backup", "pull", "storm", "--json").stdout)["snapshot"]
    at.proxy.fault = lambda method, path: None
    check(other.verify(got)["digest"] == digest, "not what was pushed")
    check(at.proxy.faults > 0, "nothing went wrong")
    check(json.loads(a.snapctl("backup", "verify", "--read-data", "--json").stdout)["whole"], "not whole")


def left(a, at, rng):
    """A silent server is left by Ctrl-C and over the API; nothing becomes visible, and the next push does it all."""
    snap, _ = image(a, rng, "left", 3000)
    at.proxy.fault = lambda method, path: "hang" if method == "PUT" else None
    at.proxy.hanging = 0
    p = subprocess.Popen([a.tool("snapctl"), "backup", "push", str(snap)], env=a.env, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    a.until(lambda: at.proxy.hanging, 60, "a silent server")
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=60)[1]
    check(p.returncode and "cancelled" in said, f"{p.returncode}: {said}")
    at.proxy.hanging = 0
    job = a.call("POST", "/v1/backup/push", {"snapshots": [str(snap)]})["job"]["id"]
    a.until(lambda: at.proxy.hanging, 60, "a silent server again")
    a.call("DELETE", f"/v1/jobs/{job}")
    a.until(lambda: a.get(f"/v1/jobs/{job}")["job"]["state"] == "cancelled", 60, "the push to be cancelled")
    at.proxy.fault = lambda method, path: None
    at.proxy.go_on.set()
    names = [s["vm"] for s in json.loads(a.snapctl("backup", "list", "--json").stdout)["snapshots"]]
    check("left" not in names, "half a push is visible")
    a.snapctl("backup", "push", str(snap))
    check(json.loads(a.snapctl("backup", "verify", "--json").stdout)["whole"], "not whole")


def progress(build, at, rng):
    """On a terminal: how much of how much, how fast, how long yet."""
    with at.bench(build, "--backup-rate", "4M") as b:
        b.start()
        snap, _ = image(b, rng, "slow", 2048)
        master, slave = pty.openpty()
        p = subprocess.Popen([b.tool("snapctl"), "backup", "push", str(snap)], env=dict(b.env, TERM="xterm"), stdin=slave,
                             stdout=slave, stderr=slave)
        os.close(slave)
        out = b""
        while select.select([master], [], [], 60)[0]:
            try:
                out += os.read(master, 65536)
            except OSError:
                break
        os.close(master)
        check(p.wait(60) == 0, out)
        check(b" of 8.0 MiB" in out and b"/s" in out and b"left " in out, out)


def clock(a, at):
    """As doctor judges it: a minute is told, a quarter of an hour is bad."""
    for ahead_s, health in ((0, "good"), (40, "good"), (70, "poor"), (-70, "poor"), (800, "poor"), (960, "bad"), (-960, "bad"), (0, "good")):
        at.proxy.clock_ahead_s = ahead_s
        checks = json.loads(a.snapctl("doctor", "--json", check=False).stdout)["checks"]
        found = next(c for c in checks if c["check"] == "backup")
        check(found["health"] == health and (health == "good" or "clock" in found["mend"]), f"{ahead_s} s: {found}")


def secrets(build, at):
    """What a hook is given, what others see of the process, what is written down."""
    with at.bench(build, "--log-level", "debug") as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies")]
        b.start()
        b.vm("web", "--accel", "sim", "--mem", "4M")
        b.vm_ready("web")
        seen = os.path.join(b.dir, "hook.env")
        hook = f"(env; tr '\\0' '\\n' < /proc/self/environ) > {seen}"
        b.snapctl("policy", "set", "hooked", "every=1h", f"pre_hook={hook}", f"backup={at.url}")
        b.snapctl("policy", "run", "hooked")
        b.until(lambda: any(s["vm"] == "web" for s in json.loads(b.snapctl("backup", "list", "--json").stdout)["snapshots"]), 60, "its backup")
        with open(f"/proc/{b.service.pid}/cmdline", "rb") as f:
            texts = {"argv": f.read()}
        check(b.stop() == 0, "its end")
        for name in os.listdir(b.dir):
            if name.endswith((".log", ".env")):
                with open(os.path.join(b.dir, name), "rb") as f:
                    texts[name] = f.read()
        check(b"SNAPD_VM=web" in texts["hook.env"], "the hook did not run")
        for where, text in texts.items():
            check(at.server.secret.encode() not in text, f"the secret is in {where}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("server")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_server()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is stopped then, too
    rng = random.Random(snaptest.seed_from(args.seed))
    at = Places(args.server)
    try:
        with at.bench(args.build) as a, at.bench(args.build) as other:
            a.start()
            other.start()
            storm(a, other, at, rng)
            left(a, at, rng)
            clock(a, at)
            progress(args.build, at, rng)
            reached(args.build, at)
            credentials(args.build, at)
            secrets(args.build, at)
    finally:
        at.stop()
    print("set up in each way, through storms, silence and wrong clocks; no secret was told")


if __name__ == "__main__":
    main()
