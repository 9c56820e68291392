#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The atomics by which agent, service, KVM and devices agree, as litmus tests on a weak machine.

For each protocol: what must not happen does not, with the orders that are said to be enough; the code
has at least these (a line of it is looked for); and with any of them one step weaker it happens.  So it
does with each fault of the kind that is easily made.  litmus.py has the model; docs/dirty-tracking.md,
section 8, the table.

  atomics.py SOURCE_ROOT      exit 0: all as said
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from litmus import outcomes  # noqa: E402


def set_bit(v):
    return v | 1


def clear_bit(v):
    return v & ~1


class Protocol:
    """`build(o)` makes (threads, initial memory) with the orders o; `bad(regs, memory)` must not happen."""

    def __init__(self, name, build, bad, orders, faults=None, code=()):
        self.name, self.build, self.bad, self.orders = name, build, bad, orders
        self.faults, self.code = faults or {}, code

    def happens(self, orders, build=None):
        program, init = (build or self.build)(orders)
        return any(self.bad(dict(r), dict(m)) for r, m in outcomes(program, init))


def weaker(atom, order):
    """One step down; what an atom does is the first word of its name."""
    kind = atom.split()[0]
    down = {"load": {"sc": ["acq"], "acq": ["rlx"]}, "store": {"sc": ["rel"], "rel": ["rlx"]},
            "rmw": {"sc": ["ar"], "ar": ["acq", "rel"], "acq": ["rlx"], "rel": ["rlx"]},
            "fence": {"rel": [None], "acq": [None]}}
    return down[kind].get(order, [])


def fence(order):
    return [("F", order)] if order else []


# ---- a ring entry: KVM fills it, the agent reads it and hands it back ----

def ring_push(o):
    kvm = [("W", "offset", 1, "rlx"), *fence("rel"), ("W", "flags", 1, "rlx")]      # smp_wmb()
    agent = [("R", "f", "flags", o["load flags"]), ("IF", lambda r: r["f"] == 1, [("R", "off", "offset", "rlx")])]
    return [kvm, agent], {"offset": 0, "flags": 0}


def ring_reuse(o):
    agent = [("R", "off", "offset", "rlx"), ("W", "flags", 2, o["store flags"])]
    kvm = [("R", "f", "flags", "acq"), ("IF", lambda r: r["f"] == 2, [("W", "offset", 9, "rlx")])]
    return [agent, kvm], {"offset": 1, "flags": 1}


# ---- gpaset: no bit is left behind, no page older than its bit ----

def set_summary(o):
    add = [("RMW", "_", "bits", set_bit, o["rmw add bit"]), ("R", "s", "summary", o["load add summary"]),
           ("IF", lambda r: r["s"] == 0, [("RMW", "_s", "summary", set_bit, "sc")])]
    take = [("RMW", "t", "summary", clear_bit, o["rmw take summary"]), ("R", "b", "bits", o["load take bits"])]
    return [add, take], {"bits": 0, "summary": 1}


def take_looks_first(o):
    add, _ = set_summary(o)[0]
    return [add, [("R", "b", "bits", "sc"), ("RMW", "t", "summary", clear_bit, "sc")]], {"bits": 0, "summary": 1}


def set_bytes(o):
    add = [("W", "page", 1, "rlx"), ("RMW", "_", "bits", set_bit, o["rmw add bit"])]
    take = [("RMW", "b", "bits", clear_bit, o["rmw take bit"]),
            ("IF", lambda r: r["b"] == 1, [("R", "p", "page", "rlx")])]
    return [add, take], {"page": 0, "bits": 1}


def skip_when_set(o):
    _, take = set_bytes(o)[0]
    add = [("W", "page", 1, "rlx"), ("R", "s", "bits", "sc"),
           ("IF", lambda r: r["s"] == 0, [("RMW", "_", "bits", set_bit, "sc")])]
    return [add, take], {"page": 0, "bits": 1}


def set_inflight(o):
    take = [("RMW", "_", "inflight", set_bit, o["rmw inflight"]), ("RMW", "b", "bits", clear_bit, o["rmw take bit"])]
    heir = [("R", "d", "bits", "acq"), ("R", "i", "inflight", "rlx")]
    return [take, heir], {"bits": 1, "inflight": 0}


def inflight_second(o):
    _, heir = set_inflight(o)[0]
    return [[("RMW", "b", "bits", clear_bit, "sc"), ("RMW", "_", "inflight", set_bit, "sc")], heir], \
        {"bits": 1, "inflight": 0}


# ---- what was published is in the sets ----

def publish(o):
    agent = [("RMW", "_", "bits", set_bit, "rlx"), ("RMW", "_q", "seq", set_bit, o["rmw publish_seq"])]
    service = [("R", "q", "seq", "acq"), ("R", "b", "bits", "rlx")]
    return [agent, service], {"bits": 0, "seq": 0}


def publish_early(o):
    _, service = publish(o)[0]
    return [[("RMW", "_q", "seq", set_bit, "sc"), ("RMW", "_", "bits", set_bit, "sc")], service], {"bits": 0, "seq": 0}


# ---- base: timeline 0 while the rest of it changes ----

def base(o):
    writer = [("W", "timeline", 0, o["store timeline 0"]), *fence(o["fence between"]), ("W", "store", 2, "rlx"),
              ("W", "timeline", 2, o["store timeline"])]
    heir = [("R", "s", "store", "rlx"), *fence("acq"), ("R", "t", "timeline", "rlx")]
    return [writer, heir], {"timeline": 1, "store": 1}


def base_new(o):
    writer, _ = base(o)[0]
    heir = [("R", "t", "timeline", "acq"), ("R", "s", "store", "rlx")]
    return [writer, heir], {"timeline": 1, "store": 1}


# ---- a kick: attention, then immediate_exit; clear, then attention ----

def kick(o):
    pauser = [("W", "attention", 1, o["store attention"]), ("RMW", "_", "exit", set_bit, o["rmw kick"])]
    vcpu = [("RMW", "_c", "exit", clear_bit, o["rmw clear"]), ("R", "a", "attention", o["load attention"])]
    return [pauser, vcpu], {"attention": 0, "exit": 0}


def look_before_clear(o):
    pauser, _ = kick(o)[0]
    return [pauser, [("R", "a", "attention", "sc"), ("RMW", "_c", "exit", clear_bit, "sc")]], {"attention": 0, "exit": 0}


# ---- a device's log: data, then the bit; the bit, then the data ----

def devlog(o):
    device = [("W", "page", 1, "rlx"), *fence("rel"), ("RMW", "_", "log", set_bit, "rlx")]   # as vhost does
    agent = [("RMW", "l", "log", lambda v: 0, o["rmw exchange"]),
             ("IF", lambda r: r["l"] == 1, [("R", "p", "page", "rlx")])]
    return [device, agent], {"page": 0, "log": 1}


def load_then_clear(o):
    device, _ = devlog(o)[0]
    agent = [("R", "l", "log", "sc"), ("IF", lambda r: r["l"] == 1, [("R", "p", "page", "rlx")]), ("W", "log", 0, "sc")]
    return [device, agent], {"page": 0, "log": 1}


# ---- counts that grow: who sees the number sees what it counts ----

def grown(o):
    adder = [("W", "vcpu", 1, "rlx"), ("W", "nr", 1, o["store nr"])]
    reader = [("R", "n", "nr", o["load nr"]), ("IF", lambda r: r["n"] == 1, [("R", "v", "vcpu", "rlx")])]
    return [adder, reader], {"vcpu": 0, "nr": 0}


GPASET, HARVEST, VCPU = "snapd/gpaset.c", "snapd/harvest.c", "agent/vcpu.c"
PROTOCOLS = [
    Protocol("ring entry, read", ring_push, lambda r, m: r["f"] == 1 and r["off"] == 0,
             {"load flags": "acq"},
             code=[(HARVEST, r"flags = __atomic_load_n\(&e->flags, __ATOMIC_ACQUIRE\)")]),
    Protocol("ring entry, handed back", ring_reuse, lambda r, m: r["off"] == 9,
             {"store flags": "rel"},
             code=[(HARVEST, r"__atomic_store_n\(&e->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE\)")]),
    Protocol("gpaset: no bit without its summary", set_summary,
             lambda r, m: r["b"] == 0 and m["bits"] == 1 and m["summary"] == 0,
             {"rmw add bit": "sc", "load add summary": "sc", "rmw take summary": "sc", "load take bits": "sc"},
             faults={"take looks at bits before it clears the summary": take_looks_first},
             code=[(GPASET, r"atomic_fetch_or\(&set->bits\[word\], mask\);\n\tsummary_set"),
                   (GPASET, r"if \(\(atomic_load\(&set->summary\[unit\]\) & mask\) != mask\)"),
                   (GPASET, r"words &= atomic_fetch_and\(&set->summary\[unit\], ~words\); /\* G2 \*/"),
                   (GPASET, r"uint64_t all = atomic_load\(&set->bits\[word\]\);")]),
    Protocol("gpaset: bytes no older than the bit", set_bytes,
             lambda r, m: r["b"] == 1 and m["bits"] == 0 and r["p"] == 0,
             {"rmw add bit": "rel", "rmw take bit": "acq"},
             faults={"add leaves a bit alone that is set": skip_when_set},
             code=[(GPASET, r"all = atomic_fetch_and\(&set->bits\[word\], ~v\);")]),
    Protocol("gpaset: dirty or inflight, for whoever comes after a crash", set_inflight,
             lambda r, m: r["d"] == 0 and r["i"] == 0,
             {"rmw inflight": "rlx", "rmw take bit": "rel"},
             faults={"taken before it is inflight": inflight_second},
             code=[(GPASET, r"word_add\(inflight, word, v\);\n\tif \(v\)\n\t\tall = atomic_fetch_and")]),
    Protocol("publish_seq", publish, lambda r, m: r["q"] == 1 and r["b"] == 0,
             {"rmw publish_seq": "rel"},
             faults={"counted before it is published": publish_early},
             code=[("agent/reap.c", r"atomic_fetch_add_explicit\(&vm->shm->publish_seq, 1, memory_order_release\)")]),
    Protocol("base: old timeline, new store", base, lambda r, m: r["s"] == 2 and r["t"] == 1,
             {"store timeline 0": "rlx", "fence between": "rel", "store timeline": "rlx"},
             code=[("snapd/vm/shm.c", r"base\.timeline, 0, __ATOMIC_SEQ_CST\);\n(.*\n)?\tatomic_thread_fence\(memory_order_release\)")]),
    Protocol("base: new timeline, old store", base_new, lambda r, m: r["t"] == 2 and r["s"] == 1,
             {"store timeline 0": "rlx", "fence between": None, "store timeline": "rel"},
             code=[("snapd/vm/shm.c", r"__atomic_store_n\(&m->base\.timeline, b->point\.timeline, __ATOMIC_SEQ_CST\)")]),
    Protocol("kick", kick, lambda r, m: r["a"] == 0 and m["exit"] == 0,
             {"store attention": "rlx", "rmw kick": "rel", "rmw clear": "acq", "load attention": "rlx"},
             faults={"the vCPU looks for a pause before it clears its kick": look_before_clear},
             code=[("agent/pause.c", r"atomic_store\(&vm->attention,"),
                   (VCPU, r"atomic_fetch_and\(immediate_exit\(v->run\), \(uint8_t\)~KICK_BIT\); /\* V2")]),
    Protocol("device log", devlog, lambda r, m: r["l"] == 1 and m["log"] == 0 and r["p"] == 0,
             {"rmw exchange": "acq"},
             faults={"looked at, then cleared": load_then_clear},
             code=[("agent/writers.c", r"atomic_exchange\(word,")]),
    Protocol("vCPUs, devices and frames that come to be", grown, lambda r, m: r["n"] == 1 and r["v"] == 0,
             {"store nr": "rel", "load nr": "acq"},
             code=[(VCPU, r"vm->vcpu_fds\[v->index\] = v->fd;\n\t\tatomic_store\(&vm->nr_vcpus,")]),
]


def check(p, root):
    """What is wrong, as lines."""
    if p.happens(p.orders):
        yield "what must not happen does"
    for atom, order in p.orders.items():
        for down in weaker(atom, order):
            if not p.happens({**p.orders, atom: down}):
                yield f"{atom}: {order} is more than is needed, {down or 'nothing'} would do"
    for name, build in p.faults.items():
        if not p.happens(p.orders, build):
            yield f"not noticed: {name}"
    for path, pattern in p.code:
        with open(os.path.join(root, path)) as f:
            if not re.search(pattern, f.read()):
                yield f"{path} has no more what this is about: {pattern}"


def main():
    failed = 0
    for p in PROTOCOLS:
        wrong = list(check(p, sys.argv[1]))
        steps = sum(len(weaker(a, o)) for a, o in p.orders.items())
        print(f"{p.name}: " + ("; ".join(wrong) or f"right; {steps} orders and {len(p.faults)} faults looked at"))
        failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
