# SPDX-License-Identifier: MIT
"""XXH3 of libxxhash: 64 bits with a seed or a secret, 128 bits as (low, high)."""
import ctypes

xxh = ctypes.CDLL("libxxhash.so.0")
size_t, u64 = ctypes.c_size_t, ctypes.c_uint64


class Hash128(ctypes.Structure):
    _fields_ = [("lo", u64), ("hi", u64)]


xxh.XXH3_64bits_withSeed.restype = xxh.XXH3_64bits_withSecret.restype = u64
xxh.XXH3_128bits.restype = xxh.XXH3_128bits_withSecret.restype = Hash128


def hash64(data, seed=0, secret=None):
    if secret:
        return xxh.XXH3_64bits_withSecret(data, size_t(len(data)), secret, size_t(len(secret)))
    return xxh.XXH3_64bits_withSeed(data, size_t(len(data)), u64(seed))


def hash128(data, secret=None):
    if secret:
        got = xxh.XXH3_128bits_withSecret(data, size_t(len(data)), secret, size_t(len(secret)))
    else:
        got = xxh.XXH3_128bits(data, size_t(len(data)))
    return got.lo, got.hi
