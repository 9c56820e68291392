/* SPDX-License-Identifier: MIT */
/*
 * spare: memory that the guest leaves to the host, and the ways in which a host writes it
 * without a vCPU:
 *
 *   --vhost RATE    a back end like vhost's: it writes a page, then sets its bit in a dirty
 *                   log by GPA (snapd_devlog_create())
 *   --disk RATE     a disk's back end: a page is read with O_DIRECT from a file of random bytes,
 *                   and marked; with --track-host nobody marks it.  The read ends before the
 *                   lock is given back, so a pause finds none under way; a harvest does
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
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "vmm/machine.h"
#include "vmm/simkvm.h"

struct spare {
	struct machine *machine;
	struct snapd_devlog *log; /* owned by the agent's VM */
	struct snapd_devlog_mem mem;
	int disk_fd; /* owned; -1: no disk */
	pthread_t thread;
	/* machine.write_lock */
	uint64_t rng;
	uint64_t writes, discards, tables;
};

enum kind { VHOST, BALLOON, DISK, NR_KINDS };
/* Pages of the region: whose they are. */
static const struct {
	uint64_t first, nr;
} parts[NR_KINDS] = {[VHOST] = {0, 24}, [BALLOON] = {24, 24}, [DISK] = {48, SPARE_PAGES - 48}};
#define DISK_BLOCKS 256u

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

static int read_disk(struct spare *s, uint64_t gpa)
{
	struct machine *m = s->machine;
	off_t at = (off_t)(draw(s, DISK_BLOCKS) * GUEST_PAGE);

	if (pread(s->disk_fd, (char *)m->low.hva + gpa, GUEST_PAGE, at) != (ssize_t)GUEST_PAGE)
		return errno ? -errno : -EIO;
	s->writes++;
	if (m->opt->track_host)
		return 0;
	return snapd_vm_mark_file_dirty(m->agent, m->low.fd, gpa, GUEST_PAGE);
}

static int touch(struct spare *s, enum kind kind)
{
	uint64_t page = parts[kind].first + draw(s, parts[kind].nr);
	uint64_t gpa = s->machine->spare_gpa + page * GUEST_PAGE;

	if (kind == DISK)
		return read_disk(s, gpa);
	if (kind == BALLOON && !draw(s, 2))
		return discard(s, gpa);
	if (kind == BALLOON)
		fill(s, gpa);
	else
		vhost_write(s, gpa);
	return 0;
}

static double total_rate(const struct options *opt)
{
	return opt->vhost_rate + opt->balloon_rate + opt->disk_rate;
}

/* By their rates. */
static enum kind draw_kind(struct spare *s)
{
	const struct options *opt = s->machine->opt;
	double at = (double)draw(s, 1000) / 1000 * total_rate(opt);

	if (at < opt->balloon_rate)
		return BALLOON;
	return at < opt->balloon_rate + opt->disk_rate ? DISK : VHOST;
}

void spare_step(struct machine *m)
{
	struct spare *s = m->spare;
	int rc = 0;

	if (!s)
		return;
	pthread_mutex_lock(&m->write_lock);
	if (atomic_load(&m->live))
		rc = touch(s, draw_kind(s));
	pthread_mutex_unlock(&m->write_lock);
	if (rc)
		machine_fail(m, "spare memory: %s", strerror(-rc));
}

static void *spare_thread(void *arg)
{
	struct spare *s = arg;
	const struct options *opt = s->machine->opt;
	double rate = total_rate(opt), due = 0;
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

/* A file without a name, to be read past the page cache where its file system allows. */
static int disk_open(struct spare *s)
{
	const char *dir = getenv("TMPDIR");
	_cleanup_fd_ int fd = open(dir ? dir : "/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	uint64_t block[GUEST_PAGE_WORDS];
	char path[32];

	if (fd < 0)
		return -errno;
	for (uint32_t b = 0; b < DISK_BLOCKS; b++) {
		for (uint32_t w = 0; w < GUEST_PAGE_WORDS; w++)
			block[w] = guest_mix(s->machine->opt->seed ^ (b * GUEST_PAGE_WORDS + w));
		if (write(fd, block, sizeof(block)) != sizeof(block))
			return errno ? -errno : -ENOSPC;
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	s->disk_fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	if (s->disk_fd < 0)
		s->disk_fd = open(path, O_RDONLY | O_CLOEXEC);
	return s->disk_fd < 0 ? -errno : 0;
}

int spare_start(struct machine *m)
{
	const uint64_t end = m->spare_gpa + (SPARE_PAGES + 1) * GUEST_PAGE;
	struct spare *s;
	int rc;

	if (total_rate(m->opt) <= 0)
		return 0;
	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->machine = m;
	s->disk_fd = -1;
	s->rng = guest_mix(m->opt->seed ^ 0x5fa4e) | 1;
	rc = m->opt->disk_rate > 0 ? disk_open(s) : 0;
	if (rc == 0)
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
		cleanup_fd(&s->disk_fd);
		free(s);
	}
	return rc;
}

void spare_stop(struct machine *m)
{
	if (!m->spare)
		return;
	if (!m->opt->lockstep)
		pthread_join(m->spare->thread, NULL);
	cleanup_fd(&m->spare->disk_fd);
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
