/* SPDX-License-Identifier: MIT */
/*
 * lockstep: everything that writes guest memory moves on request only, and one at a time,
 * in an order drawn from --seed: so the same requests make the same memory, and a test that
 * found an error finds it again.
 *
 * One thread.  Each line on stdin is a number of moves; "ok CLOCK" on stdout tells that they
 * were made, and that nothing moves any more.  A move is a few steps of one vCPU, or a step of
 * the device, the back end, the balloon or the puncher; those that are not asked for by an
 * option do nothing.  The vCPUs' threads wait between steps where a pause reaches them.
 *
 * What is left to chance is what does not change memory: the harvest thread, --mirror, and
 * when a pause interrupts a vCPU.
 */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vmm/machine.h"

#define STEPS_MAX 24u

struct lockstep {
	struct machine *machine;
	pthread_t thread;
	bool started;
	uint64_t rng;
	_Atomic uint64_t clock;
	_Atomic uint32_t credit[GUEST_MAX_VCPUS]; /* steps that a vCPU may still make */
	char line[64];				  /* of stdin, so far */
	size_t len;
};

static uint64_t draw(struct lockstep *l, uint64_t below)
{
	l->rng = guest_rng_next(l->rng);
	return guest_mix(l->rng) % below;
}

bool lockstep_may_step(struct machine *m, uint32_t vcpu)
{
	return m->lockstep && atomic_load(&m->lockstep->credit[vcpu]);
}

void lockstep_stepped(struct machine *m, uint32_t vcpu)
{
	if (m->lockstep)
		atomic_fetch_sub(&m->lockstep->credit[vcpu], 1);
}

uint64_t lockstep_clock(struct machine *m)
{
	return atomic_load(&m->lockstep->clock);
}

static bool is_over(const struct machine *m)
{
	return atomic_load(&m->stopping) || atomic_load(&m->fatal);
}

static void run_vcpu(struct lockstep *l)
{
	struct machine *m = l->machine;
	uint32_t i = (uint32_t)draw(l, m->opt->nr_vcpus);
	const struct timespec t = {.tv_nsec = 20000};

	atomic_store(&l->credit[i], 1 + (uint32_t)draw(l, STEPS_MAX));
	while (atomic_load(&l->credit[i]) && !is_over(m))
		nanosleep(&t, NULL);
}

static void move(struct lockstep *l)
{
	uint64_t which = draw(l, 16);

	if (which < 7)
		run_vcpu(l);
	else if (which < 10)
		device_step(l->machine);
	else if (which < 15)
		spare_step(l->machine);
	else
		punch_step(l->machine);
	atomic_fetch_add(&l->clock, 1);
}

/* Until there is all that is to move; and a VM that waits to be restored has no memory to
 * write before. */
static void wait_live(const struct machine *m)
{
	const struct timespec t = {.tv_nsec = 1000000};

	while (!(atomic_load(&m->started) && atomic_load(&m->live)) && !is_over(m))
		nanosleep(&t, NULL);
}

static void on_line(struct lockstep *l)
{
	uint64_t n = strtoull(l->line, NULL, 10);

	wait_live(l->machine);
	for (; n && !is_over(l->machine); n--)
		move(l);
	printf("ok %" PRIu64 "\n", atomic_load(&l->clock));
	fflush(stdout);
}

/* False: there will be no more. */
static bool read_some(struct lockstep *l)
{
	char c;
	ssize_t n = read(STDIN_FILENO, &c, 1);

	if (n <= 0)
		return n < 0 && errno == EINTR;
	if (c != '\n') {
		l->len = MIN(l->len, sizeof(l->line) - 2);
		l->line[l->len++] = c;
		return true;
	}
	l->line[l->len] = '\0';
	l->len = 0;
	on_line(l);
	return true;
}

static void *lockstep_thread(void *arg)
{
	struct lockstep *l = arg;
	struct pollfd p = {.fd = STDIN_FILENO, .events = POLLIN};

	while (!is_over(l->machine)) {
		p.revents = 0;
		if (poll(&p, 1, 20) > 0 && !read_some(l))
			p.fd = -1;
	}
	return NULL;
}

int lockstep_start(struct machine *m)
{
	struct lockstep *l;
	int rc;

	if (!m->opt->lockstep)
		return 0;
	l = calloc(1, sizeof(*l));
	if (!l)
		return -ENOMEM;
	l->machine = m;
	l->rng = guest_mix(m->opt->seed ^ 0x10c257) | 1;
	m->lockstep = l; /* before vCPUs and callbacks, which look for it, come to life */
	rc = pthread_create(&l->thread, NULL, lockstep_thread, l);
	l->started = rc == 0;
	return -rc;
}

void lockstep_stop(struct machine *m)
{
	if (m->lockstep && m->lockstep->started)
		pthread_join(m->lockstep->thread, NULL);
}
