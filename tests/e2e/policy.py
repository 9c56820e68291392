#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Policies on running VMs: they run by themselves, prune what is theirs and nothing else, a hook that hangs or fails
or a VM that stands still does not delay another, a restart of the service and a VM that comes back go on where they
were, and what is wrong is refused with the reason.

Most of this is waiting for points in time, so each scene has a service and VMs of its own, and all go on at once.

  policy.py BUILD [--accel kvm|sim] [--seed S] [SCENE...]
"""
import argparse
import concurrent.futures
import json
import os
import re
import signal
import sys
import time
import traceback

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, need_accel, seed_from  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def js(b, *argv):
    return json.loads(b.snapctl(*argv, "--json").stdout)


def bad(b, code, *argv):
    p = b.snapctl(*argv, check=False)
    check(p.returncode == code and len(p.stderr.strip().splitlines()) == 1,
          f"snapctl {argv}: exit {p.returncode}, not {code}: {p.stderr}")
    return p.stderr


def line(b, policy, vm):
    for one in b.get(f"/v1/policies/{policy}")["policy"]["lines"]:
        if one["vm"] == vm:
            return one
    return None


def until_line(b, policy, vm, fits, what):
    return b.until(lambda: (lambda one: one and fits(one) and one)(line(b, policy, vm)), 60, f"{policy} on {vm}: {what}")


def until_runs(b, policy, vm, runs):
    return until_line(b, policy, vm, lambda one: one["runs"] >= runs and one["state"] == "idle", f"{runs} runs")


def of_policy(b, vm, policy):
    return [s["id"] for s in b.snapshots(vm) if f"policy:{policy}" in s["tags"].split(",")]


def begin(b, options, *names, **more):
    b.start()
    for name in names:
        b.vm(name, *options, *more.get(name, ()))
    for name in names:
        b.vm_ready(name)


def refused(b):
    bad(b, 2, "policy", "set", "x", "keep_last=3")
    bad(b, 2, "policy", "set", "x", "every=5")
    bad(b, 2, "policy", "set", "x", "every=5m", "colour=red")
    bad(b, 2, "policy", "set", "x/y", "every=5m")
    bad(b, 2, "policy", "set", "x", "every")
    bad(b, 2, "policy", "set", "x")
    bad(b, 2, "policy", "set", "x", "every=5m", "--self-check", "often")
    bad(b, 2, "policy", "show", "x", "--self-check", "5")
    bad(b, 2, "policy", "frobnicate", "x")
    bad(b, 3, "policy", "show", "x")
    bad(b, 3, "policy", "run", "x")
    bad(b, 3, "policy", "rm", "x")
    check(js(b, "policy", "list")["policies"] == [], "something was made of refused settings")


def by_itself(b, options):
    """Every second, the newest three stay; and what others made."""
    begin(b, options, "web1", "web2", "db")
    refused(b)
    hooks = os.path.join(b.dir, "hooks.txt")
    mine = b.snapshot("web1", name="mine")["id"]
    b.snapctl("policy", "set", "fast", "vms=web*", f"owner={os.getuid()}", "every=1s", "keep_last=3", "tags=auto",
              f"pre_hook=echo pre $SNAPD_VM $SNAPD_PHASE >>{hooks}",
              f"post_hook=echo post $SNAPD_VM $SNAPD_SNAPSHOT $SNAPD_FAILED >>{hooks}")
    b.snapctl("policy", "set", "theirs", f"owner={os.getuid() + 1}", "every=1s")
    for vm in ("web1", "web2"):
        one = until_runs(b, "fast", vm, 4)
        check(one["failures"] == 0 and one["said"] == "" and one["pruned"] > 0, f"{vm}: {one}")
        check(len(of_policy(b, vm, "fast")) <= 4, f"{vm} keeps {of_policy(b, vm, 'fast')}")
        check("auto" in b.snapshots(vm)[-1]["tags"].split(","), "no tag of the policy's own")
        check(b.verify(of_policy(b, vm, "fast")[-1]).get("digest_matches") is True, "not the guest's memory")
    check(line(b, "fast", "db") is None, "a VM that it does not cover")
    check(js(b, "policy", "show", "theirs")["policy"]["lines"] == [], "VMs of another owner are covered")
    check(mine in [s["id"] for s in b.snapshots("web1")], "somebody else's snapshot was pruned")
    with open(hooks) as f:
        said = [words.split() for words in f]
    check([w for w in said if w[:2] == ["pre", "web1"]][0] == ["pre", "web1", "pre"], f"{said[:4]}")
    posts = [w for w in said if w[:2] == ["post", "web2"]]
    check(all(w[3] == "0" and int(w[2]) > 0 for w in posts) and posts, f"{posts[:3]}")
    check("web1" in b.snapctl("policy", "show", "fast").stdout and "fast" in b.snapctl("policy", "list").stdout, "text")
    pause_and_run(b)


def pause_and_run(b):
    b.snapctl("policy", "pause", "fast")
    for vm in ("web1", "web2"):
        until_line(b, "fast", vm, lambda one: one["state"] == "idle", "idle")
    before = {vm: line(b, "fast", vm)["runs"] for vm in ("web1", "web2")}
    time.sleep(2.2)
    check({vm: line(b, "fast", vm)["runs"] for vm in before} == before, "a paused policy runs")
    check("1 VM:" in b.snapctl("policy", "run", "fast", "web1").stdout, "run")
    until_runs(b, "fast", "web1", before["web1"] + 1)
    told = b.snapctl("policy", "run", "fast", "web1", "--wait").stdout
    check(told.startswith(f"web1: snapshot {of_policy(b, 'web1', 'fast')[-1]}, paused"), told)
    check(line(b, "fast", "web1")["runs"] == before["web1"] + 2, "it did not wait")
    bad(b, 2, "policy", "show", "fast", "--wait")
    check(line(b, "fast", "web2")["runs"] == before["web2"], "the other ran, too")
    bad(b, 3, "policy", "run", "fast", "db")
    b.snapctl("policy", "resume", "fast")
    until_runs(b, "fast", "web2", before["web2"] + 1)


def hooks_that_go_wrong(b, options):
    """web1's hangs and web2's goes on; a failing one prevents the snapshot only where it has to."""
    begin(b, options, "web1", "web2")
    b.snapctl("policy", "set", "hang", "vms=web*", "every=1s", "hook_timeout=3s", "keep_last=2",
              "consistency=quiesce", "pre_hook=[ $SNAPD_VM = web2 ] || sleep 60 & wait")
    until_runs(b, "hang", "web2", 3)
    one = until_runs(b, "hang", "web1", 1)
    check(one["failures"] == one["runs"] and "did not end in time" in one["said"] and not of_policy(b, "web1", "hang"), f"{one}")
    check(len(of_policy(b, "web2", "hang")) >= 2, "the other VM waited")
    b.snapctl("policy", "set", "hang", "pre_hook=exit 7")
    told = bad(b, 1, "policy", "run", "hang", "web1", "--wait")
    check("exit status 7" in told or "did not end in time" in told, told)
    b.snapctl("policy", "set", "hang", "consistency=crash")
    runs = line(b, "hang", "web1")["runs"]
    one = until_runs(b, "hang", "web1", runs + 3)
    check("exit status 7" in one["said"] and of_policy(b, "web1", "hang"), f"{one}")
    b.snapctl("policy", "rm", "hang")
    check(of_policy(b, "web2", "hang"), "removing a policy removed its snapshots")


def until_stuck(b, policy, vm):
    """In the middle of a snapshot, and for a second in the same: none that was still answered."""
    seen = []

    def same(one):
        if one["state"] != "snapshot" or (seen and seen[-1][1] != one["runs"]):
            seen.clear()
        if one["state"] == "snapshot":
            seen.append((time.monotonic(), one["runs"]))
        return seen and seen[-1][0] - seen[0][0] > 1
    return until_line(b, policy, vm, same, "to hang")


def vm_that_hangs(b, options):
    """A VMM that stands still holds up its own snapshot and nothing else; one that vanishes in the middle of it fails
    it; another that takes its name goes on."""
    begin(b, options, "web1", "web2")
    b.snapctl("policy", "set", "fast", "every=1s", "keep_last=2")
    until_runs(b, "fast", "web1", 1)
    for last in (signal.SIGCONT, signal.SIGKILL):
        b.vms[0].process.send_signal(signal.SIGSTOP)
        stuck = until_stuck(b, "fast", "web1")
        until_runs(b, "fast", "web2", line(b, "fast", "web2")["runs"] + 2)
        one = line(b, "fast", "web1")
        check(one["state"] == "snapshot" and one["runs"] == stuck["runs"], f"it does not hang: {one}")
        b.vms[0].process.send_signal(last)
        until_line(b, "fast", "web1", lambda one: one["runs"] > stuck["runs"], "the end of its run")
    one = until_line(b, "fast", "web1", lambda one: not one["attached"] and one["state"] == "idle", "to be gone")
    check(one["failures"] >= 1 and one["said"], f"{one}")
    check(line(b, "fast", "web2")["failures"] == 0, "the other VM's runs failed")
    b.vms.pop(0).kill()
    b.vm("web1", *options)
    one = until_line(b, "fast", "web1", lambda now: now["snapshot"] > one["snapshot"] and now["said"] == "", "another of its name")
    check(b.verify(one["snapshot"]).get("digest_matches") is True, "not the guest's memory")


def bounds(b, options):
    begin(b, options, "db")
    b.snapctl("policy", "set", "calm", "vms=db", "every=1s", "max_pause=1us")
    one = until_line(b, "calm", "db", lambda one: one["skipped"] >= 2, "backing off")
    check(one["backoff"] >= 1 and "backs off" in one["said"], f"{one}")
    b.snapctl("policy", "set", "calm", "max_pause=")
    until_runs(b, "calm", "db", 2)
    b.snapctl("policy", "set", "calm", "min_free=100T", "keep_last=1")
    until_line(b, "calm", "db", lambda one: "min_free" in one["said"], "the disk to be short")
    until_line(b, "calm", "db", lambda one: one["pruned"] and of_policy(b, "db", "calm") == [one["snapshot"]],
               "room to be made, though no snapshot can be taken")
    runs = line(b, "calm", "db")["runs"]
    time.sleep(1.2)
    check(line(b, "calm", "db")["runs"] == runs, "a run that only prunes is counted")


def continuously(b, options):
    """Epochs all the time, thinned, and their cost is told; every third is one with all memory compared."""
    begin(b, options, "web1")
    b.snapctl("policy", "set", "rpo", "vms=web1", "recovery_point=200ms", "--self-check", "3")
    began = time.monotonic()
    one = until_runs(b, "rpo", "web1", 15)
    rate = one["runs"] / (time.monotonic() - began)
    cost = one["cost"]
    check(one["failures"] == 0 and cost["epochs"] > 0 and cost["paused_ns"] > 0 and cost["pages_stored"] > 0, f"{one}")
    check(0 < cost["paused_share"] < 1 and cost["exposed_ns"] >= 0.05e9, f"{cost}")
    check(rate < 40, f"{rate} epochs a second are more than a recovery point of 200 ms asks for")
    check("stood still for" in b.snapctl("policy", "show", "rpo").stdout and "200ms" in b.snapctl("policy", "list").stdout,
          "the cost is not shown")
    b.snapctl("policy", "set", "rpo", "keep_last=5")
    until_line(b, "rpo", "web1", lambda one: one["pruned"] >= 10, "thinning")
    b.snapctl("policy", "pause", "rpo")
    one = until_line(b, "rpo", "web1", lambda one: one["state"] == "idle", "idle")
    left = of_policy(b, "web1", "rpo")
    check(len(left) == one["runs"] - one["pruned"] >= 5 and left[-1] == one["snapshot"], f"{one}: {left}")
    checks = figure(b, "snapd_vm_self_checks_total", "web1")
    check(one["runs"] // 3 <= checks <= one["runs"] // 3 + 1, f"{checks} self-checks in {one['runs']} runs")


def figure(b, name, vm):
    return int(re.search(rf'^{name}{{[^}}]*vm="{vm}"[^}}]*}} (\d+)', b.metrics(), re.M)[1])


def unchanged(b, options):
    """A guest that seldom writes: points at which nothing is dirty are left out, and no others."""
    begin(b, options, "lazy", lazy=("--vcpus", "1", "--rate", "1"))
    b.snapctl("policy", "set", "lazy", "vms=lazy", "recovery_point=50ms", "keep_last=2")
    until_runs(b, "lazy", "lazy", 4)
    check(line(b, "lazy", "lazy")["skipped"] == 0, "points were left out without skip_unchanged")
    b.snapctl("policy", "set", "lazy", "skip_unchanged=yes")
    one = until_line(b, "lazy", "lazy", lambda one: one["skipped"] > 5 and "nothing changed" in one["said"], "points to be left out")
    until_runs(b, "lazy", "lazy", one["runs"] + 2)
    b.snapctl("policy", "rm", "lazy")
    for s in b.snapshots("lazy")[-1:]:
        check(b.verify(s["id"]).get("digest_matches") is True, f"{s}")


def by_tags(b, options):
    """A policy takes VMs up and leaves them out as their tags change; tags outlive a restart, not the VM."""
    begin(b, options, "web1", "web2", "db")
    bad(b, 3, "tag", "nobody", "--add", "gold")
    bad(b, 2, "tag", "db", "--add", "go ld!")
    check(b.snapctl("tag", "db").stdout == "\n", "it has tags already")
    b.snapctl("policy", "set", "tagged", "vm_tags=gold, silver", "every=1s", "keep_last=2")
    check(b.snapctl("tag", "db", "--add", "gold,eu").stdout == "gold,eu\n", "tags that were set are told")
    until_runs(b, "tagged", "db", 1)
    check(line(b, "tagged", "web1") is None, "a VM without the tag is covered")
    check([v["name"] for v in js(b, "vms", "--tag", "gold")["vms"]] == ["db"], "vms --tag")
    check(js(b, "vms", "--tag", "go")["vms"] == [] and "gold,eu" in b.snapctl("vms").stdout, "tags of vms")
    b.snapctl("tag", "db", "--remove", "gold")
    b.until(lambda: line(b, "tagged", "db") is None, 30, "db to be left out")
    with open(os.path.join(b.dir, "vm-tags.conf"), "w") as f:
        f.write("[tags]\nweb* = silver\n")
    b.service.send_signal(signal.SIGHUP)
    until_runs(b, "tagged", "web2", 1)
    check(b.snapctl("tag", "web1", "--set", "x").stdout == "x,silver\n", "both kinds add up")
    b.service.kill()
    b.service.wait()
    b.start()
    check(b.snapctl("tag", "db").stdout == "eu\n" and b.snapctl("tag", "web1").stdout == "x,silver\n", "tags are lost")


def restarts(b, options):
    """The service is killed and comes back; a VM ends and another takes its name."""
    begin(b, options, "web1", "web2")
    b.snapctl("policy", "set", "fast", "vms=web*", "every=1s", "keep_last=3")
    until_runs(b, "fast", "web1", 1)
    newest = of_policy(b, "web1", "fast")[-1]
    b.service.kill()
    b.service.wait()
    b.start()
    one = until_line(b, "fast", "web1", lambda one: one["runs"] >= 1, "runs after a restart")
    check(one["snapshot"] > newest, f"{one} after {newest}")
    b.vms[1].stop()
    b.until(lambda: not line(b, "fast", "web2")["attached"], 30, "web2 to be gone")
    runs = line(b, "fast", "web1")["runs"]
    until_runs(b, "fast", "web1", runs + 2)
    gone = line(b, "fast", "web2")["runs"]
    b.vm("web2", *options)
    b.vm_ready("web2")
    until_runs(b, "fast", "web2", gone + 1)
    b.stop()
    with open(os.path.join(b.dir, "policies", "broken.conf"), "w") as f:
        f.write("[policy]\nevery = never\n")
    b.start()
    check([p["name"] for p in js(b, "policy", "list")["policies"]] == ["fast"], "the broken one is there")
    with open(os.path.join(b.dir, "snapd.log")) as f:
        check("broken.conf line 2" in f.read(), "nobody says what is wrong with the file")


def gone_before_its_backup(b, options):
    """What a VM left that is gone for good is pushed, also by a service that never saw it."""
    begin(b, options, "last")
    repository = os.path.join(b.dir, "repository")
    open(repository, "w").close()  # no directory can be made there
    b.snapctl("policy", "set", "once", "every=1d", f"backup=file://{repository}")
    b.snapctl("policy", "run", "once")
    one = until_line(b, "once", "last", lambda one: one["backup"]["failures"] >= 3, "a backup that fails, and again")
    check(one["snapshot"] and one["backup"]["said"], f"{one}")
    elsewhere = os.path.join(b.dir, "elsewhere")
    b.snapctl("policy", "set", "once", f"backup=file://{elsewhere}")
    until_line(b, "once", "last", lambda one: one["backup"]["pushed"] == 1 and not one["backup"]["said"], "the backup elsewhere")
    b.snapctl("policy", "set", "once", f"backup=file://{repository}")
    until_line(b, "once", "last", lambda one: one["backup"]["said"], "a backup that fails once more")
    b.vms[0].stop()
    b.stop()
    os.unlink(repository)
    b.start()
    one = until_line(b, "once", "last", lambda one: one["backup"]["pushed"], "the backup")
    check(not one["attached"] and one["backup"]["pushed"] == 1, f"{one}")
    listed = js(b, "backup", "list", "--repository", f"file://{repository}")["snapshots"]
    check([s["vm"] for s in listed] == ["last"], f"{listed}")
    b.stop()
    b.start()
    b.until(lambda: js(b, "policy", "list")["policies"], 30, "policies")
    check(line(b, "once", "last") is None, "a line for a VM that is gone and has nothing to push")


SCENES = (by_itself, hooks_that_go_wrong, vm_that_hangs, bounds, continuously, unchanged, by_tags, restarts,
          gone_before_its_backup)


def play(scene, args, seed):
    began = time.monotonic()
    with Bench(args.build) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies"), "--vm-tags", os.path.join(b.dir, "vm-tags.conf")]
        scene(b, ["--accel", args.accel, "--mem", "8M", "--rate", "500", "--digest", "--seed", seed])
        for vm in b.vms:
            vm.stop()
    return time.monotonic() - began


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("--accel", default="sim")
    ap.add_argument("--seed", type=int)
    ap.add_argument("scenes", nargs="*")
    args = ap.parse_args()
    need_accel(args.accel)
    seed = seed_from(args.seed)
    scenes = [s for s in SCENES if not args.scenes or s.__name__ in args.scenes]
    wrong = []
    with concurrent.futures.ThreadPoolExecutor(len(scenes)) as pool:
        playing = {pool.submit(play, scene, args, seed): scene.__name__ for scene in scenes}
        for done in concurrent.futures.as_completed(playing):
            if done.exception():
                wrong.append(playing[done])
                print(f"{playing[done]}:", "".join(traceback.format_exception(done.exception())), flush=True)
            else:
                print(f"{playing[done]}: {done.result():.1f} s", flush=True)
    if wrong:
        sys.exit(f"{len(wrong)} of {len(scenes)} scenes: {', '.join(wrong)}")
    print("policies run, prune, back off and go on as documented")


main()
