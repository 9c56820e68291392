/* SPDX-License-Identifier: MIT */
/*
 * Chunks: pages on their way from memory to the store.  Enter: 256 pages at a time, with where they
 * are; leave: epoch_put(), in the order in which they came.  The pool copies and identifies them,
 * the VM's thread hands them on.
 */
#include <assert.h>

#include "snapd/util/busguard.h"
#include "snapd/vm/capture_impl.h"
#include "snapd/vm/selfcheck.h"

static void copy_chunk(void *arg)
{
	struct chunk *k = arg;
	const struct capture *c = k->c;

	for (uint32_t i = 0; i < k->nr; i++) {
		struct epoch_page *p = &k->pages[i];
		const uint8_t *next = i + 1 < k->nr ? k->src[i + 1] : NULL;

		if (!k->src[i])
			continue;
		if (k->staged)
			p->id = pageid_of(c->secret, k->src[i], c->page_size);
		else
			p->id = pageid_copy_ahead(c->secret, (void *)p->bytes, k->src[i], next,
						  c->page_size);
	}
}

void capture_chunk_task(struct pool_task *task)
{
	struct chunk *k = (struct chunk *)((char *)task - offsetof(struct chunk, task));

	k->err = busguard_run(copy_chunk, k);
}

static void tell_check(struct capture *c, const struct chunk *k)
{
	for (uint32_t i = 0; c->check && i < k->nr; i++)
		selfcheck_copied(c->check, k->pages[i].gfn, k->pages[i].id);
}

/* The oldest chunk is identified: to the store with it. */
static int hand_on(struct capture *c, struct err *e)
{
	struct chunk *k = &c->chunks[c->handed % NR_CHUNKS];

	pool_wait(c->vm->d->pool, &k->task);
	c->handed++;
	k->busy = false;
	if (k->err) {
		err_set(e, EFAULT, "the VM's memory file shrank or cannot be read");
		vm_say_error(c->vm, SNAPD_MSG_ERROR, e);
		return -EFAULT;
	}
	tell_check(c, k);
	return epoch_put(c->ep, k->pages, k->nr, e);
}

int capture_hand_on_all(struct capture *c, struct err *e)
{
	int err = 0;

	while (!err && c->handed < c->filled)
		err = hand_on(c, e);
	return err;
}

int capture_next_chunk(struct capture *c, struct chunk **ret, struct err *e)
{
	int err = c->filled - c->handed == NR_CHUNKS ? hand_on(c, e) : 0;

	*ret = &c->chunks[c->filled % NR_CHUNKS];
	(*ret)->nr = 0;
	return err;
}

void capture_submit_chunk(struct capture *c, struct chunk *k, bool staged)
{
	assert(!k->busy);
	if (!k->nr)
		return;
	k->busy = true;
	k->staged = staged;
	k->err = 0;
	c->filled++;
	pool_submit(c->vm->d->pool, &k->task);
}

void capture_chunk_add(struct capture *c, struct chunk *k, uint64_t gfn, const uint8_t *src,
		       const uint8_t *bytes)
{
	k->src[k->nr] = src;
	k->pages[k->nr++] = (struct epoch_page){.gfn = gfn, .bytes = bytes};
}
