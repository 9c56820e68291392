#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Goal: stores of every format that was ever released stay readable, and docs/format.md says how.

Method: the stores in this folder, and ones made now, are read by the store's own code (golden.c) and by read_store.py
(encrypted ones: read_sealed.py on top of it), which was written from the document alone.  Both give the same bytes of each
snapshot; of the stores in this folder these have the digests that stood in DIGESTS when the store was made; and again
after the index was made anew from the segments.  Then the independent reader gets damaged stores, and may not give any
bytes that are not right.

  golden.py GOLDEN-PROGRAM SOURCE-FOLDER
  golden.py --make GOLDEN-PROGRAM FOLDER KIND...     more archives, and their lines in DIGESTS; only when the format changes
"""
import hashlib
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile

# Compression, encrypted, with segments that were written again.
KINDS = {
    "raw": ("none", False, False), "lz4": ("lz4", False, False), "zstd": ("zstd:3", False, False), "sealed": ("lz4", True, False),
    "holes": ("lz4", False, True), "sealed-holes": ("zstd:3", True, True),
}
HERE = os.path.dirname(os.path.abspath(__file__))
# In memory where that is possible: what is read matters, not how it is written.
WORK = "/dev/shm" if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > 1 << 30 else "."


def run(*argv):
    subprocess.run(argv, check=True, stderr=subprocess.DEVNULL, timeout=60)


def output(*argv):
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                          timeout=60).stdout


def make(program, folder, kind, state_bytes=3 << 20):
    """folder/store, and folder/key when it is encrypted."""
    compression, sealed, holes = KINDS[kind]
    if holes:
        state_bytes = 5000  # all of it in the segment that is written again
    key = []
    if sealed:
        key = [os.path.join(folder, "key")]
        with open(os.open(key[0], os.O_WRONLY | os.O_CREAT, 0o600), "wb") as f:
            f.write(bytes(range(64)))
    store = os.path.join(folder, "store")
    run(program, "make", store, compression, str(state_bytes), *key)
    if holes:
        run(program, "holes", store, compression, *key)
        with open(os.path.join(store, "segments", "00000001.seg"), "rb") as f:
            assert any(f.read(64)[48:56]), "it was not written again"


def key_of(folder):
    path = os.path.join(folder, "key")
    return [path] if os.path.exists(path) else []


def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def read_independently(folder, number, out):
    """None, or why it is not valid; in this process, as a program is begun slowly."""
    from read_sealed import SealedStore
    from read_store import Store
    store = os.path.join(folder, "store")
    s = None
    try:
        s = SealedStore(store, *key_of(folder)) if key_of(folder) else Store(store)
        with open(out, "wb") as f:
            s.write(int(number), f)
    except (SystemExit, RuntimeError, ValueError, OSError, LookupError, struct.error, zstandard.ZstdError) as e:
        return str(e)
    finally:
        if s:
            s.txn.abort()
            s.env.close()
    return None


def compare(program, folder):
    """Both readers on folder/store: {id: digest}."""
    store, ours, theirs = (os.path.join(folder, name) for name in ("store", "ours", "theirs"))
    key = key_of(folder)
    ids = output(program, "dump", store, ours, *key).split()
    listed = output("/usr/bin/python3", "-B", os.path.join(HERE, "read_sealed.py" if key else "read_store.py"), *key, store)
    assert ids and ids == [line.split()[0] for line in listed.splitlines()], (ids, listed)
    digests = {}
    for number in ids:
        one = f"{ours}.{number}"
        error = read_independently(folder, number, theirs)
        assert not error, f"snapshot {number}: {error}"
        assert os.path.getsize(one) > 4096
        digests[number] = digest(one)
        assert digest(theirs) == digests[number], f"snapshot {number}: the readers disagree"
    return digests


def rebuild(program, folder):
    """Without the index, which was lost."""
    shutil.rmtree(os.path.join(folder, "store", "index"))
    run(program, "rebuild", os.path.join(folder, "store"), *key_of(folder))


def damage(folder, digests, rounds, seed):
    """One byte of a segment after the other: refused, or it was one that means nothing."""
    rand = random.Random(seed)
    store, out = os.path.join(folder, "store"), os.path.join(folder, "theirs")
    segment = os.path.join(store, "segments", "00000001.seg")
    used = 4096 * 40
    refused = 0
    for _ in range(rounds):
        at = rand.randrange(used)
        with open(segment, "r+b") as f:
            f.seek(at)
            old = f.read(1)
            f.seek(at)
            f.write(bytes([old[0] ^ 1 << rand.randrange(8)]))
        error = read_independently(folder, 1, out)
        assert error or digest(out) == digests["1"], f"seed {seed}: damage at {at} was not noticed"
        refused += error is not None
        with open(segment, "r+b") as f:
            f.seek(at)
            f.write(old)
    assert refused or rounds < 10, f"seed {seed}: nothing was refused"


def read_digests(folder):
    digests = {}
    with open(os.path.join(folder, "DIGESTS")) as f:
        for line in f:
            name, number, value = line.split()
            digests.setdefault(name, {})[number] = value
    return digests


def check_archives(program, source):
    for name, want in read_digests(source).items():
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            with tarfile.open(os.path.join(source, name + ".tar.xz")) as tar:
                tar.extractall(folder)
            got = compare(program, folder)
            assert got == want, f"{name}: {got} instead of {want}"
            rebuild(program, folder)
            got = compare(program, folder)
            assert got == want, f"{name}, rebuilt: {got} instead of {want}"
            print(f"{name}: {len(got)} snapshots as they were")


def check_fresh(program):
    seed = int(os.environ.get("SNAPD_SEED", random.randrange(1 << 32)))
    print(f"seed: SNAPD_SEED={seed}")
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            make(program, folder, kind)
            digests = compare(program, folder)
            damage(folder, digests, 6, seed)
            if kind.startswith("sealed"):
                rebuild(program, folder)
                assert compare(program, folder) == digests
            print(f"made now, {kind}: {len(digests)} snapshots alike")


def make_archives(program, folder, kinds):
    with open(os.path.join(folder, "DIGESTS"), "a") as f:
        for kind in kinds:
            with tempfile.TemporaryDirectory(dir=WORK) as work:
                # What is encrypted does not get smaller: without the blob of several parts.
                make(program, work, kind, 5000 if KINDS[kind][1] else 3 << 20)
                with tarfile.open(os.path.join(folder, f"1.0-{kind}.tar.xz"), "w:xz", preset=9) as tar:
                    for name in ["store"] + (["key"] if key_of(work) else []):
                        tar.add(os.path.join(work, name), name)
                for number, value in compare(program, work).items():
                    f.write(f"1.0-{kind} {number} {value}\n")


if __name__ == "__main__":
    try:
        import lz4.block  # noqa: F401
        import lmdb  # noqa: F401
        import nacl.bindings  # noqa: F401
        import zstandard
    except ImportError:
        print("skipped: python3-lmdb, -lz4, -nacl or -zstandard is not installed")
        sys.exit(77)
    if sys.argv[1] == "--make":
        make_archives(os.path.abspath(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        check_archives(os.path.abspath(sys.argv[1]), sys.argv[2])
        check_fresh(os.path.abspath(sys.argv[1]))
