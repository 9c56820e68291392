/* SPDX-License-Identifier: MIT */
/*
 * The socket to one agent: whole messages in and out, checked as far as any
 * message can be, and one request at a time with its answer.  The VM's thread.
 *
 * A peer that breaks the rules is told so and disconnected; what a disconnect
 * means for the epoch under way is its caller's to settle.
 */
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"

#define DRAIN_MAX 1024
#define FDS_MAX	  4 /* room for more than the one that is allowed, to close them */

/* Empty the queue.  Closing with unread messages would make the peer's next read fail,
 * and our last word be lost; and one of them may be BYE.  What is there is bounded by the
 * socket's queue. */
static void drain(struct vm *vm)
{
	struct snapd_msg h;

	for (int i = 0; i < DRAIN_MAX; i++) {
		ssize_t n = recv(vm->sock, &h, sizeof(h), MSG_DONTWAIT);

		if (n <= 0)
			break;
		vm->said_bye |= n == sizeof(h) && h.type == SNAPD_MSG_BYE;
	}
}

void vm_disconnect(struct vm *vm)
{
	if (vm->sock >= 0) {
		drain(vm);
		close(vm->sock);
	}
	vm->sock = -1;
	if (vm->in_fd >= 0)
		close(vm->in_fd);
	vm->in_fd = -1;
}

void vm_say_error(struct vm *vm, uint16_t type, const struct err *e)
{
	struct snapd_msg_error msg = {.code = e->code ? -e->code : EPROTO};
	struct err ignored = {};

	snprintf(msg.text, sizeof(msg.text), "%.*s", (int)sizeof(msg.text) - 1, e->text);
	if (vm->sock >= 0)
		vm_send(vm, &msg, sizeof(msg), type, -1, &ignored);
	if (vm->sock >= 0)
		shutdown(vm->sock, SHUT_RD);
	vm_disconnect(vm);
}

/* The peer broke a rule: say which, and hang up. */
static int broke(struct vm *vm, struct err *e)
{
	vm_say_error(vm, SNAPD_MSG_ERROR, e);
	return -EPROTO;
}

/* Keep one descriptor; close what is beyond it.  Returns how many there were. */
static int take_fds(struct vm *vm, struct msghdr *mh)
{
	struct cmsghdr *c;
	int nr = 0;

	for (c = CMSG_FIRSTHDR(mh); c; c = CMSG_NXTHDR(mh, c)) {
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
			if (nr++)
				close(fd);
			else
				vm->in_fd = fd;
		}
	}
	return nr;
}

static bool may_carry_fd(uint16_t type)
{
	return type == SNAPD_MSG_HELLO || type == SNAPD_MSG_BLOCK || type == SNAPD_MSG_PAUSED ||
	       type == SNAPD_MSG_VCPU;
}

static int check_message(struct vm *vm, size_t len, int flags, int nr_fds, struct err *e)
{
	const struct snapd_msg *h = (const struct snapd_msg *)vm->in;

	if (flags & (MSG_TRUNC | MSG_CTRUNC))
		return err_set(e, EPROTO, "message too long, or with too many descriptors");
	if (len < sizeof(*h) || h->len != len)
		return err_set(e, EPROTO, "message of %zu bytes says it has %u", len,
			       len < sizeof(*h) ? 0 : h->len);
	if (h->flags)
		return err_set(e, EPROTO, "message type %u with unknown flags 0x%x", h->type,
			       h->flags);
	if (nr_fds > 1 || (nr_fds && !may_carry_fd(h->type)))
		return err_set(e, EPROTO, "message type %u with %d descriptors", h->type, nr_fds);
	return 0;
}

static int wait_readable(struct vm *vm, int timeout_ms)
{
	struct pollfd p = {.fd = vm->sock, .events = POLLIN};
	int n;

	do
		n = poll(&p, 1, timeout_ms);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

int vm_recv(struct vm *vm, int timeout_ms, struct err *e)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(FDS_MAX * sizeof(int))];
	struct iovec iov = {.iov_base = vm->in, .iov_len = sizeof(vm->in)};
	struct msghdr mh = {.msg_iov = &iov,
			    .msg_iovlen = 1,
			    .msg_control = control,
			    .msg_controllen = sizeof(control)};
	int err, nr_fds;
	ssize_t n;

	if (vm->sock < 0)
		return err_set(e, ENOTCONN, "the VM is not connected");
	if (vm->in_fd >= 0)
		close(vm->in_fd);
	vm->in_fd = -1;
	err = wait_readable(vm, timeout_ms);
	if (err == 0)
		return 0;
	n = err < 0 ? err : recvmsg(vm->sock, &mh, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	nr_fds = n < 0 ? 0 : take_fds(vm, &mh); /* an empty message may bring some, too */
	if (n <= 0) {
		err = n < 0 ? errno : ENOTCONN;
		vm_disconnect(vm);
		return err_set(e, ENOTCONN, "the VM closed the connection%s%s",
			       err == ENOTCONN ? "" : ": ", err == ENOTCONN ? "" : strerror(err));
	}
	err = check_message(vm, (size_t)n, mh.msg_flags, nr_fds, e);
	return err ? broke(vm, e) : 1;
}

int vm_check_len(struct vm *vm, size_t len, struct err *e)
{
	const struct snapd_msg *h = (const struct snapd_msg *)vm->in;

	if (h->len >= len)
		return 0;
	err_set(e, EPROTO, "message type %u of %u bytes is too short", h->type, h->len);
	return broke(vm, e);
}

int vm_send(struct vm *vm, void *msg, size_t len, uint16_t type, int fd, struct err *e)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
	struct snapd_msg *h = msg;
	struct iovec iov = {.iov_base = msg, .iov_len = len};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t n;

	if (vm->sock < 0)
		return err_set(e, ENOTCONN, "the VM is not connected");
	h->len = (uint32_t)len;
	h->type = type;
	if (fd >= 0) {
		struct cmsghdr *c = (struct cmsghdr *)control;

		mh.msg_control = control;
		mh.msg_controllen = sizeof(control);
		*c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)),
				      .cmsg_level = SOL_SOCKET,
				      .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	/* A queue that is full means a peer that does not read: we never send much. */
	do
		n = sendmsg(vm->sock, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n == (ssize_t)len)
		return 0;
	err_set(e, ENOTCONN, "the VM does not take messages: %s", strerror(errno));
	vm_disconnect(vm);
	return -ENOTCONN;
}

static int64_t ms_left(uint64_t deadline_ns)
{
	uint64_t now = now_ns(CLOCK_MONOTONIC);

	return now >= deadline_ns ? 0 : (int64_t)((deadline_ns - now) / 1000000) + 1;
}

/* The agent said FAILED to request `req`: its reason, made safe to show. */
static int refused(struct vm *vm, uint64_t req, struct err *e)
{
	struct snapd_msg_error *m = (struct snapd_msg_error *)vm->in;
	int err = vm_check_len(vm, sizeof(*m), e);

	if (err)
		return err;
	if (m->h.req != req) {
		err_set(e, EPROTO, "FAILED for a request that was not made");
		return broke(vm, e);
	}
	m->text[sizeof(m->text) - 1] = '\0';
	err = m->code > 0 && m->code < 4096 ? m->code : EIO;
	/* Codes that mean a lost connection are ours to give. */
	if (err == ENOTCONN || err == EPROTO)
		err = EIO;
	return err_set(e, err, "%s", m->text[0] ? m->text : strerror(err));
}

static int wait_answer(struct vm *vm, uint64_t req, uint16_t answer, size_t answer_len,
		       int timeout_ms, struct err *e)
{
	uint64_t deadline = now_ns(CLOCK_MONOTONIC) + (uint64_t)timeout_ms * 1000000;
	const struct snapd_msg *h = (const struct snapd_msg *)vm->in;

	for (;;) {
		int err = vm_recv(vm, (int)ms_left(deadline), e);

		if (err < 0)
			return err;
		if (err == 0) {
			err_set(e, ETIMEDOUT, "the VM did not answer for %d ms", timeout_ms);
			vm_say_error(vm, SNAPD_MSG_ERROR, e);
			return -ENOTCONN;
		}
		if (h->type == SNAPD_MSG_FAILED)
			return refused(vm, req, e);
		if (h->type == answer && h->req == req)
			return vm_check_len(vm, answer_len, e);
		err = vm_told(vm);
		if (err)
			return err_set(e, -err, "the VM broke the protocol");
	}
}

int vm_request(struct vm *vm, void *msg, size_t len, uint16_t type, int fd, uint16_t answer,
	       size_t answer_len, int timeout_ms, struct err *e)
{
	struct snapd_msg *h = msg;
	int err;

	h->req = ++vm->next_req;
	err = vm_send(vm, msg, len, type, fd, e);
	return err ? err : wait_answer(vm, vm->next_req, answer, answer_len, timeout_ms, e);
}

int vm_sync(struct vm *vm, struct err *e)
{
	struct snapd_msg_sync msg = {};

	return vm_request(vm, &msg, sizeof(msg), SNAPD_MSG_SYNC, -1, SNAPD_MSG_SYNCED,
			  sizeof(struct snapd_msg_synced), VM_REQUEST_TIMEOUT_MS, e);
}

static int request_pause(struct vm *vm, struct snapd_msg_pause *msg, struct vm_pause *p,
			 struct err *e)
{
	const struct snapd_msg_paused *m = (const struct snapd_msg_paused *)vm->in;
	int err;

	msg->timeout_ms = vm->d->config.pause_timeout_ms;
	err = vm_request(vm, msg, sizeof(*msg), SNAPD_MSG_PAUSE, -1, SNAPD_MSG_PAUSED, sizeof(*m),
			 (int)msg->timeout_ms + VM_REQUEST_TIMEOUT_MS, e);
	if (err)
		return err;
	p->stop_ns = m->stop_ns;
	p->state_ns = m->state_ns;
	p->harvest_ns = m->harvest_ns;
	return 0;
}

int vm_pause(struct vm *vm, int *state_fd, uint64_t *state_bytes, struct vm_pause *p, struct err *e)
{
	const struct snapd_msg_paused *m = (const struct snapd_msg_paused *)vm->in;
	struct snapd_msg_pause msg = {};
	int err = request_pause(vm, &msg, p, e);

	if (err)
		return err;
	*state_bytes = m->state_bytes;
	*state_fd = steal_fd(&vm->in_fd);
	if (*state_fd >= 0)
		return 0;
	err_set(e, EPROTO, "PAUSED came without the state");
	vm_say_error(vm, SNAPD_MSG_ERROR, e);
	return -EPROTO;
}

int vm_pause_to_rewrite(struct vm *vm, struct snapd_point to, struct vm_pause *p, struct err *e)
{
	struct snapd_msg_pause msg = {.flags = SNAPD_PAUSE_NO_STATE, .to = to};

	if (vm_speaks(vm, REWRITE_MINOR))
		msg.flags |= SNAPD_PAUSE_REWRITE;
	return request_pause(vm, &msg, p, e);
}

int vm_read_state(int fd, uint64_t len, void **ret, struct err *e)
{
	_cleanup_free_ char *state = NULL;
	struct snapd_state_reader r;
	struct stat st;

	if (fstat(fd, &st) || !S_ISREG(st.st_mode) || (uint64_t)st.st_size < len ||
	    len > STATE_MAX_BYTES)
		return err_set(e, EPROTO, "the VM's state has a wrong size");
	state = malloc(len + 1);
	if (!state)
		return err_set(e, ENOMEM, "out of memory");
	for (size_t at = 0; at < len;) {
		ssize_t n = pread(fd, state + at, len - at, (off_t)at);

		if (n <= 0)
			return err_set(e, EPROTO, "the VM's state cannot be read");
		at += (size_t)n;
	}
	if (state_reader_init(&r, state, len, e))
		return -EUCLEAN;
	*ret = steal_ptr(&state);
	return 0;
}

static int request_resume(struct vm *vm, uint32_t flags, struct vm_pause *p, struct err *e)
{
	struct snapd_msg_resume msg = {.flags = flags};
	const struct snapd_msg_resumed *m = (const struct snapd_msg_resumed *)vm->in;
	int err = vm_request(vm, &msg, sizeof(msg), SNAPD_MSG_RESUME, -1, SNAPD_MSG_RESUMED,
			     sizeof(*m), VM_REQUEST_TIMEOUT_MS, e);

	if (!err && p)
		p->total_ns = m->paused_ns;
	return err;
}

int vm_resume(struct vm *vm, struct vm_pause *p, struct err *e)
{
	return request_resume(vm, 0, p, e);
}

int vm_resume_untouched(struct vm *vm, struct err *e)
{
	return request_resume(vm, SNAPD_RESUME_UNTOUCHED, NULL, e);
}
