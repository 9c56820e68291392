/* SPDX-License-Identifier: MIT */
/* Who needs a loc: a table of fixed size, open addressing.  One thread. */
#include "snapd/store/account_internal.h"

int owner_table_init(struct owner_table *t, size_t max)
{
	t->nr_slots = 1024;
	while (t->nr_slots * 2 / 3 < max)
		t->nr_slots *= 2;
	t->locs = calloc(t->nr_slots, sizeof(*t->locs));
	t->owners = calloc(t->nr_slots, sizeof(*t->owners));
	t->nr = 0;
	return t->locs && t->owners ? 0 : -ENOMEM;
}

static size_t table_slot(const struct owner_table *t, loc_t loc)
{
	size_t i = (loc * 0x9e3779b97f4a7c15u >> 20) & (t->nr_slots - 1);

	while (t->locs[i] && t->locs[i] != loc)
		i = (i + 1) & (t->nr_slots - 1);
	return i;
}

uint32_t owner_table_get(const struct owner_table *t, loc_t loc)
{
	size_t i = table_slot(t, loc);

	return t->locs[i] ? t->owners[i] : NOBODY;
}

int owner_table_add(struct owner_table *t, loc_t loc, uint32_t owner)
{
	size_t i = table_slot(t, loc);

	if (t->locs[i]) {
		if (t->owners[i] != owner)
			t->owners[i] = SEVERAL;
		return 0;
	}
	/* More locs than the segments' records count pages: a manifest names some that
	 * are not there. */
	if (t->nr * 4 >= t->nr_slots * 3)
		return -E_CORRUPT;
	t->locs[i] = loc;
	t->owners[i] = owner;
	t->nr++;
	return 0;
}
