/* SPDX-License-Identifier: MIT */
/*
 * conn: the connection to the service, on a thread of its own.  Enter: messages;
 * leave: what the VM consists of, and answers (request.c).
 *
 *   DOWN ──connect, HELLO──► GREETING ──WELCOME──► UP ──READY──► requests
 *    ▲ backoff 50 ms … 1 s      │ REJECT            │ loss, nonsense, a lease over
 *    └──────────────────────────┴───────────────────┘
 *
 * A REJECT that another try cannot change ends it for good.  Everything is told
 * anew on each connection, with indices counted from 0.  The socket never blocks:
 * a service that does not read for 5 s has lost its connection.
 */
#include "agent/vm.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKOFF_MIN_NS 50000000ull
#define BACKOFF_MAX_NS 1000000000ull
#define SEND_STALL_MS  5000
#define POLL_STEP_MS   50

void conn_drop(struct snapd_vm *vm, const char *fmt, ...)
{
	char why[200];
	va_list ap;

	if (vm->conn.fd < 0)
		return;
	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	close(vm->conn.fd);
	vm->conn.fd = -1;
	vm->conn.welcome = false;
	vm_log(vm, SNAPD_LOG_WARN, "connection to %s ended: %s", vm->socket, why);
	request_abandon(vm);
}

static bool wait_writable(struct snapd_vm *vm)
{
	struct pollfd p = {vm->conn.fd, POLLOUT, 0};

	for (int ms = 0; ms < SEND_STALL_MS && !atomic_load(&vm->exiting); ms += POLL_STEP_MS)
		if (poll(&p, 1, POLL_STEP_MS) > 0)
			return true;
	return false;
}

static ssize_t send_once(int sock, const void *msg, size_t len_bytes, int fd)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {(void *)msg, len_bytes};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control.buf);
		control.h.cmsg_level = SOL_SOCKET;
		control.h.cmsg_type = SCM_RIGHTS;
		control.h.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.h), &fd, sizeof(fd));
	}
	return sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
}

int conn_send(struct snapd_vm *vm, void *msg, size_t len_bytes, int fd)
{
	struct snapd_msg *h = msg;

	h->len = (uint32_t)len_bytes;
	while (vm->conn.fd >= 0) {
		if (send_once(vm->conn.fd, msg, len_bytes, fd) == (ssize_t)len_bytes)
			return 0;
		if (errno == EINTR || (errno == EAGAIN && wait_writable(vm)))
			continue;
		conn_drop(vm, errno == EAGAIN ? "the service does not read" : "cannot send: %s",
			  strerror(errno));
	}
	return -ENOTCONN;
}

/* ---- telling ---- */

/* The next thing untold, into *msg; its length, 0 when all is told.  *fd gets a
 * duplicate, since an unplugged block's own may be closed at any time. */
union tell {
	struct snapd_msg h;
	struct snapd_msg_block block;
	struct snapd_msg_piece piece;
	struct snapd_msg_gone gone;
	struct snapd_msg_vcpu vcpu;
};

static size_t next_gone(struct snapd_vm *vm, union tell *msg)
{
	if (vm->conn.seen_gone == vm->gone_count)
		return 0;
	for (size_t i = 0; i < vm->conn.seen_pieces; i++) {
		struct piece *p = &vm->pieces[i];

		if (!p->gone || p->gone_told || p->told < 0)
			continue;
		p->gone_told = true;
		msg->gone = (struct snapd_msg_gone){.h.type = SNAPD_MSG_GONE,
						    .piece = (uint32_t)p->told};
		return sizeof(msg->gone);
	}
	vm->conn.seen_gone = vm->gone_count;
	return 0;
}

static size_t next_block(struct snapd_vm *vm, struct block *b, union tell *msg, int *fd)
{
	struct stat st;

	if (!fstat(b->fd, &st)) /* it may have grown since */
		b->size_bytes = (uint64_t)st.st_size;
	*fd = fcntl(b->fd, F_DUPFD_CLOEXEC, 3);
	b->told = vm->conn.next_block++;
	msg->block = (struct snapd_msg_block){.h.type = SNAPD_MSG_BLOCK,
					      .block = (uint32_t)b->told,
					      .page_size = b->page_size,
					      .size_bytes = b->size_bytes};
	return sizeof(msg->block);
}

/* What a ring held when the VMM died is read through the vCPU's descriptor. */
static size_t next_vcpu(struct snapd_vm *vm, union tell *msg, int *fd)
{
	struct conn *c = &vm->conn;
	const struct snapd_vcpu *v;

	if (!c->wants_rings || !vm->ring_entries || c->seen_vcpus == atomic_load(&vm->nr_vcpus))
		return 0;
	v = vm->vcpus[c->seen_vcpus];
	*fd = fcntl(v->fd, F_DUPFD_CLOEXEC, 3);
	if (*fd < 0) { /* the comparison with the store finds what it held */
		c->wants_rings = false;
		return 0;
	}
	msg->vcpu = (struct snapd_msg_vcpu){.h.type = SNAPD_MSG_VCPU,
					    .vcpu = c->seen_vcpus++,
					    .nr_entries = vm->ring_entries,
					    .offset = (uint64_t)vm->arch->ring_page_offset *
						      vm->page_size};
	return sizeof(msg->vcpu);
}

static size_t next_told(struct snapd_vm *vm, union tell *msg, int *fd)
{
	struct conn *c = &vm->conn;
	size_t len =
		next_gone(vm, msg); /* first: a new piece may have the home of one that is gone */

	if (len)
		return len;
	while (c->seen_pieces < vm->nr_pieces) {
		struct piece *p = &vm->pieces[c->seen_pieces];
		struct block *b = &vm->blocks[p->block];

		if (!p->gone && !b->is_private && b->told < 0)
			return next_block(vm, b, msg, fd);
		c->seen_pieces++;
		if (p->gone || b->is_private)
			continue;
		p->told = c->next_piece++;
		msg->piece = (struct snapd_msg_piece){.h.type = SNAPD_MSG_PIECE,
						      .p = {.piece = (uint32_t)p->told,
							    .block = (uint32_t)b->told,
							    .block_page = p->block_page,
							    .nr_frames = p->nr_frames,
							    .home_gfn = p->home_gfn,
							    .first_frame = p->first_frame}};
		return sizeof(msg->piece);
	}
	return next_vcpu(vm, msg, fd);
}

/* A VM to be restored is ready when its vCPUs wait for it. */
static int tell_ready(struct snapd_vm *vm)
{
	uint32_t n = atomic_load(&vm->nr_vcpus);
	struct snapd_msg_ready ready = {.h.type = SNAPD_MSG_READY, .nr_vcpus = n};

	if (vm->conn.told_ready && vm->conn.told_vcpus == n)
		return 0;
	if (vm->vmm_state ? !atomic_load(&vm->vmm_ready)
			  : atomic_load(&vm->restore_wait) && !vcpus_all_parked(vm))
		return 0;
	vm->conn.told_ready = true;
	vm->conn.told_vcpus = n;
	return conn_send(vm, &ready, sizeof(ready), -1);
}

int conn_tell(struct snapd_vm *vm)
{
	union tell msg;
	size_t len;
	int fd, r;

	while (vm->conn.welcome) {
		fd = -1;
		pthread_mutex_lock(&vm->slots_lock);
		len = next_told(vm, &msg, &fd);
		pthread_mutex_unlock(&vm->slots_lock);
		if (!len) {
			r = about_tell(vm);
			return r < 0 ? r : tell_ready(vm);
		}
		r = conn_send(vm, &msg, len, fd);
		if (fd >= 0)
			close(fd);
		if (r < 0)
			return r;
	}
	return -ENOTCONN;
}

static void tell_from_start(struct snapd_vm *vm)
{
	struct conn *c = &vm->conn;

	c->told_ready = c->wants_rings = false;
	c->seen_vcpus = 0;
	c->next_block = c->next_piece = 0;
	c->seen_pieces = 0;
	pthread_mutex_lock(&vm->slots_lock);
	for (size_t i = 0; i < vm->nr_blocks; i++)
		vm->blocks[i].told = -1;
	for (size_t i = 0; i < vm->nr_pieces; i++)
		vm->pieces[i].told = -1;
	c->seen_gone = vm->gone_count;
	pthread_mutex_unlock(&vm->slots_lock);
	pthread_mutex_lock(&vm->about_lock);
	vm->about_new = vm->about;
	pthread_mutex_unlock(&vm->about_lock);
}

/* ---- connecting ---- */

static uint32_t read_cmdline(char *buf, size_t cap)
{
	_cleanup_fd_ int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? 0 : read(fd, buf, cap);

	return n < 0 ? 0 : (uint32_t)n;
}

static int send_hello(struct snapd_vm *vm)
{
	struct snapd_msg_hello m = {
		.h.type = SNAPD_MSG_HELLO,
		.major = SNAPD_PROTO_MAJOR,
		.minor = SNAPD_PROTO_MINOR,
		.page_size = vm->page_size,
		.pid = (uint32_t)getpid(),
		.nr_vcpus = atomic_load(&vm->nr_vcpus),
		.ring_entries = vm->ring_entries,
		.dirty_backend = vm->sources[0]->backend,
		.shm_bytes = vm->shm_bytes,
	};

	memcpy(m.instance, vm->instance, sizeof(m.instance));
	snprintf(m.name, sizeof(m.name), "%s", vm->name);
	snprintf(m.arch, sizeof(m.arch), "%s", vm->arch->name);
	if (vm->rewriting) {
		m.flags |= SNAPD_HELLO_REWRITING;
		m.rewrite_to = vm->rewrite_to;
	}
	if (atomic_load(&vm->restore_wait)) {
		m.flags |= SNAPD_HELLO_RESTORE;
		snprintf(m.restore, sizeof(m.restore), "%s", vm->restore);
	}
	if (vm->vmm_state)
		m.flags |= SNAPD_HELLO_VMM_STATE;
	m.cmdline_len = read_cmdline(m.cmdline, sizeof(m.cmdline));
	return conn_send(vm, &m, sizeof(m), vm->shm_fd);
}

static int try_connect(struct snapd_vm *vm)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0)
		return -errno;
	memcpy(addr.sun_path, vm->socket, sizeof(addr.sun_path));
	if (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
		int err = errno;

		close(fd);
		return -err;
	}
	vm->conn.fd = fd;
	tell_from_start(vm);
	return send_hello(vm);
}

static void drain_wake(int fd)
{
	uint64_t n;

	(void)!read(fd, &n, sizeof(n));
}

/* Sleep till a wake or the time is over; changes told meanwhile are told later. */
static void sleep_down(struct snapd_vm *vm, int timeout_ms)
{
	uint64_t end = now_ns() + (uint64_t)timeout_ms * 1000000u;
	struct pollfd p = {vm->conn_wake, POLLIN, 0};

	while (!atomic_load(&vm->exiting) && now_ns() < end) {
		if (poll(&p, 1, (int)((end - now_ns()) / 1000000u) + 1) > 0)
			drain_wake(vm->conn_wake);
	}
}

static void step_down(struct snapd_vm *vm)
{
	struct conn *c = &vm->conn;
	int r = c->refused ? -ECONNREFUSED : try_connect(vm);

	if (!r) {
		c->logged_errno = 0;
		return;
	}
	if (!c->refused && c->logged_errno != r) {
		vm_log(vm, SNAPD_LOG_INFO, "no service on %s yet: %s", vm->socket, strerror(-r));
		c->logged_errno = r;
	}
	if (atomic_load(&vm->connect_result) > 0)
		atomic_store(&vm->connect_result, r);
	sleep_down(vm, (int)(c->backoff_ns / 1000000u));
	c->backoff_ns = MIN(c->backoff_ns * 2, BACKOFF_MAX_NS);
}

/* ---- receiving ---- */

/* What a service may send, and the least length of each. */
static size_t least_length(uint16_t type)
{
	switch (type) {
	case SNAPD_MSG_WELCOME:
		return sizeof(struct snapd_msg_welcome);
	case SNAPD_MSG_REJECT:
	case SNAPD_MSG_ERROR:
		return sizeof(struct snapd_msg_error);
	case SNAPD_MSG_SYNC:
		return sizeof(struct snapd_msg_sync);
	case SNAPD_MSG_PAUSE:
		return SNAPD_1_0_PAUSE_BYTES;
	case SNAPD_MSG_REWRITE:
		return sizeof(struct snapd_msg_rewrite);
	case SNAPD_MSG_LOAD:
		return SNAPD_1_0_LOAD_BYTES;
	case SNAPD_MSG_RESUME:
		return SNAPD_1_0_RESUME_BYTES;
	case SNAPD_MSG_CHECK:
		return sizeof(struct snapd_msg_check);
	default:
		return SIZE_MAX;
	}
}

/* The descriptor that came along; all but one are closed. */
static int take_fd(struct msghdr *m)
{
	int fd = -1;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < n; i++) {
			if (fd >= 0)
				close(fd);
			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
		}
	}
	return fd;
}

static ssize_t receive(struct snapd_vm *vm, int *fd, int *flags)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int) * 4)];
	} control;
	struct iovec iov = {vm->conn.buf, SNAPD_MSG_MAX};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control.buf,
			   .msg_controllen = sizeof(control.buf)};
	ssize_t n = recvmsg(vm->conn.fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0)
		return -errno;
	*fd = take_fd(&m);
	*flags = m.msg_flags;
	return n;
}

/* NULL, or what is wrong with the message. */
static const char *check_message(const struct snapd_vm *vm, ssize_t len, int fd, int flags)
{
	const struct snapd_msg *h = (const void *)vm->conn.buf;
	size_t least;

	if (flags & (MSG_TRUNC | MSG_CTRUNC))
		return "it sent too long a message";
	if (len < (ssize_t)sizeof(*h) || h->len != (size_t)len)
		return "it sent a message of another length than it says";
	least = least_length(h->type);
	if (least == SIZE_MAX)
		return "it sent a message of unknown type";
	if ((size_t)len < least)
		return "it sent too short a message";
	if (fd >= 0 && h->type != SNAPD_MSG_LOAD && h->type != SNAPD_MSG_CHECK)
		return "it sent a descriptor where none belongs";
	if (!vm->conn.welcome && h->type != SNAPD_MSG_WELCOME && h->type != SNAPD_MSG_REJECT &&
	    h->type != SNAPD_MSG_ERROR)
		return "it asked before WELCOME";
	if (vm->conn.welcome && h->type == SNAPD_MSG_WELCOME)
		return "it said WELCOME twice";
	return NULL;
}

static void on_welcome(struct snapd_vm *vm)
{
	const struct snapd_msg_welcome *m = (const void *)vm->conn.buf;

	if (m->major != SNAPD_PROTO_MAJOR) {
		conn_drop(vm, "it speaks protocol %u.%u, this agent %u.%u", m->major, m->minor,
			  SNAPD_PROTO_MAJOR, SNAPD_PROTO_MINOR);
		return;
	}
	vm->conn.welcome = true;
	vm->conn.wants_rings = m->flags & SNAPD_WELCOME_RINGS;
	vm->conn.backoff_ns = BACKOFF_MIN_NS;
	atomic_store(&vm->connect_result, 0);
	count(&vm->shm->reconnects, 1);
	vm_log(vm, SNAPD_LOG_INFO, "connected to %s as \"%s\"", vm->socket, vm->name);
	conn_tell(vm);
}

static bool is_final(int code)
{
	return code == EEXIST || code == EINVAL || code == EPERM || code == EPROTO;
}

static void on_reject(struct snapd_vm *vm)
{
	struct snapd_msg_error *m = (void *)vm->conn.buf;
	int code = m->code > 0 && m->code < 4096 ? m->code : EPROTO;

	m->text[sizeof(m->text) - 1] = '\0';
	vm->conn.refused = is_final(code);
	if (atomic_load(&vm->connect_result) > 0)
		atomic_store(&vm->connect_result, -code);
	vm_log(vm, SNAPD_LOG_ERR, "the service refused \"%s\"%s: %s", vm->name,
	       vm->conn.refused ? "" : " for now", m->text);
	conn_drop(vm, "refused");
	if (vm->conn.refused && atomic_load(&vm->restore_wait))
		vcpus_refuse(vm, -EREMOTEIO);
}

static void on_error(struct snapd_vm *vm)
{
	struct snapd_msg_error *m = (void *)vm->conn.buf;

	m->text[sizeof(m->text) - 1] = '\0';
	conn_drop(vm, "the service says: %.150s", m->text);
}

static void step_receive(struct snapd_vm *vm)
{
	const struct snapd_msg *h = (const void *)vm->conn.buf;
	_cleanup_fd_ int fd = -1;
	const char *wrong;
	int flags = 0;
	ssize_t n = receive(vm, &fd, &flags);

	if (n == -EAGAIN || n == -EINTR)
		return;
	if (n <= 0) {
		conn_drop(vm, "%s", n ? strerror((int)-n) : "closed by the service");
		return;
	}
	wrong = check_message(vm, n, fd, flags);
	if (wrong)
		conn_drop(vm, "%s", wrong);
	else if (h->type == SNAPD_MSG_WELCOME)
		on_welcome(vm);
	else if (h->type == SNAPD_MSG_REJECT)
		on_reject(vm);
	else if (h->type == SNAPD_MSG_ERROR)
		on_error(vm);
	else
		request_handle(vm, h, &fd);
}

static void step_up(struct snapd_vm *vm)
{
	struct pollfd p[] = {{vm->conn.fd, POLLIN, 0}, {vm->conn_wake, POLLIN, 0}};
	uint64_t lease = request_lease_end(vm), now = now_ns();
	int timeout = lease == UINT64_MAX ? -1
		      : lease > now	  ? (int)((lease - now) / 1000000u) + 1
					  : 0;

	if (poll(p, ARRAY_SIZE(p), timeout) < 0)
		return;
	if (p[1].revents) {
		drain_wake(vm->conn_wake);
		conn_tell(vm);
	}
	if (vm->conn.fd >= 0 && p[0].revents)
		step_receive(vm);
	else if (now_ns() >= request_lease_end(vm))
		conn_drop(vm, "it held the VM paused for more than %u ms", SNAPD_PAUSE_LEASE_MS);
}

void *conn_thread(void *arg)
{
	struct snapd_vm *vm = arg;

	vm->conn.backoff_ns = BACKOFF_MIN_NS;
	while (!atomic_load(&vm->exiting)) {
		if (vm->conn.fd < 0)
			step_down(vm);
		else
			step_up(vm);
	}
	request_end(vm);
	if (vm->conn.fd >= 0 && vm->conn.welcome)
		conn_send(vm, &(struct snapd_msg_bye){.h = {.type = SNAPD_MSG_BYE}},
			  sizeof(struct snapd_msg_bye), -1);
	return NULL;
}
