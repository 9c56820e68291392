#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A snapshot is of one QEMU: another version, machine type or CPU does not become it, unless told to.

  other.py BUILD

Another version is this one, whose monitor is made to say so.  What is refused is refused before
anything happened: a running VM was not stopped, and goes on; one that waits had no state loaded.
"""
import argparse
import subprocess

from proxy import ProxiedVm
from qemuvm import QEMU, Bench, Failed, QemuVm, need_qemu

GUEST = dict(guest="native", mem=16, pages=100, pause=100)


def version():
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("version ")[1].split()[0]


def lies(micro):
    """The monitor's version, told as one with a micro of 99."""
    return [(f'"micro": {micro}'.encode(), b'"micro": 99')]


def refused(vm, b, snap, why):
    try:
        b.rollback(vm.name, snap, other_vm=True)
    except Failed as e:
        assert why in str(e), f"refused, and not for {why!r}: {e}"
        return
    raise RuntimeError(f"{vm.name}: not refused for {why!r}")


def running_vm_refuses(b, snap, now):
    vm = ProxiedVm(b, "later", lies=lies(now.split(".")[2]), **GUEST)
    b.vm_ready("later")
    assert b.vm_info("later")["vmm"]["version"].endswith(".99"), b.vm_info("later")
    vm.monitor.ask("query-status")
    refused(vm, b, snap, f"the snapshot is of QEMU {now}, this is ")
    vm.wait_lines(3)
    vm.monitor.ask("query-status")
    assert not vm.monitor.events, f"it was stopped to be refused: {vm.monitor.events}"
    vm.kill()
    vm = ProxiedVm(b, "forced", lies=lies(now.split(".")[2]), env={"SNAPD_QEMU_ANY": "1"}, **GUEST)
    b.vm_ready("forced")
    b.rollback("forced", snap, other_vm=True)
    vm.wait_lines(3)
    vm.kill()


def waiting_vm_refuses(b, snap, why, more=(), smp=1):
    vm = QemuVm(b, "other", smp=smp, more=more, launcher=("--restore", str(snap)), **GUEST)
    b.until(lambda: why in open(vm.log).read(), 30, f"a refusal for {why!r} in {vm.log}")
    assert not vm.lines(), "it runs"
    vm.kill()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    args = p.parse_args()
    need_qemu()
    now = version()
    with Bench(args.build) as b:
        b.start()
        vm = QemuVm(b, "vm", **GUEST)
        b.vm_ready("vm")
        vm.wait_lines()
        snap = b.snapshot("vm")["id"]
        vm.kill()
        running_vm_refuses(b, snap, now)
        waiting_vm_refuses(b, snap, "the snapshot is of machine type pc-i440fx-", ["-machine", "q35"])
        waiting_vm_refuses(b, snap, "the snapshot is of CPU model qemu64", ["-cpu", "Nehalem"])
        waiting_vm_refuses(b, snap, "the snapshot's CPU features differ: CPUID 0x1", ["-cpu", "qemu64,-x2apic"])
        waiting_vm_refuses(b, snap, "the snapshot has 1 vCPUs", smp=2)


if __name__ == "__main__":
    main()
