/* SPDX-License-Identifier: MIT */
/* wire: see wire.h. */
#include "adapters/qemu/wire.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"

#define READ_STEP 16384u

void wire_init(struct wire *w, int fd)
{
	*w = (struct wire){.fd = fd};
}

void wire_deinit(struct wire *w)
{
	cleanup_fd(&w->fd);
	w->fd = -1;
	free(w->buf);
	w->buf = NULL;
}

uint64_t wire_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int wire_kill(struct wire *w, int code, const char *reason, struct err *e)
{
	cleanup_fd(&w->fd);
	w->fd = -1;
	err_set(&w->death, code, "%s", reason);
	return err_set(e, code, "%s", reason);
}

static int already_dead(const struct wire *w, struct err *e)
{
	return err_set(e, w->death.code ? -w->death.code : ENOTCONN, "%s", w->death.text);
}

/* 0: ready; -ETIMEDOUT. */
static int wait_for(struct wire *w, short events, uint64_t deadline_ns)
{
	struct pollfd p = {.fd = w->fd, .events = events};
	uint64_t now;
	struct timespec left;
	int n;

	do {
		now = wire_now_ns();
		if (now > deadline_ns)
			now = deadline_ns;
		left.tv_sec = (time_t)((deadline_ns - now) / 1000000000u);
		left.tv_nsec = (long)((deadline_ns - now) % 1000000000u);
		n = ppoll(&p, 1, &left, NULL);
	} while (n < 0 && errno == EINTR);
	return n > 0 ? 0 : -ETIMEDOUT;
}

static ssize_t send_some(int fd, const char *text, size_t len, int passed_fd)
{
	struct iovec iov = {.iov_base = (void *)text, .iov_len = len};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	if (passed_fd >= 0) {
		m.msg_control = control.bytes;
		m.msg_controllen = sizeof(control.bytes);
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &passed_fd, sizeof(int));
	}
	return sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
}

int wire_send(struct wire *w, const char *text, size_t len, int passed_fd, uint64_t deadline_ns,
	      struct err *e)
{
	size_t sent = 0;

	if (w->fd < 0)
		return already_dead(w, e);
	while (sent < len) {
		ssize_t n = send_some(w->fd, text + sent, len - sent, passed_fd);

		if (n > 0) {
			sent += (size_t)n;
			passed_fd = -1;
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno != EAGAIN)
			return wire_kill(w, errno, "QEMU's monitor hung up", e);
		if (wait_for(w, POLLOUT, deadline_ns))
			return sent ? wire_kill(w, ETIMEDOUT,
						"QEMU's monitor stopped reading half way", e)
				    : err_set(e, ETIMEDOUT, "QEMU's monitor does not read");
	}
	return 0;
}

static int make_room(struct wire *w, struct err *e)
{
	size_t cap = w->cap ? w->cap * 2 : READ_STEP;
	char *bigger;

	if (w->cap - w->len >= READ_STEP)
		return 0;
	bigger = realloc(w->buf, cap);
	if (!bigger)
		return wire_kill(w, ENOMEM, "no memory for an answer of QEMU's", e);
	w->buf = bigger;
	w->cap = cap;
	return 0;
}

/* Read once.  0: there is more in the buffer. */
static int fill(struct wire *w, uint64_t deadline_ns, struct err *e)
{
	ssize_t n;

	if (w->len >= QMP_LINE_MAX)
		return wire_kill(w, EPROTO, "QEMU's monitor sent a line without end", e);
	if (make_room(w, e))
		return w->death.code;
	for (;;) {
		n = recv(w->fd, w->buf + w->len, w->cap - w->len, MSG_DONTWAIT);
		if (n > 0) {
			w->len += (size_t)n;
			return 0;
		}
		if (n == 0)
			return wire_kill(w, ECONNRESET, "QEMU's monitor hung up", e);
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return wire_kill(w, errno, "QEMU's monitor hung up", e);
		if (wait_for(w, POLLIN, deadline_ns))
			return err_set(e, ETIMEDOUT, "QEMU's monitor does not answer");
	}
}

/* The line of `len` bytes at the buffer's start as an object; NULL object: an empty line. */
static int parse_line(struct wire *w, size_t len, json_t **ret, struct err *e)
{
	size_t blank = 0;
	json_error_t je;

	*ret = NULL;
	while (blank < len && (w->buf[blank] == '\r' || w->buf[blank] == ' '))
		blank++;
	if (blank == len)
		return 0;
	*ret = json_loadb(w->buf, len, JSON_REJECT_DUPLICATES, &je);
	if (json_is_object(*ret))
		return 0;
	json_decref(*ret);
	*ret = NULL;
	return wire_kill(w, EPROTO, "QEMU's monitor sent what is not QMP", e);
}

int wire_recv(struct wire *w, uint64_t deadline_ns, json_t **ret, struct err *e)
{
	*ret = NULL;
	if (w->fd < 0)
		return already_dead(w, e);
	for (;;) {
		char *nl = w->len > w->searched
				   ? memchr(w->buf + w->searched, '\n', w->len - w->searched)
				   : NULL;
		size_t line;
		int rc;

		if (!nl) {
			w->searched = w->len;
			rc = fill(w, deadline_ns, e);
			if (rc)
				return rc;
			continue;
		}
		line = (size_t)(nl - w->buf);
		rc = parse_line(w, line, ret, e);
		if (rc)
			return rc;
		w->len -= line + 1;
		memmove(w->buf, nl + 1, w->len);
		w->searched = 0;
		if (*ret)
			return 0;
	}
}
