/* SPDX-License-Identifier: MIT */
/* A check of the store as a job; see checkup.h. */
#include "snapd/daemon/checkup.h"

#include "snapd/daemon/daemon.h"
#include "snapd/util/log.h"

#define LINES_MAX 1000u /* of damages, and of losses; the counts tell the rest */

struct checkup {
	struct job *job;
	json_t *damages, *losses; /* owned */
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

	log_err("store check: %s", d->text);
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

static void on_loss(void *opaque, const struct store_loss *l)
{
	struct checkup *c = opaque;

	log_err("store check: snapshot %llu of %s is lost: %s", (unsigned long long)l->snapshot,
		l->vm_name, l->whole ? "its map or its state" : "some of its pages");
	if (json_array_size(c->losses) < LINES_MAX)
		json_array_append_new(c->losses, loss_json(l));
}

int check_job(struct job *job, struct err *e)
{
	struct checkup c = {.job = job, .damages = json_array(), .losses = json_array()};
	struct store_check_config config = {
		.read_data = json_is_true(json_object_get(job->args, "read_data")),
		.percent = (uint32_t)json_integer_value(json_object_get(job->args, "percent")),
		.rate_bytes = (uint64_t)json_integer_value(json_object_get(job->args, "rate")),
		.step = on_step,
		.damage = on_damage,
		.loss = on_loss,
		.opaque = &c};
	struct store_check_result r;
	int rc;

	job->unit = "bytes";
	atomic_store(&job->phase, config.read_data ? "reading everything" : "checking");
	rc = store_check(job->daemon->store, &config, &r, e);
	if (!rc)
		job->result = json_pack("{sb sO sI sO sI sI sI sI sI sI sI}", "whole", !r.damages,
					"damages", c.damages, "nr_damages", (json_int_t)r.damages,
					"losses", c.losses, "nr_losses", (json_int_t)r.losses,
					"records", (json_int_t)r.records, "segments",
					(json_int_t)r.segments, "batches", (json_int_t)r.batches,
					"blobs", (json_int_t)r.blobs, "pages_read",
					(json_int_t)r.pages_read, "bytes_read",
					(json_int_t)r.bytes_read);
	json_decref(c.damages);
	json_decref(c.losses);
	if (!rc && !job->result)
		rc = err_errno(e, ENOMEM, "check");
	return rc;
}
