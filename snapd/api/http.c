/* SPDX-License-Identifier: MIT */
/*
 * api_http: the socket, its connections, and when MHD runs.  Control thread only;
 * libmicrohttpd has no thread of its own and is run when its epoll descriptor, our
 * timer, or api_wake() says so.
 *
 *   accept ► peer's uid, limits ► MHD parses ► api/request.c
 *
 * Limits: 256 connections, 64 of one user; 256 KiB of buffers for headers and
 * output each; 64 KiB of JSON; 30 s without progress.  Beyond them a client gets
 * an error or is cut off; nothing else notices.
 *
 * A suspended connection belongs to the list of parked requests and is resumed
 * here alone, so that a job thread never touches a connection.
 */
#include "snapd/api/priv.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>

#include "snapd/core/unixsock.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"

#define CONNS_MAX      256
#define CONNS_USER_MAX 64
#define CONN_TIMEOUT_S 30
#define CONN_BUF_BYTES (256u << 10)
#define RUNS_PER_WAKE  32
#define SWEEP_MS       100

#define api_of(src, member) ((struct api *)((char *)(src)-offsetof(struct api, member)))

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
	conn->fd = info->connect_fd;
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
	uid_t uid = 0;

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

/*
 * A client that sends half a request and hangs up at once does both in one epoll
 * edge; MHD then reads what came, waits for the next edge, and would notice the end
 * by its time limit only, half a minute in which the user's places are taken.
 * Shutting our reading side makes that edge.  A client that only ended its own
 * sending still gets its answer.
 */
static void sweep(struct api *api)
{
	uint64_t now = api_now_ms();

	if (now - api->swept_ms < SWEEP_MS)
		return;
	api->swept_ms = now;
	for (struct conn *c = api->conns; c; c = c->next) {
		struct pollfd p = {.fd = c->fd, .events = POLLRDHUP};

		if (c->nudged || poll(&p, 1, 0) != 1 || !(p.revents & (POLLRDHUP | POLLHUP)))
			continue;
		shutdown(c->fd, SHUT_RD);
		c->nudged = true;
	}
}

static void arm_timer(struct api *api)
{
	uint64_t next = next_deadline(api), now = api_now_ms();
	struct itimerspec its = {0};
	MHD_UNSIGNED_LONG_LONG mhd_ms;

	if (MHD_get_timeout(api->mhd, &mhd_ms) == MHD_YES)
		next = MIN(next, now + mhd_ms);
	if (api->conns)
		next = MIN(next, api->swept_ms + SWEEP_MS);
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
	uint64_t now = api_now_ms();

	for (struct api_request *r = api->parked; r; r = next) {
		next = r->next;
		if (api->stopping || r->deadline_ms <= now || r->ready(r))
			api_unpark(r);
	}
}

/* Until nothing is ready, but not for ever: other sources want their turn. */
static void run(struct api *api)
{
	MHD_UNSIGNED_LONG_LONG ms = 0;

	wake_parked(api);
	sweep(api);
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

	api->mhd = MHD_start_daemon(
		MHD_USE_EPOLL | MHD_USE_NO_LISTEN_SOCKET | MHD_ALLOW_SUSPEND_RESUME |
			MHD_USE_ERROR_LOG,
		0, NULL, NULL, api_request_step, api, MHD_OPTION_EXTERNAL_LOGGER, mhd_log, NULL,
		MHD_OPTION_NOTIFY_COMPLETED, api_request_over, api, MHD_OPTION_NOTIFY_CONNECTION,
		connection, api, MHD_OPTION_UNESCAPE_CALLBACK, keep_encoded, NULL,
		MHD_OPTION_CONNECTION_LIMIT, (unsigned int)CONNS_MAX, MHD_OPTION_CONNECTION_TIMEOUT,
		(unsigned int)CONN_TIMEOUT_S, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
		(size_t)CONN_BUF_BYTES, MHD_OPTION_END);
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
		if (!api->inherited)
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
		rc = unixsock_listen(api->path, SOCK_STREAM, d->config.socket_group,
				     &api->listen_src.fd, &api->inherited, e);
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
