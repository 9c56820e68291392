/* SPDX-License-Identifier: MIT */
/*
 * Logging: one line per event to stderr, with the <N> priority prefix that
 * journald understands when stderr is the journal.  The layer that decides
 * about an error logs it, once; layers below return it.
 */
#pragma once

enum log_level {
	LOG_LVL_ERR = 3,
	LOG_LVL_WARN = 4,
	LOG_LVL_NOTICE = 5,
	LOG_LVL_INFO = 6,
	LOG_LVL_DEBUG = 7
};

void log_set_level(enum log_level max);
/* Redirect to `fn` (the agent library logs through its VMM); NULL = stderr. */
void log_set_sink(void (*fn)(void *opaque, int level, const char *line), void *opaque);
void log_at(enum log_level lvl, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_err(...)	log_at(LOG_LVL_ERR, __VA_ARGS__)
#define log_warn(...)	log_at(LOG_LVL_WARN, __VA_ARGS__)
#define log_notice(...) log_at(LOG_LVL_NOTICE, __VA_ARGS__)
#define log_info(...)	log_at(LOG_LVL_INFO, __VA_ARGS__)
#define log_debug(...)	log_at(LOG_LVL_DEBUG, __VA_ARGS__)
