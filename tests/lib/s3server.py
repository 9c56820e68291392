# SPDX-License-Identifier: MIT
"""A real S3 server for a test: Ceph's gateway, by the program s3-server beside this file; and what tests do to it."""
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile

import snaptest


def need_server():
    for tool in ("radosgw", "curl"):
        if not shutil.which(tool):
            snaptest.skip(f"{tool} is not installed")


class Server:
    def __init__(self, tool):
        self.tool = tool
        self.dir = tempfile.mkdtemp(prefix="snapd-s3.")
        self.start()
        with open(os.path.join(self.dir, "env")) as f:
            self.vars = dict(line.rstrip("\n").split("=", 1) for line in f)
        self.endpoint, self.bucket = self.vars["S3_ENDPOINT"], self.vars["S3_BUCKET"]
        self.secret = self.vars["S3_SECRET_KEY"]
        self.env = {"AWS_ACCESS_KEY_ID": self.vars["S3_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": self.secret,
                    "AWS_REGION": self.vars["S3_REGION"]}

    def start(self):
        subprocess.run([self.tool, "start", self.dir], check=True, stdout=subprocess.DEVNULL)

    def kill(self, daemon):
        with open(os.path.join(self.dir, "run", f"{daemon}.pid")) as f:
            os.kill(int(f.read()), signal.SIGKILL)

    def overload(self, limit):
        subprocess.run(["ceph", "--admin-daemon", f"{self.dir}/run/client.rgw.asok", "config", "set",
                        "rgw_max_concurrent_requests", str(limit)], check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    def request(self, method, path, *args):
        """By curl, which signs; the key goes in by stdin."""
        p = subprocess.run(["curl", "-sSf", "--noproxy", "*", "-m", "60", "-X", method, "--aws-sigv4",
                            f"aws:amz:{self.vars['S3_REGION']}:s3", "-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD",
                            "-K", "-", *args, f"{self.endpoint}/{self.bucket}{path}"],
                           input=f'user = "{self.vars["S3_ACCESS_KEY"]}:{self.secret}"'.encode(), check=True,
                           stdout=subprocess.PIPE)
        return p.stdout

    def keys(self, prefix):
        xml = self.request("GET", f"?list-type=2&prefix={prefix.replace('/', '%2F')}").decode()
        return re.findall("<Key>([^<]*)</Key>", xml)

    def bytes(self, prefix):
        """Of all objects there."""
        xml = self.request("GET", f"?list-type=2&prefix={prefix.replace('/', '%2F')}").decode()
        return sum(map(int, re.findall("<Size>([0-9]*)</Size>", xml)))

    def bytes_put(self):
        """That the server was given with objects, since it started."""
        out = subprocess.run(["ceph", "--admin-daemon", f"{self.dir}/run/client.rgw.asok", "perf", "dump"], check=True,
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        return json.loads(out)["rgw"]["put_b"]

    def get(self, key):
        return self.request("GET", "/" + key)

    def put(self, key, data):
        with tempfile.NamedTemporaryFile() as f:
            f.write(data)
            f.flush()
            self.request("PUT", "/" + key, "-T", f.name)

    def delete(self, key):
        self.request("DELETE", "/" + key)

    def stop(self):
        subprocess.run([self.tool, "stop", self.dir], check=False)
        shutil.rmtree(self.dir, ignore_errors=True)
