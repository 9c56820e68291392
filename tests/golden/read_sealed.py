#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""The reader of read_store.py for encrypted stores: keys, and what is opened with each; from docs/format.md alone.

  read_sealed.py KEY-FILE STORE [ID OUT]
"""
import hashlib
import struct
import sys

from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_decrypt as aead_open

from read_store import Store, main, need
from xxh3 import hash64


def blake(n, data, key=b"", salt=b"", person=b""):
    return hashlib.blake2b(data, digest_size=n, key=key, salt=salt, person=person).digest()


def open_sealed(key, nonce, part, data, additional):
    try:
        return aead_open(data, additional, nonce + struct.pack("<I", part), key)
    except Exception:
        sys.exit("not valid: a tag does not fit")


class SealedStore(Store):
    sealed, batch_version = True, 2

    def __init__(self, path, key_file):
        f = open(path + "/key", "rb").read()
        need(len(f) == 128 and f[:8] == b"SNPKEY01" and f[8] == 1, "STORE/key")
        need(hash64(f[:120]) == struct.unpack_from("<Q", f, 120)[0], "STORE/key")
        wrap = blake(32, open(key_file, "rb").read(), salt=f[32:48], person=b"snapd-wrap")
        self.store_key = open_sealed(wrap, f[48:68], struct.unpack_from("<I", f, 68)[0], f[72:120], f[:48])
        self.keys = {n: self.derive(n, 32) for n in (1, 2, 3, 4)}
        super().__init__(path)
        need(self.uuid == f[16:32], "STORE/key is of another store")
        self.secret = b"".join(self.derive(n, 64) for n in (16, 17, 18))

    def derive(self, n, size):
        return blake(size, b"", key=self.store_key, salt=struct.pack("<Q", n), person=b"snapd-st")

    def record_hash(self, n, key, value):
        mac = blake(16, struct.pack("<II", n, len(key)) + key + value[:8] + value[16:], key=self.keys[4])
        return struct.unpack("<QQ", mac)[0]

    def open_records(self, h, raw):
        n, h["nonce"], h["place"] = h["entries"], raw[128:148], raw[24:80]
        opened = open_sealed(self.keys[1], h["nonce"], 0, raw[176:176 + 48 * n] + raw[160:176], raw[:120] + bytes(8))
        h["tags"] = opened[32 * n:]
        return opened[:32 * n]

    def open_part(self, raw, payload):
        return open_sealed(self.keys[3], raw[128:148], 0, payload + raw[160:176], raw[:120] + bytes(8))

    def open_page(self, h, entry, data):
        tag = h["tags"][16 * entry:16 * entry + 16]
        return open_sealed(self.keys[2], h["nonce"], entry, data + tag, h["place"])

    def blob_hash(self, data):
        return hash64(data, secret=self.secret)


if __name__ == "__main__":
    main(SealedStore(sys.argv[2], sys.argv[1]), *sys.argv[3:])
