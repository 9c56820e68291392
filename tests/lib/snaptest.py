# SPDX-License-Identifier: MIT
"""What end-to-end tests share: a service and VMs of the build under test, and the HTTP API.

Everything lives in one temporary directory that is removed at the end, every wait has a limit,
and only processes started here are ever signalled.
"""
import http.client
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time


class Failed(Exception):
    """An API call that answered with an error: .status, .code, .text."""

    def __init__(self, status, code, text):
        super().__init__(f"HTTP {status} {code}: {text}")
        self.status, self.code, self.text = status, code, text


def skip(why):
    print(f"SKIP: {why}")
    sys.exit(77)


def need_accel(accel):
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip("no usable /dev/kvm on this machine")


def seed_from(arg):
    seed = arg if arg is not None else int(os.environ.get("SNAPD_SEED", "0"), 0) or random.SystemRandom().getrandbits(31)
    print(f"seed {seed} (repeat with SNAPD_SEED={seed})", flush=True)
    return seed


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Bench:
    """One service, its VMs, and their directory: `with Bench(build) as b:`."""

    def __init__(self, build, parent=None, service_args=()):
        self.build = os.path.abspath(build)
        self.dir = tempfile.mkdtemp(prefix="snapd-test.", dir=parent)
        self.api_socket = os.path.join(self.dir, "api.sock")
        self.agent_socket = os.path.join(self.dir, "agent.sock")
        self.store = os.path.join(self.dir, "store")
        self.service_args = list(service_args)
        self.service = None
        self.vms = []
        self.env = dict(os.environ, SNAPD_SOCKET=self.api_socket, SNAPD_AGENT_SOCKET=self.agent_socket)
        self.preload = {}  # more environment, of the service alone
        self.patience = 120  # seconds, for an answer
        self.keep = bool(os.environ.get("SNAPD_TEST_KEEP"))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        for vm in self.vms:
            vm.kill()
        if self.service and self.service.poll() is None:
            self.service.kill()
            self.service.wait()
        if kind and not issubclass(kind, SystemExit):
            self.show_logs()
        if not self.keep:
            shutil.rmtree(self.dir, ignore_errors=True)

    def tool(self, name):
        if os.path.isabs(name):
            return name
        where = {"snapd": "snapd", "snapctl": "tools"}.get(name, "vmm")
        return os.path.join(self.build, where, name)

    def show_logs(self):
        for name in sorted(os.listdir(self.dir)):
            if name.endswith(".log"):
                with open(os.path.join(self.dir, name), errors="replace") as f:
                    tail = f.readlines()[-40:]
                print(f"---- {name}")
                sys.stdout.writelines(tail)
        sys.stdout.flush()

    # ---- the service ----

    def start(self, wait=True):
        log = open(os.path.join(self.dir, "snapd.log"), "a")
        self.service = subprocess.Popen(
            [self.tool("snapd"), "--store", self.store, "--socket", self.api_socket,
             "--agent-socket", self.agent_socket] + self.service_args,
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=dict(self.env, **self.preload))
        log.close()
        if wait:
            self.until(lambda: self.get("/v1/version"), 120, "the service to answer")

    def stop(self, sig=signal.SIGTERM, timeout=30):
        self.service.send_signal(sig)
        return self.service.wait(timeout)

    def until(self, fn, seconds, what):
        """Call fn until it returns something true; transient errors are retried.  A limit that a loaded machine
        could reach tells nothing: no wait is shorter than the bench's patience."""
        seconds = max(seconds, self.patience)
        end = time.monotonic() + seconds
        last = None
        while time.monotonic() < end:
            if self.service and self.service.poll() is not None:
                raise RuntimeError(f"the service ended with {self.service.returncode} while waiting for {what}")
            try:
                got = fn()
                if got:
                    return got
            except (OSError, Failed, http.client.HTTPException) as e:
                last = e
            time.sleep(0.01)
        raise TimeoutError(f"waited {seconds} s for {what}: {last}")

    # ---- HTTP ----

    def call(self, method, path, body=None, timeout=None):
        c = _UnixConnection(self.api_socket, timeout or self.patience)
        try:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            c.request(method, path, json.dumps(body) if body is not None else None, headers)
            r = c.getresponse()
            data = r.read()
        finally:
            c.close()
        got = json.loads(data) if data.strip() else {}
        if r.status >= 400:
            raise Failed(r.status, got.get("code"), got.get("error"))
        return got

    def get(self, path, **kw):
        return self.call("GET", path, **kw)

    def raw(self, path):
        """What is not JSON: bytes, all that were announced."""
        c = _UnixConnection(self.api_socket, self.patience)
        try:
            c.request("GET", path)
            r = c.getresponse()
            data = r.read()
        finally:
            c.close()
        if r.status >= 400:
            raise Failed(r.status, None, data.decode(errors="replace"))
        return data

    def metrics(self):
        """/metrics, as it stands."""
        return self.raw("/metrics").decode()

    def memory(self, snap, page):
        """Pages of a snapshot that are not all zeros, by GFN."""
        c = _UnixConnection(self.api_socket, self.patience)
        try:
            c.request("GET", f"/v1/snapshots/{snap}/memory")
            r = c.getresponse()
            data = r.read()
        finally:
            c.close()
        if r.status != 200:
            raise Failed(r.status, None, "memory")
        pages, at = {}, 0
        while True:
            gpa, size = struct.unpack_from("<QQ", data, at)
            at += 16
            if gpa == 2**64 - 1:
                return pages
            for off in range(0, size, page):
                bytes_ = data[at + off:at + off + page]
                if any(bytes_):
                    pages[(gpa + off) // page] = bytes_
            at += size

    def job(self, method, path, body=None, timeout=120):
        """Start a job, wait for its end, return its result or raise."""
        job = self.call(method, path, body, timeout)["job"]
        end = time.monotonic() + timeout
        while job["state"] in ("queued", "running"):
            if time.monotonic() > end:
                raise TimeoutError(f"job {job['id']} ({job['kind']}) still {job['state']} after {timeout} s")
            job = self.get(f"/v1/jobs/{job['id']}?wait=1000")["job"]
        if job["state"] != "done":
            err = job.get("error") or {}
            raise Failed(0, err.get("code"), err.get("text"))
        return job["result"]

    # ---- VMs ----

    def vm_info(self, name):
        return self.get(f"/v1/vms/{name}")["vm"]

    def vm_ready(self, name, seconds=30):
        def ready():
            vm = self.vm_info(name)
            return vm if vm["state"] == "ready" else None
        return self.until(ready, seconds, f"{name} to be ready")

    def vm(self, name, *args, program="snapvm", env=None, nice=0, lockstep=False):
        """`nice` leaves the processor to the service: more epochs in the same time."""
        vm = Vm(self, name, args, program, env, nice, lockstep)
        self.vms.append(vm)
        return vm

    def snapshot(self, vm, timeout=60, **meta):
        r = self.job("POST", f"/v1/vms/{vm}/snapshots", meta, timeout)
        return r["snapshot"]

    def verify(self, sel, digest=True):
        return self.job("POST", f"/v1/snapshots/{sel}/verify", {"digest": digest})

    def rollback(self, vm, sel, **kw):
        return self.job("POST", f"/v1/vms/{vm}/rollback", dict(kw, snapshot=str(sel)))

    def snapshots(self, vm=None):
        return self.get("/v1/snapshots" + (f"?vm={vm}" if vm else ""))["snapshots"]

    def snapctl(self, *args, timeout=120, check=True):
        p = subprocess.run([self.tool("snapctl"), *args], env=self.env, timeout=timeout, text=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if check and p.returncode:
            raise RuntimeError(f"snapctl {' '.join(args)}: exit {p.returncode}: {p.stderr.strip()}")
        return p


class Vm:
    """A snapvm process."""

    def __init__(self, bench, name, args, program, env, nice, lockstep):
        self.bench, self.name = bench, name
        io = subprocess.PIPE if lockstep else None
        self.log = os.path.join(bench.dir, f"vm-{name}.log")
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [bench.tool(program), "--name", name, *map(str, args), *(["--lockstep"] if lockstep else [])],
                stdout=io or log, stderr=log, stdin=io or subprocess.DEVNULL, text=True, env=dict(bench.env, **(env or {})),
                preexec_fn=(lambda: os.nice(nice)) if nice else None)

    def move(self, n, seconds=60):
        """In lockstep: have it make n moves."""
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise TimeoutError(f"{self.name} did not make {n} moves in {seconds} s")
        if not self.process.stdout.readline().startswith("ok "):
            self.ends_within(5)
            self.check()
            raise RuntimeError(f"{self.name} does not answer")

    def alive(self):
        return self.process.poll() is None

    def ends_within(self, seconds):
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def check(self):
        if not self.alive():
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: the guest found an error, "
                               f"or the VMM failed (see its log)")

    def stop(self, timeout=30):
        """Ask it to end; fails when the guest found its own memory wrong."""
        if self.alive():
            self.process.terminate()
        code = self.process.wait(timeout)
        if code:
            raise RuntimeError(f"{self.name} ended with {code}")

    def kill(self):
        if self.alive():
            self.process.kill()
        self.process.wait()
