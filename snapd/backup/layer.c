/* SPDX-License-Identifier: MIT */
/* Maps of a backup, written and read; see layer.h. */
#include "snapd/backup/layer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define GFN_MAX (1ull << 52)

/* ---- names of packs ---- */

void packset_deinit(struct packset *s)
{
	free(s->names);
	free(s->slots);
	*s = (struct packset){0};
}

static uint32_t slot_of(const struct packset *s, const struct bk_name *name)
{
	uint32_t h;

	memcpy(&h, name->b, sizeof(h));
	return h & (s->nr_slots - 1);
}

int64_t packset_find(const struct packset *s, const struct bk_name *name)
{
	if (!s->nr_slots)
		return -1;
	for (uint32_t i = slot_of(s, name); s->slots[i]; i = (i + 1) & (s->nr_slots - 1))
		if (!memcmp(&s->names[s->slots[i] - 1], name, sizeof(*name)))
			return s->slots[i] - 1;
	return -1;
}

static void take_slot(struct packset *s, uint32_t number)
{
	uint32_t i = slot_of(s, &s->names[number]);

	while (s->slots[i])
		i = (i + 1) & (s->nr_slots - 1);
	s->slots[i] = number + 1;
}

void packset_rename(struct packset *s, uint32_t number, const struct bk_name *name)
{
	s->names[number] = *name;
	take_slot(s, number); /* the old slot finds a name that differs */
}

static int grow(struct packset *s)
{
	uint32_t cap = s->cap ? 2 * s->cap : 64;
	struct bk_name *names = realloc(s->names, (size_t)cap * sizeof(*names));
	uint32_t *slots;

	if (!names)
		return -ENOMEM;
	s->names = names;
	slots = calloc((size_t)cap * 4, sizeof(*slots)); /* renames take a second one */
	if (!slots)
		return -ENOMEM;
	free(s->slots);
	s->slots = slots;
	s->nr_slots = 4 * cap;
	s->cap = cap;
	for (uint32_t i = 0; i < s->nr; i++)
		take_slot(s, i);
	return 0;
}

int packset_add(struct packset *s, const struct bk_name *name, uint32_t *ret)
{
	int64_t at = packset_find(s, name);
	int rc;

	if (at < 0) {
		if (s->nr == PACKSET_MAX)
			return -E2BIG;
		rc = s->nr == s->cap ? grow(s) : 0;
		if (rc)
			return rc;
		s->names[s->nr] = *name;
		take_slot(s, s->nr);
		at = s->nr++;
	}
	*ret = (uint32_t)at;
	return 0;
}

/* ---- writing ---- */

void layer_writer_init(struct layer_writer *w, const struct packset *packs)
{
	*w = (struct layer_writer){.packs = packs};
}

void layer_writer_deinit(struct layer_writer *w)
{
	free(w->used);
	free(w->index);
	free(w->runs);
	*w = (struct layer_writer){0};
}

size_t layer_bytes(const struct layer_writer *w)
{
	return sizeof(struct bk_map) + w->nr_used * sizeof(struct bk_name) + w->len;
}

/* A run takes four numbers at most. */
static int make_room(struct layer_writer *w)
{
	size_t cap = w->cap ? 2 * w->cap : 4096;
	uint8_t *runs;

	if (w->cap - w->len >= 40)
		return 0;
	runs = realloc(w->runs, cap);
	if (!runs)
		return -ENOMEM;
	w->runs = runs;
	w->cap = cap;
	return 0;
}

static void put_number(struct layer_writer *w, uint64_t n)
{
	for (; n >= 0x80; n >>= 7)
		w->runs[w->len++] = (uint8_t)(n | 0x80);
	w->runs[w->len++] = (uint8_t)n;
}

static int reserve_index(struct layer_writer *w, uint32_t pack)
{
	uint32_t cap = w->cap_index ? w->cap_index : 64;
	uint32_t *index;

	if (pack < w->cap_index)
		return 0;
	while (cap <= pack)
		cap *= 2;
	index = realloc(w->index, cap * sizeof(*index));
	if (!index)
		return -ENOMEM;
	memset(index + w->cap_index, 0, (cap - w->cap_index) * sizeof(*index));
	w->index = index;
	w->cap_index = cap;
	return 0;
}

/* The pack's index in this map. */
static int use_pack(struct layer_writer *w, uint32_t pack, uint32_t *ret)
{
	int rc = reserve_index(w, pack);

	if (rc)
		return rc;
	if (!w->index[pack]) {
		if (w->nr_used == w->cap_used) {
			uint32_t cap = w->cap_used ? 2 * w->cap_used : 64;
			uint32_t *used = realloc(w->used, cap * sizeof(*used));

			if (!used)
				return -ENOMEM;
			w->used = used;
			w->cap_used = cap;
		}
		w->used[w->nr_used++] = pack;
		w->index[pack] = w->nr_used;
	}
	*ret = w->index[pack] - 1;
	return 0;
}

static int close_run(struct layer_writer *w)
{
	struct layer_run *r = &w->open;
	enum layer_kind kind = r->kind;
	uint32_t pack = 0;
	int rc;

	if (!r->nr)
		return 0;
	rc = make_room(w);
	if (!rc && kind == LAYER_PAGES)
		rc = use_pack(w, r->pack, &pack);
	if (rc)
		return rc;
	if (kind == LAYER_PAGES && w->has_last && w->last_pack == r->pack &&
	    w->last_entry + 1 == r->entry)
		kind = LAYER_PAGES_ON;
	put_number(w, r->gfn - w->next_gfn);
	put_number(w, r->nr << 2 | kind);
	if (kind == LAYER_PAGES) {
		put_number(w, pack);
		put_number(w, r->entry);
	}
	if (r->kind == LAYER_PAGES) {
		w->has_last = true;
		w->last_pack = r->pack;
		w->last_entry = r->entry + (uint32_t)r->nr - 1;
	}
	w->next_gfn = r->gfn + r->nr;
	r->nr = 0;
	return 0;
}

static bool goes_on(const struct layer_run *open, const struct layer_run *r)
{
	return open->nr && open->gfn + open->nr == r->gfn && open->kind == r->kind &&
	       (r->kind != LAYER_PAGES ||
		(open->pack == r->pack && open->entry + open->nr == r->entry));
}

int layer_put(struct layer_writer *w, const struct layer_run *run)
{
	int rc;

	assert(run->nr && run->gfn >= (w->open.nr ? w->open.gfn + w->open.nr : w->next_gfn));
	w->nr_frames += run->nr;
	if (goes_on(&w->open, run)) {
		w->open.nr += run->nr;
		return 0;
	}
	rc = close_run(w);
	if (!rc)
		w->open = *run;
	return rc;
}

int layer_finish(struct layer_writer *w, uint8_t **ret, size_t *ret_len, uint64_t *nr_frames)
{
	struct bk_map head = {0};
	const struct packset *packs = w->packs;
	uint8_t *p;
	int rc = close_run(w);

	if (rc)
		return rc;
	head.nr_packs = w->nr_used;
	head.nr_frames = *nr_frames = w->nr_frames;
	*ret_len = layer_bytes(w);
	*ret = p = malloc(*ret_len);
	if (!p)
		return -ENOMEM;
	memcpy(p, &head, sizeof(head));
	p += sizeof(head);
	for (uint32_t i = 0; i < w->nr_used; i++, p += BK_NAME_BYTES)
		memcpy(p, packs->names[w->used[i]].b, BK_NAME_BYTES);
	if (w->len)
		memcpy(p, w->runs, w->len);
	layer_writer_deinit(w);
	layer_writer_init(w, packs);
	return 0;
}

/* ---- reading ---- */

static bool get_number(struct layer_reader *d, uint64_t *ret)
{
	*ret = 0;
	for (int shift = 0; shift < 63 && d->p < d->end; shift += 7) {
		uint8_t byte = *d->p++;

		*ret |= (uint64_t)(byte & 0x7f) << shift;
		if (!(byte & 0x80))
			return byte || !shift; /* no longer than needed */
	}
	return false;
}

/* The pack and entry of a run of pages. */
static bool get_place(struct layer_reader *d, bool on)
{
	uint64_t pack, entry = d->next_entry;

	if (on && !d->has_last)
		return false;
	if (!on) {
		if (!get_number(d, &pack) || !get_number(d, &entry) || pack >= d->nr_packs)
			return false;
		d->run.pack = d->numbers[pack];
	}
	if (entry >= BK_PACK_PAGES || d->run.nr > BK_PACK_PAGES - entry)
		return false;
	d->run.kind = LAYER_PAGES;
	d->run.entry = (uint32_t)entry;
	d->next_entry = entry + d->run.nr;
	d->has_last = true;
	return true;
}

static bool get_run(struct layer_reader *d)
{
	uint64_t gap, len;

	if (!get_number(d, &gap) || !get_number(d, &len) || gap > GFN_MAX || !(len >> 2))
		return false;
	d->run.gfn = d->next_gfn + gap;
	d->run.nr = len >> 2;
	if (d->run.gfn > GFN_MAX || d->run.nr > GFN_MAX - d->run.gfn)
		return false;
	d->next_gfn = d->run.gfn + d->run.nr;
	d->run.kind = (enum layer_kind)(len & 3);
	if (d->run.kind == LAYER_PAGES || d->run.kind == LAYER_PAGES_ON)
		return get_place(d, d->run.kind == LAYER_PAGES_ON);
	return true;
}

static int number_packs(const uint8_t *names, uint32_t nr, struct packset *packs, uint32_t *ret,
			struct err *e)
{
	for (uint32_t i = 0; i < nr; i++) {
		struct bk_name name;
		int rc;

		memcpy(&name, names + (size_t)i * BK_NAME_BYTES, sizeof(name));
		rc = packset_add(packs, &name, &ret[i]);
		if (rc)
			return err_errno(e, -rc, "map");
	}
	return 0;
}

int layer_reader_init(struct layer_reader *r, const uint8_t *payload, size_t len,
		      struct packset *packs, struct err *e)
{
	struct bk_map head;
	int rc;

	*r = (struct layer_reader){.begin = payload, .end = payload + len};
	if (len < sizeof(head))
		return err_set(e, E_CORRUPT, "the map is cut off");
	memcpy(&head, payload, sizeof(head));
	if (head.reserved || head.nr_packs > (len - sizeof(head)) / BK_NAME_BYTES)
		return err_set(e, E_CORRUPT, "the map's head makes no sense");
	r->numbers = calloc((size_t)head.nr_packs + 1, sizeof(*r->numbers));
	if (!r->numbers)
		return err_errno(e, ENOMEM, "map");
	r->nr_packs = head.nr_packs;
	r->claimed = head.nr_frames;
	r->p = payload + sizeof(head) + (size_t)head.nr_packs * BK_NAME_BYTES;
	rc = number_packs(payload + sizeof(head), head.nr_packs, packs, r->numbers, e);
	if (rc)
		layer_reader_deinit(r);
	return rc;
}

void layer_reader_deinit(struct layer_reader *r)
{
	free(r->numbers);
	r->numbers = NULL;
}

int layer_next(struct layer_reader *r, struct layer_run *ret, struct err *e)
{
	if (r->p == r->end)
		return r->nr_frames == r->claimed
			       ? 0
			       : err_set(e, E_CORRUPT, "the map's frames do not add up");
	if (!get_run(r))
		return err_set(e, E_CORRUPT, "the map makes no sense at byte %zu",
			       (size_t)(r->p - r->begin));
	r->nr_frames += r->run.nr;
	*ret = r->run;
	return 1;
}

int layer_decode(const uint8_t *payload, size_t len, struct packset *packs, layer_fn fn, void *arg,
		 struct err *e)
{
	struct layer_reader r;
	struct layer_run run;
	int rc = layer_reader_init(&r, payload, len, packs, e);

	if (rc)
		return rc;
	while ((rc = layer_next(&r, &run, e)) == 1) {
		rc = fn(arg, &run, e);
		if (rc)
			break;
	}
	layer_reader_deinit(&r);
	return rc;
}
