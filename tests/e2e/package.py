#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The Debian packages, as an administrator meets them: built by scripts/deb, installed, the service run as the unit has it
(its user, its directory, its ExecStart; there is no systemd here), upgraded, removed, purged.

All of it on a copy of this machine's root that is written over it (an overlay in memory, in a mount namespace of
its own): nothing of it stays.

  package.py SOURCE [--debs DIR]
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from snaptest import skip  # noqa: E402

PACKAGE = "snapd-kvm"
INSIDE = "SNAPD_PACKAGE_TEST_INSIDE"


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def run(*argv, ok=(0,), **kw):
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **kw)
    check(p.returncode in ok, f"{' '.join(argv)}: exit {p.returncode}: {p.stdout[-2000:]}")
    return p.stdout


class Root:
    """The machine's root with a layer in memory over it."""

    def __init__(self, at):
        self.at = os.path.join(at, "root")
        run("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", at)
        for d in ("upper", "work", "root"):
            os.mkdir(os.path.join(at, d))
        run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={at}/upper,workdir={at}/work", self.at)
        for what in ("/proc", "/dev"):
            run("mount", "--rbind", what, self.at + what)
        for where in ("/run", "/tmp"):
            run("mount", "-t", "tmpfs", "tmpfs", self.at + where)
        self.processes = []

    def path(self, p):
        return self.at + p

    def do(self, *argv, **kw):
        return run("chroot", self.at, *argv, **kw)

    def spawn(self, *argv, log):
        with open(self.path(log), "a") as f:
            self.processes.append(subprocess.Popen(["chroot", self.at, *argv], stdin=subprocess.DEVNULL, stdout=f, stderr=f))
        return self.processes[-1]

    def stop(self):
        for p in reversed(self.processes):
            if p.poll() is None:
                p.terminate()
                p.wait(60)
        self.processes = []

    def there(self, p):
        return os.path.lexists(self.path(p))


def listed(root, package):
    return [p for p in root.do("dpkg", "-L", package).splitlines() if os.path.isfile(root.path(p))]


def documented(root):
    """A page for each program, completion for snapctl in each shell, units that systemd understands."""
    files = listed(root, PACKAGE) + listed(root, "libsnapd-agent-dev")
    for program in (p for p in files if p.startswith("/usr/bin/")):
        name = os.path.basename(program)
        check(any(re.fullmatch(rf"/usr/share/man/man[18]/{name}\.[18]\.gz", f) for f in files), f"no page for {name}")
    for page in "snapd.conf.5", "snapd-policy.5":
        check(root.there(f"/usr/share/man/man5/{page}.gz"), page)
    for f in ("bash-completion/completions/snapctl", "zsh/site-functions/_snapctl", "fish/vendor_completions.d/snapctl.fish"):
        check(root.there("/usr/share/" + f), f)
    said = root.do("systemd-analyze", "verify", "--man=no", "/lib/systemd/system/snapd.socket", "/lib/systemd/system/snapd.service",
                   ok=(0, 1))
    check("snapd" not in said, said)


def installed(root):
    user = root.do("getent", "passwd", "snapd").split(":")
    check(user[5] == "/var/lib/snapd" and "nologin" in user[6], f"{user}")
    st = os.stat(root.path("/etc/snapd/policies.d"))
    check(st.st_uid == int(user[2]), "the service cannot write policies")
    for want in ("sockets.target.wants/snapd.socket", "multi-user.target.wants/snapd.service"):
        check(root.there("/etc/systemd/system/" + want), f"not enabled: {want}")
    return int(user[2]), int(user[3])


def exec_start(root):
    with open(root.path("/lib/systemd/system/snapd.service")) as f:
        unit = dict(x.strip().split("=", 1) for x in f if "=" in x and not x.startswith("#"))
    check(unit["User"] == "snapd" and unit["StateDirectory"] == "snapd", f"{unit}")
    return unit["ExecStart"].split()


def serve(root, uid, gid):
    for d in "/var/lib/snapd", "/run/snapd":
        os.makedirs(root.path(d), 0o755, exist_ok=True)
        os.chown(root.path(d), uid, gid)
    root.spawn("setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--no-new-privs", *exec_start(root),
               log="/tmp/snapd.log")
    wait(root, lambda: root.do("snapctl", "list"), "the service to answer")


def wait(root, fn, what):
    end = time.monotonic() + 120
    while True:
        try:
            return fn()
        except RuntimeError as e:
            if time.monotonic() > end:
                with open(root.path("/tmp/snapd.log")) as f:
                    raise RuntimeError(f"{what}: {e}\n{f.read()}") from e
            time.sleep(0.1)


def used(root):
    """A guest of root's, a snapshot, and what doctor says of the installation."""
    root.spawn("snapvm", "--name", "web", "--accel", "sim", "--mem", "8M", "--digest", log="/tmp/vm.log")
    wait(root, lambda: root.do("snapctl", "snapshot", "web", "--name", "first"), "a snapshot")
    check(json.loads(root.do("snapctl", "verify", "web@first", "--digest", "--json"))["digest_matches"], "not the guest's memory")
    root.do("snapctl", "policy", "set", "nightly", "schedule=02:30", "keep_last=3")
    checks = json.loads(root.do("snapctl", "doctor", "--json", ok=(0, 1)))["checks"]
    check(any(c["check"] == "service" and c["health"] != "bad" for c in checks), f"{checks}")


def next_version(deb, out):
    """The same with a higher number."""
    tree = os.path.join(out, os.path.basename(deb) + ".d")
    run("dpkg-deb", "-R", deb, tree)
    control = os.path.join(tree, "DEBIAN", "control")
    with open(control) as f:
        text = re.sub(r"^(Version: \S+)$", r"\1+1", f.read(), flags=re.M)
    with open(control, "w") as f:
        f.write(re.sub(r"(\(= [^)]*)\)", r"\1+1)", text))
    run("dpkg-deb", "-b", "--root-owner-group", tree, tree + ".deb")
    return tree + ".deb"


def life(root, debs):
    where = root.path("/tmp/debs")
    os.mkdir(where)
    debs = [shutil.copy(d, where) for d in debs]
    inside = [d[len(root.at):] for d in debs]
    root.do("dpkg", "-i", *inside)
    uid, gid = installed(root)
    documented(root)
    serve(root, uid, gid)
    used(root)
    files = listed(root, PACKAGE)
    root.stop()

    root.do("dpkg", "-i", *[next_version(d, where)[len(root.at):] for d in debs])
    check(installed(root) == (uid, gid), "the user is another one")
    serve(root, uid, gid)
    root.do("snapctl", "verify", "web@first", "--digest")
    root.do("snapctl", "policy", "show", "nightly")
    root.stop()

    root.do("dpkg", "-r", PACKAGE)
    left = [f for f in files if root.there(f)]
    check(not left, f"left behind: {left}")
    check(root.there("/etc/snapd/policies.d/nightly.conf") and root.there("/var/lib/snapd/index"), "what was the administrator's is gone")
    said = root.do("dpkg", "-P", PACKAGE, "libsnapd-agent-dev", "libsnapd-agent1")
    check(not root.there("/etc/snapd") and root.there("/var/lib/snapd/index") and "are kept" in said, said)
    wants = glob.glob(root.path("/etc/systemd/system/*.wants/snapd.*"))
    check(not wants and not root.there("/usr/bin/snapvm"), f"left behind: {wants}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source")
    p.add_argument("--debs", help="those there, not new ones")
    args = p.parse_args()
    for tool in ("dpkg-buildpackage", "dh", "unshare", "systemd-analyze", "setpriv"):
        if not shutil.which(tool):
            skip(f"{tool} is not installed")
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, stderr=subprocess.DEVNULL).returncode:
        skip("needs a mount namespace")
    if not os.environ.get(INSIDE):
        os.execvpe("unshare", ["unshare", "-m", "--propagation", "private", sys.executable, *sys.argv], dict(os.environ, **{INSIDE: "1"}))
    with tempfile.TemporaryDirectory(prefix="snapd-package.", ignore_cleanup_errors=True) as d:
        debs = args.debs or os.path.join(d, "debs")
        if not args.debs:
            p = subprocess.run([os.path.join(args.source, "scripts", "deb"), debs], check=False)
            check(p.returncode == 0, "scripts/deb failed")
        debs = sorted(x for x in glob.glob(os.path.join(os.path.abspath(debs), "*.deb")) if "dbgsym" not in x)
        at = os.path.join(d, "layer")
        os.mkdir(at)
        root = Root(at)
        try:
            life(root, debs)
        finally:
            root.stop()
            run("umount", "-R", "-l", at)
    print("installed, served, upgraded, removed, purged: " + ", ".join(os.path.basename(x) for x in debs))


if __name__ == "__main__":
    main()
