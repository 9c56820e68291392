#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""--help, the manual pages and the shell completions list the same verbs, options and settings.

snapctl's --help is made from the table that its command line is parsed with, so it is taken as the truth;
those of snapd and snapvm are written by hand and compared with the tables in their sources.

  documents.py BUILD SOURCE
"""
import os
import re
import shutil
import subprocess
import sys

build, source = sys.argv[1], sys.argv[2]
bad = []


def run(*argv):
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=20)


def read(*path):
    with open(os.path.join(source, *path)) as f:
        return f.read()


def same(what, got, want):
    got, want = set(got), set(want)
    for extra in sorted(got - want):
        bad.append(f"{what}: {extra} is listed, but is not there")
    for missing in sorted(want - got):
        bad.append(f"{what}: {missing} is missing")


def options(text):
    """Options that a --help defines: at the start of a line or of a column, not in prose."""
    return set(re.findall(r"^(?:[a-z]+)?\s{2,}(?:--([a-z][a-z-]+))", text, re.M)) | set(
        re.findall(r"^\s+--[a-z-]+, --([a-z-]+)", text, re.M))


def page_options(text):
    return re.findall(r"^\.It Fl Fl ([a-z][a-z-]+)", text, re.M)


def snapctl():
    exe = os.path.join(build, "tools", "snapctl")
    text = run(exe, "--help").stdout
    listed = [part.split() for line in re.findall(r"^  [a-z].*$", text, re.M) for part in (line[:40], line[40:])]
    verbs = [words[0] for words in listed if words]
    if any(len(words) < 2 or "(null)" in words for words in listed if words):
        bad.append("snapctl --help: a verb without a word about it")
    for verb in [None] + verbs:
        lines = run(exe, *([verb] if verb else []), "--help").stdout.splitlines()
        if len(lines) > 24 or max(map(len, lines)) > 80:
            bad.append(f"snapctl {verb or ''} --help: {len(lines)} lines of up to {max(map(len, lines))} columns: no screen")
    common = options(text)
    own = {v: options(run(exe, v, "--help").stdout) - common for v in verbs}
    every = common.union(*own.values())

    page = read("docs", "man", "snapctl.1")
    section = page[page.index(".Ss Verbs"):page.index(".Ss Options")]
    parts = re.split(r"^\.It Ic ([a-z-]+).*$", section, flags=re.M)[1:]
    same("snapctl.1: verbs", parts[::2], verbs)
    for verb, part in zip(parts[::2], parts[1::2]):
        same(f"snapctl.1: {verb}", page_options(part), own.get(verb, set()))
    rest = page[page.index(".Ss Options"):page.index(".Sh ENVIRONMENT")]
    same("snapctl.1: options", page_options(rest), common)

    bash = read("contrib", "completions", "snapctl.bash")
    same("bash: verbs", re.search(r"verbs='([^']*)'", bash)[1].split(), verbs)
    same("bash: options", re.findall(r"--([a-z-]+)", re.search(r" options='([^']*)'", bash)[1]), common)
    for verb in verbs:
        m = re.search(rf"^\t{verb}\) options\+=' ([^']*)'", bash, re.M)
        same(f"bash: {verb}", re.findall(r"--([a-z-]+)", m[1]) if m else [], own[verb])

    zsh = read("contrib", "completions", "_snapctl")
    same("zsh: verbs", re.findall(r"^\t\t'([a-z-]+):", zsh, re.M), verbs)
    same("zsh: options", set(re.findall(r"'--([a-z-]+)\[", zsh)), every)
    for verb in verbs:
        m = re.search(rf"^\t\t(?:[a-z| ]*\b)?{verb}\b[a-z| ]*\) (.*)", zsh, re.M)
        same(f"zsh: {verb}", re.findall(r"'--([a-z-]+)\[", m[1]) if m else [], own[verb])

    fish = read("contrib", "completions", "snapctl.fish")
    same("fish: verbs", re.findall(r"__fish_use_subcommand -a ([a-z-]+)", fish), verbs)
    same("fish: options", re.findall(r"^complete -c snapctl -l ([a-z-]+)", fish, re.M), common)
    for verb in verbs:
        same(f"fish: {verb}", re.findall(rf"__snapctl_verb {verb}' -l ([a-z-]+)", fish), own[verb])


def program(exe, page, parsed):
    """A program whose --help is written by hand; `parsed`: the options in its source."""
    text = run(exe, "--help").stdout
    name = os.path.basename(exe)
    listed = set(re.findall(r"--([a-z][a-z-]+)", text)) - {"frobnicate"}
    parsed = ["".join(p) for p in parsed]
    same(f"{page}", page_options(read("docs", "man", page)), listed)
    same(f"{name} --help", listed, parsed)
    p = run(exe, "--frobnicate")
    if p.returncode != 2:
        bad.append(f"{name} takes an unknown option")


def settings():
    page = read("docs", "man", "snapd.conf.5")
    want = re.findall(r'^\t\{"([a-z_]+)", (?:"[a-z-]+"|NULL), [A-Z]+, AT', read("snapd", "daemon", "config.c"), re.M)
    same("snapd.conf.5", re.findall(r"^\.It Cm ([a-z_]+)$", page, re.M), want)


def policies():
    want = re.findall(r'^\t\{"([a-z_]+)", set_', read("snapd", "policy", "policy.c"), re.M)
    lines = re.findall(r"^\.It Cm ([a-z_ ,]+)$", read("docs", "man", "snapd-policy.5"), re.M)
    same("snapd-policy.5", [word for line in lines for word in line.split(" , ")], want)
    same("bash: settings", re.search(r"local settings='([^']*)'", read("contrib", "completions", "snapctl.bash"))[1].split(), want)
    same("zsh: settings", re.search(r"settings=\(([^)]*)\)", read("contrib", "completions", "_snapctl"))[1].split(), want)
    same("fish: settings", re.findall(r"([a-z_]+)=", re.search(r"under policy set[^\n]* -a '([^']*)'", read(
        "contrib", "completions", "snapctl.fish"))[1]), want)


def pages():
    if not shutil.which("man"):
        return
    for page in ("snapctl.1", "snapd.8", "snapvm.1", "snapd-qemu.1", "snapd.conf.5", "snapd-policy.5"):
        p = subprocess.run(["man", "--warnings", "-l", os.path.join(source, "docs", "man", page)],
                           env=dict(os.environ, MANROFFSEQ="", MANWIDTH="120", LC_ALL="C.UTF-8"),
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if p.returncode or p.stderr.strip() or "SYNOPSIS" not in p.stdout + "SYNOPSIS" * page.endswith("5"):
            bad.append(f"{page}: {p.stderr.strip()[:200]}")


def commands():
    """A page for each program and file of settings that is installed, and no page that is not."""
    listed = set(re.findall(r"'([a-z.-]+\.[0-9])'", read("docs", "meson.build")))
    same("docs/man", os.listdir(os.path.join(source, "docs", "man")), listed)
    installed = re.findall(r"executable\((?:name_prefix \+ )?'([a-z-]+)'(?:(?!executable\()[\s\S])*?install: true",
                           "".join(read(d, "meson.build") for d in ("snapd", "tools", "vmm", "adapters/qemu")))
    same("pages of commands", {re.sub(r"\.[0-9]$", "", p) for p in listed if p[-1] in "18"}, installed)


def anchor(heading):
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def links():
    """Relative links of the documents lead somewhere."""
    for name in ["README.md", "HACKING.md", "NEWS.md"] + ["docs/" + f for f in os.listdir(os.path.join(source, "docs")) if f.endswith(".md")]:
        for target in re.findall(r"\]\((?!https?:)([^)]*)\)", read(name)):
            path, _, part = target.partition("#")
            path = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
            if not os.path.exists(os.path.join(source, path)):
                bad.append(f"{name}: a link to {target}, which is not there")
            elif part and part not in map(anchor, re.findall(r"^#+ (.*)$", read(path), re.M)):
                bad.append(f"{name}: a link to {target}, which has no such heading")


def shells():
    for shell, name in (("bash", "snapctl.bash"), ("zsh", "_snapctl"), ("fish", "snapctl.fish"),
                        ("bash", "snapd-qemu.bash")):
        if shutil.which(shell):
            p = run(shell, "-n", os.path.join(source, "contrib", "completions", name))
            if p.returncode:
                bad.append(f"{name}: {p.stdout.strip()}")


snapctl()
program(os.path.join(build, "snapd", "snapd"), "snapd.8",
        re.findall(r'^\t\{"[a-z_]+", "([a-z-]+)", [A-Z]+, AT|^\t\t\{"([a-z-]+)", (?:required|no)_argument',
                   read("snapd", "daemon", "config.c"), re.M))
program(os.path.join(build, "vmm", "snapvm"), "snapvm.1",
        re.findall(r'^\t\{"([a-z-]+)", (?:required|no)_argument', read("vmm", "options.c"), re.M))
program(os.path.join(build, "adapters", "qemu", "snapd-qemu"), "snapd-qemu.1",
        re.findall(r'\{"([a-z-]+)", (?:required|no)_argument', read("adapters", "qemu", "launcher.c")))
same("bash: snapd-qemu", re.findall(r"--([a-z-]+)", re.search(r" options='([^']*)'", read(
    "contrib", "completions", "snapd-qemu.bash"))[1]),
     page_options(read("docs", "man", "snapd-qemu.1")))
settings()
policies()
pages()
commands()
links()
shells()
for line in bad:
    print(line)
print("documents: " + (f"{len(bad)} wrong" if bad else "the same everywhere"))
sys.exit(bool(bad))
