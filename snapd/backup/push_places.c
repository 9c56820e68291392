/* SPDX-License-Identifier: MIT */
/* In which pack the pages of a push are, and packs that take new ones; see push.h. */
#include "snapd/backup/push_impl.h"

#include <errno.h>
#include <sodium.h>
#include <stdlib.h>
#include <string.h>

static struct pack_info *info_of(struct push *p, uint32_t number)
{
	uint32_t cap = p->cap_infos ? p->cap_infos : 256;
	struct pack_info *infos;

	if (number >= p->cap_infos) {
		while (cap <= number)
			cap *= 2;
		infos = realloc(p->infos, cap * sizeof(*infos));
		if (!infos)
			return NULL;
		memset(infos + p->cap_infos, 0, (cap - p->cap_infos) * sizeof(*infos));
		p->infos = infos;
		p->cap_infos = cap;
	}
	return &p->infos[number];
}

int push_reopen_view(struct push *p, struct err *e)
{
	cache_view_close(p->view);
	p->view = NULL;
	return cache_view_open(p->r->cache, &p->view, e);
}

/* Its name follows when it is full: until then a random one stands for it. */
static int begin_pack(struct push *p, struct err *e)
{
	struct bk_name unnamed;
	struct pack_info *info;

	p->pack = uploader_take(p->up);
	if (!p->pack)
		return uploader_finish(p->up, e);
	pack_begin(p->pack, p->c.snap.page_size);
	p->pack->scratch = p->scratch;
	randombytes_buf(unnamed.b, sizeof(unnamed.b));
	if (packset_add(&p->packs, &unnamed, &p->pack_number) ||
	    !(info = info_of(p, p->pack_number)))
		return err_errno(e, ENOMEM, "push");
	info->flags = PACK_RELIED | PACK_OURS;
	return 0;
}

int push_send_pack(struct push *p, struct err *e)
{
	int rc;

	if (!p->pack || !p->pack->header.nr_pages)
		return 0;
	rc = pack_finish(p->pack);
	if (rc)
		return err_errno(e, -rc, "push");
	packset_rename(&p->packs, p->pack_number, &p->pack->name);
	rc = uploader_send(p->up, p->pack, e);
	if (rc)
		return rc;
	p->infos[p->pack_number].sent_ms = p->r->now_ms(p->r->now_arg);
	p->ret->packs_sent++;
	p->pack = NULL;
	return push_reopen_view(p, e);
}

/* In a pack of the repository, or of this push? */
static int find_known(struct push *p, const struct bk_name *name, uint32_t *pack, uint32_t *entry,
		      struct err *e)
{
	struct cache_place place;
	struct pack_info *info;

	if (!cache_find(p->view, name, &place) || packset_find(&p->marked, &place.pack) >= 0)
		return 0;
	if (packset_add(&p->packs, &place.pack, pack) || !(info = info_of(p, *pack)))
		return err_errno(e, ENOMEM, "push");
	if (place.state != CACHE_SENT && !(info->flags & PACK_OURS))
		return 0;
	info->flags |= PACK_RELIED;
	*entry = place.entry;
	return 1;
}

/* The place of a page: 0, with what it takes to be sent noted. */
int push_place_page(struct push *p, uint32_t i, uint32_t *pack, uint32_t *entry, struct err *e)
{
	const struct bk_name *name = &p->names[i];
	int32_t mine = p->pack ? pack_find(p->pack, name) : -1;
	int rc = mine < 0 ? find_known(p, name, pack, entry, e) : 0;

	if (rc < 0)
		return rc;
	if (rc || mine >= 0)
		p->ret->pages_known++;
	if (rc)
		return 0;
	if (!p->pack) {
		rc = begin_pack(p, e);
		if (rc)
			return rc;
	}
	*pack = p->pack_number;
	if (mine < 0) {
		mine = (int32_t)pack_reserve(p->pack, name);
		p->todo[p->nr_todo++] = p->pages + (size_t)i * p->c.snap.page_size;
		p->ret->pages_sent++;
	}
	*entry = (uint32_t)mine;
	return 0;
}
