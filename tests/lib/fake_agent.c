/* SPDX-License-Identifier: MIT */
/* The agent's side of the protocol, without KVM; see fake_agent.h. */
#include "tests/lib/fake_agent.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define FRAMES 65536ull

static uint64_t first_frame(const struct fake_agent *a, int block)
{
	return block ? ALIGN_UP(a->block_pages[0], (uint64_t)64) : 0;
}

static int sealed_memfd(const char *name, size_t bytes, int seals)
{
	int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);

	check(fd >= 0 && !ftruncate(fd, (off_t)bytes), "memfd of %zu bytes", bytes);
	check(!seals || !fcntl(fd, F_ADD_SEALS, seals), "seal");
	return fd;
}

static void make_shm(struct fake_agent *a)
{
	size_t set = gpaset_bytes(FRAMES), total = 4096 + 3 * set;

	a->shm_fd = sealed_memfd("shm", total, F_SEAL_SHRINK | F_SEAL_GROW);
	a->shm = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, a->shm_fd, 0);
	check(a->shm != MAP_FAILED, "map");
	a->shm->magic = SNAPD_SHM_MAGIC;
	a->shm->major = SNAPD_PROTO_MAJOR;
	a->shm->header_bytes = sizeof(struct snapd_shm);
	a->shm->nr_frames = FRAMES;
	a->shm->dirty_off = 4096;
	a->shm->inflight_off = 4096 + set;
	a->shm->discarded_off = 4096 + 2 * set;
	a->shm->total_bytes = a->shm_bytes = total;
	gpaset_init(&a->dirty, (uint8_t *)a->shm + 4096, FRAMES);
	gpaset_init(&a->inflight, (uint8_t *)a->shm + 4096 + set, FRAMES);
	gpaset_init(&a->discarded, (uint8_t *)a->shm + 4096 + 2 * set, FRAMES);
}

void fa_init(struct fake_agent *a, const char *name, uint64_t pages0, uint64_t pages1)
{
	static _Atomic uint32_t count;
	uint32_t number = count++;

	*a = (struct fake_agent){.name = name,
				 .block_pages = {pages0, pages1},
				 .home_gfn = {0, 0x100000},
				 .nr_vcpus = 2,
				 .sock = -1};
	memcpy(a->instance, &number, sizeof(number));
	a->instance[15] = 1;
	make_shm(a);
	for (int b = 0; b < FA_BLOCKS; b++) {
		size_t bytes = a->block_pages[b] * FA_PAGE;

		a->ram_fd[b] = -1;
		if (!bytes)
			continue;
		a->ram_fd[b] = sealed_memfd("ram", bytes, 0);
		a->ram[b] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, a->ram_fd[b], 0);
		a->truth[b] = calloc(1, bytes);
		check(a->ram[b] != MAP_FAILED && a->truth[b], "RAM");
	}
	pthread_mutex_init(&a->gate, NULL);
	pthread_cond_init(&a->gate_changed, NULL);
	a->hello = (struct snapd_msg_hello){
		.h = {.len = sizeof(a->hello), .type = SNAPD_MSG_HELLO},
		.major = SNAPD_PROTO_MAJOR,
		.minor = SNAPD_PROTO_MINOR,
		.page_size = FA_PAGE,
		.pid = (uint32_t)getpid(),
		.nr_vcpus = a->nr_vcpus,
		.ring_entries = 4096,
		.shm_bytes = a->shm->total_bytes,
		.arch = "x86_64",
	};
	snprintf(a->hello.name, sizeof(a->hello.name), "%s", name);
	memcpy(a->hello.instance, a->instance, sizeof(a->instance));
}

void fa_deinit(struct fake_agent *a)
{
	fa_stop_writers(a);
	fa_disconnect(a);
	for (int b = 0; b < FA_BLOCKS; b++) {
		if (a->ram_fd[b] < 0)
			continue;
		munmap(a->ram[b], a->block_pages[b] * FA_PAGE);
		close(a->ram_fd[b]);
		free(a->truth[b]);
	}
	munmap(a->shm, a->shm_bytes);
	close(a->shm_fd);
	pthread_cond_destroy(&a->gate_changed);
	pthread_mutex_destroy(&a->gate);
}

/* ---- messages ---- */

int fa_connect(struct fake_agent *a)
{
	int sv[2];

	check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sv), "socketpair");
	a->sock = sv[0];
	a->ended = 0;
	return sv[1];
}

void fa_send(struct fake_agent *a, const void *msg, size_t len, int fd)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
	struct iovec iov = {.iov_base = (void *)msg, .iov_len = len};
	struct msghdr mh = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		struct cmsghdr *c = (struct cmsghdr *)control;

		mh.msg_control = control;
		mh.msg_controllen = sizeof(control);
		*c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)),
				      .cmsg_level = SOL_SOCKET,
				      .cmsg_type = SCM_RIGHTS};
		memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	}
	(void)!sendmsg(a->sock, &mh, MSG_NOSIGNAL);
}

size_t fa_recv(struct fake_agent *a, void *buf, int *fd)
{
	_Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = {.iov_base = buf, .iov_len = SNAPD_MSG_MAX};
	struct msghdr mh = {.msg_iov = &iov,
			    .msg_iovlen = 1,
			    .msg_control = control,
			    .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(a->sock, &mh, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c;

	*fd = -1;
	if (n <= 0)
		return 0;
	c = CMSG_FIRSTHDR(&mh);
	if (c)
		memcpy(fd, CMSG_DATA(c), sizeof(*fd));
	return (size_t)n;
}

void fa_hello(struct fake_agent *a)
{
	struct snapd_msg_hello h = a->hello;

	if (a->rewriting) {
		h.flags |= SNAPD_HELLO_REWRITING;
		h.rewrite_to = a->rewrite_to;
	}
	if (a->restore_pending) {
		h.flags |= SNAPD_HELLO_RESTORE;
		memcpy(h.restore, a->restore, sizeof(h.restore));
	}
	fa_send(a, &h, sizeof(h), a->shm_fd);
}

void fa_tell(struct fake_agent *a)
{
	struct snapd_msg_ready ready = {.h = {.len = sizeof(ready), .type = SNAPD_MSG_READY},
					.nr_vcpus = a->nr_vcpus};

	for (int b = 0; b < FA_BLOCKS; b++) {
		struct snapd_msg_block block = {
			.h = {.len = sizeof(block), .type = SNAPD_MSG_BLOCK},
			.block = (uint32_t)b,
			.page_size = FA_PAGE,
			.size_bytes = a->block_pages[b] * FA_PAGE,
		};
		struct snapd_msg_piece piece = {
			.h = {.len = sizeof(piece), .type = SNAPD_MSG_PIECE},
			.p = {.piece = (uint32_t)b,
			      .block = (uint32_t)b,
			      .nr_frames = a->block_pages[b],
			      .home_gfn = a->home_gfn[b],
			      .first_frame = first_frame(a, b)},
		};

		if (!a->block_pages[b])
			continue;
		fa_send(a, &block, sizeof(block), a->ram_fd[b]);
		fa_send(a, &piece, sizeof(piece), -1);
	}
	fa_send(a, &ready, sizeof(ready), -1);
}

/* ---- requests ---- */

static void pause_writers(struct fake_agent *a)
{
	pthread_mutex_lock(&a->gate);
	a->paused = true;
	while (a->nr_writing)
		pthread_cond_wait(&a->gate_changed, &a->gate);
	pthread_mutex_unlock(&a->gate);
}

static void resume_writers(struct fake_agent *a)
{
	pthread_mutex_lock(&a->gate);
	a->paused = false;
	pthread_cond_broadcast(&a->gate_changed);
	pthread_mutex_unlock(&a->gate);
}

static void begin_write(struct fake_agent *a)
{
	pthread_mutex_lock(&a->gate);
	while (a->paused && !a->stop_writers)
		pthread_cond_wait(&a->gate_changed, &a->gate);
	a->nr_writing++;
	pthread_mutex_unlock(&a->gate);
}

static void end_write(struct fake_agent *a)
{
	pthread_mutex_lock(&a->gate);
	a->nr_writing--;
	pthread_cond_broadcast(&a->gate_changed);
	pthread_mutex_unlock(&a->gate);
}

static int save_state(struct fake_agent *a, uint64_t *len)
{
	struct state_piece pieces[FA_BLOCKS];
	struct state_slot slots[FA_BLOCKS];
	struct state_slot_note notes[FA_BLOCKS] = {};
	struct snapd_state_writer w;
	const void *blob;
	size_t n, nr = 0;
	int fd;

	for (int b = 0; b < FA_BLOCKS; b++) {
		if (!a->block_pages[b])
			continue;
		pieces[nr] = (struct state_piece){.home_gfn = a->home_gfn[b],
						  .nr_pages = a->block_pages[b],
						  .block = (uint32_t)b};
		slots[nr] = (struct state_slot){.slot = (uint32_t)b + 7,
						.gpa = FA_GPA(a, b),
						.nr_pages = a->block_pages[b],
						.home_gfn = a->home_gfn[b]};
		notes[nr++].generation = 100 + (uint64_t)b;
	}
	check(!state_writer_init(&w), "state");
	state_put(&w, "layout", 0, 1, slots, nr * sizeof(slots[0]));
	state_put(&w, "note.slots", 0, 1, notes, nr * sizeof(notes[0]));
	state_put(&w, "pieces", 0, 1, pieces, nr * sizeof(pieces[0]));
	for (uint32_t i = 0; i < a->nr_vcpus; i++)
		state_put(&w, "x86.regs", i, 1, &a->state_value, sizeof(a->state_value));
	check(!state_writer_finish(&w, &blob, &n), "state");
	fd = sealed_memfd("state", n, 0);
	check(pwrite(fd, blob, n, 0) == (ssize_t)n, "write");
	state_writer_deinit(&w);
	*len = n;
	return fd;
}

static void load_state(struct fake_agent *a, int fd, uint64_t len)
{
	struct snapd_state_reader r;
	const void *data;
	uint16_t version;
	size_t n;
	void *blob = malloc(len);

	check(fd >= 0 && pread(fd, blob, len, 0) == (ssize_t)len, "state to load");
	check(!state_reader_init(&r, blob, len, NULL), "state to load is valid");
	check(!state_get(&r, "x86.regs", 0, &version, &data, &n), "state has vCPU 0");
	memcpy(&a->state_value, data, sizeof(a->state_value));
	free(blob);
}

static void answer(struct fake_agent *a, void *msg, size_t len, uint16_t type, uint64_t req, int fd)
{
	struct snapd_msg *h = msg;

	*h = (struct snapd_msg){.len = (uint32_t)len, .type = type, .req = req};
	if (a->die_mute_at != a->serves)
		fa_send(a, msg, len, fd);
}

static void on_pause(struct fake_agent *a, const struct snapd_msg_pause *m)
{
	struct snapd_msg_paused out = {};
	int fd = -1;

	pause_writers(a);
	a->nr_pauses++;
	for (int b = 0; b < FA_BLOCKS && !a->no_truth; b++)
		if (a->block_pages[b])
			memcpy(a->truth[b], a->ram[b], a->block_pages[b] * FA_PAGE);
	for (int b = 0; b < FA_BLOCKS && a->dirty_all_at_pause; b++)
		gpaset_add_range(&a->dirty, first_frame(a, b), a->block_pages[b]);
	if (!(m->flags & SNAPD_PAUSE_NO_STATE))
		fd = save_state(a, &out.state_bytes);
	if (a->hello.minor >= 2 && m->flags & SNAPD_PAUSE_REWRITE) {
		a->untouched = !a->rewriting;
		a->rewriting = true;
		a->rewrite_to = m->to;
	}
	answer(a, &out, sizeof(out), SNAPD_MSG_PAUSED, m->h.req, fd);
	if (fd >= 0)
		close(fd);
}

static uint64_t said_pause(const struct fake_agent *a)
{
	uint64_t ns = atomic_load(&a->paused_ns);

	return ns ? ns : 1000;
}

static void on_load(struct fake_agent *a, const struct snapd_msg_load *m, int fd)
{
	struct snapd_msg_loaded out = {};

	check(a->paused && (a->rewriting || a->restore_pending), "LOAD while rewritten");
	load_state(a, fd, m->state_bytes);
	a->nr_loads++;
	a->untouched = false;
	if (a->hello.minor >= 2 && m->flags & SNAPD_LOAD_RESUME) {
		out.paused_ns = said_pause(a);
		a->rewriting = false;
		a->restore_pending = false;
		resume_writers(a);
	}
	answer(a, &out, sizeof(out), SNAPD_MSG_LOADED, m->h.req, -1);
}

static void on_request(struct fake_agent *a, const struct snapd_msg *h, int fd)
{
	struct snapd_msg_synced synced = {};
	struct snapd_msg_checked checked = {};
	struct snapd_msg_resumed resumed = {.paused_ns = said_pause(a)};
	struct snapd_msg_error failed = {.code = EIO, .text = "as the test asked"};
	int type = h->type;

	if (atomic_compare_exchange_strong(&a->shrink_at, &(int){type}, 0))
		check(!ftruncate(a->ram_fd[0], 0), "shrink");
	if (atomic_compare_exchange_strong(&a->lose_at, &(int){type}, 0))
		fa_write_unmarked(a, 0, 42, 4243);
	if (atomic_compare_exchange_strong(&a->gone_at, &(int){type}, 0)) {
		struct snapd_msg_gone gone = {.h = {sizeof(gone), SNAPD_MSG_GONE, 0, 0},
					      .piece = 1};

		fa_send(a, &gone, sizeof(gone), -1);
	}
	if (atomic_compare_exchange_strong(&a->fail_at, &(int){type}, 0)) {
		answer(a, &failed, sizeof(failed), SNAPD_MSG_FAILED, h->req, -1);
		return;
	}
	switch (type) {
	case SNAPD_MSG_SYNC:
		answer(a, &synced, sizeof(synced), SNAPD_MSG_SYNCED, h->req, -1);
		break;
	case SNAPD_MSG_PAUSE:
		on_pause(a, (const struct snapd_msg_pause *)h);
		break;
	case SNAPD_MSG_REWRITE:
		check(a->paused, "REWRITE while paused");
		a->rewriting = true;
		a->untouched = false;
		a->rewrite_to = ((const struct snapd_msg_rewrite *)h)->to;
		a->nr_rewrites++;
		break;
	case SNAPD_MSG_CHECK:
		answer(a, &checked, sizeof(checked), SNAPD_MSG_CHECKED, h->req, -1);
		break;
	case SNAPD_MSG_LOAD:
		on_load(a, (const struct snapd_msg_load *)h, fd);
		break;
	case SNAPD_MSG_RESUME:
		if (((const struct snapd_msg_resume *)h)->flags & SNAPD_RESUME_UNTOUCHED) {
			check(a->untouched, "UNTOUCHED where nothing was written");
			a->nr_untouched++;
		}
		a->rewriting = false;
		a->restore_pending = false;
		resume_writers(a);
		answer(a, &resumed, sizeof(resumed), SNAPD_MSG_RESUMED, h->req, -1);
		break;
	case SNAPD_MSG_REJECT:
	case SNAPD_MSG_ERROR:
		memcpy(&a->last_error, h, sizeof(a->last_error));
		a->ended = type == SNAPD_MSG_REJECT ? 2 : 3;
		break;
	default:
		check(0, "request of type %d", type);
	}
}

static void *serve(void *arg)
{
	struct fake_agent *a = arg;
	void *buf = malloc(SNAPD_MSG_MAX);
	int fd;

	while (fa_recv(a, buf, &fd)) {
		int type = ((struct snapd_msg *)buf)->type;

		if (atomic_compare_exchange_strong(&a->die_at, &(int){type}, 0)) {
			shutdown(a->sock, SHUT_RDWR);
			break;
		}
		a->serves = type;
		on_request(a, buf, fd);
		if (fd >= 0)
			close(fd);
		if (a->die_mute_at == type ||
		    atomic_compare_exchange_strong(&a->die_after, &(int){type}, 0)) {
			a->die_mute_at = 0;
			shutdown(a->sock, SHUT_RDWR);
			break;
		}
	}
	if (!a->ended)
		a->ended = 1;
	/* As the real one: a pause ends with the connection, but for half rewritten RAM. */
	if (!a->rewriting && !a->restore_pending)
		resume_writers(a);
	free(buf);
	return NULL;
}

bool fa_attach(struct fake_agent *a)
{
	void *buf = malloc(SNAPD_MSG_MAX);
	struct snapd_msg *h = buf;
	int fd;

	if (a->restore_pending)
		pause_writers(a);
	fa_hello(a);
	if (!fa_recv(a, buf, &fd))
		h->type = 0;
	if (h->type != SNAPD_MSG_WELCOME) {
		if (h->type)
			memcpy(&a->last_error, buf, sizeof(a->last_error));
		free(buf);
		return false;
	}
	memcpy(&a->welcome, buf, sizeof(a->welcome));
	free(buf);
	fa_tell(a);
	check(!pthread_create(&a->server, NULL, serve, a), "thread");
	a->serving = true;
	return true;
}

void fa_disconnect(struct fake_agent *a)
{
	if (a->sock < 0)
		return;
	shutdown(a->sock, SHUT_RDWR);
	if (a->serving)
		pthread_join(a->server, NULL);
	a->serving = false;
	close(a->sock);
	a->sock = -1;
}

/* ---- the guest ---- */

void fa_write_unmarked(struct fake_agent *a, int block, uint64_t page, uint64_t value)
{
	uint64_t *p = (uint64_t *)(a->ram[block] + page * FA_PAGE);

	/* Zero pages, a few that many share, and unique ones; writers may meet on a page. */
	for (size_t i = 0; i < FA_PAGE / 8; i++) {
		uint64_t word = value % 8 == 0 ? 0 : value % 8 == 1 ? value >> 3 & 3 : value + i;

		__atomic_store_n(&p[i], word, __ATOMIC_RELAXED);
	}
}

void fa_write(struct fake_agent *a, int block, uint64_t page, uint64_t value)
{
	fa_write_unmarked(a, block, page, value);
	gpaset_add(&a->dirty, first_frame(a, block) + page);
}

struct writer_arg {
	struct fake_agent *a;
	uint32_t index;
};

static void *writer(void *arg)
{
	struct writer_arg *w = arg;
	struct fake_agent *a = w->a;
	struct rand r = rand_of(a->seed + w->index);

	while (!a->stop_writers) {
		int block = a->block_pages[1] && rand_below(&r, 4) == 0;
		uint64_t n = a->block_pages[block];

		if (!block && a->hot_pages && rand_below(&r, 4))
			n = a->hot_pages;
		begin_write(a);
		if (!a->stop_writers)
			fa_write(a, block, rand_below(&r, n), rand_next(&r));
		end_write(a);
		if (a->write_pause_us)
			usleep(a->write_pause_us);
	}
	free(w);
	return NULL;
}

void fa_start_writers(struct fake_agent *a, uint32_t nr, uint64_t seed)
{
	a->stop_writers = false;
	a->seed = seed;
	for (a->nr_writers = 0; a->nr_writers < nr; a->nr_writers++) {
		struct writer_arg *w = malloc(sizeof(*w));

		*w = (struct writer_arg){a, a->nr_writers};
		check(!pthread_create(&a->writers[a->nr_writers], NULL, writer, w), "thread");
	}
}

void fa_stop_writers(struct fake_agent *a)
{
	pthread_mutex_lock(&a->gate);
	a->stop_writers = true;
	pthread_cond_broadcast(&a->gate_changed);
	pthread_mutex_unlock(&a->gate);
	for (; a->nr_writers; a->nr_writers--)
		pthread_join(a->writers[a->nr_writers - 1], NULL);
}
