#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""A reader of stores, written from docs/format.md alone.

  read_store.py STORE [--key FILE]            list snapshots: id, VM, timeline, epoch, pages
  read_store.py STORE [--key FILE] ID OUT     write a snapshot: frames ascending, each as u64 GFN and bytes; then the state

Every byte on the way is checked as the document says; what is not valid ends the program with the reason.
"""
import argparse
import ctypes
import hashlib
import os
import struct
import sys

import lmdb
import lz4.block
import zstandard
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt as aead_open

BLOCK = 4096
DATABASES = ["meta", "vms", "vmnames", "timelines", "epochs", "snapshots", "snapnames", "segments"]
FEATURES = {"lz4", "zstd", "sealed", "journal"}
xxh = ctypes.CDLL("libxxhash.so.0")
size_t, u64 = ctypes.c_size_t, ctypes.c_uint64


class Hash128(ctypes.Structure):
    _fields_ = [("lo", u64), ("hi", u64)]


xxh.XXH3_64bits_withSeed.restype = xxh.XXH3_64bits_withSecret.restype = u64
xxh.XXH3_128bits.restype = xxh.XXH3_128bits_withSecret.restype = Hash128


def hash64(data, seed=0):
    return xxh.XXH3_64bits_withSeed(data, size_t(len(data)), u64(seed))


def need(ok, what):
    if not ok:
        sys.exit(f"not valid: {what}")


def blake(n, data, key=b"", salt=b"", person=b""):
    return hashlib.blake2b(data, digest_size=n, key=key, salt=salt, person=person).digest()


def open_sealed(key, nonce, part, data, additional):
    try:
        return aead_open(data, additional, nonce + struct.pack("<I", part), key)
    except Exception:
        sys.exit("not valid: a tag does not fit")


class Store:
    def __init__(self, path, key_file=None):
        self.path, self.keys = path, None
        if os.path.exists(path + "/key"):
            self.open_key(key_file)
        self.env = lmdb.open(path + "/index", readonly=True, lock=False, max_dbs=len(DATABASES))
        self.dbs = [self.env.open_db(name.encode(), create=False) for name in DATABASES]
        self.txn = self.env.begin()
        store, _ = self.record("meta", b"store", 240)
        self.uuid, (major,) = store[16:32], struct.unpack_from("<I", store, 32)
        need(major == 1, f"format {major}")
        self.secret = store[48:240]
        if self.keys:
            need(self.uuid == self.key_uuid, "STORE/key is of another store")
            self.secret = b"".join(self.derive(n, 64) for n in (16, 17, 18))
        _, names = self.record("meta", b"features", 24, missing=(b"", b""))
        for name in names.split(b"\0")[:-1]:
            need(name.decode() in FEATURES, f"unknown feature {name.decode()}")

    def open_key(self, key_file):
        f = open(self.path + "/key", "rb").read()
        need(len(f) == 128 and f[:8] == b"SNPKEY01" and f[8] == 1, "STORE/key")
        need(hash64(f[:120]) == struct.unpack_from("<Q", f, 120)[0], "STORE/key")
        need(key_file, "encrypted, and no key given")
        wrap = blake(32, open(key_file, "rb").read(), salt=f[32:48], person=b"snapd-wrap")
        self.key_uuid = f[16:32]
        self.store_key = open_sealed(wrap, f[48:68], struct.unpack_from("<I", f, 68)[0], f[72:120], f[:48])
        self.keys = {n: self.derive(n, 32) for n in (1, 2, 3, 4)}

    def derive(self, n, size):
        return blake(size, b"", key=self.store_key, salt=struct.pack("<Q", n), person=b"snapd-st")

    def record(self, db, key, size, missing=None):
        n = DATABASES.index(db)
        value = self.txn.get(key, db=self.dbs[n])
        if value is None and missing is not None:
            return missing
        need(value is not None, f"no record {key.hex()} in {db}")
        version, head_size, flags, check = struct.unpack_from("<HHIQ", value)
        need(version == 1 and head_size == size <= len(value), f"record {key.hex()} in {db}")
        if self.keys:
            mac = blake(16, struct.pack("<II", n, len(key)) + key + value[:8] + value[16:], key=self.keys[4])
            want = struct.unpack("<QQ", mac)[0]
        else:
            want = hash64(key + value[:8] + bytes(8) + value[16:], n)
        need(check == want and bool(flags >> 31) == bool(self.keys), f"record {key.hex()} in {db}")
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
        """Header as a dictionary, records (opened), payload (as stored)."""
        f, generation, tail = self.segment(number)
        f.seek(block * BLOCK)
        raw = f.read(BLOCK)
        names = "magic version type shift header entries payload segment block generation seq"
        h = dict(zip(names.split(), struct.unpack_from("<IHBBIIQIIQQ", raw)))
        need(h["magic"] == 0x42504e53 and h["header"] % BLOCK == 0 and 0 < h["header"] <= 3 * BLOCK, "batch header")
        raw += f.read(h["header"] - BLOCK)
        bare = raw[:120] + bytes(8)
        need(hash64(bare + raw[128:]) == struct.unpack_from("<Q", raw, 120)[0], "batch header")
        need(h["version"] == (2 if self.keys else 1), f"batch version {h['version']}")
        here = (h["segment"], h["block"], h["generation"], raw[48:64])
        need(here == (number, block, generation, self.uuid), "batch is misplaced")
        need(0 < block and block + h["header"] // BLOCK + -(-h["payload"] // BLOCK) <= tail, "batch reaches outside")
        payload = f.read(h["payload"])
        need(len(payload) == h["payload"], "batch is cut off")
        h["prev"] = struct.unpack_from("<II", raw, 112)
        nonce, tag, n = raw[128:148], raw[160:176], h["entries"]
        if h["type"] == 1:
            need(1 <= n <= 252 and h["shift"] in (12, 14, 16), "batch of pages")
            records = raw[128:128 + 32 * n]
            if self.keys:
                opened = open_sealed(self.keys[1], nonce, 0, raw[176:176 + 48 * n] + tag, bare)
                records, h["tags"] = opened[:32 * n], opened[32 * n:]
            h["nonce"], h["place"] = nonce, raw[24:80]
            return h, records, payload
        if self.keys:
            return h, None, open_sealed(self.keys[3], nonce, 0, payload + tag, bare)
        got = xxh.XXH3_128bits(payload, size_t(len(payload)))
        need((got.lo, got.hi) == struct.unpack_from("<QQ", raw, 96), "blob part")
        return h, None, payload

    def blob(self, rec, kind):
        segment, block, size, check, parts = struct.unpack_from("<IIQQI", rec)
        data = b""
        for index in range(parts - 1, -1, -1):
            h, _, payload = self.batch(segment, block)
            need(h["type"] == kind and h["entries"] == index, "blob part out of order")
            data, (segment, block) = payload + data, h["prev"]
        secret = (self.secret, size_t(192)) if self.keys else ()
        got = xxh.XXH3_64bits_withSecret(data, size_t(len(data)), *secret) if secret else hash64(data)
        need(len(data) == size and got == check, "blob")
        return data

    def page(self, loc, size, cache={}):
        number, block, entry = loc >> 32 & 0xfffffff, loc >> 12 & 0xfffff, loc & 0xfff
        if (self, number, block) not in cache:
            cache[self, number, block] = self.batch(number, block)
        h, records, payload = cache[self, number, block]
        need(h["type"] == 1 and entry < h["entries"] and 1 << h["shift"] == size, "loc")
        lo, hi, _, offset, len_codec = struct.unpack_from("<QQQII", records, 32 * entry)
        data, codec = payload[offset:offset + (len_codec >> 8)], len_codec & 0xff
        need(len(data) == len_codec >> 8 and codec <= 2, "page record")
        need(len(data) == size and offset % BLOCK == 0 if codec == 0 else 0 < len(data) < size, "page record")
        if self.keys:
            tag = h["tags"][16 * entry:16 * entry + 16]
            data = open_sealed(self.keys[2], h["nonce"], entry, data + tag, h["place"])
        if codec == 1:
            data = lz4.block.decompress(data, uncompressed_size=size)
        elif codec == 2:
            data = zstandard.decompress(data, max_output_size=size)
        got = xxh.XXH3_128bits_withSecret(data, size_t(size), self.secret, size_t(192))
        need(len(data) == size and (got.lo, got.hi) == (lo, hi), "page")
        return data

    def epoch(self, timeline, epoch):
        while not epoch and timeline:
            rec, _ = self.record("timelines", struct.pack(">Q", timeline), 64)
            timeline, epoch = struct.unpack_from("<QQ", rec, 32)
        return self.record("epochs", struct.pack(">QQ", timeline, epoch), 288)[0] if timeline else None

    def map(self, rec):
        chain, size = [], struct.unpack_from("<I", rec, 184)[0]
        while rec is not None:
            checkpoint, chain_epochs = rec[96:128], struct.unpack_from("<I", rec, 188)[0]
            full = struct.unpack_from("<Q", checkpoint, 8)[0] > 0
            chain.append(self.blob(checkpoint, 3) if full else self.blob(rec[64:96], 2))
            rec = None if full or not chain_epochs else self.epoch(*struct.unpack_from("<QQ", rec, 32))
        frames = {}
        for data in reversed(chain):
            apply_runs(frames, data)
        return {gfn: loc for gfn, loc in frames.items() if loc is not None}, size

    def snapshots(self):
        for key, _ in self.txn.cursor(db=self.dbs[DATABASES.index("snapshots")]):
            yield struct.unpack(">Q", key)[0]

    def snapshot(self, number):
        rec, _ = self.record("snapshots", struct.pack(">Q", number), 640)
        point = struct.unpack_from("<QQ", rec, 32)
        epoch = self.epoch(*point)
        return point, epoch, *self.map(epoch)


def apply_runs(frames, data):
    """Manifest or checkpoint."""
    at = gfn = loc = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7f) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        gfn += varint()
        length, kind = divmod(varint(), 4)
        if kind == 2:
            loc, at = struct.unpack_from("<Q", data, at)[0], at + 8
        for i in range(length):
            frames[gfn + i] = (loc + i, 1 << 60, loc + i, None)[kind]
        gfn, loc = gfn + length, loc + length if kind in (0, 2) else loc


def write_snapshot(store, number, out):
    _, epoch, frames, size = store.snapshot(number)
    for gfn, loc in sorted(frames.items()):
        need(loc >> 60 in (1, 2), "loc")
        out.write(struct.pack("<Q", gfn) + (store.page(loc, size) if loc >> 60 == 2 else bytes(size)))
    out.write(store.blob(epoch[128:160], 4))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--key")
    p.add_argument("store")
    p.add_argument("id", nargs="?", type=int)
    p.add_argument("out", nargs="?", type=argparse.FileType("wb"))
    args = p.parse_args()
    store = Store(args.store, args.key)
    if args.out:
        return write_snapshot(store, args.id, args.out)
    for number in store.snapshots():
        point, _, frames, _ = store.snapshot(number)
        print(number, *point, len(frames))


if __name__ == "__main__":
    main()
