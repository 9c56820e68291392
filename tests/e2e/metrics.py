#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""/metrics is well-formed and tidy, tells the truth about a VM, and has every figure that the alert rules, the dashboard
and docs/monitoring.md name; and the document names every figure that there is.

  metrics.py BUILD SOURCE
"""
import json
import os
import re
import socket
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "lib"))
import promtext  # noqa: E402
from snaptest import Bench, _UnixConnection, seed_from  # noqa: E402

build, source = sys.argv[1], sys.argv[2]
WORDS = {"by", "on", "and", "or", "absent", "rate", "sum", "max", "increase", "histogram_quantile", "predict_linear", "time",
         "label_values", "le", "vm", "uid", "part", "policy", "kind", "state"}


def check(cond, what):
    if not cond:
        raise RuntimeError(what)


def scrape(b):
    c = _UnixConnection(b.api_socket, 20)
    c.request("GET", "/metrics")
    r = c.getresponse()
    check(r.getheader("Content-Type").startswith("text/plain; version=0.0.4"), r.getheader("Content-Type"))
    return promtext.read(r.read().decode())


def values(families, name, **labels):
    return [v for f in families.values() for n, l, v in f.samples
            if n == name and all(l.get(k) == w for k, w in labels.items())]


def value(families, name, **labels):
    found = values(families, name, **labels)
    check(len(found) == 1, f"{name}{labels}: {found}")
    return found[0]


def read(*path):
    with open(os.path.join(source, *path)) as f:
        return f.read()


def names_in(expr):
    """What a query asks for; its parts in braces, brackets and quotes are no names."""
    bare = re.sub(r'\{[^}]*\}|\[[^]]*\]|"[^"]*"', " ", expr)
    return set(re.findall(r"\b[a-z_][a-z0-9_:]*\b", bare)) - WORDS


def rules():
    """Records, alerts and expressions; a file of a fixed form, so that no YAML library is needed."""
    text = read("contrib", "prometheus", "snapd.rules.yml")
    blocks = re.split(r"^      - (?=record:|alert:)", text, flags=re.M)[1:]
    out = []
    for block in blocks:
        kind, name = re.match(r"(record|alert): (\S+)", block).groups()
        expr = re.search(r"^        expr: (.*)$", block, re.M)[1]
        check(expr.count("(") == expr.count(")") and expr.count("[") == expr.count("]"), f"{name}: {expr}")
        if kind == "alert":
            check(re.search(r"labels: \{severity: (warning|critical)\}", block) and "summary:" in block
                  and "description:" in block, f"alert {name} lacks something")
        out.append((kind, name, expr))
    check(len({n for _, n, _ in out}) == len(out) and len(out) >= 15, "rules twice, or not read")
    return out


def dashboard():
    board = json.loads(read("contrib", "grafana", "snapd.json"))
    ids = [p["id"] for p in board["panels"]]
    check(len(set(ids)) == len(ids), "panels with one id")
    exprs = [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    for p in board["panels"]:
        check(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24, f"{p['title']} is too wide")
        check(p["type"] == "row" or p["targets"], f"{p['title']} shows nothing")
        exprs += [t["expr"] for t in p.get("targets", [])]
    return exprs


def documents(families):
    there, records = promtext.names(families), set()
    for kind, name, expr in rules():
        missing = names_in(expr) - there - records
        check(not missing, f"{kind} {name} asks for {missing}")
        if kind == "record":
            records.add(name)
    for expr in dashboard():
        missing = names_in(expr) - there
        check(not missing, f"the dashboard asks for {missing}: {expr}")
    page = read("docs", "monitoring.md")
    told = set(re.findall(r"`(snapd_[a-z_]+)`", page))
    check(told == set(families), f"docs/monitoring.md: missing {set(families) - told}, not there {told - set(families)}")
    alerts = {n for kind, n, _ in rules() if kind == "alert"}
    check(set(re.findall(r"^### (Snapd\w+)", page, re.M)) == alerts, "docs/monitoring.md tells of other alerts")


def truth(b):
    b.snapshot("web", name="first")
    before = time.time()
    b.snapshot("web", name="second")
    f = scrape(b)
    check(promtext.lint(f) == [], promtext.lint(f))
    vm = b.vm_info("web")
    check(value(f, "snapd_vms") == 2 and value(f, "snapd_vm_ready", vm="web") == 1, "VMs")
    check(value(f, "snapd_vm_ram_bytes", vm="web") == vm["ram_bytes"] >= 8 << 20, "RAM")
    check(value(f, "snapd_vm_pause_seconds_count", vm="web") == value(f, "snapd_vm_epochs_total", vm="web") == 2, "pauses")
    check(value(f, "snapd_vm_epoch_bytes_sum", vm="web") >= 1 << 20, "epochs")
    check(0 < value(f, "snapd_vm_pause_seconds_sum", vm="web") < 60, "time paused")
    check(value(f, "snapd_vm_last_epoch_timestamp_seconds", vm="web") > before - 1, "when the newest was taken")
    check(value(f, "snapd_vm_capture_lag_seconds", vm="web") < time.time() - before + 1, "lag")
    check(not [1 for _, l, _ in f["snapd_vm_capture_lag_seconds"].samples if l["vm"] == "idle"], "no snapshot, and a lag")
    check(value(f, "snapd_vm_dirtied_bytes_total", vm="web") > 0, "dirty rate")
    check(value(f, "snapd_vm_harvest_seconds_count", vm="web") > 0, "harvests")
    check(value(f, "snapd_store_snapshots") == 2 and value(f, "snapd_store_filesystem_free_bytes") > 0, "store")
    check(value(f, "snapd_jobs_ended_total", kind="snapshot", state="done") == 2, "jobs")
    return f


def keys(b):
    path = os.path.join(b.dir, "credentials")
    with open(path, "w") as f:
        f.write("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    os.chmod(path, 0o600)
    return path


def backups(b, before):
    """A push that works, one to where nothing can be, and one of what is there already."""
    def operations(operation, result):
        return value(scrape(b), "snapd_backup_operations_total", operation=operation, result=result)

    pushed = json.loads(b.snapctl("backup", "push", "web@second", "--json").stdout)["pushed"][0]
    f = scrape(b)
    check(value(f, "snapd_backup_pages_sent_total") == pushed["pages_sent"] > 0, "pages sent")
    check(value(f, "snapd_backup_packs_sent_total") == pushed["packs_sent"] > 0, "packs")
    check(value(f, "snapd_backup_pages_known_total") == pushed["pages_known"], "pages known")
    check(value(f, "snapd_backup_sent_bytes_total") > pushed["pages_sent"], "bytes")
    check(value(f, "snapd_backup_last_push_timestamp_seconds", vm="web") >= int(before), "when it was pushed")
    check(value(f, "snapd_backup_last_point_timestamp_seconds", vm="web") ==
          int(value(f, "snapd_vm_last_epoch_timestamp_seconds", vm="web")), "when what was pushed was taken")
    b.snapctl("backup", "push", "web@second", "--repository", "file:///proc/nowhere", check=False)
    b.snapctl("backup", "verify")
    b.snapctl("backup", "pull", "nobody", check=False)
    # To a server that takes connections and never answers; and cancelled, which counts as nothing.
    job = b.call("POST", "/v1/backup/push", {"snapshots": ["web@first"], "repository": "s3://nobody/there"})["job"]["id"]
    b.until(lambda: b.get(f"/v1/jobs/{job}")["job"]["state"] == "running", 20, "the push to run")
    b.call("DELETE", f"/v1/jobs/{job}")
    b.until(lambda: b.get(f"/v1/jobs/{job}")["job"]["state"] == "cancelled", 20, "cancel")
    f = scrape(b)
    check((operations("push", "done"), operations("push", "failed")) == (1, 1), "pushes")
    check((operations("verify", "done"), operations("pull", "failed"), operations("prune", "done")) == (1, 1, 0), "operations")
    check(value(f, "snapd_backup_received_bytes_total") > 0 and not promtext.lint(f), promtext.lint(f))


def other_user(b):
    """Another user has no VM here, and sees none of anybody's."""
    if os.getuid():
        return
    os.chmod(b.dir, 0o755)
    os.seteuid(65534)  # the socket tells the service
    try:
        f = scrape(b)
    finally:
        os.seteuid(0)
    check(value(f, "snapd_vms") == 0 and value(f, "snapd_backup_pages_sent_total") > 0, "sums are everybody's")
    seen = {l["vm"] for family in f.values() for _, l, _ in family.samples if "vm" in l}
    check(not seen, f"another user sees {seen}")


def main():
    seed = seed_from(None)
    with socket.create_server(("127.0.0.1", 0)) as silent, Bench(build) as b:
        b.service_args += ["--policies", os.path.join(b.dir, "policies"), "--vm-tags", os.path.join(b.dir, "none"),
                           "--backup", f"file://{b.dir}/repo", "--backup-credentials", keys(b),
                           "--backup-endpoint", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        b.start()
        for name in ("web", "idle"):
            b.vm(name, "--accel", "sim", "--mem", "8M", "--rate", "500", "--seed", seed)
        for name in ("web", "idle"):
            b.vm_ready(name)
        before = time.time()
        documents(truth(b))
        backups(b, before)
        b.snapctl("policy", "set", "p", "vms=idle", "every=1h", "keep_last=1")
        b.snapctl("policy", "run", "p")
        b.until(lambda: 1 in values(scrape(b), "snapd_policy_runs_total", policy="p", vm="idle"), 20, "a run")
        f = scrape(b)
        check(promtext.lint(f) == [] and value(f, "snapd_policy_failures_total", policy="p") == 0, promtext.lint(f))
        check(value(f, "snapd_vm_capture_lag_seconds", vm="idle") < 60, "lag of a VM with a policy")
        other_user(b)
    print(f"{len(f)} metrics: tidy, true, documented")


main()
