#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Goal: an operator's view of encryption and compression: a store made with a key opens with it, from a file or a
systemd credential; each wrong key is one line and exit 3; the key can be changed; wrong settings are exit 2.

  encryption.py BUILD
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile

snapd = os.path.join(sys.argv[1], "snapd", "snapd")
work = tempfile.mkdtemp(prefix="snapd-encryption-")


def path(name):
    return os.path.join(work, name)


def write_key(name, byte, mode=0o600):
    with open(path(name), "wb") as f:
        f.write(bytes([byte]) * 32)
    os.chmod(path(name), mode)


def command(*args):
    return [snapd, "--store", path("store"), "--socket", path("api"), "--agent-socket", path("agent"),
            "--policies", path("policies"), *args]


def serves(*args, env=None):
    """It comes up, and ends when told to."""
    p = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    lines = []
    for line in p.stderr:
        lines.append(line)
        if " serves " in line:
            p.send_signal(signal.SIGTERM)
    assert p.wait(20) == 0, (args, lines)


def refuses(status, reason, *args):
    p = subprocess.run(command(*args), stderr=subprocess.PIPE, text=True, timeout=20)
    lines = p.stderr.strip().splitlines()
    assert p.returncode == status and reason in p.stderr, (args, p.returncode, p.stderr)
    assert status != 3 or len(lines) == 1, lines


def main():
    os.mkdir(path("policies"))
    os.mkdir(path("credentials"))
    write_key("key", 1)
    write_key("other", 2)
    write_key("open", 1, 0o644)
    serves("--encryption-key", path("key"), "--compression", "zstd:3")
    serves("--encryption-key", path("key"))
    refuses(3, "is encrypted: its key is needed")
    refuses(3, "is not the key of", "--encryption-key", path("other"))
    refuses(3, "chmod 600", "--encryption-key", path("open"))
    refuses(2, "--rekey needs --encryption-key", "--rekey", path("other"))
    refuses(2, "is no compression", "--compression", "gzip")
    refuses(2, "is no compression", "--compression", "zstd:99")
    rekey = subprocess.run(command("--encryption-key", path("key"), "--rekey", path("other")), timeout=20)
    assert rekey.returncode == 0
    refuses(3, "is not the key of", "--encryption-key", path("key"))
    shutil.copy(path("other"), path("credentials/snapd.encryption-key"))
    os.chmod(path("credentials/snapd.encryption-key"), 0o440)
    serves(env={"CREDENTIALS_DIRECTORY": path("credentials")})
    print("keys from files and credentials, wrong ones, a changed one: as documented")


try:
    main()
finally:
    shutil.rmtree(work)
