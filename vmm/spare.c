/* SPDX-License-Identifier: MIT */
/*
 * spare: memory that the guest leaves to the host, and the ways in which a host writes it
 * without a vCPU:
 *
 *   --vhost RATE    a back end like vhost's: it writes a page, then sets its bit in a dirty
 *                   log by GPA (snapd_devlog_create())
 *   --balloon RATE  pages are filled (marked by file and offset), later given back to the
 *                   host in one of three ways, and the agent is told; one of the ways frees
 *                   nothing, so whoever believes the telling and does not look has zeros
 *                   where bytes are
 *   tables          on the simulated KVM, KVM itself writes a page whenever device state is
 *                   saved, as arm64's interrupt controller does
 *
 * One thread, or lockstep's, under machine.write_lock as every host writer.  The guest never looks
 * here: the digest in each snapshot does.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "vmm/machine.h"
#include "vmm/simkvm.h"

struct spare {
	struct machine *machine;
	struct snapd_devlog *log; /* owned by the agent's VM */
	struct snapd_devlog_mem mem;
	pthread_t thread;
	/* machine.write_lock */
	uint64_t rng;
	uint64_t writes, discards, tables;
};

static uint64_t draw(struct spare *s, uint64_t below)
{
	s->rng = guest_rng_next(s->rng);
	return guest_mix(s->rng) % below;
}

static void vhost_write(struct spare *s, uint64_t gpa)
{
	uint64_t page = gpa / GUEST_PAGE;

	atomic_store(ram_word(s->machine, gpa + draw(s, GUEST_PAGE_WORDS) * 8), ++s->writes);
	__atomic_fetch_or((uint8_t *)s->mem.base + page / 8, (uint8_t)(1u << page % 8),
			  __ATOMIC_SEQ_CST);
}

static void fill(struct spare *s, uint64_t gpa)
{
	struct machine *m = s->machine;

	memset((char *)m->low.hva + gpa, (int)(++s->writes & 0xff) | 1, GUEST_PAGE);
	snapd_vm_mark_file_dirty(m->agent, m->low.fd, gpa, GUEST_PAGE);
}

static int discard(struct spare *s, uint64_t gpa)
{
	struct machine *m = s->machine;
	char *hva = (char *)m->low.hva + gpa;
	int rc = 0;

	switch (draw(s, 3)) {
	case 0:
		rc = fallocate(m->low.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)gpa,
			       (off_t)GUEST_PAGE);
		break;
	case 1:
		rc = madvise(hva, GUEST_PAGE, MADV_REMOVE);
		break;
	case 2:
		rc = madvise(hva, GUEST_PAGE, MADV_DONTNEED); /* a shared file keeps its bytes */
		break;
	}
	if (rc)
		return -errno;
	s->discards++;
	return snapd_vm_discarded(m->agent, m->low.fd, gpa, GUEST_PAGE);
}

/* Pages of the lower half are the back end's, of the upper half the balloon's. */
static void touch_page(struct spare *s, bool balloon)
{
	struct machine *m = s->machine;
	uint64_t half = SPARE_PAGES / 2, page = draw(s, half) + (balloon ? half : 0);
	uint64_t gpa = m->spare_gpa + page * GUEST_PAGE;
	int rc = 0;

	pthread_mutex_lock(&m->write_lock);
	if (atomic_load(&m->live)) {
		if (!balloon)
			vhost_write(s, gpa);
		else if (draw(s, 2))
			fill(s, gpa);
		else
			rc = discard(s, gpa);
	}
	pthread_mutex_unlock(&m->write_lock);
	if (rc)
		machine_fail(m, "balloon: %s", strerror(-rc));
}

void spare_step(struct machine *m)
{
	const struct options *opt = m->opt;
	double share = opt->balloon_rate / (opt->vhost_rate + opt->balloon_rate);

	if (m->spare)
		touch_page(m->spare, (double)draw(m->spare, 1000) < share * 1000);
}

static void *spare_thread(void *arg)
{
	struct spare *s = arg;
	const struct options *opt = s->machine->opt;
	double rate = opt->vhost_rate + opt->balloon_rate, due = 0;
	const struct timespec rest = {.tv_nsec = (long)MIN(1e9 / rate, 20e6)};

	while (!atomic_load(&s->machine->stopping)) {
		nanosleep(&rest, NULL);
		due += rate * (double)rest.tv_nsec / 1e9;
		if (due < 1)
			continue;
		due = 0;
		spare_step(s->machine);
	}
	return NULL;
}

/* KVM by itself; within the save callback.  How often that is asked for, by a service that
 * is killed meanwhile, is not to be seen in lockstep. */
int spare_save_tables(struct machine *m)
{
	struct spare *s = m->spare;

	if (!s || !m->sim)
		return 0;
	s->tables = m->lockstep ? lockstep_clock(m) : s->tables + 1;
	return simkvm_write(m->sim, 0, m->spare_gpa + SPARE_PAGES * GUEST_PAGE, s->tables);
}

int spare_start(struct machine *m)
{
	const uint64_t end = m->spare_gpa + (SPARE_PAGES + 1) * GUEST_PAGE;
	struct spare *s;
	int rc;

	if (m->opt->vhost_rate + m->opt->balloon_rate <= 0)
		return 0;
	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->machine = m;
	s->rng = guest_mix(m->opt->seed ^ 0x5fa4e) | 1;
	rc = snapd_devlog_create(m->agent, end, &s->log, &s->mem);
	if (rc == 0) {
		pthread_mutex_lock(&m->write_lock); /* a callback may want it */
		m->spare = s;
		pthread_mutex_unlock(&m->write_lock);
		if (!m->opt->lockstep)
			rc = -pthread_create(&s->thread, NULL, spare_thread, s);
	}
	if (rc) {
		m->spare = NULL;
		free(s);
	}
	return rc;
}

void spare_stop(struct machine *m)
{
	if (m->spare && !m->opt->lockstep)
		pthread_join(m->spare->thread, NULL);
}

void spare_get(struct machine *m, uint64_t *writes, uint64_t *discards)
{
	*writes = *discards = 0;
	pthread_mutex_lock(&m->write_lock);
	if (m->spare) {
		*writes = m->spare->writes;
		*discards = m->spare->discards;
	}
	pthread_mutex_unlock(&m->write_lock);
}
