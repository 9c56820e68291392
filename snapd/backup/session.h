/* SPDX-License-Identifier: MIT */
/*
 * session: a job's open repository, and the figures of all of them.  A session is one job's.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>

#include "snapd/backup/backup.h"
#include "snapd/backup/repo.h"
#include "snapd/core/job.h"

struct session {
	struct job *job;
	const char *url; /* the job's, or the configuration's */
	struct objstore *os;
	struct repo *repo;
};

/* -EINVAL: no repository is named, and none is configured. */
int session_open(struct job *job, bool create, struct session *ret, struct err *e);
/* Adds to the figures. */
void session_close(struct session *s);

extern const char *const backup_op_names[BACKUP_NR_OPS];

/* When a VM was last pushed. */
struct backup_last {
	char vm[64];
	uint32_t uid;
	uint64_t taken_s, pushed_s;
	struct backup_last *next;
};

/* What the last verification of a repository found. */
struct backup_found {
	char *url; /* owned */
	uint64_t damages, verified_s;
	struct backup_found *next;
};

struct backups {
	struct cache *pushed; /* what was pushed where; a cache of its own */
	_Atomic uint64_t bytes_sent, bytes_received, requests, retries;
	_Atomic uint64_t failures[NR_OBJSTORE_FAILURES];
	_Atomic uint64_t done[BACKUP_NR_OPS], failed[BACKUP_NR_OPS];
	_Atomic uint64_t pages_sent, pages_known, packs_sent;
	pthread_mutex_t lock;
	struct backup_last *last;   /* lock; owned */
	struct backup_found *found; /* lock; owned */
};

/* How an operation ended, for the figures.  What was cancelled is not counted. */
void session_count(struct session *s, enum backup_op op, int rc);
/* Of a verification: for the figures and the log. */
void session_note_damages(struct session *s, const json_t *damages);
void session_note_pushed(struct session *s, uint64_t snapshot, const char *vm, uint32_t uid,
			 uint64_t taken_ns);
