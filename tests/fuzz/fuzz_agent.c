/* SPDX-License-Identifier: MIT */
/*
 * Any messages of an agent, to a real service: each u8 descriptor (0 none, 1 sets, 2
 * memory, 3 both), u8 flags (1: a real header, and for HELLO real contents, lie under
 * the bytes), u16 length, bytes.  The service lives, and lets go of the connection
 * when it ends, and of every descriptor that came along.
 */
#include <dirent.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/vm/priv.h"
#include "tests/fuzz/fuzz.h"
#include "tests/lib/service.h"

#define FDS_SPARE 12 /* what the service may have opened since for itself */

static struct service service;
static struct fake_agent agent;

static void stop(void)
{
	service_stop(&service);
	fa_deinit(&agent);
}

static void start(void)
{
	service_start(&service, NULL);
	fa_init(&agent, "fuzzed", 64, 16);
	atexit(stop);
}

/* The bytes over a message that would be right. */
static size_t compose(uint8_t *msg, const uint8_t *bytes, size_t len, bool real)
{
	struct snapd_msg *h = (struct snapd_msg *)msg;

	memset(msg, 0, SNAPD_MSG_MAX);
	memcpy(msg, bytes, len);
	if (!real)
		return len;
	if (h->type == SNAPD_MSG_HELLO) {
		memcpy(msg, &agent.hello, sizeof(agent.hello));
		for (size_t i = 16; i < len; i++)
			msg[i] ^= bytes[i];
		len = sizeof(agent.hello);
		h->type = SNAPD_MSG_HELLO;
	}
	len = MAX(len, sizeof(*h));
	h->len = (uint32_t)len;
	h->flags = 0;
	return len;
}

static void send_message(int sock, const void *msg, size_t len, unsigned int fds)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
	struct iovec iov = {.iov_base = (void *)msg, .iov_len = len};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};
	struct cmsghdr *c = (struct cmsghdr *)control;
	int fd[2], nr = 0;

	if (fds & 1)
		fd[nr++] = agent.shm_fd;
	if (fds & 2)
		fd[nr++] = agent.ram_fd[0];
	if (nr) {
		mh.msg_control = control;
		mh.msg_controllen = CMSG_SPACE((size_t)nr * sizeof(int));
		*c = (struct cmsghdr){.cmsg_len = CMSG_LEN((size_t)nr * sizeof(int)),
				      .cmsg_level = SOL_SOCKET,
				      .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(c), fd, (size_t)nr * sizeof(int));
	}
	sendmsg(sock, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Until the service has closed its end, as it does when ours was shut down. */
static void wait_end(int sock)
{
	static char buf[SNAPD_MSG_MAX];

	while (recv(sock, buf, sizeof(buf), 0) > 0)
		;
}

static void check_descriptors(void)
{
	static int first;
	DIR *d = opendir("/proc/self/fd");
	int nr = 0;

	PROMISE(d);
	while (readdir(d))
		nr++;
	closedir(d);
	if (!first)
		first = nr;
	PROMISE(nr <= first + FDS_SPARE);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static uint8_t msg[SNAPD_MSG_MAX];
	int sv[2];

	if (!service.d.store)
		start();
	PROMISE(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv));
	PROMISE(!vm_accept(&service.d, sv[0]));
	while (len >= 4) {
		size_t n = (size_t)(data[2] | data[3] << 8);

		n = MIN(n, len - 4);
		n = MIN(n, sizeof(msg));
		send_message(sv[1], msg, compose(msg, data + 4, n, data[1] & 1), data[0] & 3);
		data += 4 + n;
		len -= 4 + n;
	}
	shutdown(sv[1], SHUT_WR);
	wait_end(sv[1]);
	close(sv[1]);
	vm_reap(&service.d);
	check_descriptors();
	return 0;
}
