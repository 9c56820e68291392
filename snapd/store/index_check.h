/* SPDX-License-Identifier: MIT */
/*
 * index_check: is data.mdb structurally sound?  LMDB maps its file and trusts
 * every offset in it: a truncated or damaged file can crash the library.  So the
 * whole file is walked here first, without LMDB; O(size of the index).
 */
#pragma once

#include <stdbool.h>

#include "snapd/util/err.h"

/*
 * 0, -ENOENT when there is no file, -EUCLEAN with what is wrong and where, or
 * another error of reading it.  `beside_writer`: another process may be
 * committing; damage is then believed only when the file did not change meanwhile.
 */
int index_check(const char *path, bool beside_writer, struct err *e);
