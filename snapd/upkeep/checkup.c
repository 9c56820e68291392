/* SPDX-License-Identifier: MIT */
/* A check of the store as a job; see checkup.h. */
#include "snapd/upkeep/checkup.h"

#include <stdlib.h>

#include "snapd/core/daemon.h"
#include "snapd/upkeep/scrub.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define LINES_MAX 1000u /* of damages, and of losses; the counts tell the rest */

struct checkup {
	struct job *job;
	json_t *damages, *losses; /* owned */
	uint64_t *lost;		  /* owned; snapshots */
	size_t nr_lost, cap_lost;
	bool no_memory;
};

static bool on_step(void *opaque, uint64_t done, uint64_t total)
{
	struct job *job = ((struct checkup *)opaque)->job;

	atomic_store(&job->total, total);
	atomic_store(&job->done, done);
	return atomic_load(&job->cancel);
}

static void on_damage(void *opaque, const struct store_damage *d)
{
	struct checkup *c = opaque;

	log_event(LOG_STORE_DAMAGED, LOG_LVL_ERR, "store check: %s", d->text);
	if (json_array_size(c->damages) < LINES_MAX)
		json_array_append_new(c->damages,
				      json_pack("{ss ss}", "kind", damage_kind_names[d->kind],
						"text", d->text));
}

json_t *loss_json(const struct store_loss *l)
{
	json_t *ranges = json_array();

	for (uint32_t i = 0; i < l->nr_ranges; i++)
		json_array_append_new(ranges,
				      json_pack("[II]", (json_int_t)l->ranges[i][0] * l->page_size,
						(json_int_t)l->ranges[i][1] * l->page_size));
	return json_pack("{sI ss sI sb sI so}", "snapshot", (json_int_t)l->snapshot, "vm",
			 l->vm_name, "page_size", (json_int_t)l->page_size, "whole", l->whole,
			 "pages", (json_int_t)l->nr_pages, "ranges", ranges);
}

static void note_lost(struct checkup *c, uint64_t snapshot)
{
	if (c->nr_lost == c->cap_lost) {
		size_t cap = c->cap_lost ? c->cap_lost * 2 : 16;
		uint64_t *p = realloc(c->lost, cap * sizeof(*p));

		c->no_memory |= !p;
		if (!p)
			return;
		c->lost = p;
		c->cap_lost = cap;
	}
	c->lost[c->nr_lost++] = snapshot;
}

static void on_loss(void *opaque, const struct store_loss *l)
{
	struct checkup *c = opaque;

	note_lost(c, l->snapshot);
	log_about()->snapshot = l->snapshot;
	log_event(LOG_STORE_DAMAGED, LOG_LVL_ERR, "store check: snapshot %llu of %s is lost: %s",
		  (unsigned long long)l->snapshot, l->vm_name,
		  l->whole ? "its map or its state" : "some of its pages");
	log_about()->snapshot = 0;
	if (json_array_size(c->losses) < LINES_MAX)
		json_array_append_new(c->losses, loss_json(l));
}

/* ---- jobs ---- */

static int check_with(struct checkup *c, bool read_data, struct store_check_result *r,
		      struct err *e)
{
	struct job *job = c->job;
	struct store_check_config config = {
		.read_data = read_data,
		.percent = (uint32_t)json_integer_value(json_object_get(job->args, "percent")),
		.rate_bytes = (uint64_t)json_integer_value(json_object_get(job->args, "rate")),
		.step = on_step,
		.damage = on_damage,
		.loss = on_loss,
		.opaque = c};

	job->unit = "bytes";
	atomic_store(&job->phase, read_data ? "reading everything" : "checking");
	return store_check(job->daemon->store, &config, r, e);
}

static json_t *result_json(const struct checkup *c, const struct store_check_result *r)
{
	return json_pack("{sb sO sI sO sI sI sI sI sI sI sI}", "whole", !r->damages, "damages",
			 c->damages, "nr_damages", (json_int_t)r->damages, "losses", c->losses,
			 "nr_losses", (json_int_t)r->losses, "records", (json_int_t)r->records,
			 "segments", (json_int_t)r->segments, "batches", (json_int_t)r->batches,
			 "blobs", (json_int_t)r->blobs, "pages_read", (json_int_t)r->pages_read,
			 "bytes_read", (json_int_t)r->bytes_read);
}

static void checkup_init(struct checkup *c, struct job *job)
{
	*c = (struct checkup){.job = job, .damages = json_array(), .losses = json_array()};
}

static void checkup_deinit(struct checkup *c)
{
	json_decref(c->damages);
	json_decref(c->losses);
	free(c->lost);
}

int check_job(struct job *job, struct err *e)
{
	_cleanup_(checkup_deinit) struct checkup c;
	struct scrub_figures scrubbed;
	struct store_check_result r;
	int rc;

	checkup_init(&c, job);
	rc = check_with(&c, json_is_true(json_object_get(job->args, "read_data")), &r, e);
	if (rc)
		return rc;
	job->result = result_json(&c, &r);
	if (!job->result)
		return err_errno(e, ENOMEM, "check");
	scrub_figures(job->daemon->scrub, &scrubbed);
	json_object_set_new(job->result, "scrub_damages",
			    json_integer((json_int_t)scrubbed.damages));
	return 0;
}

/* Snapshots that can't be had whole any more: forgotten, pinned or not.  What others
 * share with them stays. */
static int drop_lost(struct checkup *c, uint64_t *dropped, struct err *e)
{
	struct snapshot_change unpin = {.pin = SNAPSHOT_PIN_CLEAR};
	struct store *s = c->job->daemon->store;

	if (c->no_memory)
		return err_errno(e, ENOMEM, "repair");
	for (size_t i = 0; i < c->nr_lost; i++) {
		struct err why = {0};
		int rc = store_snapshot_change(s, c->lost[i], &unpin, &why);

		if (!rc)
			rc = store_snapshot_delete(s, c->lost[i], &why);
		if (rc == -ENOENT) /* deleted meanwhile */
			continue;
		if (rc)
			return err_set(e, -rc, "%s", why.text);
		++*dropped;
		log_notice("store repair: dropped snapshot %llu", (unsigned long long)c->lost[i]);
	}
	return 0;
}

int repair_job(struct job *job, struct err *e)
{
	bool dry = json_is_true(json_object_get(job->args, "dry_run"));
	_cleanup_(checkup_deinit) struct checkup c;
	struct store_check_result r;
	uint64_t dropped = 0;
	int rc;

	checkup_init(&c, job);
	rc = check_with(&c, true, &r, e);
	if (!rc && !dry)
		rc = drop_lost(&c, &dropped, e);
	if (rc)
		return rc;
	job->result = result_json(&c, &r);
	if (!job->result)
		return err_errno(e, ENOMEM, "repair");
	json_object_set_new(job->result, "dropped", json_integer((json_int_t)dropped));
	json_object_set_new(job->result, "dry_run", json_boolean(dry));
	return 0;
}
