/* SPDX-License-Identifier: MIT */
/*
 * turn_store: an object store in memory (objstore.h) with a clock of its own, and threads that
 * take turns at it.  At every call the caller hands over to one that is picked at random, when
 * the clock may go on, too; only one ever runs, so nothing here has a lock of its own.  The main
 * thread's calls go through at once.  A put of a snapshot or a list that takes longer than
 * TOO_LONG_MS fails; lists come in pages of 3 keys, with other things in between.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "snapd/backup/repo.h"
#include "tests/lib/rand.h"

#define NR_ACTORS   5
#define MAX_OBJECTS 4096
#define GRACE_S	    64
#define TOO_LONG_MS (GRACE_S * 1000 * 3 / 4) /* G - W of repo.h */

struct object {
	char key[REPO_KEY_BYTES];
	uint8_t *bytes;
	size_t len;
	int64_t mtime_s;
	bool there;
};

struct objstore {
	struct object all[MAX_OBJECTS];
	size_t nr;
	int64_t now_ms;
	uint64_t nr_deleted; /* ever; clear_world() leaves it */
	/* Called, where set, after the call that they are named for. */
	void (*after_head)(const char *key);
	void (*after_delete)(void);
};

extern struct objstore world;
extern struct rand rng;
extern bool alive[NR_ACTORS]; /* has more to do */

struct object *find_object(const char *key);
void clear_world(void);

/* As an actor, first of all: this is who I am; returns when it is its turn. */
void begin_turns(int actor);
/* As an actor, when it has nothing more to do (alive is false); as the main thread, to begin. */
void pass_turn(void);
