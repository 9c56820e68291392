/* SPDX-License-Identifier: MIT */
/*
 * pageid for x86-64, compiled by meson with -mavx2, and again with -mavx512*.
 * Nothing but PAGEID_OPS leaves this file: an inline function of common headers
 * compiled here and shared by the linker would crash older CPUs.
 */
#if defined(__AVX512F__)
#define PAGEID_OPS  pageid_ops_avx512
#define PAGEID_NAME "avx512"
#else
#define PAGEID_OPS  pageid_ops_avx2
#define PAGEID_NAME "avx2"
#endif
#include "snapd/store/pageid_impl.h"
