/* SPDX-License-Identifier: MIT */
/*
 * qmp: what the adapter asks of the QEMU that it lives in, over a QMP monitor of its own:
 * stop, cont, device state without RAM, and back.
 *
 * In: one end of a Unix stream socket whose other end is a `-mon …,mode=control` of QEMU.
 * Out: device state in a memfd; device state loaded; one line of reason for what failed.
 *
 * Threads: one thread at a time, never one that QEMU's main loop waits for, since
 * the main loop gives the answers.  Every call ends within its time limit (a little later
 * where something has to be undone), whatever QEMU does.
 *
 * Device state is the stream of `migrate` with x-ignore-shared: everything but RAM that
 * is shared with us, private RAM blocks (VGA) included.  The same stream goes into a fresh
 * QEMU (-incoming defer), and, inside a qcow2 made here (vmstate.h), by snapshot-load into
 * the running one.
 *
 * Invariants
 *   Q1  Who got no answer in time has not stopped QEMU from obeying later.  So a request that
 *       may stop the VM is followed by its undoing at once; QEMU works both off in order.
 *   Q2  Answers carry the request's id; a late one is recognised and dropped.  While answers
 *       are owed, new work is refused with EBUSY: QEMU's queue is finite, and it would hang.
 *   Q3  Migration capabilities and parameters are the operator's (x-ignore-shared in a
 *       migration of theirs would lose all RAM): set after `stop`, put back when the state is
 *       saved, confirmed before `cont` or anything else is asked, and a migration that began
 *       in between is cancelled and told.
 *   Q4  What QEMU says is not trusted to be short, flat, or JSON.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "snapd/util/err.h"

struct qmp; /* opaque */

/* A line longer than this ends the session.  query-* answers have some 100 KiB. */
#define QMP_LINE_MAX  (4u << 20)
/* Device state, private RAM blocks included; STATE_MAX_BYTES bounds it, too. */
#define QMP_STATE_MAX (60u << 20)

enum qmp_event {
	QMP_EVENT_STOP,
	QMP_EVENT_RESUME,
	QMP_EVENT_RESET,
	QMP_EVENT_SHUTDOWN, /* the guest or the operator; QEMU may linger (-no-shutdown) */
	QMP_EVENT_GONE,	    /* the monitor hung up, or spoke no QMP; the last event */
};

enum qmp_run {
	QMP_RUNNING,
	QMP_PAUSED,	/* by somebody; also before the first cont of -S */
	QMP_INCOMING,	/* -incoming: waits for a stream */
	QMP_MIGRATING,	/* a migration finishes: QEMU takes no cont */
	QMP_UNRUNNABLE, /* shut down, panicked, internal error: cont would fail */
};

struct qmp_config {
	int fd;		  /* connected socket; taken over, also on failure; -1: connect to `path` */
	const char *path; /* Unix socket of a server=on monitor */
	uint32_t timeout_ms; /* of qmp_open(), and of questions; 0: 5000 */
	/* Called from within the calls below, on their thread; must not call back. */
	void (*event)(void *opaque, enum qmp_event event);
	void (*log)(void *opaque, const char *line); /* what is odd and not a failure */
	void *opaque;
};

/* Connect, greet, negotiate.  -ETIMEDOUT, -EPROTO, -ECONNRESET, -ECONNREFUSED. */
int qmp_open(const struct qmp_config *config, struct qmp **ret, struct err *e);
/* Accepts NULL.  QEMU is left as it is. */
void qmp_close(struct qmp *q);

/* To be polled for input; then qmp_poll() hands out events. */
int qmp_fd(const struct qmp *q);
/* Take what has arrived; never waits.  0, or the reason why the session is over. */
int qmp_poll(struct qmp *q, struct err *e);

int qmp_status(struct qmp *q, enum qmp_run *ret, struct err *e);

/*
 * What has to be known before a stop, asked while the VM runs, so that the answers do not
 * lengthen the pause: for the qmp_stop() that comes next, which else asks itself.
 * -EBUSY as there; -ENOTSUP: a device with memory that others write was plugged in.
 */
int qmp_look(struct qmp *q, uint32_t timeout_ms, struct err *e);

/*
 * Stop the VM: vCPUs are out of KVM_RUN, block I/O is drained.  *was_running tells
 * whether it ran.  -ETIMEDOUT: not in time; it runs on as soon as QEMU answers again.
 * -EBUSY: a migration of the operator's is under way, or answers are owed (Q2).
 */
int qmp_stop(struct qmp *q, uint32_t timeout_ms, bool *was_running, struct err *e);
int qmp_cont(struct qmp *q, uint32_t timeout_ms, struct err *e);

/*
 * Save device state; the VM is stopped, and stays so.  *fd: a new memfd, the stream from
 * its start; *len its bytes.  On failure (-ETIMEDOUT, -EBUSY, -EIO, -EFBIG) nothing is left
 * under way, and the VM can go on.  After success the migration settings are on their way back
 * (Q3): the caller has other things to do meanwhile.
 */
int qmp_save(struct qmp *q, uint32_t timeout_ms, int *fd, size_t *len, struct err *e);
/* Until the settings are back; every other call does that first.  For a VM that stays paused. */
void qmp_settle(struct qmp *q);

/*
 * Load device state; RAM is complete already.  Into a VM that waits for it
 * (QMP_INCOMING, x-ignore-shared set here), else in place into a stopped one.  The VM is paused
 * afterwards. On failure it must not run: its devices may be half loaded (in place, another
 * qmp_load() may mend it).  -EUCLEAN: QEMU refused the stream; e has its words.
 */
int qmp_load(struct qmp *q, uint32_t timeout_ms, const void *stream, size_t len, struct err *e);

/* Any command; takes `args` (may be NULL) over.  *ret (may be NULL) gets what QEMU returned, the
 * caller's.  -EIO: QEMU refused it; e has its words. */
int qmp_ask(struct qmp *q, uint32_t timeout_ms, const char *command, json_t *args, json_t **ret,
	    struct err *e);
