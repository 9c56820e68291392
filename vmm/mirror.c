/* SPDX-License-Identifier: MIT */
/*
 * mirror: a consumer that keeps a picture, as a display does: every --mirror milliseconds
 * it copies the pages that its own set says are dirty.  At times everything is held and
 * the picture compared with memory: a page that differs is one that somebody else's
 * reading took from it.  At times it goes, and a new one with no picture comes.
 *
 * One thread.  The picture is of the low block and of the areas, by home GFN.
 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "vmm/machine.h"

#define TAKE_MAX    1024u
#define CHECK_EVERY 4u
#define RENEW_EVERY 32u

struct mirror {
	struct machine *machine;
	struct snapd_consumer *consumer; /* owned */
	char *low, *main;		 /* the picture; owned */
	pthread_t thread;
	_Atomic uint64_t checks;
};

/* The picture's page, and memory's; false: not in the picture. */
static bool page_of(struct mirror *k, uint64_t gfn, char **copy, const char **page)
{
	struct machine *m = k->machine;
	uint64_t gpa = gfn * m->page_size, offset;
	struct area *a;

	if (gpa < m->low.len_bytes) {
		*copy = k->low + gpa;
		*page = (char *)m->low.hva + gpa;
		return true;
	}
	a = ram_area_of(m, gpa, &offset);
	if (!a || gpa - a->gpa != offset)
		return false;
	*copy = k->main + (gpa - GUEST_MAIN_GPA);
	*page = (char *)a->backing->hva + a->backing_offset + offset;
	return true;
}

/* Others write meanwhile; what is torn is copied again, since it is dirty again. */
__attribute__((no_sanitize("thread"))) static void copy_words(char *copy, const char *page,
							      size_t len)
{
	const volatile uint64_t *from = (const void *)page;
	uint64_t *to = (void *)copy;

	for (size_t i = 0; i < len / sizeof(*to); i++)
		to[i] = from[i];
}

/* The area's memory stays what it is while its lock is held. */
static void copy_page(struct mirror *k, uint64_t gfn)
{
	uint64_t offset;
	struct area *a = ram_area_of(k->machine, gfn * k->machine->page_size, &offset);
	const char *page;
	char *copy;

	if (a)
		pthread_mutex_lock(&a->lock);
	if (page_of(k, gfn, &copy, &page))
		copy_words(copy, page, k->machine->page_size);
	if (a)
		pthread_mutex_unlock(&a->lock);
}

static int refresh(struct mirror *k)
{
	uint64_t gfns[TAKE_MAX];
	int again = 0;
	long n;

	while ((n = snapd_consumer_take(k->consumer, gfns, TAKE_MAX, again)) > 0) {
		for (long i = 0; i < n; i++)
			copy_page(k, gfns[i]);
		again = 1;
	}
	return (int)n;
}

static void compare(struct mirror *k, uint64_t gpa, uint64_t len_bytes)
{
	const uint64_t page_size = k->machine->page_size;
	const char *page;
	char *copy;

	for (uint64_t gfn = gpa / page_size, end = gfn + len_bytes / page_size; gfn < end; gfn++)
		if (page_of(k, gfn, &copy, &page) && memcmp(copy, page, page_size) != 0) {
			machine_fail(k->machine, "mirror: page 0x%llx is not what memory is",
				     (unsigned long long)gfn);
			return;
		}
}

/* Nothing moves: host writers by the lock, vCPUs by the pause. */
static int check(struct mirror *k)
{
	struct machine *m = k->machine;
	int rc;

	pthread_mutex_lock(&m->write_lock);
	rc = snapd_vm_pause(m->agent, 0);
	if (rc == 0) {
		rc = refresh(k);
		compare(k, 0, m->low.len_bytes);
		compare(k, GUEST_MAIN_GPA, m->main.len_bytes);
		snapd_vm_resume(m->agent);
		atomic_fetch_add(&k->checks, 1);
	}
	pthread_mutex_unlock(&m->write_lock);
	return rc == -ETIMEDOUT ? 0 : rc;
}

/* A picture that is as wrong as can be: all of it must be told. */
static int renew(struct mirror *k)
{
	struct machine *m = k->machine;

	snapd_consumer_destroy(k->consumer);
	k->consumer = NULL;
	memset(k->low, 0xa5, m->low.len_bytes);
	memset(k->main, 0xa5, m->main.len_bytes);
	return snapd_consumer_create(m->agent, "mirror", &k->consumer);
}

static void *mirror_thread(void *arg)
{
	struct mirror *k = arg;
	struct machine *m = k->machine;
	const struct timespec rest = {.tv_sec = m->opt->mirror_ms / 1000,
				      .tv_nsec = (long)(m->opt->mirror_ms % 1000) * 1000000};
	uint64_t round = 0;
	int rc = 0;

	while (rc == 0 && !atomic_load(&m->stopping)) {
		nanosleep(&rest, NULL);
		if (!atomic_load(&m->live))
			continue;
		if (round++ % RENEW_EVERY == 0)
			rc = renew(k);
		else
			rc = round % CHECK_EVERY ? refresh(k) : check(k);
	}
	if (rc)
		machine_fail(m, "mirror: %s", snapd_vm_error(m->agent));
	return NULL;
}

static void mirror_free(struct mirror *k)
{
	free(k->low);
	free(k->main);
	free(k);
}

int mirror_start(struct machine *m)
{
	struct mirror *k;
	int rc;

	if (!m->opt->mirror_ms)
		return 0;
	k = calloc(1, sizeof(*k));
	if (!k)
		return -ENOMEM;
	k->machine = m;
	k->low = malloc(m->low.len_bytes);
	k->main = malloc(m->main.len_bytes);
	rc = k->low && k->main ? -pthread_create(&k->thread, NULL, mirror_thread, k) : -ENOMEM;
	if (rc)
		mirror_free(k);
	else
		m->mirror = k;
	return rc;
}

void mirror_stop(struct machine *m)
{
	if (!m->mirror)
		return;
	pthread_join(m->mirror->thread, NULL);
	snapd_consumer_destroy(m->mirror->consumer);
	m->mirror->consumer = NULL;
}

void mirror_destroy(struct machine *m)
{
	if (m->mirror)
		mirror_free(m->mirror);
	m->mirror = NULL;
}

uint64_t mirror_checks(struct machine *m)
{
	return m->mirror ? atomic_load(&m->mirror->checks) : 0;
}
