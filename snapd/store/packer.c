/* SPDX-License-Identifier: MIT */
/* Compressing pages side by side; see packer.h. */
#include "snapd/store/packer.h"

#include <assert.h>
#include <stdlib.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/pool.h"

#define PARALLEL_MIN 32u /* below it, waking a helper costs more than it saves */

int packer_init(struct packer *p, struct codec_policy policy, uint32_t page_size,
		struct codec_list *codecs, struct pool *pool)
{
	int r;

	*p = (struct packer){
		.policy = policy, .codecs = codecs, .pool = pool, .page_size = page_size};
	p->bytes = malloc((size_t)codec_pack_max(page_size) * (packer_max(p) + 1));
	r = p->bytes ? codec_list_get(codecs, &p->codec) : -ENOMEM;
	if (r)
		packer_deinit(p);
	return r;
}

void packer_deinit(struct packer *p)
{
	if (p->codecs)
		codec_list_put(p->codecs, p->codec);
	free(p->bytes);
	*p = (struct packer){0};
}

static uint8_t *slot(const struct packer *p, uint32_t i)
{
	return p->bytes + (size_t)codec_pack_max(p->page_size) * i;
}

void packer_reset(struct packer *p)
{
	p->nr = p->next = 0;
}

void packer_add(struct packer *p, const void *page)
{
	assert(p->nr < packer_max(p));
	p->pages[p->nr++] = page;
}

static int pack_range(void *arg, uint64_t first, uint64_t n)
{
	struct packer *p = arg;
	struct codec *c;
	int r = codec_list_get(p->codecs, &c);

	if (r)
		return r;
	for (uint64_t i = first; i < first + n; i++)
		p->lens[i] =
			codec_pack(c, p->policy, slot(p, (uint32_t)i), p->pages[i], p->page_size);
	codec_list_put(p->codecs, c);
	return 0;
}

int packer_run(struct packer *p)
{
	if (!p->nr)
		return 0;
	if (!p->pool)
		return pack_range(p, 0, p->nr);
	return pool_ranges(p->pool, p->nr, PARALLEL_MIN, pack_range, p);
}

const void *packer_take(struct packer *p, const void *page, uint32_t *len)
{
	for (uint32_t i = p->next; i < p->nr; i++) {
		if (p->pages[i] != page)
			continue;
		p->next = i + 1;
		*len = p->lens[i];
		return slot(p, i);
	}
	*len = codec_pack(p->codec, p->policy, slot(p, packer_max(p)), page, p->page_size);
	return slot(p, packer_max(p));
}
