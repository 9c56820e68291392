#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The operator's own live migration of a VM under the adapter, while its guest writes: QEMU's dirty log, which the
adapter serves, must tell every page.  All RAM of the destination is compared with the source's when both stand
still; snapshots before, meanwhile (refused) and after.

  migrate.py BUILD [--smp N] [--rounds N]
"""
import argparse
import os
import random

from qemuvm import Bench, Failed, QemuVm, need_qemu, seed_from, stopped_snapshot


def migrate(b, source, target, bandwidth):
    path = os.path.join(b.dir, f"{target.name}.migration")
    target.monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    target.monitor.ask("migrate-incoming", uri=f"unix:{path}")
    source.monitor.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    source.monitor.ask("migrate-set-parameters", max_bandwidth=bandwidth, downtime_limit=1)
    source.monitor.events.clear()  # snapshots are migrations, too
    source.monitor.ask("migrate", uri=f"unix:{path}")
    source.monitor.wait_event("MIGRATION", lambda d: d["status"] == "active")
    try:
        b.snapshot(source.name)
        raise RuntimeError("a snapshot in the middle of a migration was not refused")
    except Failed as e:
        assert "migration" in str(e), e
    caps = {c["capability"]: c["state"] for c in source.monitor.ask("query-migrate-capabilities")}
    assert not caps["x-ignore-shared"], "a migration without RAM"
    source.wait_lines(3)
    passes = source.monitor.ask("query-migrate")["ram"]["dirty-sync-count"]
    source.monitor.ask("migrate-set-parameters", max_bandwidth=1 << 33, downtime_limit=2000)
    source.monitor.wait_event("MIGRATION", lambda d: d["status"] in ("completed", "failed"))
    assert source.monitor.ask("query-migrate")["status"] == "completed", source.monitor.ask("query-migrate")
    target.monitor.wait_event("MIGRATION", lambda d: d["status"] == "completed")
    return passes


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("build")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--seed", type=int)
    args = p.parse_args()
    need_qemu()
    rng = random.Random(seed_from(args.seed))
    with Bench(args.build) as b:
        b.start()
        for i in range(args.rounds):
            options = dict(mem=32, smp=args.smp, pages=2000, pause=rng.choice([0, 200]))
            source = QemuVm(b, f"source{i}", "native", **options)
            b.vm_ready(source.name, 60)
            source.wait_lines(2)
            stopped_snapshot(b, source)
            target = QemuVm(b, f"target{i}", "native", more=["-incoming", "defer", "-S"], **options)
            migrate(b, source, target, rng.choice([8, 16]) << 20)
            assert target.monitor.status() == "paused", target.monitor.status()
            a, c = bytes(source.ram()), bytes(target.ram())
            bad = [n for n in range(0, len(a), 4096) if a[n:n + 4096] != c[n:n + 4096]]
            assert not bad, f"{len(bad)} pages differ after the migration, the first at 0x{bad[0]:x}"
            source.kill()
            target.monitor.ask("cont")
            target.wait_lines(3)
            b.vm_ready(target.name, 30)
            snap, ram, said = stopped_snapshot(b, target)
            b.rollback(target.name, snap["id"])
            target.wait_lines(2)
            target.kill()
        print(f"{args.rounds} migrations: the same RAM on both sides")


if __name__ == "__main__":
    main()
