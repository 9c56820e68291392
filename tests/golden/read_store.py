#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""A reader of stores, written from docs/format.md alone.  Encrypted ones: read_sealed.py, which adds what they have besides.

  read_store.py STORE             list snapshots: id, timeline, epoch, pages
  read_store.py STORE ID OUT      write a snapshot: frames ascending, each as u64 GFN and bytes; then the state

Every byte on the way is checked as the document says; what is not valid ends the program with the reason.
"""
import struct
import sys

import lmdb
import lz4.block
import zstandard

from xxh3 import hash64, hash128

BLOCK = 4096
DATABASES = ["meta", "vms", "vmnames", "timelines", "epochs", "snapshots", "snapnames", "segments"]
FEATURES = {"lz4", "zstd", "sealed", "journal", "holes"}


def need(ok, what):
    if not ok:
        sys.exit(f"not valid: {what}")


class Store:
    sealed, batch_version = False, 1

    def __init__(self, path):
        self.path, self.batches = path, {}
        self.env = lmdb.open(path + "/index", readonly=True, lock=False, max_dbs=len(DATABASES))
        self.dbs = [self.env.open_db(name.encode(), create=False) for name in DATABASES]
        self.txn = self.env.begin()
        store, _ = self.record("meta", b"store", 240)
        self.uuid, (major,), self.secret = store[16:32], struct.unpack_from("<I", store, 32), store[48:240]
        need(major == 1, f"format {major}")
        features = self.txn.get(b"features", db=self.dbs[0]) and self.record("meta", b"features", 24)[1]
        for name in (features or b"").split(b"\0")[:-1]:
            need(name.decode() in FEATURES, f"unknown feature {name.decode()}")
        need(self.sealed or b"sealed" not in (features or b""), "encrypted, and no key given")

    def record_hash(self, n, key, value):
        return hash64(key + value[:8] + bytes(8) + value[16:], n)

    def record(self, db, key, size):
        n = DATABASES.index(db)
        value = self.txn.get(key, db=self.dbs[n])
        need(value is not None, f"no record {key.hex()} in {db}")
        version, head_size, flags, check = struct.unpack_from("<HHIQ", value)
        need(version == 1 and head_size == size <= len(value), f"record {key.hex()} in {db}")
        need(bool(flags >> 31) == self.sealed and check == self.record_hash(n, key, value), f"record {key.hex()} in {db}")
        return value[:size], value[size:]

    def segment(self, number):
        rec, _ = self.record("segments", struct.pack(">I", number), 48)
        generation, size, tail = struct.unpack_from("<QQI", rec, 16)
        f = open(f"{self.path}/segments/{number:08x}.seg", "rb")
        s = f.read(64)
        need(s[:8] == b"SNPSEG01" and s[8] == 1 and hash64(s[:56]) == struct.unpack_from("<Q", s, 56)[0], "superblock")
        need((number, generation, size, self.uuid) == (*struct.unpack_from("<IQQ", s, 12), s[32:48]), "superblock")
        return f, generation, tail

    def batch(self, number, block):
        """Header as a dictionary, records of pages, payload as stored."""
        f, generation, tail = self.segment(number)
        f.seek(block * BLOCK)
        raw = f.read(BLOCK)
        names = "magic version type shift header entries payload segment block generation seq"
        h = dict(zip(names.split(), struct.unpack_from("<IHBBIIQIIQQ", raw)))
        need(h["magic"] == 0x42504e53 and h["header"] % BLOCK == 0 and 0 < h["header"] <= 3 * BLOCK, "batch header")
        raw += f.read(h["header"] - BLOCK)
        need(hash64(raw[:120] + bytes(8) + raw[128:]) == struct.unpack_from("<Q", raw, 120)[0], "batch header")
        need(h["version"] == self.batch_version, f"batch version {h['version']}")
        here = (h["segment"], h["block"], h["generation"], raw[48:64])
        need(here == (number, block, generation, self.uuid), "batch is misplaced")
        need(0 < block and block + h["header"] // BLOCK + -(-h["payload"] // BLOCK) <= tail, "batch reaches outside")
        payload, h["prev"] = f.read(h["payload"]), struct.unpack_from("<II", raw, 112)
        need(len(payload) == h["payload"], "batch is cut off")
        if h["type"] != 1:
            return h, None, self.open_part(raw, payload)
        need(1 <= h["entries"] <= 252 and h["shift"] in (12, 14, 16), "batch of pages")
        return h, self.open_records(h, raw), payload

    def open_records(self, h, raw):
        return raw[128:128 + 32 * h["entries"]]

    def open_part(self, raw, payload):
        need(hash128(payload) == struct.unpack_from("<QQ", raw, 96), "blob part")
        return payload

    def open_page(self, h, entry, data):
        return data

    def blob_hash(self, data):
        return hash64(data)

    def blob(self, rec, kind):
        segment, block, size, check, parts = struct.unpack_from("<IIQQI", rec)
        data = b""
        for index in range(parts - 1, -1, -1):
            h, _, payload = self.batch(segment, block)
            need(h["type"] == kind and h["entries"] == index, "blob part out of order")
            data, (segment, block) = payload + data, h["prev"]
        need(len(data) == size and self.blob_hash(data) == check, "blob")
        return data

    def page(self, loc, size):
        place, entry = (loc >> 32 & 0xfffffff, loc >> 12 & 0xfffff), loc & 0xfff
        if place not in self.batches:
            self.batches[place] = self.batch(*place)
        h, records, payload = self.batches[place]
        need(h["type"] == 1 and entry < h["entries"] and 1 << h["shift"] == size, "loc")
        lo, hi, _, offset, len_codec = struct.unpack_from("<QQQII", records, 32 * entry)
        data, codec = payload[offset:offset + (len_codec >> 8)], len_codec & 0xff
        need(len(data) == len_codec >> 8 and codec <= 2, "page record")
        need(len(data) == size and offset % BLOCK == 0 if codec == 0 else 0 < len(data) < size, "page record")
        data = self.open_page(h, entry, data)
        if codec == 1:
            data = lz4.block.decompress(data, uncompressed_size=size)
        elif codec == 2:
            data = zstandard.decompress(data, max_output_size=size)
        need(len(data) == size and hash128(data, self.secret) == (lo, hi), "page")
        return data

    def epoch(self, timeline, epoch):
        while not epoch and timeline:
            timeline, epoch = struct.unpack_from("<QQ", self.record("timelines", struct.pack(">Q", timeline), 64)[0], 32)
        return self.record("epochs", struct.pack(">QQ", timeline, epoch), 288)[0] if timeline else None

    def frames(self, rec):
        """{gfn: loc}, and bytes of a page."""
        chain, frames, size = [], {}, struct.unpack_from("<I", rec, 184)[0]
        while rec is not None:
            full, chain_epochs = any(rec[104:112]), struct.unpack_from("<I", rec, 188)[0]
            chain.append(self.blob(rec[96:128], 3) if full else self.blob(rec[64:96], 2))
            rec = None if full or not chain_epochs else self.epoch(*struct.unpack_from("<QQ", rec, 32))
        for data in reversed(chain):
            frames.update(runs(data))
        return {gfn: loc for gfn, loc in frames.items() if loc is not None}, size

    def snapshot(self, number):
        point = struct.unpack_from("<QQ", self.record("snapshots", struct.pack(">Q", number), 640)[0], 32)
        return point, self.epoch(*point)

    def write(self, number, out):
        _, epoch = self.snapshot(number)
        frames, size = self.frames(epoch)
        for gfn, loc in sorted(frames.items()):
            need(loc >> 60 in (1, 2), "loc")
            out.write(struct.pack("<Q", gfn) + (self.page(loc, size) if loc >> 60 == 2 else bytes(size)))
        out.write(self.blob(epoch[128:160], 4))

    def list(self):
        for key, _ in self.txn.cursor(db=self.dbs[DATABASES.index("snapshots")]):
            point, epoch = self.snapshot(struct.unpack(">Q", key)[0])
            print(struct.unpack(">Q", key)[0], *point, len(self.frames(epoch)[0]))


def varint(data, at):
    value = shift = 0
    while data[at] >= 0x80:
        value, shift, at = value | (data[at] & 0x7f) << shift, shift + 7, at + 1
    return value | data[at] << shift, at + 1


def runs(data):
    """Manifest or checkpoint: (gfn, loc) of each frame; None: gone."""
    at = gfn = loc = 0
    while at < len(data):
        gap, at = varint(data, at)
        word, at = varint(data, at)
        gfn, length, kind = gfn + gap, word >> 2, word & 3
        if kind == 2:
            loc, at = struct.unpack_from("<Q", data, at)[0], at + 8
        for i in range(length):
            yield gfn + i, (loc + i, 1 << 60, loc + i, None)[kind]
        gfn, loc = gfn + length, loc + length if kind in (0, 2) else loc


def main(store, number=None, out=None):
    if number is None:
        return store.list()
    with open(out, "wb") as f:
        store.write(int(number), f)


if __name__ == "__main__":
    main(Store(sys.argv[1]), *sys.argv[2:])
