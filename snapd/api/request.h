/* SPDX-License-Identifier: MIT */
/*
 * api_request: one HTTP request as the handlers of api_*.c see it.  All on the
 * control thread.
 *
 * A handler (struct api_route.fn) runs when the whole body is there, and either
 * answers (api_reply…) and returns 0, or returns -errno with the reason in
 * req->err, which becomes the answer, or parks the request: the connection is
 * suspended, no thread waits, and `again` is called when `ready` says so or the
 * time is over.  Handlers never block: what touches the disk is a job.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include <jansson.h>
#include <microhttpd.h>

#include "snapd/api/api.h"
#include "snapd/core/daemon.h"
#include "snapd/util/err.h"

#define API_BODY_MAX	(64u << 10)
#define API_SEGS_MAX	2
#define API_WAIT_MS_MAX 60000

struct api;

struct api_request {
	struct api *api;
	struct daemon *daemon;
	struct MHD_Connection *conn;
	const struct api_route *route; /* NULL: none, see `err` */
	uid_t uid;		       /* of the peer: owner of what it makes */
	uid_t view; /* 0: sees everything (root, and the daemon's own user); else uid */
	char *seg[API_SEGS_MAX]; /* what stood for {…} in the path, decoded; owned */
	char *body;		 /* owned; NUL-terminated */
	size_t body_len;
	json_t *json; /* the body; an empty object when there was none; owned */
	struct err err;
	/* parked */
	bool parked;
	uint64_t deadline_ms; /* CLOCK_MONOTONIC */
	bool (*ready)(struct api_request *req);
	int (*again)(struct api_request *req);
	struct api_request *next, **pprev;
	/* handlers' own */
	struct job *job;       /* a reference */
	int job_state_seen;    /* enum job_state at the time of parking */
	struct stream *stream; /* import: where the body goes; a reference */
};

/* Answers; each returns 0, or -ENOMEM.  api_reply_json() takes the reference. */
int api_reply_json(struct api_request *req, unsigned int status, json_t *json_stolen);
int api_reply_text(struct api_request *req, const char *content_type, char *text_stolen);
int api_reply_response(struct api_request *req, unsigned int status, struct MHD_Response *r);

/* Suspend until ready() (looked at on each api_wake()) or timeout_ms; then again().
 * timeout_ms 0: no limit. */
int api_park(struct api_request *req, bool (*ready)(struct api_request *),
	     int (*again)(struct api_request *), uint32_t timeout_ms);
bool api_stopping(const struct api_request *req);

/* A query parameter, decoded, in a malloc()ed string; NULL when absent. */
char *api_query(struct api_request *req, const char *name);
/* The same as a number; `absent` when it is not there; -EINVAL. */
int api_query_u64(struct api_request *req, const char *name, uint64_t absent, uint64_t *ret);
/* Check that the body has no keys but these (NULL-terminated). */
int api_body_keys(struct api_request *req, const char *const *keys);

/* api/vms.c: a text of the body, without control characters, of at most 255 bytes; NULL:
 * not there, or null. */
int api_body_text(struct api_request *req, const char *key, const char **ret);

/* -EPERM for anyone but root (and the daemon's own user). */
int api_root_only(struct api_request *req, const char *what);

/* api/jobs.c: run `job` (consumed) on a job thread, answer 202 with it. */
int api_start_job(struct api_request *req, struct job *job_stolen);
int api_reply_job(struct api_request *req, unsigned int status, struct job *job);
/* Parked requests: has req->job ended, or left the state it was in? */
bool api_job_ended(struct api_request *req);

/* api/snapshots.c: the snapshot of seg[n] or of any text that this user may see. */
struct store_snapshot;
int api_find_snapshot(struct api_request *req, const char *selector, struct store_snapshot *ret);

/* Handlers. */
int api_get_version(struct api_request *req);
int api_get_metrics(struct api_request *req);
int api_get_vms(struct api_request *req);
int api_get_vm(struct api_request *req);
int api_post_snapshot(struct api_request *req);
int api_post_rollback(struct api_request *req);
int api_post_self_check(struct api_request *req);
int api_get_snapshots(struct api_request *req);
int api_get_snapshot(struct api_request *req);
int api_delete_snapshot(struct api_request *req);
int api_patch_snapshot(struct api_request *req);
int api_delete_vm(struct api_request *req);
int api_get_tags(struct api_request *req);
int api_patch_tags(struct api_request *req);
int api_post_account(struct api_request *req);
int api_get_scrub(struct api_request *req);
int api_post_scrub(struct api_request *req);
int api_post_repair(struct api_request *req);
int api_post_check(struct api_request *req);
int api_post_prune(struct api_request *req);
int api_post_verify(struct api_request *req);
int api_get_diff(struct api_request *req);
int api_get_memory(struct api_request *req);
int api_get_state(struct api_request *req);
int api_post_import(struct api_request *req);
int api_get_policies(struct api_request *req);
int api_get_policy(struct api_request *req);
int api_put_policy(struct api_request *req);
int api_patch_policy(struct api_request *req);
int api_delete_policy(struct api_request *req);
int api_post_policy_run(struct api_request *req);
int api_get_jobs(struct api_request *req);
int api_get_job(struct api_request *req);
int api_delete_job(struct api_request *req);
int api_post_gc(struct api_request *req);
int api_post_backup_push(struct api_request *req);
int api_post_backup_pull(struct api_request *req);
int api_post_backup_list(struct api_request *req);
int api_post_backup_verify(struct api_request *req);
int api_post_backup_forget(struct api_request *req);
int api_post_backup_prune(struct api_request *req);
int api_post_backup_status(struct api_request *req);
int api_get_store_stats(struct api_request *req);

/* api/transfer.c: an import's body as it comes in.  Consumes up to *len bytes and
 * lowers it by as much; 1: parked until there is room. */
int api_import_begin(struct api_request *req);
int api_import_data(struct api_request *req, const char *data, size_t *len);
