#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""libvirt with the adapter as its <emulator>: the domain of contrib/libvirt/example.xml is defined, started, snapshotted,
suspended, rolled back and destroyed, and a clone of it is made; libvirt's view of it holds all the while.

  libvirt.py BUILD

libvirt's driver runs inside of virsh (qemu:///embed), with all of its files in the test's directory.
"""
import argparse
import contextlib
import glob
import os
import pty
import re
import shutil
import signal
import subprocess

from qemuvm import Bench, QemuVm, image, need_qemu, skip

HERE = os.path.dirname(os.path.abspath(__file__))
CONTRIB = os.path.join(HERE, "..", "..", "contrib", "libvirt")
MARK, ECHO_MARK = "== that was all ==", "echo == that 'was' all =="  # virsh repeats what it was told


class Virsh:
    def __init__(self, bench):
        self.bench = bench
        root = os.path.join(bench.dir, "libvirt")
        os.makedirs(os.path.join(root, "etc"))
        with open(os.path.join(root, "etc", "qemu.conf"), "w") as f:
            f.write('user = "root"\ngroup = "root"\nsecurity_driver = "none"\nstdio_handler = "file"\n')
        path = os.path.join(bench.build, "adapters", "qemu") + ":" + os.environ["PATH"]
        self.terminal, end = pty.openpty()  # in a pipe its output would stay where it is
        self.process = subprocess.Popen(
            ["virsh", "-q", "-c", f"qemu:///embed?root={root}"], stdin=end, stdout=end, stderr=end,
            env=dict(bench.env, PATH=path, TERM="dumb"))
        os.close(end)
        bench.vms.append(self)
        self("version")

    def __call__(self, *words):
        """A command's output, errors among it."""
        text = ""
        os.write(self.terminal, (" ".join(words) + "\n" + ECHO_MARK + "\n").encode())
        while MARK not in text:
            try:
                text += os.read(self.terminal, 65536).decode()
            except OSError:
                skip("libvirt's driver for QEMU does not come up here: " + text[-500:])
        return text[:text.index(MARK)]

    def state(self, domain):
        return re.search(r"^(running|paused|shut off)", self("domstate", domain), re.M)[1]

    def kill(self):
        """Its domains end with it only if it is asked."""
        self.process.kill()
        self.process.wait()
        for path in glob.glob(os.path.join(self.bench.dir, "libvirt", "run", "**", "*.pid"), recursive=True):
            with open(path) as f, contextlib.suppress(ProcessLookupError):
                os.kill(int(f.read()), signal.SIGKILL)
        os.close(self.terminal)


class Domain(QemuVm):
    """The process is libvirt's; what it says comes by its serial line."""

    def __init__(self, bench, virsh, name, disk=None, restore=None):
        self.bench, self.virsh, self.name, self.mem_bytes = bench, virsh, name, 64 << 20
        self.disk_path = os.path.join(bench.dir, f"{name}.disk")
        self.serial = os.path.join(bench.dir, f"{name}.serial")
        if disk:
            shutil.copy(disk, self.disk_path)
        else:
            with open(self.disk_path, "wb") as f:
                f.write(image(bench.build, "native", "img", pages=300, pause=100))
        path = os.path.join(bench.dir, f"{name}.xml")
        with open(path, "w") as f:
            f.write(self.xml(restore))
        self.must("define", path)
        self.must("start", name)

    def must(self, *words):
        out = self.virsh(*words)
        assert "error:" not in out, f"{' '.join(words)}: {out}"

    def alive(self):
        return self.virsh.process.poll() is None

    def xml(self, restore):
        """The example, with this machine's paths; host-model, and a network, are not to be had everywhere."""
        with open(os.path.join(CONTRIB, "example.xml")) as f:
            text = f.read()
        env = {"SNAPD_AGENT_SOCKET": self.bench.agent_socket, "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        if restore:
            env["SNAPD_RESTORE"] = str(restore)
        more = "".join(f"<qemu:env name='{k}' value='{v}'/>" for k, v in env.items() if v)
        for pattern, to in (
                ("<domain type='kvm'>", "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>"),
                ("<name>web</name>", f"<name>{self.name}</name>"),
                ("<memory unit='GiB'>2</memory>", "<memory unit='MiB'>64</memory>"),
                ("<vcpu>2</vcpu>", "<vcpu>1</vcpu>"),
                ("<cpu mode='host-model'/>", "<cpu mode='custom' check='none'><model>qemu64</model>"
                                             "<feature policy='disable' name='svm'/></cpu>"),
                ("/usr/libexec/snapd/snapd-qemu-x86_64", os.path.realpath(os.path.join(CONTRIB, "snapd-qemu-x86_64"))),
                ("/var/lib/libvirt/images/web.img", self.disk_path),
                ("(?s)<interface .*</interface>", f"<serial type='file'><source path='{self.serial}'/></serial>"),
                ("</domain>", f"<qemu:commandline>{more}</qemu:commandline></domain>")):
            text, n = re.subn(pattern, to, text)
            assert n == 1, f"{pattern}: not in the example"
        return text


def goes_on(lines, said, what):
    """The line on its way at the stop is said again, or was cut in two."""
    assert said <= lines[0][1] <= said + 2, f"{what} to {said}, it says {lines[:2]}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    args = p.parse_args()
    need_qemu()
    if not shutil.which("virsh"):
        skip("no virsh: libvirt is not installed")
    if os.getuid():
        skip("not root: libvirt's driver has its files elsewhere then")
    with Bench(args.build) as b:
        b.start()
        virsh = Virsh(b)
        vm = Domain(b, virsh, "web")
        b.vm_ready("web", 60)
        vm.wait_lines(3)
        b.snapshot("web", name="running")
        assert virsh.state("web") == "running", virsh.state("web")
        vm.must("suspend", "web")
        said = vm.said()
        snap = b.snapshot("web", name="suspended")["id"]
        assert virsh.state("web") == "paused", "a domain that was suspended goes on after a snapshot"
        vm.must("resume", "web")
        vm.wait_lines(9)
        vm.must("suspend", "web")
        before = len(vm.lines())
        b.rollback("web", snap)
        vm.must("resume", "web")
        vm.wait_lines(2)
        goes_on(vm.lines()[before:], said, "rolled back")
        assert virsh.state("web") == "running", virsh.state("web")
        clone = Domain(b, virsh, "clone", disk=vm.disk_path, restore=snap)
        b.vm_ready("clone", 60)
        clone.wait_lines(2)
        goes_on(clone.lines(), said, "restored")
        b.snapshot("clone")
        for d in (vm, clone):
            d.must("destroy", d.name)
        b.until(lambda: not b.get("/v1/vms")["vms"], 30, "both to be gone")


if __name__ == "__main__":
    main()
