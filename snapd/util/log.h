/* SPDX-License-Identifier: MIT */
/*
 * Logging: one line per event.  The layer that decides about an error logs it, once; layers
 * below return it.  By default lines go to stderr, with the <N> prefix that journald understands
 * when stderr is the journal; the service writes them itself (daemon/logging.h).
 *
 * What a line is about (VM, job, …) is told once for a thread, by log_about(), not in each call.
 * What operators may want to act upon is an *event*, with an identity that stays when its words
 * change.
 */
#pragma once

#include <stdint.h>

enum log_level {
	LOG_LVL_ERR = 3,
	LOG_LVL_WARN = 4,
	LOG_LVL_NOTICE = 5,
	LOG_LVL_INFO = 6,
	LOG_LVL_DEBUG = 7
};

/* Their ids, and what to do about each: daemon/logging.c, contrib/systemd/snapd.catalog. */
enum log_event {
	LOG_NO_EVENT,
	LOG_STARTED,
	LOG_STOPPING,
	LOG_VM_READY,
	LOG_VM_LOST,
	LOG_VM_ENDED,
	LOG_VM_REFUSED,
	LOG_SNAPSHOT_TAKEN,
	LOG_SNAPSHOT_FAILED,
	LOG_ROLLED_BACK,
	LOG_ROLLBACK_FAILED,
	LOG_RESTORED,
	LOG_POST_MORTEM,
	LOG_MISSED_PAGES,
	LOG_POLICY_TROUBLE,
	LOG_POLICY_LEFT_OUT,
	LOG_JOB_FAILED,
	LOG_STORE_DAMAGED,
	LOG_BACKUP_DAMAGED,
	LOG_SCRUBBED,
	LOG_STORE_FILLING,
	LOG_STORE_IN_DOUBT,
	LOG_NR_EVENTS
};

struct log_about {
	const char *vm, *policy; /* borrowed until changed; NULL none */
	uint64_t job, snapshot;	 /* 0 none */
};

struct log_record {
	enum log_level level;
	enum log_event event;
	const char *format; /* the same for lines of one kind; a constant */
	const char *text;   /* without control characters */
	struct log_about about;
};

void log_set_level(enum log_level max);
/* Lines go to `fn`, from any thread; NULL: to stderr. */
void log_set_writer(void (*fn)(const struct log_record *r));
/* This thread's; what it says holds for all of its lines until it is changed. */
struct log_about *log_about(void);

void log_at(enum log_level lvl, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void log_event(enum log_event event, enum log_level lvl, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

#define log_err(...)	log_at(LOG_LVL_ERR, __VA_ARGS__)
#define log_warn(...)	log_at(LOG_LVL_WARN, __VA_ARGS__)
#define log_notice(...) log_at(LOG_LVL_NOTICE, __VA_ARGS__)
#define log_info(...)	log_at(LOG_LVL_INFO, __VA_ARGS__)
#define log_debug(...)	log_at(LOG_LVL_DEBUG, __VA_ARGS__)
