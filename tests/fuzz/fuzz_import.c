/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as an import, into a real store.  The hash at the end is put right when
 * the first byte says so, and the whole may be cut off.  Whatever the job answers, a
 * refused import leaves nothing, and an accepted one can be read.
 */
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "snapd/transfer/transfer.h"
#include "snapd/util/cleanup.h"
#include "snapd/vm/vm.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/service.h"

#define INPUT_MAX (1u << 20) /* the stream holds more: nobody waits */

static struct service service;

static void stop(void)
{
	service_stop(&service);
}

static uint64_t nr_snapshots(void)
{
	struct store_stats stats;

	PROMISE(!store_get_stats(service.d.store, &stats, NULL));
	return stats.snapshots;
}

/* Put what follows the state under the hash that its reader expects. */
static void send(struct stream *s, const uint8_t *data, size_t len, bool hashed)
{
	const uint8_t *line = memchr(data, '\n', len);
	struct xfer_end end = {.extent = {XFER_END, sizeof(end) - sizeof(end.extent)}};
	json_t *head = line ? json_loadb((const char *)data, (size_t)(line - data), 0, NULL) : NULL;
	uint64_t state = (uint64_t)json_integer_value(json_object_get(head, "state_bytes"));
	XXH128_hash_t h;
	size_t at;

	stream_client_write(s, data, len);
	at = line ? (size_t)(line - data) + 1 : len;
	if (hashed && state <= len - at) {
		h = XXH3_128bits(data + at + state, len - at - state);
		end.hash_lo = h.low64;
		end.hash_hi = h.high64;
		stream_client_write(s, &end, sizeof(end));
	}
	json_decref(head);
}

static void verify_and_drop(uint64_t id)
{
	struct store_snapshot snap;
	struct pagemap *m;
	struct err e = {0};

	PROMISE(!store_snapshot_get(service.d.store, id, &snap, &e));
	PROMISE(!store_map_load(service.d.store, snap.point, false, &m, &e));
	pagemap_destroy(m);
	PROMISE(!store_snapshot_delete(service.d.store, id, &e));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static bool started;
	struct stream *s;
	struct transfer *t;
	struct job *job;
	struct err e = {0};
	uint64_t before;
	int r;

	if (!started) {
		service_start(&service, NULL);
		atexit(stop);
		started = true;
	}
	if (!len)
		return 0;
	len = MIN(len, (size_t)INPUT_MAX);
	before = nr_snapshots();
	PROMISE(!stream_create(&service.d, &s));
	send(s, data + 1, len - 1, data[0] & 1);
	if (!(data[0] & 2))
		stream_end(s);
	stream_unref(s, STREAM_CLIENT);
	t = transfer_new(s);
	job = job_new(&service.d, JOB_IMPORT, 1000, json_object(), import_job);
	PROMISE(t && job);
	job->ctx = t;
	job->ctx_free = transfer_free;
	r = import_job(job, &e);
	PROMISE((r == 0) == !e.text[0]);
	PROMISE(nr_snapshots() == before + (r == 0));
	if (r == 0)
		verify_and_drop(
			(uint64_t)json_integer_value(json_object_get(job->result, "snapshot")));
	job_fail(job, ECANCELED, "done");
	job_unref(job);
	return 0;
}
