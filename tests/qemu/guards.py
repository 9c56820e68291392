#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the adapter must not do to a QEMU, and what it must not let pass.

  guards.py BUILD CASE [--rounds N] [--seed S]

  refused   RAM that is private to QEMU: said in `snapctl vms` and to whom asks for a snapshot; QEMU
            runs on, and its own dirty log works (a migration)
  unfit     RAM that is a file on a disk, or of huge pages: likewise
  plugged   an ivshmem device that is plugged into a running VM: no snapshot is taken of it any more
  stranger  preloaded into programs that are not QEMU, or a QEMU without KVM: nothing happens
  bye       a QEMU that quits is no VM that died; one that is killed is
  intruder  somebody resumes the VM in the middle of snapshots: each such snapshot is given up,
            and the guest's own check of its memory holds after rollbacks to the others
  restarts  the service is killed again and again; the guest runs, and later snapshots are its memory
  migrate   QEMU's own live migration, of a guest that writes, to another QEMU under the adapter; post-copy
            and background snapshots, which cannot work, are refused when they are asked for
  helpers   what QEMU starts while it runs has nothing of the adapter, and changes nothing
"""
import argparse
import os
import random
import subprocess
import tempfile
import threading
import time

from qemuvm import Bench, Failed, Monitor, QemuVm, need_qemu, same, seed_from, stopped_snapshot


def library(b):
    return os.path.join(b.build, "adapters", "qemu", "libsnapd-qemu.so")


def preloaded(b, path):
    return {"LD_PRELOAD": library(b), "SNAPD_QEMU_QMP": path, "SNAPD_VM_NAME": "vm"}


def fails(b, want, fn):
    try:
        fn()
    except Failed as e:
        assert want in str(e), f"failed, and not for {want!r}: {e}"
        return
    raise RuntimeError(f"not refused for {want!r}")


def migrate(b, vm, target, path):
    """vm goes on as target, which waits at `path`."""
    b.until(lambda: os.path.exists(path), 30, "the target to listen")
    vm.monitor.ask("migrate-set-parameters", max_bandwidth=1 << 40, downtime_limit=300)
    vm.monitor.ask("migrate", uri=f"unix:{path}")
    b.until(lambda: vm.monitor.ask("query-migrate").get("status") in ("completed", "failed"), 60, "the migration")
    assert vm.monitor.ask("query-migrate")["status"] == "completed"
    target.wait_lines(6)  # "E" among them: its memory is not what it wrote


def test_refused(b, args):
    b.start()
    path, there = os.path.join(b.dir, "ours.qmp"), os.path.join(b.dir, "there")
    vm = QemuVm(b, "vm", pages=300, mem=16, adapter=False, env=preloaded(b, path),
                more=["-qmp", f"unix:{path},server=on,wait=off"])
    b.vm_ready("vm")
    info = b.vm_info("vm")
    assert "private to QEMU" in info["refusal"], info["refusal"]
    assert "cannot be snapshotted" in b.snapctl("vms").stdout
    assert info["ram_bytes"] == 0, info
    fails(b, "private to QEMU", lambda: b.snapshot("vm"))
    vm.wait_lines(3)
    with open(vm.log) as f:
        assert "private to QEMU" in f.read()
    target = QemuVm(b, "target", pages=300, mem=16, adapter=False, more=["-incoming", f"unix:{there}"])
    migrate(b, vm, target, there)


def unfit_memory(b):
    """(what QEMU has for RAM, why not): where the launcher was not asked."""
    # /tmp may be a tmpfs; the build directory seldom is.
    on_disk = tempfile.NamedTemporaryFile(dir=b.build)
    stat = subprocess.run(["stat", "-f", "-c", "%T", on_disk.name], capture_output=True, text=True).stdout.strip()
    if stat != "tmpfs":
        yield f"memory-backend-file,id=m,size=16M,share=on,mem-path={on_disk.name}", "not on tmpfs"
    with open("/proc/meminfo") as f:
        free = [int(line.split()[1]) for line in f if line.startswith("HugePages_Free")][0]
    if free * 2 >= 16:
        yield "memory-backend-memfd,id=m,size=16M,share=on,hugetlb=on", "hugetlbfs"
    else:
        print("no free huge pages: RAM of those is not tried")


def test_unfit(b, args):
    b.start()
    for i, (ram, why) in enumerate(unfit_memory(b)):
        path = os.path.join(b.dir, f"ours{i}.qmp")
        vm = QemuVm(b, f"vm{i}", pages=100, mem=16, adapter=False, env=dict(preloaded(b, path), SNAPD_VM_NAME=f"vm{i}"),
                    more=["-qmp", f"unix:{path},server=on,wait=off", "-object", ram, "-machine", "memory-backend=m"])
        b.vm_ready(f"vm{i}")
        fails(b, why, lambda: b.snapshot(f"vm{i}"))
        vm.wait_lines(2)
        vm.kill()


def test_plugged(b, args):
    b.start()
    vm = QemuVm(b, "vm", pages=100, mem=16)
    b.vm_ready("vm")
    vm.wait_lines()
    b.snapshot("vm")
    vm.monitor.ask("object-add", **{"qom_type": "memory-backend-memfd", "id": "m", "size": 1 << 20, "share": True})
    vm.monitor.ask("device_add", driver="ivshmem-plain", id="foreign", memdev="m")
    vm.monitor.ask("query-status")
    vm.monitor.events.clear()
    fails(b, "device foreign is ivshmem: other processes write its memory unseen", lambda: b.snapshot("vm"))
    vm.wait_lines(2)
    vm.monitor.ask("query-status")
    assert not vm.monitor.events, f"it was stopped to be refused: {vm.monitor.events}"


def test_stranger(b, args):
    b.start()
    env = dict(b.env, **preloaded(b, "/nonexistent"))
    for argv in (["ls", "/"], ["sh", "-c", "echo $SNAPD_QEMU_QMP"], ["qemu-system-x86_64", "--version"]):
        plain = subprocess.run(argv, capture_output=True, env=dict(b.env, SNAPD_QEMU_QMP="/nonexistent"))
        with_it = subprocess.run(argv, capture_output=True, env=env)
        assert (plain.returncode, plain.stdout, plain.stderr) == (with_it.returncode, with_it.stdout, with_it.stderr), argv
    p = subprocess.Popen(["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults"], env=env,
                         stderr=subprocess.PIPE)
    time.sleep(0.5)
    assert p.poll() is None and not b.get("/v1/vms")["vms"]
    p.terminate()
    assert not p.communicate(timeout=30)[1].replace(b"qemu-system-x86_64: terminating on signal 15", b"").count(b"snapd")


def test_bye(b, args):
    b.service_args += ["--post-mortem", "on"]
    b.start()
    vm = QemuVm(b, "vm", pages=100, mem=16)
    b.vm_ready("vm")
    first = b.snapshot("vm")["id"]
    vm.monitor.ask("quit")
    assert vm.process.wait(30) == 0, f"QEMU ended with {vm.process.returncode}"
    b.until(lambda: not b.get("/v1/vms")["vms"], 30, "the VM to be gone")
    assert [s["id"] for s in b.snapshots()] == [first], "a VM that said goodbye has a post-mortem snapshot"
    vm.kill()
    vm = QemuVm(b, "vm", pages=100, mem=16)
    b.vm_ready("vm")
    b.snapshot("vm")
    vm.ram()  # mapped while QEMU lives
    vm.process.kill()
    vm.process.wait()
    ram = bytes(vm.ram())
    b.until(lambda: len(b.snapshots()) == 3, 30, "the post-mortem snapshot")
    same(b, b.snapshots()[-1]["id"], ram, "the post-mortem snapshot")


def resume_for_ever(path, stop):
    m = Monitor(path)
    while not stop.is_set():
        try:
            m.ask("cont")
        except RuntimeError:
            pass  # not while it migrates its state
        time.sleep(0.005)
    m.close()


def test_intruder(b, args):
    b.start()
    second = os.path.join(b.dir, "second.qmp")
    vm = QemuVm(b, "vm", pages=400, mem=16, more=["-qmp", f"unix:{second},server=on,wait=off"])
    b.vm_ready("vm")
    vm.wait_lines()
    good, refused, stop = [], [], threading.Event()
    thread = threading.Thread(target=resume_for_ever, args=(second, stop))
    thread.start()
    try:
        for _ in range(args.rounds * 5):
            try:
                good.append(b.snapshot("vm")["id"])
            except Failed as e:
                refused.append(str(e))
    finally:
        stop.set()
        thread.join()
    vm.wait_lines(3)
    assert [r for r in refused if "resumed in the middle" in r], f"{len(good)} snapshots taken, refused: {refused[:3]}"
    good.append(b.snapshot("vm")["id"])
    rng = random.Random(seed_from(args.seed))
    for snap in rng.sample(good, min(3, len(good))):
        b.rollback("vm", snap)
        vm.wait_lines(4)
    stopped_snapshot(b, vm)
    print(f"{len(good)} snapshots, {len(refused)} given up")


def test_restarts(b, args):
    b.start()
    rng = random.Random(seed_from(args.seed))
    vm = QemuVm(b, "vm", pages=400, mem=16, smp=2)
    b.vm_ready("vm")
    b.until(lambda: [n for c, n in vm.lines() if c != "m"], 60, "the first vCPU to say something")
    stopped_snapshot(b, vm)
    for _ in range(args.rounds):
        job = threading.Thread(target=lambda: b.snapctl("snapshot", "vm", check=False))
        job.start()
        time.sleep(rng.random() * 0.05)
        b.stop(9)
        job.join()
        vm.wait_lines(2)  # no service, and a pause that was under way ends by itself
        b.start()
        b.vm_ready("vm")
        snap = stopped_snapshot(b, vm)[0]
        assert snap["changed_pages"] < 2000, f"all of 4096 pages again: {snap}"
    b.rollback("vm", snap["id"])
    vm.wait_lines(3)


def refuses_capability(vm, name):
    try:
        vm.monitor.ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])
    except RuntimeError:
        return
    raise RuntimeError(f"{vm.name} takes {name}")


def test_helpers(b, args):
    b.start()
    vm = QemuVm(b, "vm", pages=100, mem=16)
    b.vm_ready("vm")
    seen = os.path.join(b.dir, "seen")
    vm.monitor.ask("migrate", uri=f"exec:env > {seen}; ls -l /proc/self/fd >> {seen}; cat > /dev/null")
    b.until(lambda: vm.monitor.ask("query-migrate").get("status") in ("completed", "failed"), 60, "the migration")
    with open(seen) as f:
        text = f.read()
    assert "PATH=" in text and " 2 -> " in text, text
    for word in ("LD_PRELOAD", "SNAPD_QEMU_QMP", "memfd", "kvm", "userfaultfd"):
        assert word not in text, f"{word} in a child of QEMU's:\n{text}"
    vm.monitor.ask("cont")
    vm.wait_lines(2)
    stopped_snapshot(b, vm)


def test_migrate(b, args):
    b.start()
    there = os.path.join(b.dir, "there")
    vm = QemuVm(b, "vm", pages=400, mem=16)
    b.vm_ready("vm")
    vm.wait_lines()
    stopped_snapshot(b, vm)
    target = QemuVm(b, "target", pages=400, mem=16, more=["-incoming", "defer"])
    refuses_capability(target, "postcopy-ram")
    refuses_capability(vm, "background-snapshot")
    target.monitor.ask("migrate-incoming", uri=f"unix:{there}")
    migrate(b, vm, target, there)
    vm.kill()
    b.vm_ready("target")
    stopped_snapshot(b, target)
    target.wait_lines(3)


def main():
    cases = {name[5:]: fn for name, fn in globals().items() if name.startswith("test_")}
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("case", choices=sorted(cases))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_qemu()
    with Bench(args.build) as b:
        cases[args.case](b, args)


if __name__ == "__main__":
    main()
