/* SPDX-License-Identifier: MIT */
/*
 * line_backup: backups of one policy and one VM.  Beside the line's own runs, and never in
 * their way: whenever there is a snapshot that was not seen yet, a job pushes what is pending;
 * what fails is tried again.  Under the scheduler's lock; nothing here blocks.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

struct daemon;
struct job;
struct line;
struct policy;

struct line_backup {
	struct job *job;      /* a reference; NULL: none is under way */
	uint64_t seen;	      /* newest snapshot when the last job began */
	uint64_t retry_ns;    /* not before, CLOCK_MONOTONIC; 0: at once */
	uint64_t pause_ns;    /* before that; twice as long after each failure in a row */
	char repository[256]; /* what all of this is about */
	/* for people */
	char said[192]; /* about the last job; "" all is well */
	uint64_t pushed, bytes_sent, failures;
	int64_t last_s; /* of the last job that was done */
};

void line_backup_step(struct line *l, struct daemon *d, const struct policy *p, int64_t now_s);
/* Is nothing under way or pending that it knows of? */
bool line_backup_is_idle(const struct line *l, const struct policy *p);
void line_backup_stop(struct line_backup *b);
json_t *line_backup_json(const struct line_backup *b);
