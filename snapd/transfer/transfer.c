/* SPDX-License-Identifier: MIT */
/*
 * transfer: what an export and an import share: the stream whose other end is an
 * HTTP connection, as context of their job.  transfer.h has the format.
 */
#include "snapd/transfer/transfer.h"

#include <stdlib.h>

struct transfer *transfer_new(struct stream *stream_stolen)
{
	struct transfer *t = calloc(1, sizeof(*t));

	if (!t) {
		stream_unref(stream_stolen, STREAM_JOB);
		return NULL;
	}
	t->stream = stream_stolen;
	return t;
}

void transfer_free(void *transfer)
{
	struct transfer *t = transfer;

	if (!t)
		return;
	stream_unref(t->stream, STREAM_JOB);
	free(t->text);
	free(t);
}

void transfer_over(struct job *job)
{
	struct transfer *t = job->ctx;

	if (!t->stream)
		return;
	stream_unref(t->stream, STREAM_JOB);
	t->stream = NULL;
}

int transfer_failed(int rc, struct err *e)
{
	switch (rc) {
	case -ECANCELED:
		return err_set(e, ECANCELED, "the transfer was cancelled");
	case -EPIPE:
		return err_set(e, ECANCELED, "the client went away");
	case -ENODATA:
		return err_set(e, EINVAL, "the import ends too early");
	default:
		return err_errno(e, -rc, "transfer");
	}
}
