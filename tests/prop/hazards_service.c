/* SPDX-License-Identifier: MIT */
/* hazards: the service's epochs and rollbacks, the VMM's answers to them, and other consumers. */
#include <string.h>
#include <unistd.h>

#include "tests/prop/hazards.h"

/* Copy what is dirty, at most `max` frames. */
static void copy_dirty(struct campaign *c, uint64_t max)
{
	uint64_t frames[64], cursor = 0;
	size_t n;

	image_fit(&c->kept, &c->live);
	while (max && (n = gpaset_take(&c->s.dirty, NULL, c->s.shm->nr_frames, &cursor, frames,
				       MIN(max, ARRAY_SIZE(frames))))) {
		for (size_t i = 0; i < n; i++) {
			const struct live_piece *p = live_by_frame(&c->live, frames[i]);
			uint64_t skip;

			if (!p)
				missed("a bit of no piece");
			skip = frames[i] - p->p.first_frame;
			c->changed +=
				image_copy(&c->kept, p->p.home_gfn + skip, p->map + skip * PAGE);
			trace(c, p->p.home_gfn + skip);
		}
		c->reported += n;
		max -= n;
	}
}

void op_early(struct campaign *c)
{
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	copy_dirty(c, 1 + below(c, 100));
}

/* A device finishes what it had begun. */
static int on_quiesce(void *opaque)
{
	device_write(opaque);
	return 0;
}

/* And saving its state writes memory, by itself and through KVM. */
static int on_save(void *opaque, struct snapd_state_writer *w)
{
	op_no_vcpu(opaque);
	host_write(opaque, true);
	return 0;
}

static int on_load(void *opaque, const struct snapd_state_reader *r)
{
	op_no_vcpu(opaque);
	return 0;
}

static void on_layout(void *opaque, const struct snapd_memslot *slots, size_t nr)
{
	struct campaign *c = opaque;

	check(nr <= MAX_SLOTS, "%zu slots", nr);
	c->nr_slots = (uint32_t)nr;
	for (size_t i = 0; i < nr; i++) {
		c->slots[i] = slots[i];
		c->slots[i].fd = c->mem[mem_of(c, &slots[i])].fd;
	}
}

static void save(struct campaign *c, int state, uint64_t len)
{
	forget_saved(c);
	c->saved_state = state;
	c->saved_len = len;
	image_clone(&c->saved, &c->kept);
	memcpy(c->saved_slots, c->slots, sizeof(c->slots));
	c->nr_saved_slots = c->nr_slots;
	for (enum mem_id i = 0; i < NR_MEMS; i++)
		c->mem[i].in_saved = c->mem[i].fd >= 0;
}

void op_epoch(struct campaign *c)
{
	int state = fake_pause(&c->s, 0);
	uint64_t len = c->s.in.paused.state_bytes;

	live_update(&c->live, &c->s);
	copy_dirty(c, UINT64_MAX);
	image_check(&c->kept, &c->live, "snapshot");
	if (below(c, 8) == 0)
		save(c, state, len);
	else
		close(state);
	fake_resume(&c->s);
	c->epochs++;
	trace(c, c->reported);
}

static bool saved_is_whole(const struct campaign *c)
{
	for (uint32_t i = 0; i < c->saved.nr; i++)
		if (!live_page(&c->live, c->saved.part[i].home_gfn))
			return false;
	return c->saved_state >= 0;
}

static void check_slots(const struct campaign *c)
{
	uint32_t found = 0;

	for (uint32_t i = 0; i < c->nr_saved_slots; i++) {
		const struct snapd_memslot *s =
			slot_seen(c, c->saved_slots[i].as_id, c->saved_slots[i].gpa);

		found += s && s->slot == c->saved_slots[i].slot &&
			 s->size_bytes == c->saved_slots[i].size_bytes &&
			 s->hva == c->saved_slots[i].hva;
	}
	if (found != c->nr_slots || c->nr_slots != c->nr_saved_slots)
		missed("a rollback brought other memslots");
}

void op_rollback(struct campaign *c)
{
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	if (!saved_is_whole(c))
		return;
	fake_pause(&c->s, SNAPD_PAUSE_NO_STATE);
	live_update(&c->live, &c->s);
	fake_rewrite(&c->s, (struct snapd_point){1, 1});
	image_write(&c->saved, &c->live);
	gpaset_clear(&c->s.dirty, c->s.shm->nr_frames);
	fake_load(&c->s, c->saved_state, c->saved_len);
	live_update(&c->live, &c->s);
	image_clone(&c->kept, &c->saved);
	for (enum mem_id i = DIMM0; i <= DIMM1; i++) /* plugged since: given up */
		if (!c->mem[i].in_saved)
			mem_destroy(&c->mem[i]);
	check_slots(c);
	fake_resume(&c->s);
	c->rollbacks++;
}

/* The sets and what was copied survive; who is told what does not. */
void op_reconnect(struct campaign *c)
{
	fake_close(&c->s);
	fake_open_on(c->listen_fd, &c->s);
	live_reconnected(&c->live);
	live_update(&c->live, &c->s);
	live_settle(&c->live);
	c->reconnects++;
}

const struct snapd_vm_callbacks hazard_callbacks = {.size_bytes = sizeof(struct snapd_vm_callbacks),
						    .quiesce = on_quiesce,
						    .save = on_save,
						    .load = on_load,
						    .layout = on_layout};

static void consumer_check(struct campaign *c, struct consumer *k)
{
	uint64_t gfns[64];
	int again = 0;
	long n;

	/* Whatever the agent has, the service is told: so the pieces are known. */
	fake_sync(&c->s);
	live_update(&c->live, &c->s);
	image_fit(&k->im, &c->live);
	/* The backup bitmaps are read in a pause only; the service's set keeps its bits. */
	close(fake_pause(&c->s, 0));
	while ((n = snapd_consumer_take(k->c, gfns, ARRAY_SIZE(gfns), again)) > 0) {
		again = 1;
		for (long i = 0; i < n; i++)
			if (live_page(&c->live, gfns[i]))
				image_copy(&k->im, gfns[i], live_page(&c->live, gfns[i]));
	}
	check(n == 0, "take: %ld", n);
	image_check(&k->im, &c->live, "consumer");
	fake_resume(&c->s);
	c->checks++;
}

void op_consumer(struct campaign *c)
{
	struct consumer *k = &c->consumers[below(c, CONSUMERS)];

	if (!k->c) {
		check(!snapd_consumer_create(c->agent, "one", &k->c), "%s", snapd_vm_error(NULL));
	} else if (below(c, 4) == 0) {
		snapd_consumer_destroy(k->c);
		image_deinit(&k->im);
		k->c = NULL;
		return;
	}
	consumer_check(c, k);
}
