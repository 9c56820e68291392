# SPDX-License-Identifier: MIT
"""A proxy in front of an S3 server that does to requests and answers what networks and servers do: errors, resets,
answers cut off, silence, a clock that is wrong; with TLS by an authority of its own where it is asked for.

Signatures stay right: what is signed goes through unchanged."""
import http.client
import http.server
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
from email.utils import formatdate
from urllib.parse import urlsplit

OVERLOADED = b"<Error><Code>SlowDown</Code><Message>later</Message></Error>"


def authority(directory, names):
    """An authority and a certificate of its for those names: paths of the authority's, the certificate, the key."""
    ca, ca_key, cert, key, request, ext = (os.path.join(directory, n) for n in
                                           ("ca.pem", "ca.key", "cert.pem", "cert.key", "request", "ext"))
    with open(ext, "w") as f:
        f.write("subjectAltName=" + ",".join(f"DNS:{n}" for n in names))
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for argv in (new + ["-x509", "-days", "2", "-subj", "/CN=an authority", "-keyout", ca_key, "-out", ca],
                 new + ["-subj", "/CN=a server", "-keyout", key, "-out", request],
                 ["openssl", "x509", "-req", "-days", "2", "-in", request, "-CA", ca, "-CAkey", ca_key, "-CAcreateserial",
                  "-extfile", ext, "-out", cert]):
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return ca, cert, key


class Proxy:
    """fault(method, path) is asked for each request: None, "500", "503", "reset", "cut" or "hang"."""

    def __init__(self, endpoint, cert=None, key=None):
        self.upstream = urlsplit(endpoint).netloc
        self.fault = lambda method, path: None
        self.clock_ahead_s = 0
        self.requests = self.faults = self.hanging = 0
        self.lock, self.go_on = threading.Lock(), threading.Event()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                proxy.forward(self)
            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def log_message(self, *_):
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # clients leave when they like
                pass
        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        if cert:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def choose(self, h):
        with self.lock:
            self.requests += 1
            what = self.fault(h.command, h.path)
            self.faults += what is not None
            return what

    def forward(self, h):
        body = h.rfile.read(int(h.headers.get("Content-Length", 0)))
        what = self.choose(h)
        if what == "hang":
            with self.lock:
                self.hanging += 1
            self.go_on.wait(300)
        if what in ("reset", "hang"):
            h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            h.connection.close()
            h.close_connection = True
        elif what in ("500", "503"):
            self.answer(h, int(what), [], OVERLOADED if what == "503" else b"", None)
        else:
            self.pass_on(h, body, what)

    def pass_on(self, h, body, what):
        c = http.client.HTTPConnection(self.upstream, timeout=120)
        c.putrequest(h.command, h.path, skip_host=True, skip_accept_encoding=True)
        for name, value in h.headers.items():
            if name.lower() not in ("connection", "expect"):
                c.putheader(name, value)
        c.endheaders(body)
        r = c.getresponse()
        data = r.read()
        headers = [(n, v) for n, v in r.getheaders() if n.lower() not in ("date", "content-length", "transfer-encoding", "connection")]
        length = int(r.getheader("Content-Length") or 0) if h.command == "HEAD" else len(data)
        self.answer(h, r.status, headers, data, length, cut=what == "cut")
        c.close()

    def answer(self, h, status, headers, data, length, cut=False):
        h.send_response_only(status)
        h.send_header("Date", formatdate(time.time() + self.clock_ahead_s, usegmt=True))
        for name, value in headers:
            h.send_header(name, value)
        h.send_header("Content-Length", str(len(data) if length is None else length))
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(data[:len(data) // 2] if cut else data)
        if cut:
            h.close_connection = True

    def stop(self):
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
