#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The HTTP API against clients of every kind: garbage, half and oversized requests, slow ones, wrong methods,
encoded paths, other users, too many connections, uploads and downloads that are cut off, a service that stops
while clients wait.  The service answers as docs/openapi.yaml says, or closes that one connection; it never
crashes, hangs, leaks descriptors or disturbs another client.

  http_api.py BUILD SOURCE [--seed S]
"""
import argparse
import http.client
import json
import os
import random
import re
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from image import PAGE, Image  # noqa: E402
from snaptest import Bench, Failed, seed_from  # noqa: E402

NOBODY = 65534


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


class Http:
    def __init__(self, b, rng):
        self.b, self.rng = b, rng
        self.idle_fds = self.descriptors()

    def connect(self, timeout=10):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.settimeout(timeout)
        s.connect(self.b.api_socket)
        return s

    def raw(self, data, timeout=10):
        """Send, then read to the end: (status or None, body)."""
        s = self.connect(timeout)
        got = b""
        try:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            while True:
                more = s.recv(1 << 16)
                if not more:
                    break
                got += more
        except OSError:
            pass
        s.close()
        m = re.match(rb"HTTP/1\.1 (\d+) ", got)
        return int(m[1]) if m else None, got.partition(b"\r\n\r\n")[2]

    def request(self, line, headers="", body=b""):
        return self.raw(f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n".encode() + body)

    def fails(self, status, code, line, headers="", body=b""):
        got, data = self.request(line, headers, body)
        check(got == status, f"{line}: HTTP {got}, not {status}: {data[:200]}")
        o = json.loads(data)
        check(o["code"] == code and o["error"] and "\n" not in o["error"], f"{line}: {o}")

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.b.service.pid}/fd"))

    # ---- what is described ----

    def every_path(self, source):
        """Each path and method of the file answers; each other method is refused."""
        with open(os.path.join(source, "docs", "openapi.yaml")) as f:
            text = f.read().split("\ncomponents:")[0]
        paths = {}
        for block in re.split(r"^  (?=/)", text, flags=re.M)[1:]:
            paths[block.split(":")[0]] = set(re.findall(r"^    (get|post|put|delete|patch):", block, re.M))
        check(len(paths) > 12, "no paths in openapi.yaml")
        for path, methods in paths.items():
            real = re.sub(r"\{[a-z]+\}", "nothing", path)
            for m in ("get", "post", "put", "delete", "patch", "head", "options"):
                status, data = self.request(f"{m.upper()} {real}", "Content-Length: 0\r\n" if m != "get" else "")
                if m in methods:
                    check(status is not None and status != 405 and b"no such path" not in data,
                          f"{m} {path}: {status} {data[:100]}")
                else:
                    check(status == 405, f"{m} {path}: HTTP {status}, not 405")

    def malformed(self):
        post = "Content-Type: application/json\r\nContent-Length: {}\r\n"

        def posts(line, body, status=400, code="invalid"):
            self.fails(status, code, line, post.format(len(body)), body)

        posts("POST /v1/vms/x/snapshots", b"{")
        posts("POST /v1/vms/x/snapshots", b"[]")
        posts("POST /v1/vms/x/snapshots", b'"x"')
        posts("POST /v1/vms/x/snapshots", b'{"name": "a", "name": "b"}')
        posts("POST /v1/vms/x/snapshots", b'{"nmae": "a"}')
        posts("POST /v1/vms/x/snapshots", b'{"name": 5}')
        posts("POST /v1/vms/x/snapshots", b'{"name": "12"}')
        posts("POST /v1/vms/x/snapshots", b'{"name": "a b"}')
        posts("POST /v1/vms/x/snapshots", b'{"note": "%s"}' % (b"n" * 300))
        posts("POST /v1/vms/x/snapshots", b'{"note": "\\n"}')
        posts("POST /v1/vms/x/snapshots", b'{"note": "\\u0000"}')
        posts("POST /v1/vms/x/snapshots", b'{"note": "\xff"}')
        posts("POST /v1/vms/x/snapshots", b"[" * 60000)
        posts("POST /v1/vms/x/rollback", b"{}")
        posts("POST /v1/vms/x/rollback", b'{"snapshot": 1}')
        posts("POST /v1/vms/x/rollback", b'{"snapshot": "1", "check": 1}')
        posts("POST /v1/vms/x/snapshots", b"{}", 404, "not-found")
        posts("POST /v1/snapshots/1/verify", b'{"digest": "yes"}')
        posts("POST /v1/store/gc", b'{"x": 1}')
        posts("POST /v1/import", b"", 400, "invalid")
        posts("POST /v1/import", b"{}\n", 400, "invalid")
        posts("POST /v1/import", b"\n" * 10, 400, "invalid")
        posts("POST /v1/import", b"x" * 100000, 400, "invalid")
        big = b'{"note": "' + b"n" * (80 << 10) + b'"}'
        posts("POST /v1/vms/x/snapshots", big, 413, "too-large")
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(big), big) for _ in range(2)) + b"0\r\n\r\n"
        self.fails(413, "too-large", "POST /v1/vms/x/snapshots", "Transfer-Encoding: chunked\r\n", chunks)
        self.fails(400, "invalid", "GET /v1/jobs/1?wait=x") if self.job_exists(1) else None
        self.fails(400, "invalid", "GET /v1/snapshots/1/diff")
        self.fails(400, "invalid", "DELETE /v1/snapshots/vm")
        for path in ("/", "//", "/v1", "/v1/", "/v1/vms/", "/v1//vms", "/v2/vms", "/v1/vms/x/y", "/../../etc/passwd",
                     "/v1/../v1/vms", "/v1/%76ms", "/v1/snapshots/1/nope", "/v1/vms/x/snapshots/1", "*"):
            self.fails(404, "not-found", f"GET {path}")
        for path in ("/v1/vms/%", "/v1/vms/%0", "/v1/vms/%zz", "/v1/vms/a%00b"):
            self.fails(400, "invalid", f"GET {path}")
        for path in ("/v1/vms/..", "/v1/vms/%2e%2e", "/v1/vms/..%2f..%2fetc", "/v1/vms/%ff%fe", "/v1/vms/" + "x" * 5000,
                     "/v1/jobs/-1", "/v1/jobs/18446744073709551616", "/v1/jobs/0x1", "/v1/jobs/1e9"):
            self.fails(404, "not-found", f"GET {path}")

    def job_exists(self, n):
        return self.request(f"GET /v1/jobs/{n}")[0] == 200

    def garbage(self):
        rng = self.rng
        whole = b"POST /v1/vms/x/snapshots HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
        for i in range(150):
            kind = i % 6
            if kind == 0:
                data = rng.randbytes(rng.choice([1, 10, 1000, 100000]))
            elif kind == 1:
                data = whole[:rng.randrange(len(whole))]
            elif kind == 2:
                data = bytearray(whole)
                for _ in range(rng.randrange(1, 5)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                data = bytes(data)
            elif kind == 3:
                data = b"GET /v1/version HTTP/1.1\r\n" + b"X-A: " + b"a" * rng.choice([100, 70000, 400000]) + b"\r\n\r\n"
            elif kind == 4:
                data = b"GET /" + b"a" * rng.choice([5000, 300000]) + b" HTTP/1.1\r\n\r\n"
            else:
                data = b"POST /v1/import HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + rng.randbytes(2000)
            self.raw(data)
        many = b"".join(b"X-%d: 1\r\n" % i for i in range(20000))
        status, _ = self.raw(b"GET /v1/version HTTP/1.1\r\n" + many + b"\r\n")
        check(status in (None, 400, 413, 431), f"20000 headers: {status}")
        check(self.request("GET /v1/version")[0] == 200, "no answer after garbage")

    def slow(self):
        """Half requests stay open; others are served all the same."""
        idle = [self.connect() for _ in range(40)]
        for i, s in enumerate(idle):
            s.sendall(b"POST /v1/vms/x/snapshots HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"[:10 + i * 2])
        start = time.monotonic()
        for _ in range(20):
            check(self.request("GET /v1/vms")[0] == 200, "slow clients block others")
        check(time.monotonic() - start < 5, "slow clients slow others down")
        for s in idle:
            s.close()

    def crowd(self):
        """One user gets 64 connections, then 503; afterwards all is as before."""
        self.b.until(lambda: self.descriptors() <= self.idle_fds, 10, "earlier connections to be closed")
        before = self.descriptors()
        socks = [self.connect() for _ in range(64)]
        for s in socks:
            s.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n")
            check(b" 200 " in s.recv(4096), "one of 64")
        s = self.connect()
        check(b" 503 " in s.recv(4096), "the 65th connection was not refused")
        s.close()
        for s in socks:
            s.close()
        self.b.until(lambda: self.descriptors() <= before + 2, 10, "descriptors to be closed")
        check(self.request("GET /v1/version")[0] == 200, "no answer after the crowd")

    def keep_alive(self):
        """Many requests on one connection, also pipelined."""
        s = self.connect()
        s.sendall(b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        got = b""
        while got.count(b"HTTP/1.1 200 OK") < 50:
            more = s.recv(1 << 16)
            check(more, "the connection was closed in between")
            got += more
        s.close()

    # ---- streams ----

    def import_bytes(self, image, vm_name, **more):
        """The body of POST /v1/import, without the memory's end."""
        pieces = b"".join(struct.pack("<QQIIQ", home, n, 0, 0, 0) for home, n in image.pieces)
        payload = pieces + bytes(-len(pieces) % 8)
        records = struct.pack("<32sIHHQ", b"pieces", 0, 1, 0, len(pieces)) + payload
        header = struct.pack("<8sHHIQQ", b"SNPSTATE", 1, 0, 1, 32 + len(records), self.xxh64(records))
        blob = header + records
        head = dict({"vm": vm_name, "arch": "x86_64", "page_size": PAGE, "state_bytes": len(blob)}, **more)
        return json.dumps(head).encode() + b"\n" + blob

    def xxh64(self, data):
        return 0    # wrong on purpose: see bad_state()

    def bad_state(self):
        body = self.import_bytes(Image({}, [(0, 4)]), "wrong-hash")
        self.fails(400, "invalid", "POST /v1/import", f"Content-Length: {len(body)}\r\n", body)
        for more in ({"page_size": 3}, {"state_bytes": -1}, {"state_bytes": 1 << 40}, {"vm": "1"}, {"vm": None},
                     {"name": "a b"}, {"arch": "x" * 40}, {"note": 7}, {"taken_ns": "x"}):
            body = self.import_bytes(Image({}, [(0, 4)]), "x", **more)
            self.fails(400, "invalid", "POST /v1/import", f"Content-Length: {len(body)}\r\n", body)

    def cut_off(self):
        """Uploads and downloads that end in the middle: nothing stays, nothing hangs."""
        before = [s["id"] for s in self.b.snapshots()]
        fds = self.idle_fds
        for n in (0, 1, 50, 5000):
            s = self.connect()
            s.sendall(b"POST /v1/import HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            body = b'{"vm": "cut", "arch": "x86_64", "page_size": 4096, "state_bytes": 4000}\n' + bytes(5000)
            s.sendall(b"%x\r\n" % len(body) + body[:n])
            s.close()
        image = Image({g: self.rng.randbytes(PAGE) for g in range(3000)}, [(0, 3000)], vm="cut")
        path = os.path.join(self.b.dir, "cut.img")
        image.write(path)
        self.b.snapctl("import", path, "--name", "cut")
        snap = self.b.snapshots("cut")[0]["id"]
        for n in (0, 1, 4096, 1 << 20):
            s = self.connect()
            s.sendall(f"GET /v1/snapshots/{snap}/memory HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            while n > 0:
                n -= len(s.recv(min(n, 65536)))
            s.close()
        self.b.until(lambda: all(j["state"] not in ("queued", "running") for j in self.b.get("/v1/jobs")["jobs"]), 60,
                     "cut-off transfers to end")
        self.b.until(lambda: self.descriptors() <= fds + 2, 10, "descriptors to be closed")
        check([s["id"] for s in self.b.snapshots() if s["vm"] != "cut"] == before, "a cut-off import left something")
        check(self.b.verify(snap)["digest"] == image.digest(), "the snapshot after cut-off downloads")
        # A reader that stops reading holds its own job up, and cancel ends it.
        s = self.connect()
        s.sendall(f"GET /v1/snapshots/{snap}/memory HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        job = self.b.until(lambda: [j for j in self.b.get("/v1/jobs")["jobs"]
                                    if j["kind"] == "export" and j["state"] == "running"], 10, "the export to run")[0]
        self.b.call("DELETE", f"/v1/jobs/{job['id']}")
        self.b.until(lambda: self.b.get(f"/v1/jobs/{job['id']}")["job"]["state"] == "cancelled", 10, "cancel")
        s.close()
        return snap

    # ---- users, waiting, the end ----

    def other_user(self, snap):
        """Another user sees nothing of root's, as if it were not there."""
        r, w = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(r)
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                got = []
                for path in ("/v1/snapshots", f"/v1/snapshots/{snap}", f"/v1/snapshots/{snap}/memory", "/v1/jobs",
                             "/v1/jobs/1", "/v1/vms", f"/v1/snapshots/{snap}/state"):
                    got.append(self.request(f"GET {path}"))
                got.append(self.request("POST /v1/store/gc", "Content-Length: 0\r\n"))
                got.append(self.request(f"DELETE /v1/snapshots/{snap}"))
                got.append(self.request(f"POST /v1/snapshots/{snap}/verify", "Content-Length: 0\r\n"))
                os.write(w, json.dumps([(s, d.decode()) for s, d in got]).encode())
            except BaseException as e:
                os.write(w, json.dumps(str(e)).encode())
            os._exit(0)
        os.close(w)
        with os.fdopen(r) as f:
            got = json.loads(f.read())
        os.waitpid(pid, 0)
        check(isinstance(got, list), f"as another user: {got}")
        check([s for s, _ in got] == [200, 404, 404, 200, 404, 200, 404, 403, 404, 404], f"as another user: {got}")
        check(json.loads(got[0][1]) == {"snapshots": []} and json.loads(got[3][1]) == {"jobs": []}, f"{got}")

    def stop_while_waiting(self, snap):
        """SIGTERM while clients wait and download: it ends, with exit code 0."""
        socks = []
        for i in range(5):
            s = self.connect(30)
            s.sendall(f"GET /v1/snapshots/{snap}/memory HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            socks.append(s)
        up = self.connect(30)
        up.sendall(b"POST /v1/import HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        job = self.b.until(lambda: [j for j in self.b.get("/v1/jobs")["jobs"]
                                    if j["kind"] == "import" and j["state"] == "running"], 10, "the import to run")[0]
        waiter = threading.Thread(target=self.wait_for, args=(job["id"],))
        waiter.start()
        time.sleep(0.1)
        check(self.b.stop(timeout=20) == 0, "exit code after SIGTERM with clients")
        waiter.join(10)
        check(not waiter.is_alive(), "a waiting client was left hanging")
        for s in socks + [up]:
            s.close()

    def wait_for(self, job):
        try:
            self.b.get(f"/v1/jobs/{job}?wait=60000")
        except (OSError, Failed, http.client.HTTPException):
            pass

    def long_poll(self):
        start = time.monotonic()
        up = self.connect(30)
        up.sendall(b"POST /v1/import HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        job = self.b.until(lambda: [j for j in self.b.get("/v1/jobs")["jobs"]
                                    if j["kind"] == "import" and j["state"] == "running"], 10, "the import to run")[0]
        check(self.b.get(f"/v1/jobs/{job['id']}?wait=300")["job"]["state"] == "running", "wait ended in another state")
        check(time.monotonic() - start >= 0.3, "wait did not wait")
        got = []
        t = threading.Thread(target=lambda: got.append(self.b.get(f"/v1/jobs/{job['id']}?wait=50000")["job"]))
        t.start()
        time.sleep(0.1)
        self.b.call("DELETE", f"/v1/jobs/{job['id']}")
        t.join(20)
        check(got and got[0]["state"] == "cancelled", f"the change did not reach the waiting client: {got}")
        up.sendall(b"0\r\n\r\n")
        answer = up.recv(65536)
        check(b" 409 " in answer and b"cancelled" in answer, f"a cancelled import answers: {answer}")
        up.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("source")
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        os.chmod(b.dir, 0o755)
        b.start()
        h = Http(b, rng)
        h.every_path(args.source)
        h.malformed()
        h.garbage()
        h.slow()
        h.crowd()
        h.keep_alive()
        h.bad_state()
        snap = h.cut_off()
        h.long_poll()
        if os.geteuid() == 0:
            h.other_user(snap)
        h.stop_while_waiting(snap)
        b.start()
        check(b.verify(snap)["pages"] == 3000, "the store after all that")
        check(b.stop() == 0, "exit code")
    print("answered, refused or closed; never disturbed")


if __name__ == "__main__":
    main()
