/* SPDX-License-Identifier: MIT */
/*
 * epochs: a consumer of dirty frames inside the VMM, as a framebuffer or a working-set
 * recorder has one: every --epoch-ms it empties a set of its own.  It shows what the
 * harvest alone costs the guest, and that two consumers do not disturb each other.
 *
 * One thread; --epoch-ms 0: none.
 */
#include <errno.h>
#include <time.h>

#include "vmm/machine.h"

#define TAKE_MAX 1024u

struct epochs {
	struct machine *machine;
	struct snapd_consumer *consumer; /* owned */
	pthread_t thread;
	_Atomic uint64_t nr, pages;
};

/* Pages of one epoch, or -errno. */
static long take_all(struct epochs *e)
{
	uint64_t gfns[TAKE_MAX];
	long n, total = 0;
	int again = 0;

	do {
		n = snapd_consumer_take(e->consumer, gfns, TAKE_MAX, again);
		if (n < 0)
			return n;
		total += n;
		again = 1;
	} while (n);
	return total;
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Until `due_ms`, or until the machine stops. */
static void rest_until(uint64_t due_ms, struct machine *m)
{
	for (uint64_t now = now_ms(); now < due_ms && !atomic_load(&m->stopping); now = now_ms()) {
		uint64_t ms = MIN(due_ms - now, (uint64_t)50);

		nanosleep(&(const struct timespec){.tv_nsec = (long)ms * 1000000}, NULL);
	}
}

static void *epochs_thread(void *arg)
{
	struct epochs *e = arg;
	struct machine *m = e->machine;
	uint64_t due_ms = now_ms();

	while (!atomic_load(&m->stopping)) {
		long n = take_all(e);

		if (n < 0) {
			machine_fail(m, "epoch: %s", snapd_vm_error(m->agent));
			break;
		}
		atomic_fetch_add(&e->nr, 1);
		atomic_fetch_add(&e->pages, (uint64_t)n);
		/* After a long stop there are no epochs to catch up with. */
		due_ms = MAX(due_ms + m->opt->epoch_ms, now_ms());
		rest_until(due_ms, m);
	}
	return NULL;
}

int epochs_start(struct machine *m)
{
	struct epochs *e;
	int rc;

	if (!m->opt->epoch_ms)
		return 0;
	e = calloc(1, sizeof(*e));
	if (!e)
		return -ENOMEM;
	e->machine = m;
	rc = snapd_consumer_create(m->agent, "epochs", &e->consumer);
	if (rc == 0) {
		rc = -pthread_create(&e->thread, NULL, epochs_thread, e);
		if (rc)
			snapd_consumer_destroy(e->consumer);
	}
	if (rc)
		free(e);
	else
		m->epochs = e;
	return rc;
}

void epochs_stop(struct machine *m)
{
	if (!m->epochs)
		return;
	pthread_join(m->epochs->thread, NULL);
	snapd_consumer_destroy(m->epochs->consumer);
	m->epochs->consumer = NULL;
}

void epochs_get(struct machine *m, uint64_t *nr, uint64_t *pages)
{
	*nr = m->epochs ? atomic_load(&m->epochs->nr) : 0;
	*pages = m->epochs ? atomic_load(&m->epochs->pages) : 0;
}
