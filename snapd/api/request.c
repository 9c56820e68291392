/* SPDX-License-Identifier: MIT */
/*
 * api_request: the life of a request: route, body, handler, answer.  Control
 * thread; see api_request.h for what handlers may do.
 *
 * MHD calls api_request_step() once per step:
 *   headers:  find the route; import: start the job that reads the body
 *   body:     collect (64 KiB at most) or hand to the import's stream
 *   complete: the handler answers or parks
 * and api_request_over() when it was answered or the client is gone.
 */
#include "snapd/core/json.h"
#include "snapd/api/priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "snapd/core/job.h"
#include "snapd/core/stream.h"
#include "snapd/util/cleanup.h"

uint64_t api_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

/* ---- answers ---- */

static unsigned int status_of(int code)
{
	static const struct {
		const char *name;
		unsigned int status;
	} map[] = {
		{"invalid", 400},	{"forbidden", 403}, {"not-found", 404},
		{"bad-method", 405},	{"exists", 409},    {"busy", 409},
		{"not-connected", 409}, {"cancelled", 409}, {"unsupported", 409},
		{"too-large", 413},	{"stopping", 503},  {"no-space", 507},
	};

	for (size_t i = 0; i < ARRAY_SIZE(map); i++)
		if (!strcmp(map[i].name, err_name(code)))
			return map[i].status;
	return 500;
}

int api_reply_response(struct api_request *req, unsigned int status, struct MHD_Response *r)
{
	int rc = -ENOMEM;

	if (!r)
		return -ENOMEM;
	MHD_add_response_header(r, "Cache-Control", "no-store");
	if (status == 405 && req->seg[0])
		MHD_add_response_header(r, "Allow", req->seg[0]);
	if (MHD_queue_response(req->conn, status, r) == MHD_YES)
		rc = 0;
	MHD_destroy_response(r);
	return rc;
}

static int reply_owned(struct api_request *req, unsigned int status, const char *type, char *text)
{
	struct MHD_Response *r;

	if (!text)
		return -ENOMEM;
	r = MHD_create_response_from_buffer(strlen(text), text, MHD_RESPMEM_MUST_FREE);
	if (!r) {
		free(text);
		return -ENOMEM;
	}
	MHD_add_response_header(r, "Content-Type", type);
	return api_reply_response(req, status, r);
}

int api_reply_json(struct api_request *req, unsigned int status, json_t *json_stolen)
{
	char *text = json_stolen ? json_text(json_stolen, JSON_COMPACT) : NULL;

	json_decref(json_stolen);
	return reply_owned(req, status, "application/json", text);
}

int api_reply_text(struct api_request *req, const char *content_type, char *text_stolen)
{
	return reply_owned(req, 200, content_type, text_stolen);
}

static int reply_error(struct api_request *req, int rc)
{
	if (!req->err.code)
		err_errno(&req->err, -rc, "%s", req->route ? req->route->path : "request");
	err_ascii(&req->err); /* it may quote what the client sent: any bytes */
	return api_reply_json(req, status_of(req->err.code),
			      json_pack("{ss ss}", "error", req->err.text, "code",
					err_name(req->err.code)));
}

/* ---- what the client asked ---- */

static int hex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Percent-decode into a new string; NULL: malformed, a NUL inside, or no memory. */
static char *decode(const char *s, size_t len)
{
	char *out = malloc(len + 1), *o = out;

	for (size_t i = 0; out && i < len; i++) {
		int c = (unsigned char)s[i];

		if (c == '%') {
			int hi = i + 2 < len ? hex(s[i + 1]) : -1;
			int lo = i + 2 < len ? hex(s[i + 2]) : -1;

			c = hi < 0 || lo < 0 ? 0 : hi << 4 | lo;
			i += 2;
		}
		if (!c) {
			free(out);
			return NULL;
		}
		*o++ = (char)c;
	}
	if (out)
		*o = '\0';
	return out;
}

char *api_query(struct api_request *req, const char *name)
{
	const char *v = MHD_lookup_connection_value(req->conn, MHD_GET_ARGUMENT_KIND, name);

	return v ? decode(v, strlen(v)) : NULL;
}

int api_query_u64(struct api_request *req, const char *name, uint64_t absent, uint64_t *ret)
{
	const char *v = MHD_lookup_connection_value(req->conn, MHD_GET_ARGUMENT_KIND, name);
	char *end;

	*ret = absent;
	if (!v)
		return 0;
	errno = 0;
	*ret = strtoull(v, &end, 10);
	if (errno || *end || *v < '0' || *v > '9')
		return err_set(&req->err, EINVAL, "%s=%.32s: not a number", name, v);
	return 0;
}

int api_body_keys(struct api_request *req, const char *const *keys)
{
	const char *key;
	json_t *value;

	json_object_foreach(req->json, key, value)
	{
		const char *const *k = keys;

		while (*k && strcmp(*k, key) != 0)
			k++;
		if (!*k)
			return err_set(&req->err, EINVAL, "unknown key \"%.40s\" in the request",
				       key);
	}
	return 0;
}

/* Does `url` (still encoded) have the shape of `pattern`?  What stands for {…} goes
 * to seg[], encoded as [start, len). */
static bool match(const char *pattern, const char *url, const char *seg[], size_t seg_len[])
{
	size_t n = 0;

	while (*pattern == '/' && *url == '/') {
		size_t pl = strcspn(++pattern, "/"), ul = strcspn(++url, "/");

		if (*pattern == '{') {
			if (!ul || n == API_SEGS_MAX)
				return false;
			seg[n] = url;
			seg_len[n++] = ul;
		} else if (pl != ul || memcmp(pattern, url, pl) != 0) {
			return false;
		}
		pattern += pl;
		url += ul;
	}
	for (; n < API_SEGS_MAX; n++)
		seg[n] = NULL;
	return !*pattern && !*url;
}

static int find_route(struct api_request *req, const char *method, const char *url)
{
	const char *seg[API_SEGS_MAX];
	size_t seg_len[API_SEGS_MAX];
	char allow[64] = "";

	for (size_t i = 0; i < api_nr_routes; i++) {
		const struct api_route *r = &api_routes[i];

		if (!match(r->path, url, seg, seg_len))
			continue;
		if (strcmp(r->method, method) != 0) {
			snprintf(allow + strlen(allow), sizeof(allow) - strlen(allow), "%s%s",
				 *allow ? ", " : "", r->method);
			continue;
		}
		for (size_t s = 0; s < API_SEGS_MAX && seg[s]; s++) {
			req->seg[s] = decode(seg[s], seg_len[s]);
			if (!req->seg[s])
				return err_set(&req->err, EINVAL, "bad %%-encoding in the path");
		}
		req->route = r;
		return 0;
	}
	if (*allow) {
		req->seg[0] = strdup(allow);
		return err_set(&req->err, ENOSYS, "%.16s is not possible here, only %s", method,
			       allow);
	}
	return err_set(&req->err, ENOENT, "no such path: %.200s", url);
}

/* ---- life of a request ---- */

int api_park(struct api_request *req, bool (*ready)(struct api_request *),
	     int (*again)(struct api_request *), uint32_t timeout_ms)
{
	struct api *api = req->api;

	if (api->stopping)
		return err_set(&req->err, ESHUTDOWN, "the service is stopping");
	req->ready = ready;
	req->again = again;
	req->deadline_ms = timeout_ms ? api_now_ms() + timeout_ms : UINT64_MAX;
	req->parked = true;
	req->next = api->parked;
	req->pprev = &api->parked;
	if (req->next)
		req->next->pprev = &req->next;
	api->parked = req;
	MHD_suspend_connection(req->conn);
	if (ready(req)) /* since before: no wake-up will come for it */
		daemon_wake(req->daemon);
	return 0;
}

void api_unpark(struct api_request *req)
{
	*req->pprev = req->next;
	if (req->next)
		req->next->pprev = req->pprev;
	req->parked = false;
	MHD_resume_connection(req->conn);
}

bool api_stopping(const struct api_request *req)
{
	return req->api->stopping;
}

static struct conn *conn_of(struct MHD_Connection *c)
{
	const union MHD_ConnectionInfo *info =
		MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);

	return info ? info->socket_context : NULL;
}

static struct api_request *request_new(struct api *api, struct MHD_Connection *c)
{
	struct conn *conn = conn_of(c);
	struct api_request *req = conn ? calloc(1, sizeof(*req)) : NULL;

	if (!req)
		return NULL;
	req->api = api;
	req->daemon = api->daemon;
	req->conn = c;
	req->uid = conn->uid;
	req->view = conn->uid == geteuid() ? 0 : conn->uid;
	return req;
}

void api_request_over(void *cls, struct MHD_Connection *c, void **con_cls,
		      enum MHD_RequestTerminationCode why)
{
	struct api_request *req = *con_cls;

	if (!req)
		return;
	*con_cls = NULL;
	if (req->stream)
		stream_unref(req->stream, STREAM_CLIENT);
	job_unref(req->job);
	json_decref(req->json);
	for (size_t i = 0; i < API_SEGS_MAX; i++)
		free(req->seg[i]);
	free(req->body);
	free(req);
}

/* Over the limit the rest is read and dropped, within reason: a client that is
 * cut off while it sends never sees the answer. */
static enum MHD_Result collect_body(struct api_request *req, const char *data, size_t len)
{
	char *p;

	if (req->err.code || req->body_len + len > API_BODY_MAX) {
		err_set(&req->err, EMSGSIZE, "the request has more than %u KiB",
			API_BODY_MAX >> 10);
		req->body_len += len;
		return req->body_len < 16 * API_BODY_MAX ? MHD_YES : MHD_NO;
	}
	p = realloc(req->body, req->body_len + len + 1);
	if (!p)
		return MHD_NO;
	memcpy(p + req->body_len, data, len);
	req->body = p;
	req->body_len += len;
	p[req->body_len] = '\0';
	return MHD_YES;
}

static int parse_body(struct api_request *req)
{
	json_error_t je = {0};

	if (!req->body_len)
		req->json = json_object();
	else
		req->json = json_loadb(req->body, req->body_len, JSON_REJECT_DUPLICATES, &je);
	if (!req->json)
		return err_set(&req->err, EINVAL, "request is not JSON: %s (line %d)", je.text,
			       je.line);
	if (!json_is_object(req->json))
		return err_set(&req->err, EINVAL, "request is not a JSON object");
	return 0;
}

static int complete(struct api_request *req)
{
	int (*again)(struct api_request *) = req->again;

	if (again) {
		req->again = NULL;
		return again(req);
	}
	if (req->err.code)
		return req->err.code;
	if (!req->json && parse_body(req))
		return req->err.code;
	return req->route->fn(req);
}

static bool body_too_large(struct api_request *req)
{
	const char *v = MHD_lookup_connection_value(req->conn, MHD_HEADER_KIND, "Content-Length");

	return v && !req->stream && strtoull(v, NULL, 10) > API_BODY_MAX;
}

static enum MHD_Result headers(struct api *api, struct MHD_Connection *c, const char *url,
			       const char *method, void **con_cls)
{
	struct api_request *req = request_new(api, c);

	if (!req)
		return MHD_NO;
	*con_cls = req;
	find_route(req, method, url);
	if (req->route && req->route->fn == api_post_import)
		api_import_begin(req); /* its failure is told once the body is over */
	if (body_too_large(req)) {
		err_set(&req->err, EMSGSIZE, "the request has more than %u KiB",
			API_BODY_MAX >> 10);
		return reply_error(req, -EMSGSIZE) ? MHD_NO : MHD_YES;
	}
	return MHD_YES;
}

/* MHD's access handler; called again for each step, see above. */
enum MHD_Result api_request_step(void *cls, struct MHD_Connection *c, const char *url,
				 const char *method, const char *version, const char *data,
				 size_t *len, void **con_cls)
{
	struct api_request *req = *con_cls;
	int rc;

	if (!req)
		return headers(cls, c, url, method, con_cls);
	if (*len) {
		if (req->stream)
			return api_import_data(req, data, len) < 0 ? MHD_NO : MHD_YES;
		rc = collect_body(req, data, *len);
		*len = 0;
		return rc;
	}
	rc = complete(req);
	if (rc < 0)
		rc = reply_error(req, rc);
	return rc ? MHD_NO : MHD_YES;
}
