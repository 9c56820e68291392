/* SPDX-License-Identifier: MIT */
/*
 * scrub: every byte of the store read and checked once a period, slowly, beside
 * everything else, so that damage is found while there is a backup to mend it with.
 *
 *   OFF ──(asked for)──┐            a pass ends
 *   IDLE ─(period over)┴► RUNNING ◄────────────► IDLE, OFF
 *                         ▲     │ pause, resume
 *                         └─ PAUSED (also across restarts; nothing begins by itself)
 *
 * A thread of its own, of the idle I/O class, reads at most scrub_rate bytes a second.
 * Where a pass stands, and what it found, is kept in STORE/scrub.json: a pass that is cut
 * off by the end of the service goes on at the segment where it was.  Nothing else
 * depends on that file: without it the period begins anew.
 *
 * Damage is an event in the log, in /metrics, and in what scrub_json() tells until a later
 * pass has come to its end without it.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct daemon;
struct scrub;

enum scrub_action { SCRUB_NOW, SCRUB_PAUSE, SCRUB_RESUME, SCRUB_CANCEL, SCRUB_NR_ACTIONS };
extern const char *const scrub_action_names[SCRUB_NR_ACTIONS];

struct scrub_figures {
	bool running, paused;
	uint64_t period_s;
	uint64_t bytes_read; /* since the service started */
	uint64_t passes;     /* likewise: those that came to their end */
	uint64_t damages;    /* of the newest pass that ended, or more, of the one under way */
	uint64_t ended_s;    /* CLOCK_REALTIME, of the newest pass that ended; 0: none */
};

/* Once the store is open; d->scrub. */
int scrub_start(struct daemon *d, struct err *e);
/* The thread has ended; a pass goes on at the next start.  Accepts a daemon without one. */
void scrub_stop(struct daemon *d);

/* Any thread: */
/* -ENOENT: cancel, and no pass is under way. */
int scrub_act(struct scrub *s, enum scrub_action action, struct err *e);
json_t *scrub_json(struct scrub *s); /* a new object, or NULL: no memory */
void scrub_figures(struct scrub *s, struct scrub_figures *ret);
