#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The oracle: thousands of epochs of a guest that counts, each compared by whole-memory SHA-256.

Two vCPUs stamp pages while memslots are punched, resized, merged, moved and removed, a device writes
guest memory by each route (marks, a vhost-style log, a balloon), consumers come and go, rings are
small, and the service is killed (-9), restarted and stopped in the middle.
At each snapshot the VMM itself takes, while paused, a SHA-256 of all its RAM; `verify` recomputes it
from the store alone.  Rollbacks go to random points of the tree, each followed by a check of digest
and vCPU state while still paused.  And the guest checks its own memory all the time: a page lost by a
rollback ends the VM with an error.

  campaign.py BUILD [options]      exit 0: nothing missed; 1: something was; 77: cannot run here
With --expect-miss the exit code is turned round: a broken build (ablation) has to be caught.
With --lockstep, on the simulated KVM, guest and devices move between the steps of the campaign and
one at a time: so a seed replays a run exactly.  --twice does that, and compares what was seen.
With --self-check each snapshot compares all memory itself, and has to find nothing; with --heal, of a
broken build, it has to find what that one loses, and every snapshot has to be right all the same.
"""
import argparse
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "lib"))
from snaptest import Bench, Failed, need_accel, seed_from  # noqa: E402


class Missed(Exception):
    """The oracle's verdict: memory and store differ."""


class Campaign:
    def __init__(self, bench, args, rng):
        self.b, self.args, self.rng = bench, args, rng
        self.vm = None
        self.reported = self.changed = 0    # pages copied because they were dirty; that differed
        self.taken = []          # (id, digest) of acknowledged snapshots
        self.base = 0            # the snapshot that memory was last brought to, or taken from
        self.unasked = set()     # in lockstep, those that were durable when the service was killed
        self.seen = []           # what has to be the same when a seed is replayed
        self.counts = dict(epochs=0, verified=0, rollbacks=0, kills=0, restarts=0, restores=0, exports=0, freezes=0, refused=0)
        self.unplugs = args.punch_pattern == "all" or "remove" in args.punch_pattern

    def vm_args(self):
        a = self.args
        got = ["--accel", a.accel, "--mem", a.mem, "--vcpus", a.vcpus, "--workload", a.workload,
               "--seed", self.rng.getrandbits(30), "--digest"]
        if a.punch:
            got += ["--punch", a.punch, "--punch-pattern", a.punch_pattern, "--punch-mode", a.punch_mode]
            if self.unplugs:
                got += ["--dimm", "2M"]
        if a.device:
            got += ["--device", a.device]
        broken = a.heal or a.expect_miss    # then the store has to notice, not the VMM's own mirror
        for name in ("vhost", "balloon", "disk", "mirror", "smm"):
            if getattr(a, name) and not (broken and name == "mirror"):
                got += ["--" + name, getattr(a, name)]
        if a.dirty:
            got += ["--dirty", a.dirty]
        if a.track_host:
            got.append("--track-host")
        if a.ring:
            got += ["--ring", a.ring]
        if a.harvest_us:
            got += ["--harvest-us", a.harvest_us]
        return got

    def start_service(self):
        """Now with early capture of whatever is dirty, now with nearly none."""
        self.b.service_args = ["--early-min-frames", str(self.rng.choice([16, 64, 512, 4096])),
                               "--segment", "16M"]
        self.b.start()

    def boot(self):
        self.command = self.vm_args()
        self.vm = self.b.vm("guest", *self.command, program=self.args.program, nice=10, lockstep=self.args.lockstep)
        self.b.vm_ready("guest")

    def note(self, *what):
        self.seen.append(what)

    def verify(self, snap):
        try:
            r = self.b.verify(snap)
        except Failed as e:
            if e.code == "corrupt":
                raise Missed(f"snapshot {snap}: {e.text}") from e
            raise
        if not r.get("recorded_digest"):
            raise RuntimeError(f"snapshot {snap} carries no digest of the VMM")
        if not r["digest_matches"]:
            raise Missed(f"snapshot {snap}: the store has {r['digest']}, memory was {r['recorded_digest']}")
        self.counts["verified"] += 1
        return r["digest"]

    def step_snapshot(self, unasked=None):
        """`unasked`: pages changed in epochs of the same instant that nobody asked for."""
        r = self.b.job("POST", "/v1/vms/guest/snapshots", {"self_check": bool(self.args.self_check or self.args.heal)})
        snap, found = r["snapshot"], r.get("self_check", {"missed": 0})
        self.counts["epochs"] += 1
        if self.taken:           # the first has everything
            self.reported += r["early_pages"] + r["paused_pages"]
            self.changed += snap["changed_pages"]
        if found["missed"]:
            if not self.args.heal:
                raise Missed(f"snapshot {snap['id']}: the self-check found {found}")
            self.counts["healed"] = self.counts.get("healed", 0) + 1
            # One in a hole just now has no slot; the others say which.
            if not any(p["mapped"] for p in found["pages"]) or not all(
                    p["generation"] for p in found["pages"] if p["mapped"]):
                raise RuntimeError(f"a page is told without its place: {found['pages']}")
        self.taken.append((snap["id"], self.verify(snap["id"])))
        changed = snap["changed_pages"]
        if unasked is not None:
            changed = self.differing(self.base, snap, unasked + changed)
        self.base = snap["id"]
        self.note("epoch", self.taken[-1][1], changed)

    def differing(self, base, snap, most):
        """Pages whose bytes differ.  What was told to have changed may be more, but for memory that went."""
        page = snap["page_size"]
        old, new = self.b.memory(base, page), self.b.memory(snap["id"], page)
        written = sum(old.get(gfn) != new[gfn] for gfn in new)
        if written > most:
            raise Missed(f"{written} pages differ between snapshots {base} and {snap['id']}, {most} were told")
        return written, len(old.keys() - new.keys())

    def step_old(self):
        """Old snapshots stay what they were."""
        snap, digest = self.rng.choice(self.taken)
        if self.verify(snap) != digest:
            raise Missed(f"snapshot {snap} changed after it was taken")

    def step_rollback(self):
        snap, _ = self.rng.choice(self.taken)
        check = self.rng.random() < 0.5     # else the VM runs on at once, and its guest checks itself
        try:
            r = self.b.rollback("guest", snap, check=check)
        except Failed as e:
            if not self.unplugs or not any(t in (e.text or "") for t in ("has none there", "unplugged meanwhile")):
                raise
            self.note("refused")
            self.counts["refused"] += 1     # memory is unplugged now, or was meanwhile: nothing was touched
            return
        if r.get("checked") != check:
            raise RuntimeError("rollback did not say truly whether it checked memory and state")
        self.base = snap
        self.note("rollback")
        self.counts["rollbacks"] += 1

    def step_kill(self):
        """kill -9 in the middle of whatever a snapshot is doing.

        Whether it is durable by then is chance.  So in lockstep another one is taken before anything moves: both
        have the same memory.  How much either says has changed is chance, too: memory that was replaced is
        known from the agent if told, else from what is missing.  So the bytes are compared."""
        kill_after, start_after = self.rng.random() * 0.02, self.rng.random() * 0.1
        self.b.call("POST", "/v1/vms/guest/snapshots", {})
        time.sleep(kill_after)
        self.b.service.kill()
        self.b.service.wait()
        time.sleep(start_after)
        self.start_service()
        self.b.vm_ready("guest")
        self.counts["kills"] += 1
        known = {i for i, _ in self.taken} | self.unasked
        have = {s["id"]: s["changed_pages"] for s in self.b.snapshots("guest")}
        if not known <= have.keys():
            raise Missed(f"acknowledged snapshots are gone after a kill: {sorted(known - have.keys())}")
        extra = {i: self.verify(i) for i in sorted(have.keys() - known)}   # durable, but the answer never came
        if not self.args.lockstep:
            self.taken += extra.items()
            return
        self.unasked |= extra.keys()         # a replay may not have it: no other step draws it
        self.step_snapshot(unasked=sum(have[i] for i in extra))

    def step_restart(self):
        self.b.stop()
        time.sleep(self.rng.random() * 0.05)
        self.start_service()
        self.b.vm_ready("guest")
        self.counts["restarts"] += 1

    def step_restore(self):
        """Another VM starts from a snapshot, checks its memory as it runs, and is snapshotted in turn."""
        if self.unplugs:
            return                          # it would start with a DIMM that the snapshot may not have
        snap, _ = self.rng.choice(self.taken)
        copy = self.b.vm("copy", *self.command, program=self.args.program, nice=10, env={"SNAPD_RESTORE": str(snap)},
                         lockstep=self.args.lockstep)
        self.b.vm_ready("copy")
        if self.args.lockstep:
            copy.move(60)
        else:
            time.sleep(0.05)
        self.note("restore", self.verify(self.b.snapshot("copy")["id"]))
        try:
            copy.stop()
        except RuntimeError as e:
            raise Missed(f"restored from {snap}, the guest found its memory wrong: {e}") from e
        self.counts["restores"] += 1

    def step_export(self):
        """Out of the store and into it again: every page under its key, also those that no GPA names."""
        snap, digest = self.rng.choice(self.taken)
        self.counts["exports"] += 1
        name, image = f"imported{self.counts['exports']}", os.path.join(self.b.dir, "image")
        self.b.snapctl("export", str(snap), image)
        self.b.snapctl("import", image, "--name", name)
        os.unlink(image)
        os.unlink(image + ".json")
        if self.verify(self.b.snapshots(name)[0]["id"]) != digest:
            raise Missed(f"snapshot {snap} is another one after export and import")

    def step_freeze(self):
        """The service hangs for a while: the guest must not."""
        self.b.service.send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.05 + self.rng.random() * 0.15)
        finally:
            self.b.service.send_signal(signal.SIGCONT)
        self.counts["freezes"] += 1

    def heal_by_verb(self):
        """The verb says what it found, and by its exit code; the metric counts it."""
        p = self.b.snapctl("self-check", "guest", check=False)
        if p.returncode == 0:
            return False
        if p.returncode != 5 or "GPA 0x" not in p.stdout or "generation" not in p.stdout:
            raise RuntimeError(f"snapctl self-check: exit {p.returncode}: {p.stdout} {p.stderr}")
        if self.b.vm_info("guest")["missed_pages"] < 2:
            raise RuntimeError("missed pages are not counted")
        self.step_snapshot()
        return True

    def run(self):
        a = self.args
        self.start_service()
        self.boot()
        self.step_snapshot()
        end = time.monotonic() + a.limit
        steps = [(self.step_snapshot, 100), (self.step_old, a.old), (self.step_rollback, a.rollback),
                 (self.step_kill, a.kill), (self.step_freeze, a.freeze), (self.step_restart, a.restart),
                 (self.step_restore, a.restore), (self.step_export, a.export)]
        fns, weights = zip(*steps)
        floor = 0 if a.expect_miss or a.heal else a.at_least or a.epochs
        patience = end + min(max(7 * a.limit, 120), 600)   # for a machine that is busy otherwise
        while self.counts["epochs"] < a.epochs and (
                time.monotonic() < end or self.counts["epochs"] < floor and time.monotonic() < patience):
            self.vm.check()
            if a.heal and self.counts.get("healed", 0) and self.heal_by_verb():
                break
            if a.lockstep:
                self.vm.move(self.rng.randint(1, 60))
            self.rng.choices(fns, weights)[0]()
            if not a.lockstep and self.rng.random() < 0.3:
                time.sleep(self.rng.random() * 0.01)
        if a.heal and not self.counts.get("healed"):
            raise RuntimeError("the broken build lost nothing, or the self-check saw nothing")
        if self.counts["epochs"] < floor:
            raise RuntimeError(f"only {self.counts['epochs']} of {a.epochs} epochs, time's up")
        self.stats = self.b.vm_info("guest")
        try:
            self.vm.stop()
        except RuntimeError as e:
            raise Missed(f"the guest found its own memory wrong: {e}") from e
        self.b.stop()


def run_one(args, seed):
    campaign, verdict = None, None
    try:
        with Bench(args.build, parent=args.dir) as b:
            if args.preload:
                b.env["LD_PRELOAD"] = os.path.abspath(args.preload)
            campaign = Campaign(b, args, random.Random(seed))
            try:
                campaign.run()
            except (RuntimeError, Missed, Failed) as e:
                dead = campaign.vm and campaign.vm.ends_within(2)   # the guest or its mirror saw it first
                if not (args.expect_miss and (isinstance(e, Missed) or dead)):
                    raise
                verdict = e
    finally:
        if campaign:
            print(" ".join(f"{k} {v}" for k, v in campaign.counts.items()), flush=True)
    return campaign, verdict


def replay(args, seed, first):
    """A seed has to make the same memory again, epoch by epoch."""
    args.epochs = min(args.twice, first.counts["epochs"])
    again, _ = run_one(args, seed)
    for i, (a, b) in enumerate(zip(first.seen, again.seen)):
        if a != b:
            print(f"seed {seed} did not replay: the runs part at observation {i} of {len(first.seen)}: {a}, then {b}")
            return 1
    print(f"replayed {again.counts['epochs']} epochs, {len(again.seen)} observations: the same")
    return 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--accel", default="kvm", choices=["kvm", "sim"])
    p.add_argument("--epochs", type=int, default=200)
    p.add_argument("--limit", type=float, default=300, help="seconds, if by then there are --at-least epochs")
    p.add_argument("--at-least", type=int, default=0, help="epochs, whatever the time (default: all)")
    p.add_argument("--seed", type=int)
    p.add_argument("--mem", default="2M")
    p.add_argument("--vcpus", default="2")
    p.add_argument("--workload", default="random")
    p.add_argument("--dirty", default="", help="the agent's way of dirty tracking")
    p.add_argument("--track-host", action="store_true", help="the device marks nothing")
    p.add_argument("--ring", default="")
    p.add_argument("--harvest-us", default="", help="slowest harvest interval, to force full rings")
    p.add_argument("--punch", default="50")
    p.add_argument("--punch-pattern", default="mix")
    p.add_argument("--punch-mode", default="running")
    p.add_argument("--device", default="200")
    p.add_argument("--vhost", default="200", help="pages per second by a back end with a dirty log")
    p.add_argument("--disk", default="100", help="pages per second read with O_DIRECT")
    p.add_argument("--balloon", default="200", help="pages per second filled or given back")
    p.add_argument("--mirror", default="20", help="ms between two looks of a consumer with a copy")
    p.add_argument("--smm", default="", help="with --accel sim: every n-th step sees address space 1")
    p.add_argument("--preload", help="a library to be preloaded into service and VMM")
    p.add_argument("--lockstep", action="store_true", help="with --accel sim: a seed replays a run exactly")
    p.add_argument("--twice", type=int, default=0, help="with --lockstep: replay so many epochs, and compare")
    p.add_argument("--old", type=float, default=3, help="weights against 100 of a snapshot")
    p.add_argument("--rollback", type=float, default=5)
    p.add_argument("--kill", type=float, default=1)
    p.add_argument("--restart", type=float, default=0.5)
    p.add_argument("--restore", type=float, default=0.5)
    p.add_argument("--export", type=float, default=0.5)
    p.add_argument("--freeze", type=float, default=1)
    p.add_argument("--program", default="snapvm")
    p.add_argument("--expect-miss", action="store_true")
    p.add_argument("--self-check", action="store_true")
    p.add_argument("--heal", action="store_true")
    p.add_argument("--dir", help="where the store goes")
    args = p.parse_args()
    need_accel(args.accel)
    seed = seed_from(args.seed)
    campaign, verdict = run_one(args, seed)
    if args.expect_miss:
        if verdict is None:
            print("the broken build was NOT caught: the oracle is too weak")
            return 1
        print(f"caught, as it has to be: {verdict}")
        return 0
    s = campaign.stats
    print("figures: " + " ".join(f"{k} {s[k]}" for k in sorted(s) if isinstance(s[k], int)))
    print(f"reported {campaign.reported}, changed {campaign.changed}, over-reporting "
          f"{campaign.reported / max(campaign.changed, 1):.3f}")
    print("missed pages: 0")
    return replay(args, seed, campaign) if args.twice else 0


if __name__ == "__main__":
    sys.exit(main())
