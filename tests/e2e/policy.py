#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Policies on running VMs: they run by themselves, prune what is theirs and nothing else, a hook that hangs or fails
on one VM does not delay another, a restart of the service and a VM that comes back go on where they were, and what is
wrong is refused with the reason.

  policy.py BUILD [--accel kvm|sim] [--seed S]
"""
import argparse
import json
import os
import signal
import sys
import time

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
    for one in js(b, "policy", "show", policy)["policy"]["lines"]:
        if one["vm"] == vm:
            return one
    return None


def until_runs(b, policy, vm, runs):
    return b.until(lambda: (lambda one: one and one["runs"] >= runs and one["state"] == "idle" and one)(
        line(b, policy, vm)), 60, f"{runs} runs of {policy} on {vm}")


def of_policy(b, vm, policy):
    return [s["id"] for s in b.snapshots(vm) if f"policy:{policy}" in s["tags"].split(",")]


def refused(b):
    bad(b, 2, "policy", "set", "x", "keep_last=3")
    bad(b, 2, "policy", "set", "x", "every=5")
    bad(b, 2, "policy", "set", "x", "every=5m", "colour=red")
    bad(b, 2, "policy", "set", "x/y", "every=5m")
    bad(b, 2, "policy", "set", "x", "every")
    bad(b, 2, "policy", "frobnicate", "x")
    bad(b, 3, "policy", "show", "x")
    bad(b, 3, "policy", "run", "x")
    bad(b, 3, "policy", "rm", "x")
    check(js(b, "policy", "list")["policies"] == [], "something was made of refused settings")


def by_itself(b, hooks):
    """Every second, the newest three stay; and what others made."""
    mine = b.snapshot("web1", name="mine")["id"]
    b.snapctl("policy", "set", "fast", "vms=web*", "every=1s", "keep_last=3", "tags=auto",
              f"pre_hook=echo pre $SNAPD_VM $SNAPD_PHASE >>{hooks}",
              f"post_hook=echo post $SNAPD_VM $SNAPD_SNAPSHOT $SNAPD_FAILED >>{hooks}")
    for vm in ("web1", "web2"):
        one = until_runs(b, "fast", vm, 4)
        check(one["failures"] == 0 and one["said"] == "" and one["pruned"] > 0, f"{vm}: {one}")
        check(len(of_policy(b, vm, "fast")) <= 4, f"{vm} keeps {of_policy(b, vm, 'fast')}")
        check("auto" in b.snapshots(vm)[-1]["tags"].split(","), "no tag of the policy's own")
        check(b.verify(of_policy(b, vm, "fast")[-1]).get("digest_matches") is True, "not the guest's memory")
    check(line(b, "fast", "db") is None, "a VM that it does not cover")
    check(mine in [s["id"] for s in b.snapshots("web1")], "somebody else's snapshot was pruned")
    with open(hooks) as f:
        said = [words.split() for words in f]
    check([w for w in said if w[:2] == ["pre", "web1"]][0] == ["pre", "web1", "pre"], f"{said[:4]}")
    posts = [w for w in said if w[:2] == ["post", "web2"]]
    check(all(w[3] == "0" and int(w[2]) > 0 for w in posts) and posts, f"{posts[:3]}")
    check("web1" in b.snapctl("policy", "show", "fast").stdout and "fast" in b.snapctl("policy", "list").stdout, "text")


def pause_and_run(b):
    b.snapctl("policy", "pause", "fast")
    until_idle = [b.until(lambda: line(b, "fast", vm)["state"] == "idle", 30, "idle") for vm in ("web1", "web2")]
    check(all(until_idle), "still busy")
    before = {vm: line(b, "fast", vm)["runs"] for vm in ("web1", "web2")}
    time.sleep(2.2)
    check({vm: line(b, "fast", vm)["runs"] for vm in before} == before, "a paused policy runs")
    check("1 VM" in b.snapctl("policy", "run", "fast", "web1").stdout, "run")
    until_runs(b, "fast", "web1", before["web1"] + 1)
    check(line(b, "fast", "web2")["runs"] == before["web2"], "the other ran, too")
    bad(b, 3, "policy", "run", "fast", "db")


def hooks_that_go_wrong(b):
    """web1's hangs and web2's goes on; a failing one prevents the snapshot only where it has to."""
    b.snapctl("policy", "set", "hang", "vms=web*", "every=1s", "hook_timeout=3s", "keep_last=2",
              "consistency=quiesce", "pre_hook=[ $SNAPD_VM = web2 ] || sleep 60 & wait")
    until_runs(b, "hang", "web2", 3)
    one = until_runs(b, "hang", "web1", 1)
    check(one["failures"] == one["runs"] and "did not end in time" in one["said"] and not of_policy(b, "web1", "hang"), f"{one}")
    check(len(of_policy(b, "web2", "hang")) >= 2, "the other VM waited")
    b.snapctl("policy", "set", "hang", "consistency=crash", "pre_hook=exit 7")
    runs = line(b, "hang", "web1")["runs"]
    one = until_runs(b, "hang", "web1", runs + 3)
    check("exit status 7" in one["said"] and of_policy(b, "web1", "hang"), f"{one}")
    b.snapctl("policy", "rm", "hang")
    check(of_policy(b, "web2", "hang"), "removing a policy removed its snapshots")


def bounds(b):
    b.snapctl("policy", "set", "calm", "vms=db", "every=1s", "max_pause=1us")
    one = b.until(lambda: (lambda x: x and x["skipped"] >= 2 and x)(line(b, "calm", "db")), 60, "backing off")
    check(one["backoff"] >= 1 and "backs off" in one["said"], f"{one}")
    b.snapctl("policy", "set", "calm", "max_pause=", "min_free=100T")
    b.until(lambda: "min_free" in line(b, "calm", "db")["said"], 90, "the disk to be short")
    b.snapctl("policy", "rm", "calm")


def continuously(b):
    """Epochs all the time, thinned, and their cost is told; a VM that comes back is taken up again."""
    b.snapctl("policy", "set", "rpo", "vms=web1", "recovery_point=200ms", "keep_last=5")
    began = time.monotonic()
    one = until_runs(b, "rpo", "web1", 15)
    rate = one["runs"] / (time.monotonic() - began)
    cost = one["cost"]
    check(one["failures"] == 0 and cost["epochs"] > 0 and cost["paused_ns"] > 0 and cost["pages_stored"] > 0, f"{one}")
    check(0 < cost["paused_share"] < 1 and cost["exposed_ns"] >= 0.05e9, f"{cost}")
    check(rate < 40, f"{rate} epochs a second are more than a recovery point of 200 ms asks for")
    check("stood still for" in b.snapctl("policy", "show", "rpo").stdout and "200ms" in b.snapctl("policy", "list").stdout,
          "the cost is not shown")
    b.until(lambda: len(of_policy(b, "web1", "rpo")) <= 5 + 1 and line(b, "rpo", "web1")["pruned"], 60, "thinning")
    b.snapctl("policy", "rm", "rpo")


def unchanged(b, options):
    """A guest that seldom writes: points at which nothing is dirty are left out, and no others."""
    lazy = b.vm("lazy", *options, "--vcpus", "1", "--rate", "1")
    b.vm_ready("lazy")
    b.snapctl("policy", "set", "lazy", "vms=lazy", "recovery_point=50ms", "keep_last=2")
    until_runs(b, "lazy", "lazy", 4)
    check(line(b, "lazy", "lazy")["skipped"] == 0, "points were left out without skip_unchanged")
    b.snapctl("policy", "set", "lazy", "skip_unchanged=yes")
    one = b.until(lambda: (lambda x: x["skipped"] > 5 and "nothing changed" in x["said"] and x)(line(b, "lazy", "lazy")), 60,
                  "points to be left out")
    until_runs(b, "lazy", "lazy", one["runs"] + 2)
    for s in b.snapshots("lazy")[-1:]:
        check(b.verify(s["id"]).get("digest_matches") is True, f"{s}")
    b.snapctl("policy", "rm", "lazy")
    lazy.stop()
    b.vms.remove(lazy)


def by_tags(b):
    """A policy takes VMs up and leaves them out as their tags change; tags outlive a restart, not the VM."""
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
    b.snapctl("policy", "rm", "tagged")


def restarts(b, options):
    """The service is killed and comes back; a VM ends and another takes its name."""
    b.snapctl("policy", "resume", "fast")
    newest = of_policy(b, "web1", "fast")[-1]
    b.service.kill()
    b.service.wait()
    b.start()
    check(b.snapctl("tag", "db").stdout == "eu\n" and b.snapctl("tag", "web1").stdout == "x,silver\n", "tags are lost")
    one = b.until(lambda: (lambda x: x and x["runs"] >= 1 and x)(line(b, "fast", "web1")), 60, "runs after a restart")
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
    path = os.path.join(b.dir, "policies", "broken.conf")
    with open(path, "w") as f:
        f.write("[policy]\nevery = never\n")
    b.start()
    check([p["name"] for p in js(b, "policy", "list")["policies"]] == ["fast"], "the broken one is there")
    with open(os.path.join(b.dir, "snapd.log")) as f:
        check("broken.conf line 2" in f.read(), "nobody says what is wrong with the file")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("build")
    ap.add_argument("--accel", default="sim")
    ap.add_argument("--seed", type=int)
    args = ap.parse_args()
    need_accel(args.accel)
    seed = seed_from(args.seed)
    with Bench(args.build) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies"), "--vm-tags", os.path.join(b.dir, "vm-tags.conf")]
        options = ["--accel", args.accel, "--mem", "8M", "--rate", "500", "--digest", "--seed", seed]
        b.start()
        for name in ("web1", "web2", "db"):
            b.vm(name, *options)
        for name in ("web1", "web2", "db"):
            b.vm_ready(name)
        refused(b)
        by_itself(b, os.path.join(b.dir, "hooks.txt"))
        pause_and_run(b)
        hooks_that_go_wrong(b)
        bounds(b)
        continuously(b)
        unchanged(b, options)
        by_tags(b)
        restarts(b, options)
        for vm in b.vms:
            vm.stop()
    print("policies run, prune, back off and go on as documented")


main()
