#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What a service manager sees: sockets handed over are served and left in place at the end, READY, a sign of life while
the loop goes round and none when it does not, RELOADING at SIGHUP, STOPPING; and all of it as a user without rights,
with VMs of another user.  Then the units themselves, as far as systemd-analyze can tell offline.

  service_manager.py BUILD
"""
import os
import pwd
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench  # noqa: E402


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def listen(path, kind):
    s = socket.socket(socket.AF_UNIX, kind)
    s.bind(path)
    os.chmod(path, 0o666)
    s.listen(8)
    return s


class Manager(Bench):
    """Starts the service as systemd does: sockets from descriptor 3 on, notices to a datagram socket."""

    def start(self, wait=True):
        os.makedirs(os.path.join(self.dir, "policies"), exist_ok=True)
        self.api = listen(self.api_socket, socket.SOCK_STREAM)
        self.agents = listen(self.agent_socket, socket.SOCK_SEQPACKET)
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = os.path.join(self.dir, "notify")
        self.notices.bind(path)
        # Like a manager, at all times: the service waits for room in a queue of ten.
        self.read = queue.Queue()
        threading.Thread(target=self.listen, daemon=True).start()
        os.chmod(path, 0o666)
        user = pwd.getpwnam("nobody")
        if os.geteuid() == 0:
            for d in (self.dir, os.path.join(self.dir, "policies")):
                os.chown(d, user.pw_uid, user.pw_gid)
                os.chmod(d, 0o755)
        fds = (self.api.fileno(), self.agents.fileno())

        def child():
            # Out of the way first: they may stand where the others belong.
            copies = [os.dup(fd) for fd in fds]
            for n, fd in enumerate(copies):
                os.dup2(fd, 3 + n)
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)

        with open(os.path.join(self.dir, "snapd.log"), "a") as log:
            self.service = subprocess.Popen(
                ["sh", "-c", "LISTEN_PID=$$ WATCHDOG_PID=$$ exec \"$@\"", "sh", self.tool("snapd"), "--store", self.store,
                 "--socket", self.api_socket, "--agent-socket", self.agent_socket, "--policies",
                 os.path.join(self.dir, "policies")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False,
                preexec_fn=child if os.geteuid() == 0 else None,
                env=dict(self.env, LISTEN_FDS="2", NOTIFY_SOCKET=path, WATCHDOG_USEC="400000"))

    def listen(self):
        while True:
            self.read.put(self.notices.recv(4096).decode())

    def notice(self, seconds=20):
        return self.read.get(timeout=seconds)

    def until_notice(self, want):
        for _ in range(200):
            if want in self.notice():
                return
        raise TimeoutError(want)


def serve(b):
    b.start()
    b.until_notice("READY=1")
    for _ in range(3):
        b.until_notice("WATCHDOG=1")
    vm = b.vm("guest", "--accel", "sim", "--mem", "8M", "--digest", "--rate", "1000")
    b.vm_ready("guest")
    snap = b.snapshot("guest")["id"]
    check(b.verify(snap).get("digest_matches") is True, "the snapshot differs from the guest's memory")
    b.rollback("guest", snap)
    vm.stop()


def reload(b):
    with open(os.path.join(b.dir, "policies", "late.conf"), "w") as f:
        f.write("[policy]\nevery = 1h\n")
    b.service.send_signal(signal.SIGHUP)
    b.until_notice("RELOADING=1")
    b.until_notice("READY=1")
    check([p["name"] for p in b.get("/v1/policies")["policies"]] == ["late"], "a new policy is not there")
    os.unlink(os.path.join(b.dir, "policies", "late.conf"))
    b.service.send_signal(signal.SIGHUP)
    b.until_notice("READY=1")
    check(b.get("/v1/policies")["policies"] == [], "a policy without a file is there")


def hang(b):
    b.service.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    while not b.read.empty():
        b.notice()
    try:
        said = b.notice(0.8)
        raise RuntimeError(f"a service that hangs says {said}")
    except queue.Empty:
        pass
    b.service.send_signal(signal.SIGCONT)
    b.until_notice("WATCHDOG=1")


def units(build):
    if not shutil.which("systemd-analyze"):
        print("systemd-analyze is not there: units not checked")
        return
    p = subprocess.run(["systemd-analyze", "security", "--offline=yes", "--threshold=10",
                        os.path.join(build, "contrib", "snapd.service")], stdin=subprocess.DEVNULL,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    check(p.returncode == 0, f"the unit is exposed: {p.stdout[-400:]}")
    print(p.stdout.strip().splitlines()[-1].encode("ascii", "ignore").decode().strip())


def main():
    with Manager(sys.argv[1]) as b:
        serve(b)
        reload(b)
        hang(b)
        b.service.terminate()
        b.until_notice("STOPPING=1")
        check(b.service.wait(30) == 0, "exit status")
        check(os.path.exists(b.api_socket) and os.path.exists(b.agent_socket), "a socket that is not its own was removed")
    units(os.path.abspath(sys.argv[1]))
    print("a service manager gets what it wants")


main()
