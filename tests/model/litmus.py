# SPDX-License-Identifier: MIT
"""A small checker of litmus tests: every execution that the C11 memory model allows.

A program is a list of threads, a thread a list of
    ("W", loc, value, order)      ("R", reg, loc, order)      ("F", order)
    ("RMW", reg, loc, fn, order)  reg gets the old value, loc fn(old)
    ("IF", fn, [...])             fn of the registers so far
with orders "rlx", "acq", "rel", "ar" (both) and "sc".  outcomes(program, init) is the set of all
(registers, memory at the end).

The model is RC11 (Lahav et al., PLDI 2017) with release sequences of read-modify-writes only, as C++20
has them, and one change towards the weaker: a load may be overtaken by a later store that does not
depend on it, as arm64 allows, so only dependencies take part in "no value out of thin air".
Executions are enumerated by what each read reads (rf) and the order of the writes to each place (mo).
"""
import itertools

STRONG = {"acq": ("acq", "ar", "sc"), "rel": ("rel", "ar", "sc")}


class Event:
    def __init__(self, thread, kind, loc=None, order="rlx", rval=None, wval=None, deps=frozenset()):
        self.thread, self.kind, self.loc, self.order = thread, kind, loc, order
        self.rval, self.wval, self.deps = rval, wval, deps

    def reads(self):
        return self.kind in ("R", "RMW")

    def writes(self):
        return self.kind in ("W", "RMW", "INIT")


def traces(tid, code, domain):
    """All ways through a thread: (events, registers), for every value that a read might get."""
    def go(rest, events, regs, sources, control):
        if not rest:
            yield events, regs
            return
        op, rest = rest[0], rest[1:]
        if op[0] == "IF":
            deps = control | frozenset().union(*sources.values()) if sources else control
            yield from go((op[2] if op[1](regs) else []) + rest, events, regs, sources, deps)
        elif op[0] == "F":
            yield from go(rest, events + [Event(tid, "F", order=op[1], deps=control)], regs, sources, control)
        elif op[0] == "W":
            e = Event(tid, "W", op[1], op[3], wval=op[2], deps=control)
            yield from go(rest, events + [e], regs, sources, control)
        else:
            for v in sorted(domain[op[2]]):
                at = len(events)
                if op[0] == "R":
                    e = Event(tid, "R", op[2], op[3], rval=v, deps=control)
                else:
                    e = Event(tid, "RMW", op[2], op[4], rval=v, wval=op[3](v), deps=control)
                yield from go(rest, events + [e], {**regs, op[1]: v}, {**sources, op[1]: frozenset([at])}, control)
    yield from go(list(code), [], {}, {}, frozenset())


def domains(program, init):
    """What each place may ever hold."""
    domain = {loc: {v} for loc, v in init.items()}
    while True:
        before = {k: set(v) for k, v in domain.items()}
        for tid, code in enumerate(program):
            for events, _ in traces(tid, code, domain):
                for e in events:
                    if e.writes():
                        domain[e.loc].add(e.wval)
        if domain == before:
            return domain


def closure(n, pairs):
    reach = [0] * n
    for a, b in pairs:
        reach[a] |= 1 << b
    for k in range(n):
        for i in range(n):
            if reach[i] >> k & 1:
                reach[i] |= reach[k]
    return reach


def pairs_of(reach):
    return {(i, j) for i, r in enumerate(reach) for j in range(len(reach)) if r >> j & 1}


def compose(a, b):
    after = {}
    for x, y in b:
        after.setdefault(x, []).append(y)
    return {(x, z) for x, y in a for z in after.get(y, ())}


def acyclic(n, pairs):
    return not any(r >> i & 1 for i, r in enumerate(closure(n, pairs)))


def synchronizes(ev, sb, rf):
    """Release (or a release fence before a write) → acquire (or a read before an acquire fence)."""
    sw, rf_of = set(), {}
    for w, r in rf:
        rf_of.setdefault(w, []).append(r)
    for i, e in enumerate(ev):
        if not e.writes() or e.kind == "INIT":
            continue
        heads = {i} if e.order in STRONG["rel"] else set()
        heads |= {f for f, w in sb if w == i and ev[f].kind == "F" and ev[f].order in STRONG["rel"]}
        if not heads:
            continue
        todo, readers = [i], set()
        while todo:
            for r in rf_of.get(todo.pop(), ()):
                if ev[r].kind == "RMW" and r not in readers:    # two may yet read from each other
                    todo.append(r)
                readers.add(r)
        for r in readers:
            tails = {r} if ev[r].order in STRONG["acq"] else set()
            tails |= {f for x, f in sb if x == r and ev[f].kind == "F" and ev[f].order in STRONG["acq"]}
            sw |= {(h, t) for h in heads for t in tails}
    return sw


def consistent(ev, sb, dep, rf, mo):
    n = len(ev)
    rb = {(r, w2) for w, r in rf for w1, w2 in mo if w1 == w and r != w2}
    hb = pairs_of(closure(n, sb | synchronizes(ev, sb, rf)))
    if any(a == b for a, b in hb):
        return False
    eco = pairs_of(closure(n, rf | mo | rb))
    if any((b, a) in eco for a, b in hb):
        return False
    if any((w, x) in mo and (x, r) in mo for w, r in rf if ev[r].kind == "RMW" for x in range(n)):
        return False
    if not acyclic(n, dep | rf):
        return False
    same = {(a, b) for a in range(n) for b in range(n) if ev[a].loc and ev[a].loc == ev[b].loc}
    apart = sb - same
    scb = sb | compose(compose(apart, hb), apart) | (hb & same) | mo | rb
    sc = {i for i, e in enumerate(ev) if e.order == "sc"}
    fences = {i for i in sc if ev[i].kind == "F"}
    own = {(i, i) for i in sc}
    left = own | {(f, b) for f, b in hb if f in fences}
    right = own | {(a, f) for a, f in hb if f in fences}
    psc = compose(compose(left, scb), right)
    psc |= {(a, b) for a, b in hb | compose(compose(hb, eco), hb) if a in fences and b in fences}
    return acyclic(n, psc)


def executions(ev, init_of):
    """Every (rf, mo) that fits the values."""
    writes = {}
    for i, e in enumerate(ev):
        if e.writes():
            writes.setdefault(e.loc, []).append(i)
    reads = [i for i, e in enumerate(ev) if e.reads()]
    choices = [[w for w in writes[ev[r].loc] if w != r and ev[w].wval == ev[r].rval] for r in reads]
    orders = []
    for loc, ws in writes.items():
        rest = [w for w in ws if w != init_of[loc]]
        orders.append([[init_of[loc], *p] for p in itertools.permutations(rest)])
    for picked in itertools.product(*choices):
        rf = {(w, r) for w, r in zip(picked, reads)}
        for chains in itertools.product(*orders):
            yield rf, {(a, b) for c in chains for i, a in enumerate(c) for b in c[i + 1:]}, [c[-1] for c in chains]


def outcomes(program, init):
    found = set()
    domain = domains(program, init)
    for combo in itertools.product(*(list(traces(t, code, domain)) for t, code in enumerate(program))):
        ev = [Event(None, "INIT", loc, wval=v) for loc, v in init.items()]
        init_of = {loc: i for i, loc in enumerate(init)}
        sb, dep, regs = set(), set(), {}
        for events, r in combo:
            base = len(ev)
            ev += events
            sb |= {(i, j) for i in range(base, len(ev)) for j in range(i + 1, len(ev))}
            dep |= {(base + d, base + j) for j, e in enumerate(events) for d in e.deps}
            regs.update(r)
        sb |= {(i, j) for i in init_of.values() for j in range(len(init), len(ev))}
        for rf, mo, last in executions(ev, init_of):
            end = (tuple(sorted(regs.items())), tuple(sorted((ev[w].loc, ev[w].wval) for w in last)))
            if end not in found and consistent(ev, sb, dep, rf, mo):
                found.add(end)
    return found
