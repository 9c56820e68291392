/* SPDX-License-Identifier: MIT */
/* Pages out of the bucket; see fetch.h. */
#include "snapd/backup/fetch.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/backup/pack.h"
#include "snapd/util/cleanup.h"

#define RANGE_BYTES (2u << 20)	 /* of one get, at most */
#define GAP_BYTES   (128u << 10) /* read along rather than asked for apart */
#define TABLE_READ  (320u << 10)

struct worker {
	struct fetch *f;
	struct fetching *all;
	void *arg;
	uint8_t *range; /* owned; RANGE_BYTES */
	uint8_t *head;	/* owned */
	uint8_t run[BK_RUN_BYTES];
};

struct fetching {
	struct fetch *f;
	pthread_mutex_t lock; /* the rest */
	size_t next;
	struct err err; /* the first failure */
};

static int by_ref(const void *a, const void *b)
{
	const struct fetch_page *x = a, *y = b;

	if (x->ref != y->ref)
		return x->ref < y->ref ? -1 : 1;
	return x->gfn < y->gfn ? -1 : x->gfn > y->gfn;
}

static size_t head_max(void)
{
	return sizeof(struct bk_header) + BK_TAG_BYTES +
	       BK_PACK_PAGES * (sizeof(struct bk_run) + BK_NAME_BYTES);
}

static int get(struct worker *w, const char *key, uint64_t at, void *buf, size_t len, size_t *got,
	       struct err *e)
{
	struct err why = {0};
	int rc = objstore_get(w->f->r->os, key, at, buf, len, got, &why);

	atomic_fetch_add(&w->f->bytes, rc ? 0 : *got);
	if (rc == -ENOENT)
		return err_set(e, E_CORRUPT, "missing");
	return rc ? err_set(e, -rc, "%s", why.code ? why.text : strerror(-rc)) : 0;
}

static int open_pack(struct worker *w, const struct bk_name *name, const char *key,
		     struct pack_head *h, struct err *e)
{
	size_t got, want;
	int rc = get(w, key, 0, w->head, TABLE_READ, &got, e);

	if (!rc)
		rc = pack_head_bytes(&w->f->r->keys, w->head, got, &want, e);
	if (!rc && want > got)
		rc = get(w, key, 0, w->head, want, &got, e);
	if (!rc)
		rc = pack_head_decode(&w->f->r->keys, name, w->head, got, h, e);
	if (!rc && pack_page_size(h) != w->f->page_size) {
		pack_head_deinit(h);
		rc = err_set(e, E_CORRUPT, "its pages are not of %u bytes", w->f->page_size);
	}
	return rc;
}

/* pages[0, nr) of one run, whose stored bytes are here. */
static int take_run(struct worker *w, const struct pack_head *h, uint32_t run, uint8_t *stored,
		    const struct fetch_page *pages, size_t nr, struct err *e)
{
	int rc = pack_run_open(&w->f->r->keys, h, run, stored, w->run, e);

	for (size_t i = 0; !rc && i < nr; i++)
		rc = w->f->fn(w->arg, pages[i].gfn,
			      w->run + (size_t)(ref_entry(pages[i].ref) - h->first[run]) *
					       w->f->page_size,
			      e);
	return !rc && w->f->flush ? w->f->flush(w->arg, e) : rc;
}

static size_t pages_of_run(const struct pack_head *h, uint32_t run, const struct fetch_page *pages,
			   size_t nr)
{
	size_t n = 0;

	while (n < nr && ref_entry(pages[n].ref) < h->first[run + 1])
		n++;
	return n;
}

/* Runs [first, *last] as one range; how many of the pages lie in it. */
static size_t plan_range(const struct pack_head *h, uint32_t first, const struct fetch_page *pages,
			 size_t nr, uint32_t *last)
{
	size_t n = pages_of_run(h, first, pages, nr);

	*last = first;
	while (n < nr) {
		uint32_t run = pack_run_of(h, ref_entry(pages[n].ref));

		if (h->offsets[run + 1] - h->offsets[first] > RANGE_BYTES ||
		    h->offsets[run] - h->offsets[*last + 1] > GAP_BYTES)
			break;
		*last = run;
		n += pages_of_run(h, run, pages + n, nr - n);
	}
	return n;
}

static int take_range(struct worker *w, const char *key, const struct pack_head *h, uint32_t first,
		      uint32_t last, const struct fetch_page *pages, size_t nr, struct err *e)
{
	size_t len = h->offsets[last + 1] - h->offsets[first], got, n;
	int rc = get(w, key, h->offsets[first], w->range, len, &got, e);

	if (!rc && got < len)
		rc = err_set(e, E_CORRUPT, "cut off at byte %llu",
			     (unsigned long long)(h->offsets[first] + got));
	for (; !rc && nr; pages += n, nr -= n) {
		uint32_t run = pack_run_of(h, ref_entry(pages[0].ref));

		n = pages_of_run(h, run, pages, nr);
		rc = take_run(w, h, run, w->range + (h->offsets[run] - h->offsets[first]), pages, n,
			      e);
	}
	return rc;
}

static int take_pages(struct worker *w, const char *key, const struct pack_head *h,
		      const struct fetch_page *pages, size_t nr, struct err *e)
{
	size_t n;
	int rc = 0;

	if (ref_entry(pages[nr - 1].ref) >= h->header.nr_pages)
		return err_set(e, E_CORRUPT, "it has %u pages, and page %u is wanted",
			       h->header.nr_pages, ref_entry(pages[nr - 1].ref));
	for (; !rc && nr; pages += n, nr -= n) {
		uint32_t first = pack_run_of(h, ref_entry(pages[0].ref)), last;

		if (w->f->stop && w->f->stop(w->f->arg))
			return err_set(e, ECANCELED, "cancelled");
		n = plan_range(h, first, pages, nr, &last);
		rc = take_range(w, key, h, first, last, pages, n, e);
	}
	return rc;
}

/* All pages of one pack. */
static int take_pack(struct worker *w, const struct fetch_page *pages, size_t nr, struct err *e)
{
	const struct bk_name *name = &w->f->packs->names[ref_pack(pages[0].ref)];
	char key[REPO_KEY_BYTES];
	struct err why = {0};
	struct pack_head h;
	int rc = open_pack(w, name, repo_key(REPO_PACKS, name, key), &h, &why);

	if (!rc) {
		rc = take_pages(w, key, &h, pages, nr, &why);
		pack_head_deinit(&h);
	}
	return rc ? err_set(e, -rc, "%s: %s", key, why.code ? why.text : strerror(-rc)) : 0;
}

/* The pages of the next pack, or none. */
static size_t next_pack(struct fetching *all, const struct fetch_page **ret)
{
	struct fetch *f = all->f;
	size_t n = 0;

	pthread_mutex_lock(&all->lock);
	*ret = f->pages + all->next;
	if (!all->err.code)
		while (all->next + n < f->nr && ref_pack((*ret)[n].ref) == ref_pack((*ret)[0].ref))
			n++;
	all->next += n;
	pthread_mutex_unlock(&all->lock);
	return n;
}

static void *fetch_thread(void *arg)
{
	struct worker *w = arg;
	const struct fetch_page *pages;
	size_t nr;

	while ((nr = next_pack(w->all, &pages))) {
		struct err e = {0};
		int rc = take_pack(w, pages, nr, &e);

		if (!rc)
			continue;
		pthread_mutex_lock(&w->all->lock);
		err_set(&w->all->err, -rc, "%s", e.text);
		pthread_mutex_unlock(&w->all->lock);
		break;
	}
	return NULL;
}

static int start(struct fetching *all, struct worker *workers, pthread_t *threads, int *nr)
{
	struct fetch *f = all->f;
	sigset_t set, old;
	int rc = 0;

	sigfillset(&set);
	pthread_sigmask(SIG_BLOCK, &set, &old);
	for (*nr = 0; !rc && *nr < FETCH_THREADS; *nr += !rc) {
		struct worker *w = &workers[*nr];

		w->f = f;
		w->all = all;
		w->arg = f->worker ? f->worker(f->arg, *nr) : f->arg;
		w->range = malloc(RANGE_BYTES);
		w->head = malloc(MAX(head_max(), (size_t)TABLE_READ));
		rc = w->range && w->head ? pthread_create(&threads[*nr], NULL, fetch_thread, w)
					 : ENOMEM;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -rc;
}

int fetch_run(struct fetch *f, struct err *e)
{
	_cleanup_free_ struct worker *workers = calloc(FETCH_THREADS, sizeof(*workers));
	struct fetching all = {.f = f};
	pthread_t threads[FETCH_THREADS];
	int nr, rc;

	if (!workers)
		return err_errno(e, ENOMEM, "backup");
	qsort(f->pages, f->nr, sizeof(*f->pages), by_ref);
	pthread_mutex_init(&all.lock, NULL);
	rc = start(&all, workers, threads, &nr);
	if (rc) {
		pthread_mutex_lock(&all.lock);
		err_errno(&all.err, -rc, "backup: start threads");
		pthread_mutex_unlock(&all.lock);
	}
	for (int i = 0; i < nr; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < FETCH_THREADS; i++) {
		free(workers[i].range);
		free(workers[i].head);
	}
	pthread_mutex_destroy(&all.lock);
	return all.err.code ? err_set(e, -all.err.code, "%s", all.err.text) : 0;
}
