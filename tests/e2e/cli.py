#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""snapctl, every verb that needs no running VM, against a real service: made-up images go in, are listed,
shown, compared, verified, exported byte for byte, deleted; damage, cut-offs, conflicts and unknown names
give the documented exit code, one line, and leave nothing behind.

  cli.py BUILD [--seed S]
"""
import argparse
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from image import PAGE, Image, random_image, record  # noqa: E402
from snaptest import Bench, seed_from  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Cli:
    def __init__(self, b, rng):
        self.b, self.rng = b, rng

    def path(self, name):
        return os.path.join(self.b.dir, name)

    def ok(self, *argv):
        return self.b.snapctl(*map(str, argv)).stdout

    def js(self, *argv):
        return json.loads(self.ok(*argv, "--json"))

    def bad(self, code, *argv, says=""):
        """Must end with `code` (or one of them) and say why in one line."""
        p = self.b.snapctl(*map(str, argv), check=False)
        check(p.returncode in (code if isinstance(code, tuple) else (code,)), f"snapctl {argv}: exit {p.returncode}, not {code}: {p.stderr}")
        lines = p.stderr.strip().splitlines()
        check(len(lines) == 1 and lines[0].startswith("snapctl: "), f"snapctl {argv} says: {p.stderr!r}")
        check(says in p.stderr, f"snapctl {argv}: no {says!r} in: {p.stderr}")

    def snapshots(self):
        return [s["id"] for s in self.js("list")["snapshots"]]

    # ---- there and back ----

    def round_trip(self):
        image = random_image(self.rng, vm="web", note="a note", cmdline=["/bin/echo", "two words", "it's"])
        image.write(self.path("a.img"))
        self.ok("import", self.path("a.img"), "--name", "web", "--snapshot-name", "first", "--tag", "x,y")
        got = self.js("verify", "--digest", "web@first")
        check(got["digest"] == image.digest() and got["digest_matches"] is True, f"digest: {got}")
        check(got["pages"] == 2048 and got["stored"] + got["zero"] == 2048, f"counts: {got}")

        self.ok("export", "web@first", self.path("b.img"))
        with open(self.path("a.img"), "rb") as a, open(self.path("b.img"), "rb") as b:
            check(a.read() == b.read(), "the exported file differs")
        check(os.stat(self.path("b.img")).st_blocks * 512 < 4 << 20, "the exported file is not sparse")
        check(os.stat(self.path("b.img")).st_mode & 0o77 == 0, "others may read a guest's memory")
        self.bad(4, "export", "web@first", self.path("b.img"), says="--force")
        self.ok("export", "--force", "web@first", self.path("b.img"))

        self.ok("import", self.path("b.img"))
        check(self.js("verify", "--digest", "web-imported")["digest"] == image.digest(), "the second generation")
        check(self.js("diff", "web@first", "web@first")["pages"] == 0, "a snapshot differs from itself")
        show = self.js("show", "web-imported")
        check(show["snapshot"]["note"] == "a note" and show["vm"]["cmdline"] == image.cmdline, f"show: {show}")
        check({r["name"] for r in show["records"]} == {"pieces", "made.up", "note.ram-sha256"}, "records")
        return image

    def many_shapes(self):
        """Pieces with gaps, at high addresses and beyond what a file can hold; all zero; one page."""
        rng = self.rng
        high = 1 << 40
        pages = {g: rng.randbytes(PAGE) for g in (0, 5, 6, 7, 300, 1000, 1299, (1 << 14) + 3)}
        shapes = [
            Image(pages, [(0, 8), (300, 1000), (1 << 14, 16)]),
            Image({}, [(16, 64)]),
            Image({3: b"\1" * PAGE}, [(3, 1)]),
            Image({g: rng.randbytes(PAGE) for g in range(0, 700)}, [(0, 700)]),
        ]
        for i, image in enumerate(shapes):
            image.write(self.path(f"s{i}"))
            self.ok("import", self.path(f"s{i}"), "--name", f"shape{i}")
            check(self.js("verify", "--digest", f"shape{i}")["digest"] == image.digest(), f"shape {i}")
            self.ok("export", f"shape{i}", self.path(f"s{i}.out"))
            with open(self.path(f"s{i}"), "rb") as a, open(self.path(f"s{i}.out"), "rb") as b:
                check(a.read() == b.read(), f"shape {i} came out different")
        # A key beyond every file: its map says where the bytes lie.
        image = Image({2: rng.randbytes(PAGE), high + 1: rng.randbytes(PAGE)}, [(0, 4), (high, 4)])
        desc = image.json("far")
        desc["memory"] = {"file": "far", "bytes": 8 * PAGE,
                          "map": [[0, 4 * PAGE, 0], [high * PAGE, 4 * PAGE, 4 * PAGE]]}
        with open(self.path("far"), "wb") as f:
            for at, gfn in ((2, 2), (5, high + 1)):
                f.seek(at * PAGE)
                f.write(image.pages[gfn])
            f.truncate(8 * PAGE)
        with open(self.path("far.json"), "w") as f:
            json.dump(desc, f)
        self.ok("import", self.path("far"), "--name", "far")
        check(self.js("verify", "--digest", "far")["digest"] == image.digest(), "far piece")
        self.ok("export", "far", self.path("far2"))
        with open(self.path("far2.json")) as f:
            check(json.load(f)["memory"]["map"] == desc["memory"]["map"], "map of the far piece")
        self.ok("import", self.path("far2"), "--name", "far2")
        check(self.js("verify", "--digest", "far2")["digest"] == image.digest(), "far piece again")

    def hard_imports(self, image):
        """What is wrong is refused with the reason; what is cut off leaves nothing."""
        before = self.snapshots()
        timelines = self.js("store", "stats")["timelines"]
        bad = self.path("bad")

        def attempt(code, says, change):
            desc = image.json("bad")
            image.write(bad)
            change(desc)
            with open(bad + ".json", "w") as f:
                json.dump(desc, f)
            self.bad(code, "import", bad, "--name", "bad", says=says)

        def no_pieces(d):
            d["records"] = [r for r in d["records"] if r["name"] != "pieces"]

        def overlap(d):
            d["records"][0] = record("pieces", (0).to_bytes(8, "little") + (9).to_bytes(24, "little") +
                                     (5).to_bytes(8, "little") + (9).to_bytes(24, "little"))

        def smaller(d):
            d["records"][0] = record("pieces", (0).to_bytes(8, "little") + (10).to_bytes(24, "little"))

        def payload(d):
            d["records"][1]["payload"] = "!!!!"

        attempt(1, "pieces", no_pieces)
        attempt(1, "piece", overlap)
        attempt(1, "not in the RAM", smaller)
        attempt(5, "payload", payload)
        attempt(5, "not what snapctl export writes", lambda d: d.update(format="other"))
        attempt(1, "map", lambda d: d["memory"].update(map=[[1, 2, 3]]))
        attempt(5, "bytes", lambda d: d["memory"].update(bytes=1 << 40))
        attempt(1, "page size", lambda d: d["snapshot"].update(page_size=1000))
        with open(bad + ".json", "w") as f:
            f.write("{")
        self.bad(5, "import", bad)
        self.bad(3, "import", self.path("nothing"))
        self.bad(1, "import", self.path("a.img"), "--name", "no blanks", says="blanks")
        self.bad(4, "import", self.path("a.img"), "--name", "web", "--snapshot-name", "first", says="first")
        check(self.snapshots() == before, "a failed import left something")
        check(self.js("store", "stats")["timelines"] == timelines, "a failed import left a timeline")

    # ---- names, exit codes ----

    def errors(self):
        for sel in ("web@nope", "nope", "999999", "web@999999", "a/b", "../../x", "%00", "@", "web@first@x", "é", "x" * 500):
            code = (2, 3) if sel in ("@", "web@first@x", "x" * 500) else 3    # malformed, or not there
            for argv in (["show", sel], ["verify", sel], ["delete", sel if "@" in sel else sel + "@x"],
                         ["diff", sel, "web@first"], ["diff", "web@first", sel], ["export", sel, self.path("x")],
                         ["restore", sel, "--name", "n"]):
                self.bad(code, *argv)
        check(not os.path.exists(self.path("x")), "a failed export left a file")
        for argv in (["nonsense"], ["snapshot"], ["list", "--wat"], ["list", "a", "b"], ["--socket"],
                     ["show", "--json=1", "web"], ["store", "nonsense"], ["restore", "web"], ["delete", "web"],
                     ["list", "--tree", "--flat"], ["verify", "web", "--", "x"], ["-x"], []):
            self.bad(2, *argv)
        self.bad(3, "snapshot", "no-such-vm")
        self.bad(3, "rollback", "no-such-vm", "web@first")
        self.bad(3, "cancel", "99999")
        self.bad(3, "cancel", "x")
        self.bad(1, "--socket", self.path("no.sock"), "vms", says=self.path("no.sock"))
        self.bad(1, "--socket", "/" + "x" * 200, "vms")
        done = self.js("jobs")["jobs"][0]["id"]
        self.bad(4, "cancel", done, says="ended")
        with open("/dev/full", "w") as full:
            p = subprocess.run([self.b.tool("snapctl"), "list"], env=self.b.env, stdout=full,
                               stderr=subprocess.PIPE, text=True)
        check(p.returncode == 1, "a full disk behind stdout looked like success")

    def tables(self):
        flat = self.ok("list").splitlines()
        check(flat[0].split()[:3] == ["ID", "VM", "NAME"], f"head of the table: {flat[0]}")
        check(len({len(line.split("  ")) for line in flat if line}) >= 1, "table")
        tree = self.ok("list", "--tree", "web").splitlines()
        check(tree[0] == "web" and tree[1].startswith("└─ 1 first"), f"tree: {tree}")
        for argv in (["vms"], ["jobs"], ["store", "stats"], ["show", "web"], ["version"], ["store", "gc"]):
            check(self.ok(*argv).strip(), f"{argv} prints nothing")
            self.js(*argv)
        cmd = self.ok("restore", "web@first", "--name", "new one", "--print")
        check("SNAPD_VM_NAME='new one'" in cmd and "/bin/echo 'two words' 'it'\\''s'" in cmd, cmd)
        check(self.ok("restore", "web@first", "--name", "n").strip() == "two words it's", "the recorded command")
        env = self.ok("restore", "web@first", "--name", "n2", "--", "env")
        check(f"SNAPD_VM_NAME=n2\n" in env and "SNAPD_RESTORE=1\n" in env and
              f"SNAPD_AGENT_SOCKET={self.b.agent_socket}\n" in env, env)
        self.bad(1, "restore", "web@first", "--name", "n", "--", "/nonexistent/vmm", says="/nonexistent/vmm")

    def deletion(self):
        before = self.snapshots()
        self.ok("delete", "web@first")
        self.bad(3, "show", "web@first")
        check(self.snapshots() == before[1:], "the deleted one is still listed, or another is gone")
        self.ok("delete", before[1])
        self.bad(3, "delete", before[1])
        check(self.js("store", "gc")["bytes_freed"] >= 0, "gc")
        for s in self.snapshots():
            self.ok("verify", s)

    # ---- names, tags, pins; what goes ----

    def find(self, snap):
        return next(s for s in self.js("list")["snapshots"] if s["id"] == snap)

    def doctor_without_kvm(self, mount):
        """In a mount namespace of its own, where there is none, or another device in its place."""
        p = subprocess.run(["unshare", "-m", "sh", "-c", mount + ' && exec "$0" doctor --json', self.b.tool("snapctl")], env=self.b.env,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
        if p.returncode != 1 or not p.stdout:
            return print(f"doctor without /dev/kvm not tried: {p.stderr.strip()}")
        checks = {c["check"]: c for c in json.loads(p.stdout)["checks"]}
        check(checks["kvm"]["health"] == "bad" and checks["kvm"]["mend"], f"doctor: {checks['kvm']}")
        check(checks["dirty-ring"]["health"] == "poor" and "not known" in checks["dirty-ring"]["found"], f"doctor: {checks['dirty-ring']}")
        check(checks["service"]["health"] == "good", f"doctor: {checks['service']}")

    def doctor(self):
        """What has to be there for these tests is found; what is not is told with its cure."""
        p = self.b.snapctl("doctor", "--json", check=False)
        checks = {c["check"]: c for c in json.loads(p.stdout)["checks"]}
        check(all(checks[c]["health"] == "good" for c in ("io_uring", "service", "agent-socket")), f"doctor: {checks}")
        check(p.returncode == any(c["health"] == "bad" for c in checks.values()), f"doctor: exit {p.returncode}")
        self.doctor_without_kvm("mount -t tmpfs none /dev")
        if os.path.exists("/dev/kvm"):
            self.doctor_without_kvm("mount --bind /dev/null /dev/kvm")
        p = self.b.snapctl("doctor", "--socket", self.path("nobody"), check=False)
        check(p.returncode == 1 and "systemctl start snapd" in p.stdout, f"doctor: {p.returncode} {p.stdout}")

    def said_of(self):
        """Name, note, tags and pin are set later, shown everywhere, and kept over a restart."""
        Image({1: b"x" * PAGE}, [(0, 4)]).write(self.path("t"))
        ids = []
        for i in range(4):
            out = self.js("import", self.path("t"), "--name", "tended", "--snapshot-name", f"n{i}", "--tag", "a,b")
            ids.append(out["snapshot"])
        first = ids[0]
        self.ok("set", first, "--name", "other", "--note", "a new note", "--add-tag", "c,a", "--remove-tag", "b", "--pin")
        got = self.find(first)
        check((got["name"], got["note"], got["tags"], got["pinned"]) == ("other", "a new note", "a,c", True), f"set: {got}")
        self.ok("show", "tended@other")
        self.bad(3, "show", "tended@n0")
        self.bad(4, "set", "tended@n1", "--name", "other", says="other")
        self.bad(2, "set", "tended@n1", "--name", "12")
        self.bad(2, "set", "tended@n1")
        self.bad(2, "set", "tended@n1", "--pin", "--unpin")
        self.bad(2, "set", "tended@n1", "--tag", "x", "--add-tag", "y")
        self.bad(3, "set", "tended@nope", "--pin")
        tree = self.ok("list", "--tree", "tended")
        check("other  " in tree and "  pinned  [a,c]  a new note" in tree, f"tree: {tree}")
        flat = [line.split() for line in self.ok("list", "tended").splitlines()]
        check(flat[0][-2:] == ["PIN", "TAGS"] and flat[1][-2:] == ["*", "a,c"], f"table: {flat}")
        self.ok("set", "tended@n3", "--name", "", "--tag", "")
        check(self.find(ids[3])["name"] == self.find(ids[3])["tags"] == "", "an empty name, empty tags")
        self.bad(4, "delete", "tended@other", says="pinned")
        self.bad(4, "delete", "--vm", "tended", says="pinned")
        check([s["id"] for s in self.js("list", "tended")["snapshots"]] == ids, "a refused deletion deleted")
        self.prune(ids)

    def prune(self, ids):
        """A dry run tells what the real one does; what is pinned or tagged stays."""
        for argv in ([], ["--keep-last", "x"], ["--keep-within", "soon"], ["--keep-grid", "24x2h,7x5h"], ["--keep-last", "0"]):
            self.bad(2, "prune", "tended", *argv)
        self.bad(3, "prune", "nobody", "--keep-last", 1)
        rules = ["tended", "--keep-last", 1, "--keep-tag", "nothing,zz"]
        dry = self.js("prune", *rules, "--dry-run")
        check(len(self.js("list", "tended")["snapshots"]) == 4 and dry["deleted"] == 0, "a dry run deletes")
        text = self.ok("prune", *rules, "--dry-run")
        check(text.count("would delete") == 2 and "pinned" in text and "last" in text, text)
        wet = self.js("prune", *rules)
        check(wet["snapshots"] == dry["snapshots"] and wet["deleted"] == 2, f"{wet} instead of {dry}")
        left = [s["id"] for s in self.js("list", "tended")["snapshots"]]
        check(left == [ids[0], ids[3]], f"left: {left} of {ids}")
        check([s["keep"] for s in wet["snapshots"]] == [True, False, False, True], f"kept: {wet}")
        self.ok("set", ids[0], "--unpin")
        self.bad(3, "delete", "--vm", "nobody")
        self.bad(2, "delete")
        self.bad(2, "delete", ids[0], "--vm", "tended")
        self.ok("delete", "--vm", "tended")
        self.bad(3, "show", ids[3])
        self.bad(3, "delete", "--vm", "tended")

    def check_store(self):
        """A whole store, then one flipped bit: named, with what it costs, and exit code 5."""
        got = self.js("store", "check", "--read-data")
        check(got["whole"] and not got["damages"] and got["pages_read"] > 0, f"check: {got}")
        check(self.ok("store", "check").endswith("whole\n"), "check in words")
        some = self.js("store", "check", "--read-data=10", "--rate", "1G")
        check(some["pages_read"] < got["pages_read"], f"10 percent: {some}")
        for argv in (["--read-data=0"], ["--read-data=101"], ["--read-data=x"], ["--rate", "fast"], ["--rate"]):
            self.bad(2, "store", "check", *argv)
        Image({7: self.rng.randbytes(PAGE)}, [(0, 16)]).write(self.path("hurt"))
        snap = self.js("import", self.path("hurt"), "--name", "hurt")["snapshot"]
        with open(self.path("hurt"), "rb") as f:
            f.seek(7 * PAGE)
            page = f.read(PAGE)
        where = None
        for name in os.listdir(os.path.join(self.b.store, "segments")):
            seg = os.path.join(self.b.store, "segments", name)
            with open(seg, "rb") as f:
                at = f.read().find(page)
            if at >= 0:
                where = seg, at
        check(where, "the page is in no segment")

        def flip():
            with open(where[0], "r+b") as f:
                f.seek(where[1] + 100)
                byte = f.read(1)
                f.seek(where[1] + 100)
                f.write(bytes([byte[0] ^ 1]))
                os.fsync(f.fileno())
        flip()
        p = self.b.snapctl("store", "check", "--read-data", "--json", check=False)
        got = json.loads(p.stdout)
        check(p.returncode == 5 and [d["kind"] for d in got["damages"]] == ["page"], f"one damage: {got}")
        check([(x["snapshot"], x["pages"], x["ranges"]) for x in got["losses"]] == [(snap, 1, [[7 * PAGE, PAGE]])],
              f"what it costs: {got}")
        p = self.b.snapctl("store", "check", "--read-data", check=False)
        check(p.returncode == 5 and f"lost: hurt@{snap}: 1 pages: 0x7000+0x1000" in p.stdout, p.stdout)
        self.ok("set", snap, "--pin")
        before = self.snapshots()
        dry = self.js("store", "repair", "--dry-run")
        check(dry["dropped"] == 0 and self.snapshots() == before, "a dry run drops")
        check("1 snapshots would be dropped" in self.ok("store", "repair", "--dry-run"), "a dry run in words")
        flip()
        check(self.js("store", "check", "--read-data")["whole"], "whole again")
        check(self.js("store", "repair")["dropped"] == 0, "a whole store lost something to a repair")
        flip()
        check(self.js("store", "repair")["dropped"] == 1, "the lost snapshot stays")
        check(self.snapshots() == [s for s in before if s != snap], "repair dropped another")
        flip()

    def space(self):
        """What only one snapshot needs, shared, dead: known exactly, and given back by gc."""
        rng = self.rng
        base = {g: rng.randbytes(PAGE) for g in range(40)}
        Image(base, [(0, 64)]).write(self.path("p0"))
        Image({**base, **{g: rng.randbytes(PAGE) for g in range(5)}}, [(0, 64)]).write(self.path("p1"))
        a, b = (self.js("import", self.path(f"p{i}"), "--name", f"space{i}")["snapshot"] for i in range(2))

        def unique():
            got = self.js("store", "stats", "--exact")
            return {s["id"]: s["pages_unique"] for s in got["snapshots"]}, got
        per, got = unique()
        check((per[a], per[b]) == (5, 5) and got["pages_shared"] >= 35, f"accounting: {per}, {got}")
        check("unique     20.0 KiB" in self.ok("show", "--space", a), self.ok("show", "--space", a))
        check("dead" in self.ok("store", "stats", "--exact"), "accounting in words")
        dead = got["pages_dead"]
        self.ok("delete", a)
        per, got = unique()
        check(per[b] == 40 and got["pages_dead"] == dead + 5, f"after the deletion: {per}, {got}")
        self.bad(2, "store", "gc", "--rate", "x")
        check(self.js("store", "gc", "--rate", "1G")["bytes_freed"] >= 0, "gc at a rate")
        self.ok("verify", b)

    # ---- terminal, Ctrl-C ----

    def terminal(self, image):
        """A bar on a terminal, none elsewhere; Ctrl-C cancels and says so, and nothing stays."""
        big = Image({g: self.rng.randbytes(PAGE) for g in range(6000)}, [(0, 6000)], vm="big")
        big.write(self.path("big"))
        before = self.snapshots()
        out, code = self.on_terminal(["import", self.path("big")])
        check(code == 0 and "imported" in out, f"import on a terminal: {code} {out!r}")
        out, code = self.on_terminal(["verify", "--digest", "--no-progress", "big-imported"])
        check(code == 0 and "\r" not in out.replace("\r\n", "\n"), f"--no-progress draws: {out!r}")
        out, code = self.on_terminal(["list", "big-imported"])
        check(code == 0 and "└─ " in out, f"no tree on a terminal: {out!r}")
        with open(self.path("slow.json"), "w") as f:
            json.dump(big.json("slow"), f)
        os.mkfifo(self.path("slow"))   # not seekable: refused before anything is sent
        p = subprocess.Popen([self.b.tool("snapctl"), "import", self.path("slow")], env=self.b.env,
                             stderr=subprocess.PIPE, text=True)
        time.sleep(0.2)
        p.send_signal(signal.SIGINT)
        p.communicate(timeout=20)
        check(p.returncode != 0, "an interrupted import looked like success")
        check(len(self.snapshots()) == len(before) + 1, "an interrupted import left something")

    def on_terminal(self, argv):
        master, slave = pty.openpty()
        p = subprocess.Popen([self.b.tool("snapctl"), *argv], env=dict(self.b.env, TERM="xterm"), stdin=slave,
                             stdout=slave, stderr=slave)
        os.close(slave)
        out = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                break
            if not data:
                break
            out += data
        os.close(master)
        return out.decode(errors="replace"), p.wait(30)


def options_are_documented(b):
    """Every option that --help lists is accepted, every other one is refused."""
    text = subprocess.run([b.tool("snapctl"), "--help"], text=True, stdout=subprocess.PIPE, check=True).stdout
    check(len(text.splitlines()) <= 24, "--help does not fit a screen")
    listed = [part.split() for row in re.findall(r"^  [a-z].*$", text, re.M) for part in (row[:40], row[40:])]
    verbs = [words[0] for words in listed if words]
    check(len(verbs) >= 15, f"verbs: {verbs}")
    for verb in verbs:
        p = subprocess.run([b.tool("snapctl"), verb, "--help"], text=True, stdout=subprocess.PIPE, check=True)
        check(p.stdout.startswith(f"usage: snapctl {verb}") and len(p.stdout.splitlines()) <= 24, f"{verb} --help")
        for option in ("--frobnicate", "--jso", "--names", "-j"):
            q = b.snapctl(verb, option, check=False)
            check(q.returncode == 2 and option in q.stderr, f"{verb} {option}: {q.returncode} {q.stderr}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        options_are_documented(b)
        b.start()
        cli = Cli(b, rng)
        image = cli.round_trip()
        cli.many_shapes()
        cli.hard_imports(image)
        cli.errors()
        cli.tables()
        cli.terminal(image)
        cli.deletion()
        cli.said_of()
        cli.doctor()
        cli.check_store()
        cli.space()
        left = cli.snapshots()
        b.stop()
        b.start()
        check(cli.snapshots() == left, "snapshots after a restart")
        check(b.stop() == 0, "the service's exit code")
    print("every verb as documented")


if __name__ == "__main__":
    main()
