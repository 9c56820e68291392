/* SPDX-License-Identifier: MIT */
/*
 * api_http: the socket, its connections, and the life of a request.  Control
 * thread only; libmicrohttpd has no thread of its own and is run when its epoll
 * descriptor, our timer, or api_wake() says so.
 *
 *   accept ► peer's uid, limits ► MHD parses ► request() once per step:
 *     headers:  find the route; import: start the job that reads the body
 *     body:     collect (64 KiB at most) or hand to the import's stream
 *     complete: the handler answers or parks
 *   ► request_over() when answered or the client is gone
 *
 * Limits: 256 connections, 64 of one user; 256 KiB of buffers for headers and
 * output each; 64 KiB of JSON; 30 s without progress.  Beyond them a client gets
 * an error or is cut off; nothing else notices.
 *
 * A suspended connection belongs to the list of parked requests and is resumed
 * by this file alone, so that a job thread never touches a connection.
 */
#include "snapd/api_request.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>

#include "snapd/job.h"
#include "snapd/stream.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define CONNS_MAX      256
#define CONNS_USER_MAX 64
#define CONN_TIMEOUT_S 30
#define CONN_BUF_BYTES (256u << 10)
#define RUNS_PER_WAKE  32

struct conn {
	uid_t uid;
	struct conn *next, **pprev;
};

struct api {
	struct daemon *daemon;
	struct MHD_Daemon *mhd;
	struct loop_source listen_src, mhd_src, timer_src;
	int spare_fd; /* given up for a moment when descriptors run out */
	char *path;
	struct conn *conns;
	uint32_t nr_conns;
	struct api_request *parked;
	bool stopping;
};

#define api_of(src, member) ((struct api *)((char *)(src)-offsetof(struct api, member)))

static uint64_t now_ms(void)
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
	char *text = json_stolen ? json_dumps(json_stolen, JSON_COMPACT) : NULL;

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

		while (*k && strcmp(*k, key))
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
		} else if (pl != ul || memcmp(pattern, url, pl)) {
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
		if (strcmp(r->method, method)) {
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
	req->deadline_ms = timeout_ms ? now_ms() + timeout_ms : UINT64_MAX;
	req->parked = true;
	req->next = api->parked;
	req->pprev = &api->parked;
	if (req->next)
		req->next->pprev = &req->next;
	api->parked = req;
	MHD_suspend_connection(req->conn);
	return 0;
}

static void unpark(struct api_request *req)
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

static void request_over(void *cls, struct MHD_Connection *c, void **con_cls,
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
	json_error_t je;

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
static enum MHD_Result request(void *cls, struct MHD_Connection *c, const char *url,
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

/* ---- connections ---- */

static int peer_uid(int fd, uid_t *ret)
{
	struct ucred cred;
	socklen_t len = sizeof(cred);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len))
		return -errno;
	*ret = cred.uid;
	return 0;
}

static void connection(void *cls, struct MHD_Connection *c, void **ctx,
		       enum MHD_ConnectionNotificationCode code)
{
	const union MHD_ConnectionInfo *info;
	struct api *api = cls;
	struct conn *conn = *ctx;

	if (code == MHD_CONNECTION_NOTIFY_CLOSED) {
		if (!conn)
			return;
		*conn->pprev = conn->next;
		if (conn->next)
			conn->next->pprev = conn->pprev;
		api->nr_conns--;
		free(conn);
		*ctx = NULL;
		return;
	}
	info = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD);
	conn = calloc(1, sizeof(*conn));
	if (!info || !conn || peer_uid(info->connect_fd, &conn->uid)) {
		free(conn); /* request_new() refuses a connection without one */
		return;
	}
	conn->next = api->conns;
	conn->pprev = &api->conns;
	if (conn->next)
		conn->next->pprev = &conn->next;
	api->conns = conn;
	api->nr_conns++;
	*ctx = conn;
}

static bool too_many(struct api *api, uid_t uid)
{
	uint32_t n = 0;

	for (struct conn *c = api->conns; c; c = c->next)
		n += c->uid == uid;
	/* The last places are root's, so that it can always look. */
	return n >= CONNS_USER_MAX || api->nr_conns >= CONNS_MAX - (uid ? 16 : 0);
}

static void refuse(int fd)
{
	static const char answer[] =
		"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
		"Content-Length: 56\r\nConnection: close\r\n\r\n"
		"{\"error\":\"too many connections; try later\",\"code\":\"busy\"}";

	send(fd, answer, sizeof(answer) - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	close(fd);
}

/* Out of descriptors: take the client off the queue all the same, or epoll would
 * report it for ever. */
static void shed(struct api *api)
{
	int fd;

	close(api->spare_fd);
	fd = accept4(api->listen_src.fd, NULL, NULL, SOCK_CLOEXEC);
	if (fd >= 0)
		close(fd);
	api->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	log_warn("api: out of file descriptors: a client was turned away");
}

static void run(struct api *api);

static void on_listen(struct loop_source *src, uint32_t events)
{
	struct api *api = api_of(src, listen_src);
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	uid_t uid;

	for (int i = 0; i < 32; i++) {
		int fd = accept4(src->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

		if (fd < 0) {
			if (errno == EMFILE || errno == ENFILE)
				shed(api);
			break;
		}
		if (peer_uid(fd, &uid) || too_many(api, uid))
			refuse(fd);
		else if (MHD_add_connection(api->mhd, fd, (struct sockaddr *)&un, sizeof(un)) !=
			 MHD_YES)
			log_warn("api: connection not taken: %s", strerror(errno));
	}
	run(api);
}

/* ---- running MHD ---- */

static uint64_t next_deadline(struct api *api)
{
	uint64_t next = UINT64_MAX;

	for (struct api_request *r = api->parked; r; r = r->next)
		next = MIN(next, r->deadline_ms);
	return next;
}

static void arm_timer(struct api *api)
{
	uint64_t next = next_deadline(api), now = now_ms();
	struct itimerspec its = {0};
	MHD_UNSIGNED_LONG_LONG mhd_ms;

	if (MHD_get_timeout(api->mhd, &mhd_ms) == MHD_YES)
		next = MIN(next, now + mhd_ms);
	if (next != UINT64_MAX) {
		uint64_t ms = next > now ? next - now : 0;

		its.it_value.tv_sec = (time_t)(ms / 1000);
		its.it_value.tv_nsec = (long)(ms % 1000) * 1000000 + 1; /* 0 would disarm */
	}
	timerfd_settime(api->timer_src.fd, 0, &its, NULL);
}

static void wake_parked(struct api *api)
{
	struct api_request *next;
	uint64_t now = now_ms();

	for (struct api_request *r = api->parked; r; r = next) {
		next = r->next;
		if (api->stopping || r->deadline_ms <= now || r->ready(r))
			unpark(r);
	}
}

/* Until nothing is ready, but not for ever: other sources want their turn. */
static void run(struct api *api)
{
	MHD_UNSIGNED_LONG_LONG ms = 0;

	wake_parked(api);
	for (int i = 0; i < RUNS_PER_WAKE; i++) {
		MHD_run(api->mhd);
		if (MHD_get_timeout(api->mhd, &ms) != MHD_YES || ms)
			break;
	}
	arm_timer(api);
}

static void on_mhd(struct loop_source *src, uint32_t events)
{
	run(api_of(src, mhd_src));
}

static void on_timer(struct loop_source *src, uint32_t events)
{
	uint64_t n;

	(void)!read(src->fd, &n, sizeof(n));
	run(api_of(src, timer_src));
}

void api_wake(struct daemon *d)
{
	if (d->api && d->api->mhd)
		run(d->api);
}

/* ---- start and stop ---- */

static int unix_address(const char *path, struct sockaddr_un *un, struct err *e)
{
	*un = (struct sockaddr_un){.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof(un->sun_path))
		return err_set(e, ENAMETOOLONG, "%s: a socket's path has at most %zu bytes", path,
			       sizeof(un->sun_path) - 1);
	strcpy(un->sun_path, path);
	return 0;
}

/* A socket file that nobody answers on was left by a crash: it may go. */
static int clear_stale(const struct sockaddr_un *un, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	struct stat st;

	if (lstat(un->sun_path, &st))
		return errno == ENOENT ? 0 : err_errno(e, errno, "%s", un->sun_path);
	if (!S_ISSOCK(st.st_mode))
		return err_set(e, EEXIST, "%s is there and is not a socket", un->sun_path);
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_errno(e, errno, "socket");
	if (!connect(fd, (const struct sockaddr *)un, sizeof(*un)) || errno == EAGAIN)
		return err_set(e, EADDRINUSE, "another service answers on %s", un->sun_path);
	if (unlink(un->sun_path))
		return err_errno(e, errno, "%s", un->sun_path);
	return 0;
}

static int listen_on(const char *path, int *ret, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	struct sockaddr_un un;
	int rc;

	rc = unix_address(path, &un, e);
	if (!rc)
		rc = clear_stale(&un, e);
	if (rc)
		return rc;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return err_errno(e, errno, "socket");
	if (bind(fd, (struct sockaddr *)&un, sizeof(un)))
		return err_errno(e, errno, "cannot listen on %s", path);
	/* Any user may ask; each sees what is its own. */
	if (chmod(path, 0666) || listen(fd, 128)) {
		rc = err_errno(e, errno, "cannot listen on %s", path);
		unlink(path);
		return rc;
	}
	*ret = steal_fd(&fd);
	return 0;
}

static void mhd_log(void *cls, const char *fmt, va_list ap)
{
	char line[256];

	vsnprintf(line, sizeof(line), fmt, ap);
	log_debug("http: %s", line);
}

/* Paths are split before they are decoded: a %2F belongs to its segment. */
static size_t keep_encoded(void *cls, struct MHD_Connection *c, char *s)
{
	return strlen(s);
}

static int start_mhd(struct api *api, struct err *e)
{
	const union MHD_DaemonInfo *info;

	api->mhd = MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_NO_LISTEN_SOCKET |
					    MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG,
				    0, NULL, NULL, request, api, MHD_OPTION_EXTERNAL_LOGGER,
				    mhd_log, NULL, MHD_OPTION_NOTIFY_COMPLETED, request_over, api,
				    MHD_OPTION_NOTIFY_CONNECTION, connection, api,
				    MHD_OPTION_UNESCAPE_CALLBACK, keep_encoded, NULL,
				    MHD_OPTION_CONNECTION_LIMIT, (unsigned int)CONNS_MAX,
				    MHD_OPTION_CONNECTION_TIMEOUT, (unsigned int)CONN_TIMEOUT_S,
				    MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)CONN_BUF_BYTES,
				    MHD_OPTION_END);
	info = api->mhd ? MHD_get_daemon_info(api->mhd, MHD_DAEMON_INFO_EPOLL_FD) : NULL;
	if (!info || info->epoll_fd < 0)
		return err_set(e, EIO, "cannot start the HTTP server");
	api->mhd_src.fd = info->epoll_fd;
	return 0;
}

static int add_sources(struct api *api, struct err *e)
{
	struct loop_source *src[] = {&api->listen_src, &api->mhd_src, &api->timer_src};
	int rc;

	for (size_t i = 0; i < ARRAY_SIZE(src); i++) {
		rc = loop_add(api->daemon, src[i], EPOLLIN);
		if (rc) {
			while (i--)
				loop_del(api->daemon, src[i]);
			return err_errno(e, -rc, "epoll");
		}
	}
	return 0;
}

static void api_destroy(struct api *api)
{
	if (api->mhd)
		MHD_stop_daemon(api->mhd);
	if (api->listen_src.fd >= 0) {
		close(api->listen_src.fd);
		unlink(api->path);
	}
	cleanup_fd(&api->timer_src.fd);
	cleanup_fd(&api->spare_fd);
	free(api->path);
	free(api);
}

int api_start(struct daemon *d, struct err *e)
{
	struct api *api = calloc(1, sizeof(*api));
	int rc;

	if (!api)
		return err_errno(e, ENOMEM, "api");
	api->daemon = d;
	api->listen_src = (struct loop_source){.fd = -1, .fn = on_listen};
	api->mhd_src = (struct loop_source){.fd = -1, .fn = on_mhd};
	api->path = strdup(d->config.api_socket);
	api->spare_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
	api->timer_src.fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	api->timer_src.fn = on_timer;
	if (!api->path || api->timer_src.fd < 0)
		rc = err_errno(e, errno, "api");
	else
		rc = listen_on(api->path, &api->listen_src.fd, e);
	if (!rc)
		rc = start_mhd(api, e);
	if (!rc)
		rc = add_sources(api, e);
	if (rc)
		api_destroy(api);
	else
		d->api = api;
	return rc;
}

void api_stop(struct daemon *d)
{
	struct api *api = d->api;

	if (!api)
		return;
	loop_del(d, &api->listen_src);
	loop_del(d, &api->mhd_src);
	loop_del(d, &api->timer_src);
	/* MHD must not stop with a connection suspended; resumed ones get their answer
	 * here, or are cut off. */
	api->stopping = true;
	for (int i = 0; i < 4; i++)
		run(api);
	d->api = NULL;
	api_destroy(api);
}
