/* SPDX-License-Identifier: MIT */
/* The service's side of the protocol, played by a test; fake_service.h tells. */
#include "tests/lib/fake_service.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "tests/lib/check.h"

int fake_listen(char *dir, size_t dir_bytes, char *socket_path, size_t socket_bytes)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd;

	snprintf(dir, dir_bytes, "/tmp/snapd-test-XXXXXX");
	check(mkdtemp(dir), "%s", strerror(errno));
	snprintf(socket_path, socket_bytes, "%s/agent.sock", dir);
	snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/agent.sock", dir);
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	check(!bind(fd, (struct sockaddr *)&addr, sizeof(addr)), "%s", strerror(errno));
	check(!listen(fd, 4), "%s", strerror(errno));
	return fd;
}

void fake_unlisten(int listen_fd, const char *dir, const char *socket_path)
{
	close(listen_fd);
	unlink(socket_path);
	rmdir(dir);
}

static size_t receive(struct fake_service *s)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {&s->in, sizeof(s->in)};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control.buf,
			   .msg_controllen = sizeof(control.buf)};
	struct pollfd p = {s->fd, POLLIN, 0};
	ssize_t n;

	check(TEMP_FAILURE_RETRY(poll(&p, 1, 30000)) > 0, "no message for 30 s");
	n = recvmsg(s->fd, &m, MSG_CMSG_CLOEXEC);
	s->in_fd = -1;
	if (n <= 0)
		return 0;
	if (CMSG_FIRSTHDR(&m))
		memcpy(&s->in_fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(int));
	check(s->in.h.len == (size_t)n, "length %u, got %zd", s->in.h.len, n);
	return (size_t)n;
}

void fake_accept_on(int listen_fd, struct fake_service *s)
{
	struct pollfd p = {listen_fd, POLLIN, 0};
	struct stat st;

	memset(s, 0, sizeof(*s));
	check(TEMP_FAILURE_RETRY(poll(&p, 1, 10000)) > 0, "the agent does not come");
	s->fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
	check(s->fd >= 0, "%s", strerror(errno));
	check(receive(s) >= sizeof(s->hello) && s->in.h.type == SNAPD_MSG_HELLO, "no HELLO");
	memcpy(&s->hello, &s->in, sizeof(s->hello));
	s->shm_fd = s->in_fd;
	check(s->shm_fd >= 0 && !fstat(s->shm_fd, &st) &&
		      (uint64_t)st.st_size == s->hello.shm_bytes,
	      "shm");
	s->shm = mmap(NULL, s->hello.shm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		      s->shm_fd, 0);
	check(s->shm != MAP_FAILED, "%s", strerror(errno));
	gpaset_init(&s->dirty, (char *)s->shm + s->shm->dirty_off, s->shm->nr_frames);
	gpaset_init(&s->inflight, (char *)s->shm + s->shm->inflight_off, s->shm->nr_frames);
}

void fake_send(struct fake_service *s, void *msg, size_t len, uint16_t type, int fd)
{
	union {
		struct cmsghdr h;
		char buf[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct snapd_msg *h = msg;
	struct iovec iov = {msg, len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	h->len = (uint32_t)len;
	h->type = type;
	h->req = ++s->req;
	if (fd >= 0) {
		m.msg_control = control.buf;
		m.msg_controllen = sizeof(control.buf);
		control.h.cmsg_level = SOL_SOCKET;
		control.h.cmsg_type = SCM_RIGHTS;
		control.h.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&control.h), &fd, sizeof(fd));
	}
	check(sendmsg(s->fd, &m, MSG_NOSIGNAL) == (ssize_t)len, "%s", strerror(errno));
}

void fake_welcome(struct fake_service *s)
{
	struct snapd_msg_welcome w = {.major = SNAPD_PROTO_MAJOR, .minor = SNAPD_PROTO_MINOR};

	fake_send(s, &w, sizeof(w), SNAPD_MSG_WELCOME, -1);
}

/* Take in what the agent tells; true when it is an answer instead. */
static bool is_answer(struct fake_service *s)
{
	const struct snapd_msg_block *b = (void *)&s->in;
	const struct snapd_msg_piece *p = (void *)&s->in;
	const struct snapd_msg_gone *gone = (void *)&s->in;
	const struct snapd_msg_ready *ready = (void *)&s->in;

	switch (s->in.h.type) {
	case SNAPD_MSG_BLOCK:
		check(b->block == s->nr_blocks && s->in_fd >= 0, "block %u", b->block);
		s->block_fds[s->nr_blocks++] = s->in_fd;
		return false;
	case SNAPD_MSG_PIECE:
		check(p->p.piece == s->nr_pieces && p->p.block < s->nr_blocks, "piece %u",
		      p->p.piece);
		check(s->nr_pieces < FAKE_PIECES, "many pieces");
		s->pieces[s->nr_pieces++] = p->p;
		return false;
	case SNAPD_MSG_GONE:
		check(gone->piece < s->nr_pieces && !s->gone[gone->piece], "gone %u", gone->piece);
		s->gone[gone->piece] = true;
		return false;
	case SNAPD_MSG_READY:
		s->ready_vcpus = ready->nr_vcpus;
		return false;
	case SNAPD_MSG_ABOUT:
		memcpy(&s->about, &s->in, sizeof(s->about));
		s->nr_abouts++;
		return false;
	case SNAPD_MSG_BYE:
		s->said_bye = true;
		return false;
	default:
		return true;
	}
}

void fake_until_ready(struct fake_service *s)
{
	do {
		check(receive(s), "closed");
		check(!is_answer(s), "type %u before READY", s->in.h.type);
	} while (s->in.h.type != SNAPD_MSG_READY);
}

void fake_open_on(int listen_fd, struct fake_service *s)
{
	fake_accept_on(listen_fd, s);
	fake_welcome(s);
	fake_until_ready(s);
}

void fake_close(struct fake_service *s)
{
	for (uint32_t i = 0; i < s->nr_blocks; i++)
		close(s->block_fds[i]);
	munmap(s->shm, s->hello.shm_bytes);
	close(s->shm_fd);
	close(s->fd);
}

uint16_t fake_answer(struct fake_service *s)
{
	do
		check(receive(s), "the agent hung up");
	while (!is_answer(s));
	check(s->in.h.req == s->req, "answer to %llu", (unsigned long long)s->in.h.req);
	return s->in.h.type;
}

bool fake_is_closed(struct fake_service *s)
{
	while (receive(s))
		if (is_answer(s) && s->in.h.type != SNAPD_MSG_FAILED)
			return false;
	return true;
}

static void must(struct fake_service *s, uint16_t type)
{
	uint16_t got = fake_answer(s);

	check(got == type, "type %u instead of %u: %s", got, type,
	      got == SNAPD_MSG_FAILED ? s->in.error.text : "");
}

void fake_sync(struct fake_service *s)
{
	struct snapd_msg_sync m = {0};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_SYNC, -1);
	must(s, SNAPD_MSG_SYNCED);
}

int fake_pause(struct fake_service *s, uint32_t flags)
{
	struct snapd_msg_pause m = {.flags = flags, .timeout_ms = 10000};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_PAUSE, -1);
	must(s, SNAPD_MSG_PAUSED);
	check((s->in_fd >= 0) == !(flags & SNAPD_PAUSE_NO_STATE), "state descriptor");
	return s->in_fd;
}

void fake_pause_to_rewrite(struct fake_service *s, struct snapd_point to)
{
	struct snapd_msg_pause m = {
		.flags = SNAPD_PAUSE_NO_STATE | SNAPD_PAUSE_REWRITE, .timeout_ms = 10000, .to = to};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_PAUSE, -1);
	must(s, SNAPD_MSG_PAUSED);
}

void fake_load_resume(struct fake_service *s, int state_fd, uint64_t len)
{
	struct snapd_msg_load m = {.state_bytes = len, .flags = SNAPD_LOAD_RESUME};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_LOAD, state_fd);
	must(s, SNAPD_MSG_LOADED);
}

uint16_t fake_resume_untouched(struct fake_service *s)
{
	struct snapd_msg_resume m = {.flags = SNAPD_RESUME_UNTOUCHED};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_RESUME, -1);
	return fake_answer(s);
}

void fake_rewrite(struct fake_service *s, struct snapd_point to)
{
	struct snapd_msg_rewrite m = {.to = to};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_REWRITE, -1);
}

void fake_load(struct fake_service *s, int state_fd, uint64_t len)
{
	struct snapd_msg_load m = {.state_bytes = len};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_LOAD, state_fd);
	must(s, SNAPD_MSG_LOADED);
}

void fake_resume(struct fake_service *s)
{
	struct snapd_msg_resume m = {0};

	fake_send(s, &m, sizeof(m), SNAPD_MSG_RESUME, -1);
	must(s, SNAPD_MSG_RESUMED);
}

/* ---- a copy of RAM made from the sets alone ---- */

void fake_copy_init(struct fake_copy *c, const struct fake_service *s)
{
	struct stat st;

	c->nr = s->nr_blocks;
	for (uint32_t i = 0; i < c->nr; i++) {
		check(!fstat(s->block_fds[i], &st), "fstat");
		c->size[i] = (uint64_t)st.st_size;
		c->ram[i] = calloc(1, c->size[i]);
		c->map[i] = mmap(NULL, c->size[i], PROT_READ | PROT_WRITE, MAP_SHARED,
				 s->block_fds[i], 0);
		check(c->ram[i] && c->map[i] != MAP_FAILED, "memory");
	}
}

void fake_copy_deinit(struct fake_copy *c)
{
	for (uint32_t i = 0; i < c->nr; i++) {
		munmap(c->map[i], c->size[i]);
		free(c->ram[i]);
	}
}

static uint64_t copy_piece(struct fake_service *s, const struct snapd_piece *p, struct fake_copy *c)
{
	uint64_t total = 0, frames[256], cursor = p->first_frame, at;
	size_t n;

	while ((n = gpaset_take(&s->dirty, NULL, p->first_frame + p->nr_frames, &cursor, frames,
				256))) {
		for (size_t k = 0; k < n; k++) {
			at = (p->block_page + frames[k] - p->first_frame) * FAKE_PAGE;
			memcpy(c->ram[p->block] + at, c->map[p->block] + at, FAKE_PAGE);
		}
		total += n;
	}
	return total;
}

uint64_t fake_copy_dirty(struct fake_service *s, struct fake_copy *c)
{
	uint64_t total = 0;

	for (uint32_t i = 0; i < s->nr_pieces; i++)
		if (!s->gone[i])
			total += copy_piece(s, &s->pieces[i], c);
	return total;
}

void fake_copy_check(const struct fake_copy *c, const char *when)
{
	for (uint32_t i = 0; i < c->nr; i++)
		for (uint64_t at = 0; at < c->size[i]; at += FAKE_PAGE)
			check(!memcmp(c->ram[i] + at, c->map[i] + at, FAKE_PAGE),
			      "%s: page %llu of block %u is lost", when,
			      (unsigned long long)(at / FAKE_PAGE), i);
}
