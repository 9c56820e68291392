/* SPDX-License-Identifier: MIT */
/* qmp_priv: what the files of qmp.h share. */
#pragma once

#include "adapters/qemu/qmp.h"
#include "adapters/qemu/wire.h"

enum migration_end { MIGRATION_NONE, MIGRATION_COMPLETED, MIGRATION_FAILED };

struct qmp {
	struct wire wire;
	struct qmp_config config;
	json_int_t posted;   /* id of the last request that went out */
	json_int_t answered; /* id of the last answer; those between are owed */
	bool gone;	     /* QMP_EVENT_GONE was told */

	/* What events said since the one who waits for it looked last. */
	bool stop_seen, resume_seen;
	enum migration_end migration;
	bool job_concluded; /* `job` */
	char job[32];

	unsigned nr_names; /* for names of nodes, jobs and descriptors of which QEMU has one each */

	/* Q3: what is to be put back; owned.  NULL: not read. */
	json_t *capabilities;
	json_int_t max_bandwidth;
	/* The requests that put it back, of which the answers are owed; 0: none. */
	json_int_t settle_first, settle_last;
	bool settle_refused; /* one of them was */

	bool looked;	  /* by qmp_look(), for the stop that comes next */
	enum qmp_run run; /* as it was then */
};

uint64_t qmp_deadline(const struct qmp *q, uint32_t timeout_ms);
void qmp_log(const struct qmp *q, const char *line);

/* 0 unless answers are owed, or the session is over. */
int qmp_ready(struct qmp *q, struct err *e);
/* Send; takes `args` over, borrows `fd`.  The answer will have the id q->posted. */
int qmp_post(struct qmp *q, const char *command, json_t *args, int fd, uint64_t deadline,
	     struct err *e);
/* Wait for the answer to request `id`; earlier ones are dropped. */
int qmp_await(struct qmp *q, json_int_t id, const char *command, uint64_t deadline, json_t **ret,
	      struct err *e);
int qmp_call(struct qmp *q, uint64_t deadline, const char *command, json_t *args, int fd,
	     json_t **ret, struct err *e);
int qmp_read_status(struct qmp *q, uint64_t deadline, enum qmp_run *ret, struct err *e);
/* Hand out what arrives until done().  -ETIMEDOUT, or the session is over. */
int qmp_wait(struct qmp *q, bool (*done)(const struct qmp *q), uint64_t deadline, struct err *e);

struct qmp_question {
	const char *command;
	const char *path; /* its argument; NULL: it has none */
};
/* All sent before the first answer; rets[] are the caller's, NULL where there is none.  The first
 * failure. */
int qmp_call_all(struct qmp *q, uint64_t deadline, const struct qmp_question *questions, size_t nr,
		 json_t **rets, struct err *e);

/* Remember the operator's migration settings, as QEMU told them. */
int qmp_settings_keep(struct qmp *q, json_t *parameters, json_t *capabilities, struct err *e);
void qmp_settings_forget(struct qmp *q);
