/* SPDX-License-Identifier: MIT */
/*
 * api_transfer: memory and state of a snapshot as a download, an import as an
 * upload.  Control thread; the other end of each stream is a job (transfer.c).
 *
 * Errors that are known before the first byte of an answer are answers; after it,
 * the connection is cut short of the Content-Length that was promised.
 */
#include "snapd/api/request.h"

#include <stdlib.h>
#include <string.h>

#include "snapd/transfer/transfer.h"
#include "snapd/util/cleanup.h"

#define RESPONSE_BUF_BYTES (512u << 10)

/* The request's job with a transfer as its context, not started. */
static int make_job(struct api_request *req, enum job_kind kind, json_t *args_stolen,
		    struct stream *job_side_stolen, int (*fn)(struct job *, struct err *))
{
	struct transfer *t = transfer_new(job_side_stolen);

	if (!t) {
		json_decref(args_stolen);
		return -ENOMEM;
	}
	req->job = job_new(req->daemon, kind, req->uid, args_stolen, fn);
	if (!req->job) {
		transfer_free(t);
		return -ENOMEM;
	}
	req->job->ctx = t;
	req->job->ctx_free = transfer_free;
	req->job->over = transfer_over;
	return 0;
}

static int start_job(struct api_request *req)
{
	int rc = job_run_detached(req->job);

	if (rc == -EBUSY)
		err_set(&req->err, EBUSY, "too many jobs of yours are queued; try later");
	if (rc)
		job_fail(req->job, -rc, "%s", req->err.code ? req->err.text : strerror(-rc));
	return rc;
}

/* The error of a job that failed, as the request's. */
static int job_error(struct api_request *req)
{
	pthread_mutex_lock(&req->job->lock);
	req->err = req->job->err;
	pthread_mutex_unlock(&req->job->lock);
	return req->err.code < 0 ? req->err.code : -EIO;
}

/* ---- memory ---- */

/* What a response reads from; lives until MHD destroys the response. */
struct download {
	struct api_request *req; /* valid while MHD asks for bytes */
	struct stream *stream;	 /* the client's reference */
	struct job *job;	 /* a reference */
};

static bool download_ready(struct api_request *req)
{
	return stream_client_ready(req->stream);
}

static ssize_t download_read(void *cls, uint64_t pos, char *buf, size_t max)
{
	struct download *dl = cls;
	long n = stream_client_read(dl->stream, buf, max);

	if (n > 0)
		return n;
	if (n < 0 || api_park(dl->req, download_ready, NULL, 0))
		return MHD_CONTENT_READER_END_WITH_ERROR;
	return 0;
}

static void download_free(void *cls)
{
	struct download *dl = cls;

	job_cancel(dl->job); /* no effect when it has ended */
	job_unref(dl->job);
	free(dl);
}

static bool memory_ready(struct api_request *req)
{
	struct transfer *t = req->job->ctx;

	return atomic_load(&t->prepared) || api_job_ended(req);
}

static int memory_reply(struct api_request *req)
{
	struct transfer *t = req->job->ctx;
	struct MHD_Response *r;
	struct download *dl;

	if (!atomic_load(&t->prepared))
		return api_job_ended(req)
			       ? job_error(req)
			       : err_set(&req->err, ESHUTDOWN, "the service is stopping");
	dl = malloc(sizeof(*dl));
	if (!dl)
		return -ENOMEM;
	*dl = (struct download){.req = req, .stream = req->stream, .job = job_ref(req->job)};
	r = MHD_create_response_from_callback(atomic_load(&t->total_bytes), RESPONSE_BUF_BYTES,
					      download_read, dl, download_free);
	if (!r) {
		job_unref(dl->job);
		free(dl);
		return -ENOMEM;
	}
	MHD_add_response_header(r, "Content-Type", XFER_MEMORY_TYPE);
	return api_reply_response(req, 200, r);
}

int api_get_memory(struct api_request *req)
{
	struct store_snapshot s;
	int rc = api_find_snapshot(req, req->seg[0], &s);

	if (!rc)
		rc = stream_create(req->daemon, &req->stream);
	if (!rc)
		rc = make_job(req, JOB_EXPORT, json_pack("{sI}", "snapshot", (json_int_t)s.id),
			      req->stream, export_job);
	if (!rc)
		rc = start_job(req);
	return rc ? rc : api_park(req, memory_ready, memory_reply, 0);
}

/* ---- state ---- */

static int state_reply(struct api_request *req)
{
	struct transfer *t = req->job->ctx;

	if (!api_job_ended(req))
		return err_set(&req->err, ESHUTDOWN, "the service is stopping");
	if (!t->text)
		return job_error(req);
	return api_reply_text(req, "application/json", steal_ptr(&t->text));
}

/* ?payload=0 leaves the bytes of the records out. */
int api_get_state(struct api_request *req)
{
	struct store_snapshot s;
	struct transfer *t;
	uint64_t payload;
	int rc = api_query_u64(req, "payload", 1, &payload);

	if (!rc)
		rc = api_find_snapshot(req, req->seg[0], &s);
	if (!rc)
		rc = make_job(req, JOB_EXPORT,
			      json_pack("{sI ss}", "snapshot", (json_int_t)s.id, "what", "state"),
			      NULL, state_job);
	if (rc)
		return rc;
	t = req->job->ctx;
	t->with_payload = payload;
	rc = start_job(req);
	return rc ? rc : api_park(req, api_job_ended, state_reply, 0);
}

/* ---- import ---- */

/* Called with the headers, before the body.  Errors wait in req->err until the
 * body is over. */
int api_import_begin(struct api_request *req)
{
	int rc = stream_create(req->daemon, &req->stream);

	if (!rc)
		rc = make_job(req, JOB_IMPORT, json_object(), req->stream, import_job);
	if (!rc)
		rc = start_job(req);
	return rc ? err_errno(&req->err, -rc, "import") : 0;
}

static bool upload_ready(struct api_request *req)
{
	return stream_client_ready(req->stream);
}

int api_import_data(struct api_request *req, const char *data, size_t *len)
{
	size_t n = stream_client_write(req->stream, data, *len);

	*len -= n;
	return *len ? api_park(req, upload_ready, NULL, 0) : 0;
}

static int import_reply(struct api_request *req)
{
	if (!api_job_ended(req))
		return err_set(&req->err, ESHUTDOWN, "the service is stopping");
	if (job_state_of(req->job) != JOB_DONE)
		return job_error(req);
	return api_reply_job(req, 201, req->job);
}

/* The body is over: wait for the commit. */
int api_post_import(struct api_request *req)
{
	stream_end(req->stream);
	return api_park(req, api_job_ended, import_reply, 0);
}
