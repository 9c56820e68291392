/* SPDX-License-Identifier: MIT */
/* What index.c, transactions, and record.c, the records in them, share. */
#pragma once

#include <limits.h>
#include <pthread.h>

#include "snapd/store/index.h"

#define NO_DBI UINT_MAX /* a derived database that is not there */

struct index {
	MDB_env *env;
	MDB_dbi dbi[IX_NR_DBS];
	pthread_rwlock_t resize_lock; /* read: a transaction is open; write: the map changes */
	char *dir;		      /* owned; for reasons */
	bool read_only;
	void (*doubt)(void *opaque); /* index_on_doubt(); NULL: nobody asked */
	void *doubt_opaque;
	const uint8_t *key; /* borrowed; NULL: records are hashed, not authenticated */
};

extern const char *const index_db_names[IX_NR_DBS];

/* Made from the others; stores of older versions have none. */
static inline bool index_db_is_derived(enum index_db db)
{
	return db == IX_REFS || db == IX_COUNTED;
}

/* A code of LMDB's or the system's as an error of ours. */
int index_error(const struct index *ix, int rc, const char *what, struct err *e);
