/* SPDX-License-Identifier: MIT */
/*
 * monitor: QEMU's end of a monitor, on a thread: it reads requests and answers each from a
 * table, but for the one at which it is to misbehave.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "adapters/qemu/qmp.h"

#define LOG_MAX	 256
#define SHORT_MS 100 /* the client's patience */

enum misdeed {
	BEHAVE,
	SILENT, /* no answer to this request, but to later ones */
	HANG,	/* nothing any more; it keeps the connection */
	LATE,	/* the answer to this one after the time limit, with the next */
	HANG_UP,
	REFUSE,
	GARBAGE,    /* a line that is not JSON */
	NESTED,	    /* a million brackets */
	ENDLESS,    /* a line without end */
	STRANGER,   /* an answer with an id that nobody used */
	TWICE,	    /* the answer, twice */
	NO_VALUE,   /* neither return nor error */
	NOT_OBJECT, /* returns a number where an object belongs */
	NR_MISDEEDS
};

struct monitor {
	int fd;
	pthread_t thread;
	/* The script; set before the start. */
	const char *at; /* the request at which it misbehaves: its name; NULL: none */
	int nth;	/* its nth occurrence, from 1 */
	enum misdeed how;
	const char *status;		/* of the VM at first */
	const char *migration_status;	/* the event's; NULL: no event */
	const char *foreign;		/* status of a migration of somebody else's */
	const char *device, *device_at; /* of qom-list: ",{...}", and the path; NULL: none */
	bool resumed_meanwhile;
	int not_final;	      /* so often QEMU refuses `cont` after a migration */
	bool final_at_once;   /* and it is final right after the refusal */
	bool begun_meanwhile; /* a migration of somebody else's, when ours is over */
	/* What is the case; the monitor's thread. */
	bool running, x_ignore_shared, events, auto_converge, incoming;
	long long bandwidth;
	int passed_fd;
	bool hung, refused_cont;
	/* What came; read by the test after the end. */
	char log[LOG_MAX][40];
	int nr_log;
	unsigned gone; /* events; the client's thread */
};

/* Starts it; the client, or NULL and the reason. */
struct qmp *open_monitor(struct monitor *m, uint32_t timeout_ms, struct err *e);
void close_monitor(struct monitor *m, struct qmp *q);
