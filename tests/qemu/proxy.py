# SPDX-License-Identifier: MIT
"""A QEMU whose monitor the adapter reaches through us: what goes by can be held, or told otherwise."""
import array
import json
import os
import socket
import threading

from qemuvm import QemuVm


class Proxy:
    """Between the adapter's end of the monitor and QEMU's.  `lies`: [(bytes, bytes)] of answers, the one told
    as the other."""

    def __init__(self, lies=()):
        self.lies = lies
        self.adapter, self.to_adapter = socket.socketpair()
        self.qemu, self.to_qemu = socket.socketpair()
        self.lock = threading.Lock()
        self.trap = self.action = None
        self.held = None  # [(text, descriptors)] while nothing passes
        self.hit = threading.Event()
        threading.Thread(target=self.commands, daemon=True).start()
        threading.Thread(target=self.answers, daemon=True).start()

    def started(self):
        self.adapter.close()
        self.qemu.close()

    def arm(self, command, action):
        self.hit.clear()
        self.action, self.trap = action, command

    def forward(self, text, fds):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.to_qemu.sendmsg([text.encode()], rights)
        for fd in fds:
            os.close(fd)

    def passes(self, name, text, fds):
        with self.lock:
            if name == self.trap:
                self.trap = None
                if self.action == "hold":
                    self.held = []
                else:
                    self.action()
                self.hit.set()
            if self.held is not None:
                self.held.append((text, fds))
                return
            self.forward(text, fds)

    def commands(self):
        text = ""
        try:
            while True:
                data, fds, _, _ = socket.recv_fds(self.to_adapter, 65536, 4)
                if not data:
                    break
                text += data.decode()
                while text:
                    o, end = json.JSONDecoder().raw_decode(text)
                    self.passes(o["execute"], text[:end], list(fds) if o["execute"] in ("getfd", "add-fd") else [])
                    text = text[end:]
        except OSError:
            pass
        self.to_qemu.close()

    def answers(self):
        try:
            for line in self.to_qemu.makefile("rb"):
                for was, told in self.lies:
                    line = line.replace(was, told)
                self.to_adapter.sendall(line)
        except OSError:
            pass
        self.to_adapter.close()

    def release(self):
        with self.lock:
            held, self.held = self.held, None
            for text, fds in held:
                self.forward(text, fds)


class ProxiedVm(QemuVm):
    def __init__(self, bench, name, lies=(), env=(), more=(), **kw):
        self.proxy = Proxy(lies)
        self.fds = (self.proxy.adapter.fileno(), self.proxy.qemu.fileno())
        for fd in self.fds:
            os.set_inheritable(fd, True)
        more = [*more, "-object", f"memory-backend-memfd,id=snapd-ram,size={kw['mem']}M,share=on", "-machine",
                "memory-backend=snapd-ram", "-chardev", f"socket,id=snapd-qmp,fd={self.fds[1]}", "-mon",
                "chardev=snapd-qmp,mode=control"]
        env = {"LD_PRELOAD": os.path.join(bench.build, "adapters", "qemu", "libsnapd-qemu.so"),
               "SNAPD_QEMU_QMP": f"fd:{self.fds[0]}", "SNAPD_VM_NAME": name, **dict(env)}
        super().__init__(bench, name, more=more, adapter=False, env=env, pass_fds=self.fds, **kw)
        self.proxy.started()
