# SPDX-License-Identifier: MIT
"""Images as `snapctl export` writes them, made up: snapshots without any VM."""
import base64
import hashlib
import json
import struct

PAGE = 4096


def record(name, payload, instance=0, version=1):
    return {"name": name, "instance": instance, "version": version, "bytes": len(payload),
            "payload": base64.b64encode(payload).decode()}


class Image:
    """pages: {gfn: bytes of a page}; pieces: [(home gfn, pages)], ascending; the rest is zero."""

    def __init__(self, pages, pieces, vm="made-up", note="", cmdline=("true",)):
        self.pages, self.pieces = pages, pieces
        self.vm, self.note, self.cmdline = vm, note, list(cmdline)

    def digest(self):
        """As snapd/upkeep/verify.h says."""
        h = hashlib.sha256()
        for home, n in self.pieces:
            for gfn in range(home, home + n):
                h.update(struct.pack("<Q", gfn))
                h.update(self.pages.get(gfn, bytes(PAGE)))
        return h.hexdigest()

    def json(self, name, with_digest=True):
        pieces = b"".join(struct.pack("<QQIIQ", home, n, 0, 0, 0) for home, n in self.pieces)
        records = [record("pieces", pieces), record("made.up", b"nothing special")]
        if with_digest:
            records.append(record("note.ram-sha256", bytes.fromhex(self.digest())))
        end = max(home + n for home, n in self.pieces) * PAGE
        return {
            "format": "snapd-state-1",
            "snapshot": {"vm": self.vm, "page_size": PAGE, "note": self.note, "tags": "", "taken_ns": 1700000000000000000},
            "vm": {"arch": "x86_64", "cmdline": self.cmdline},
            "records": records,
            "memory": {"file": name, "bytes": end,
                       "map": [[home * PAGE, n * PAGE, home * PAGE] for home, n in self.pieces]},
        }

    def write(self, path, **kw):
        with open(path, "wb") as f:
            for gfn, data in self.pages.items():
                f.seek(gfn * PAGE)
                f.write(data)
            f.truncate(max(home + n for home, n in self.pieces) * PAGE)
        with open(path + ".json", "w") as f:
            json.dump(self.json(path, **kw), f)
        return path


def random_image(rng, pages=2048, stored=600, **kw):
    pieces = [(0, 160), (256, pages - 160)]
    gfns = [g for home, n in pieces for g in range(home, home + n)]
    some = [rng.randbytes(PAGE) for _ in range(stored * 3 // 4)]
    picked = rng.sample(gfns, stored)
    return Image({g: some[i % len(some)] for i, g in enumerate(picked)}, pieces, **kw)
