/* SPDX-License-Identifier: MIT */
/*
 * Any messages of a service, to a real agent on the simulated KVM.  First byte: 1: WELCOME comes
 * first, 2: the VM waits to be restored.  Then each u8 flags (0..2: descriptor: none, a file with
 * the message's bytes, the state that the agent last gave; 4: as it is, else its header is put
 * right), u8 type, u8 length, bytes.  The agent lets go of the connection when it ends, and the
 * VM can be detached.
 */
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/fake_service.h"
#include "tests/lib/sim_vm.h"

#define WAIT_MS 20000

static struct fake_service service;
static int state_fd; /* -1: none was given yet */

/* The next message of the agent; 0: it let go. */
static size_t receive(void)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {&service.in, sizeof(service.in)};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control.buf,
			   .msg_controllen = sizeof(control.buf)};
	struct pollfd p = {service.fd, POLLIN, 0};
	struct cmsghdr *c;
	ssize_t n;
	int fd;

	PROMISE(TEMP_FAILURE_RETRY(poll(&p, 1, WAIT_MS)) > 0); /* libFuzzer has an alarm */
	n = recvmsg(service.fd, &m, MSG_CMSG_CLOEXEC);
	if (n <= 0)
		return 0;
	PROMISE(n >= (ssize_t)sizeof(service.in.h) && service.in.h.len == (size_t)n);
	c = CMSG_FIRSTHDR(&m);
	if (!c)
		return (size_t)n;
	memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	if (state_fd >= 0)
		close(state_fd);
	state_fd = fd;
	return (size_t)n;
}

static int file_of(const uint8_t *bytes, size_t len)
{
	int fd = memfd_create("fuzz", MFD_CLOEXEC);

	PROMISE(fd >= 0 && write(fd, bytes, len) == (ssize_t)len);
	return fd;
}

/* False: the agent takes no more. */
static bool send_one(const void *msg, size_t len, int fd)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {(void *)msg, len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control.buf);
		control.h.cmsg_level = SOL_SOCKET;
		control.h.cmsg_type = SCM_RIGHTS;
		control.h.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.h), &fd, sizeof(fd));
	}
	return sendmsg(service.fd, &m, MSG_NOSIGNAL) == (ssize_t)len;
}

/* One message of the input; its bytes, or 0: that was the last, or the agent let go. */
static size_t one_message(const uint8_t *data, size_t len)
{
	static _Alignas(8) uint8_t msg[sizeof(struct snapd_msg) + UINT8_MAX];
	struct snapd_msg *h = (struct snapd_msg *)msg;
	size_t body = len < 3 ? 0 : MIN((size_t)data[2], len - 3), n = sizeof(*h) + body;
	int fd = -1;
	bool sent;

	if (len < 3)
		return 0;
	memset(msg, 0, sizeof(*h));
	memcpy(msg + sizeof(*h), data + 3, body);
	if (data[0] & 4) {
		memcpy(msg, data + 3, MIN(body, sizeof(*h)));
	} else {
		h->len = (uint32_t)n;
		h->type = data[1];
		h->req = ++service.req;
	}
	if ((data[0] & 3) == 1)
		fd = file_of(data + 3, body);
	else if ((data[0] & 3) == 2 && state_fd >= 0)
		fd = dup(state_fd);
	sent = send_one(msg, n, fd);
	if (fd >= 0)
		close(fd);
	/* Its answer has the state for what comes after. */
	while (sent && h->type == SNAPD_MSG_PAUSE && h->len == n && (sent = receive()) &&
	       service.in.h.type != SNAPD_MSG_PAUSED && service.in.h.type != SNAPD_MSG_FAILED)
		;
	return sent ? 3 + body : 0;
}

static void talk(const uint8_t *data, size_t len)
{
	size_t n;

	while ((n = one_message(data, len))) {
		data += n;
		len -= n;
	}
	shutdown(service.fd, SHUT_WR);
	while (receive())
		;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct sim_vm_config config = {.ring_entries = 256, .harvest_us = 1000};
	static struct sim_vm vm;

	if (!len)
		return 0;
	state_fd = -1;
	if (data[0] & 2)
		setenv("SNAPD_RESTORE", "guest@1", 1);
	else
		unsetenv("SNAPD_RESTORE");
	sim_vm_create(&vm, &config);
	fake_accept_on(vm.listen_fd, &service);
	if (data[0] & 1)
		fake_welcome(&service);
	talk(data + 1, len - 1);
	munmap(service.shm, service.hello.shm_bytes);
	close(service.shm_fd);
	close(service.fd);
	if (state_fd >= 0)
		close(state_fd);
	sim_vm_destroy(&vm);
	return 0;
}
