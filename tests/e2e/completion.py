#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The completions of bash, zsh and fish, loaded into these shells beside a service with a VM, a snapshot and a policy:
what is begun is brought to its end, as on a terminal.

  completion.py BUILD SOURCE
"""
import concurrent.futures
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
from snaptest import Bench, seed_from, skip  # noqa: E402

# What is typed before the tabulator, and what the last word becomes; each has one end only.
LINES = (
    ("snapctl rollb", "rollback"),
    ("snapctl --js", "--json"),
    ("snapctl snapshot we", "web"),
    ("snapctl snapshot web --self", "--self-check"),
    ("snapctl show web@bef", "web@before"),
    ("snapctl rollback web web@b", "web@before"),
    ("snapctl rollback --other", "--other-vm"),
    ("snapctl prune --keep-y", "--keep-yearly"),
    ("snapctl policy sh", "show"),
    ("snapctl policy show nig", "nightly"),
    ("snapctl policy run nightly w", "web"),
    ("snapctl policy set nightly recov", "recovery_point="),
    ("snapctl policy set nightly every=1h schedu", "schedule="),
    ("snapctl policy run --wa", "--wait"),
    ("snapctl policy set nightly --self", "--self-check"),
    ("snapctl store rebui", "rebuild-index"),
    ("snapctl backup pus", "push"),
    ("snapctl backup push --repos", "--repository"),
    ("snapctl top --sort dir", "dirty"),
)


def plain(seen):
    """The lines that a terminal shows, which overwrites and goes back."""
    line, at, text = [], 0, ""
    for c in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]", "", seen):
        if c == "\n":
            text, line, at = text + "".join(line) + "\n", [], 0
        elif c in "\r\b":
            at = 0 if c == "\r" else max(at - 1, 0)
        elif " " <= c <= "~":
            line[at:at + 1] = [c]
            at += 1
    return text + "".join(line)


class Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, env, argv, prepare):
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvpe(argv[0], argv, env)
        self.seen = ""
        self.send(prepare + "; echo it-is-'ready'\n")
        self.until("it-is-ready")

    def send(self, text):
        os.write(self.fd, text.encode())

    def until(self, what, seconds=20):
        """Read until `what` (a text, or a function of what was seen) comes."""
        end = time.monotonic() + seconds
        fits = what if callable(what) else lambda seen: what in seen
        while not fits(self.seen):
            if time.monotonic() > end:
                raise TimeoutError(f"no {what!r} in {self.seen[-300:]!r}")
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def complete(self, line, word):
        """Does `line`, completed, end with `word`?"""
        head = line.split(" ")
        head[-1] = word
        want = " ".join(head)
        self.seen = ""
        self.send(line + "\t")
        try:
            self.until(lambda seen: want in plain(seen), 10)
        except TimeoutError:
            raise RuntimeError(f"'{line}' does not become '{want}': {plain(self.seen)[-200:]!r}") from None
        # Away with it: nothing of it is run.
        self.send("\x15")
        self.seen = ""
        self.send("echo it-is-'empty'\n")
        self.until("it-is-empty")

    def close(self):
        os.close(self.fd)
        os.waitpid(self.pid, 0)


def by_terminal(env, argv, prepare):
    t = Terminal(env, argv, prepare)
    try:
        for line, word in LINES:
            t.complete(line, word)
    finally:
        t.close()


def bash(env, source):
    by_terminal(env, ["bash", "--norc", "--noprofile", "-i"],
                f"bind 'set enable-bracketed-paste off'; stty cols 200; source {source}/contrib/completions/snapctl.bash")


def zsh(env, source):
    by_terminal(env, ["zsh", "-f", "-i"], f"unsetopt zle_bracketed_paste prompt_sp; stty cols 200; "
                f"fpath=({source}/contrib/completions $fpath); autoload -Uz compinit; compinit -u -D")


def fish(env, source):
    script = f"source {source}/contrib/completions/snapctl.fish\n" + "".join(
        f"echo '==' {word}; complete -C '{line}'\n" for line, word in LINES)
    p = subprocess.run(["fish", "--no-config", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT, text=True, timeout=60)
    got = [part.splitlines() for part in p.stdout.split("== ")[1:]]
    for (line, word), part in zip(LINES, got, strict=True):
        offered = [x.split("\t")[0] for x in part[1:]]
        if offered != [word]:
            raise RuntimeError(f"'{line}': {offered}, not {word}")


def main():
    build, source = os.path.abspath(sys.argv[1]), os.path.abspath(sys.argv[2])
    shells = [s for s in ("bash", "zsh", "fish") if shutil.which(s)]
    if not shells:
        skip("no bash, zsh or fish")
    with Bench(build) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies")]
        b.start()
        vm = b.vm("web", "--accel", "sim", "--mem", "4M", "--rate", "1", "--seed", seed_from(None))
        b.vm_ready("web")
        b.snapshot("web", name="before")
        b.snapctl("policy", "set", "nightly", "every=1d")
        env = dict(b.env, PATH=os.path.join(build, "tools") + ":" + os.environ["PATH"], TERM="dumb", HOME=b.dir, PS1="$ ",
                   LC_ALL="C.UTF-8")
        completing = {"bash": bash, "zsh": zsh, "fish": fish}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for done in [pool.submit(completing[s], env, source) for s in shells]:
                done.result()
        vm.stop()
    print(f"{len(LINES)} lines completed by {', '.join(shells)}")


main()
