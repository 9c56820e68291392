/* SPDX-License-Identifier: MIT */
/*
 * Goal: whatever one agent sends, the service lives, says why it hangs up, and
 * serves the others (I11).
 *
 * Method: one well-behaved agent stays attached all the time.  Each case opens
 * another connection, does one thing wrong, and expects REJECT or ERROR, or the end
 * of the connection; after each case the good agent is still served, and every fourth time
 * it takes a snapshot, which has to be exact.
 */
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/priv.h"
#include "tests/lib/check.h"
#include "tests/lib/fake_agent.h"
#include "tests/lib/rand.h"
#include "tests/lib/service.h"

static struct service service;
static struct fake_agent good;
static uint64_t writes;

static void good_is_well(const char *after)
{
	static unsigned int calls;
	struct err e = {};
	uint64_t id;

	vm_reap(&service.d); /* an uid may have so many connections, those that ended included */
	if (calls++ % 4) {   /* a snapshot waits for the disk */
		service_await(&service, &good, VM_READY);
		return;
	}
	fa_write(&good, 0, writes % 64, writes);
	writes++;
	check(!service_snapshot(&service, &good, NULL, &id, &e), "after %s: %s", after, e.text);
	service_compare(&service, &good, id, good.truth);
}

static void open_bad(struct fake_agent *a, const char *name)
{
	fa_init(a, name, 64, 16);
	check(!vm_accept(&service.d, fa_connect(a)), "accept");
}

/* The last word: REJECT or ERROR with a reason, then the end.  `want` 0: either. */
static void expect_refusal(struct fake_agent *a, int want, const char *what)
{
	static char buf[SNAPD_MSG_MAX];
	struct snapd_msg_error *m = (struct snapd_msg_error *)buf;
	int fd, last = 0;

	while (fa_recv(a, buf, &fd)) {
		last = m->h.type;
		if (last != SNAPD_MSG_REJECT && last != SNAPD_MSG_ERROR)
			continue;
		check(m->code > 0 && m->text[0], "%s: a code and a reason", what);
		if (getenv("SNAPD_TEST_VERBOSE"))
			printf("%-32s %s\n", what, m->text);
	}
	check(last == SNAPD_MSG_REJECT || last == SNAPD_MSG_ERROR, "%s: refused", what);
	check(!want || last == want, "%s: refused by type %d, not %d", what, last, want);
	fa_deinit(a);
	good_is_well(what);
}

/* ---- HELLO ---- */

static void bad_major(struct fake_agent *a)
{
	a->hello.major = 2;
}

static void no_name(struct fake_agent *a)
{
	a->hello.name[0] = '\0';
}

static void slash_name(struct fake_agent *a)
{
	strcpy(a->hello.name, "a/b");
}

static void at_name(struct fake_agent *a)
{
	strcpy(a->hello.name, "a@b");
}

static void number_name(struct fake_agent *a)
{
	strcpy(a->hello.name, "123");
}

static void endless_name(struct fake_agent *a)
{
	memset(a->hello.name, 'x', sizeof(a->hello.name));
}

static void control_name(struct fake_agent *a)
{
	strcpy(a->hello.name, "a\nb");
}

static void taken_name(struct fake_agent *a)
{
	strcpy(a->hello.name, "good");
}

static void bad_page_size(struct fake_agent *a)
{
	a->hello.page_size = 12345;
}

static void endless_arch(struct fake_agent *a)
{
	memset(a->hello.arch, 'x', sizeof(a->hello.arch));
}

static void bad_cmdline(struct fake_agent *a)
{
	a->hello.cmdline_len = 5000;
}

static void bad_flags(struct fake_agent *a)
{
	a->hello.flags = 0x80;
}

static void wrong_shm_size(struct fake_agent *a)
{
	a->hello.shm_bytes += 4096;
}

static void bad_shm_magic(struct fake_agent *a)
{
	a->shm->magic++;
}

static void odd_frames(struct fake_agent *a)
{
	a->shm->nr_frames++;
}

static void many_frames(struct fake_agent *a)
{
	a->shm->nr_frames = 1ull << 60;
}

static void sets_overlap(struct fake_agent *a)
{
	a->shm->inflight_off = a->shm->dirty_off;
}

static void set_outside(struct fake_agent *a)
{
	a->shm->inflight_off = a->shm->total_bytes - 4096;
}

static void set_on_header(struct fake_agent *a)
{
	a->shm->dirty_off = 0;
}

static void set_far_away(struct fake_agent *a)
{
	a->shm->dirty_off = UINT64_MAX & ~4095ull;
}

static void unsealed_shm(struct fake_agent *a)
{
	close(a->shm_fd);
	a->shm_fd = memfd_create("unsealed", MFD_CLOEXEC);
	check(!ftruncate(a->shm_fd, (off_t)a->hello.shm_bytes), "truncate");
}

static void pipe_for_shm(struct fake_agent *a)
{
	int p[2];

	check(!pipe(p), "pipe");
	close(a->shm_fd);
	close(p[1]);
	a->shm_fd = p[0];
}

static void unknown_snapshot(struct fake_agent *a)
{
	strcpy(a->restore, "nobody@nothing");
	a->restore_pending = true;
}

static void restore_without_name(struct fake_agent *a)
{
	a->restore_pending = true;
}

static const struct hello_case {
	const char *what;
	void (*damage)(struct fake_agent *a);
} hello_cases[] = {
	{"protocol major 2", bad_major},
	{"empty name", no_name},
	{"name with slash", slash_name},
	{"name with at", at_name},
	{"number as name", number_name},
	{"name without end", endless_name},
	{"name with newline", control_name},
	{"name of another VM", taken_name},
	{"page size", bad_page_size},
	{"architecture without end", endless_arch},
	{"command line too long", bad_cmdline},
	{"unknown flags", bad_flags},
	{"shared memory of other size", wrong_shm_size},
	{"shared memory magic", bad_shm_magic},
	{"odd number of frames", odd_frames},
	{"too many frames", many_frames},
	{"overlapping sets", sets_overlap},
	{"set beyond the end", set_outside},
	{"set on the header", set_on_header},
	{"set far away", set_far_away},
	{"shared memory not sealed", unsealed_shm},
	{"a pipe for shared memory", pipe_for_shm},
	{"restore of nothing", unknown_snapshot},
	{"restore without a name", restore_without_name},
};

static void test_hello(void)
{
	struct fake_agent a;

	for (size_t i = 0; i < ARRAY_SIZE(hello_cases); i++) {
		open_bad(&a, "bad");
		hello_cases[i].damage(&a);
		fa_hello(&a);
		expect_refusal(&a, SNAPD_MSG_REJECT, hello_cases[i].what);
	}
}

static void test_hello_framing(void)
{
	struct fake_agent a;
	struct snapd_msg_hello h;

	open_bad(&a, "bad");
	h = a.hello;
	h.h.len--;
	fa_send(&a, &h, sizeof(h), a.shm_fd);
	expect_refusal(&a, 0, "HELLO with a wrong length");

	open_bad(&a, "bad");
	h = a.hello;
	h.h.len = 64;
	fa_send(&a, &h, 64, a.shm_fd);
	expect_refusal(&a, 0, "half a HELLO");

	open_bad(&a, "bad");
	fa_send(&a, &a.hello, sizeof(a.hello), -1);
	expect_refusal(&a, 0, "HELLO without a descriptor");

	open_bad(&a, "bad");
	fa_send(&a, "x", 1, -1);
	expect_refusal(&a, 0, "one byte");

	open_bad(&a, "bad");
	fa_tell(&a);
	expect_refusal(&a, 0, "BLOCK before HELLO");

	open_bad(&a, "bad");
	fa_deinit(&a);
	good_is_well("a connection closed at once");
}

/* ---- blocks and pieces ---- */

static void send_block(struct fake_agent *a, uint32_t block, uint64_t size, int fd)
{
	struct snapd_msg_block m = {.h = {.len = sizeof(m), .type = SNAPD_MSG_BLOCK},
				    .block = block,
				    .page_size = FA_PAGE,
				    .size_bytes = size};

	fa_send(a, &m, sizeof(m), fd);
}

static void send_piece(struct fake_agent *a, struct snapd_piece p)
{
	struct snapd_msg_piece m = {.h = {.len = sizeof(m), .type = SNAPD_MSG_PIECE}, .p = p};

	fa_send(a, &m, sizeof(m), -1);
}

static void open_welcomed(struct fake_agent *a)
{
	static char buf[SNAPD_MSG_MAX];
	int fd;

	open_bad(a, "bad");
	fa_hello(a);
	check(fa_recv(a, buf, &fd) && ((struct snapd_msg *)buf)->type == SNAPD_MSG_WELCOME,
	      "WELCOME");
}

static const struct piece_case {
	const char *what;
	struct snapd_piece p; /* after block 0 of 64 pages and piece 0 over its first 32 */
} piece_cases[] = {
	{"piece of no block", {1, 7, 32, 8, 100, 100}},
	{"piece of a block out of range", {1, 1u << 31, 32, 8, 100, 100}},
	{"piece beyond its block", {1, 0, 60, 8, 100, 100}},
	{"piece far beyond its block", {1, 0, UINT64_MAX - 3, 8, 100, 100}},
	{"endless piece", {1, 0, 0, UINT64_MAX, 100, 100}},
	{"empty piece", {1, 0, 32, 0, 100, 100}},
	{"piece told twice", {0, 0, 32, 8, 100, 100}},
	{"piece number too high", {UINT32_MAX, 0, 32, 8, 100, 100}},
	{"frames beyond the sets", {1, 0, 32, 8, 100, 65530}},
	{"frames far beyond the sets", {1, 0, 32, 8, 100, UINT64_MAX - 3}},
	{"frames of another piece", {1, 0, 32, 8, 100, 31}},
	{"GFNs of another piece", {1, 0, 32, 8, 31, 100}},
	{"GFNs around another piece", {1, 0, 0, 64, 0, 100}},
	{"GFN out of range", {1, 0, 32, 8, UINT64_MAX - 3, 100}},
};

static void test_pieces(void)
{
	struct fake_agent a;

	for (size_t i = 0; i < ARRAY_SIZE(piece_cases); i++) {
		open_welcomed(&a);
		send_block(&a, 0, 64 * FA_PAGE, a.ram_fd[0]);
		send_piece(&a, (struct snapd_piece){0, 0, 0, 32, 0, 0});
		send_piece(&a, piece_cases[i].p);
		expect_refusal(&a, SNAPD_MSG_ERROR, piece_cases[i].what);
	}
}

static void test_blocks(void)
{
	struct fake_agent a;
	int fd;

	open_welcomed(&a);
	send_block(&a, 0, 65 * FA_PAGE, a.ram_fd[0]);
	expect_refusal(&a, SNAPD_MSG_ERROR, "block that says it is larger");

	open_welcomed(&a);
	send_block(&a, 0, 64 * FA_PAGE, -1);
	expect_refusal(&a, SNAPD_MSG_ERROR, "block without its file");

	open_welcomed(&a);
	send_block(&a, 0, 64 * FA_PAGE - 1, a.ram_fd[0]);
	expect_refusal(&a, SNAPD_MSG_ERROR, "block of half a page");

	open_welcomed(&a);
	send_block(&a, 99999, 64 * FA_PAGE, a.ram_fd[0]);
	expect_refusal(&a, SNAPD_MSG_ERROR, "block number too high");

	open_welcomed(&a);
	send_block(&a, 0, 64 * FA_PAGE, a.ram_fd[0]);
	send_block(&a, 0, 64 * FA_PAGE, a.ram_fd[0]);
	expect_refusal(&a, SNAPD_MSG_ERROR, "block told twice");

	open_welcomed(&a);
	fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
	send_block(&a, 0, 64 * FA_PAGE, fd);
	close(fd);
	expect_refusal(&a, SNAPD_MSG_ERROR, "a device for a block");

	open_welcomed(&a);
	fd = memfd_create("ro", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	check(!ftruncate(fd, 64 * FA_PAGE) && !fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), "seal");
	send_block(&a, 0, 64 * FA_PAGE, fd);
	close(fd);
	expect_refusal(&a, SNAPD_MSG_ERROR, "a file that cannot be written");
}

static void test_messages(void)
{
	struct fake_agent a;
	struct snapd_msg h = {.len = sizeof(h)};
	static const uint16_t types[] = {SNAPD_MSG_HELLO,
					 SNAPD_MSG_SYNCED,
					 SNAPD_MSG_PAUSED,
					 SNAPD_MSG_LOADED,
					 SNAPD_MSG_RESUMED,
					 SNAPD_MSG_WELCOME,
					 SNAPD_MSG_RESUME,
					 0,
					 999};

	for (size_t i = 0; i < ARRAY_SIZE(types); i++) {
		open_welcomed(&a);
		h.type = types[i];
		fa_send(&a, &h, sizeof(h), -1);
		expect_refusal(&a, SNAPD_MSG_ERROR, "a message out of turn");
	}
	open_welcomed(&a);
	h.type = SNAPD_MSG_READY;
	fa_send(&a, &h, sizeof(h), -1);
	expect_refusal(&a, SNAPD_MSG_ERROR, "a short READY");

	open_welcomed(&a);
	h.type = SNAPD_MSG_GONE;
	fa_send(&a, &(struct snapd_msg_gone){.h = {24, SNAPD_MSG_GONE, 0, 0}, .piece = 5}, 24, -1);
	expect_refusal(&a, SNAPD_MSG_ERROR, "a piece gone that never was");

	open_welcomed(&a);
	h.type = SNAPD_MSG_READY;
	fa_send(&a, &(struct snapd_msg_ready){.h = {24, SNAPD_MSG_READY, 0, 0}}, 24, a.ram_fd[0]);
	expect_refusal(&a, SNAPD_MSG_ERROR, "READY with a descriptor");
}

static void test_garbage(struct rand *r)
{
	static char buf[SNAPD_MSG_MAX];
	struct fake_agent a;

	for (int i = 0; i < 60; i++) {
		size_t len = 1 + rand_below(r, i % 3 ? 64 : sizeof(buf));

		for (size_t k = 0; k < len; k++)
			buf[k] = (char)rand_next(r);
		/* A right length gets further in. */
		if (len >= sizeof(struct snapd_msg) && i % 2) {
			struct snapd_msg *h = (struct snapd_msg *)buf;

			h->len = (uint32_t)len;
			h->type = (uint16_t)rand_below(r, SNAPD_MSG_VCPU + 1);
			/* these would be right */
			h->flags = h->type == SNAPD_MSG_READY || h->type == SNAPD_MSG_BYE;
		}
		if (i % 4 < 2)
			open_welcomed(&a);
		else
			open_bad(&a, "bad");
		fa_send(&a, buf, len, i % 5 ? -1 : a.ram_fd[0]);
		fa_send(&a, buf, len, -1);
		expect_refusal(&a, 0, "garbage");
	}
}

/* ---- rings ---- */

enum ring_fd { NO_FD, PIPE_FD, MEMFD };

static const struct ring_case {
	const char *what;
	enum ring_fd fd;
	uint32_t vcpu, nr_entries;
	uint64_t offset;
	bool unasked;
} ring_cases[] = {
	{"a ring that nobody wants", MEMFD, 0, 1024, 0x40000, .unasked = true},
	{"a ring without its vCPU", NO_FD, 0, 1024, 0x40000},
	{"a pipe for a vCPU", PIPE_FD, 0, 1024, 0x40000},
	{"vCPUs out of order", MEMFD, 1, 1024, 0x40000},
	{"a ring of no entries", MEMFD, 0, 0, 0x40000},
	{"a ring of 1000 entries", MEMFD, 0, 1000, 0x40000},
	{"a ring too large", MEMFD, 0, 1u << 31, 0x40000},
	{"a ring far away", MEMFD, 0, 1024, 1ull << 40},
	{"a ring between pages", MEMFD, 0, 1024, 0x40010},
};

static void send_ring(struct fake_agent *a, const struct ring_case *r)
{
	struct snapd_msg_vcpu m = {.h = {.len = sizeof(m), .type = SNAPD_MSG_VCPU},
				   .vcpu = r->vcpu,
				   .nr_entries = r->nr_entries,
				   .offset = r->offset};
	int fds[2] = {-1, -1};

	if (r->fd == PIPE_FD)
		check(!pipe(fds), "pipe");
	if (r->fd == MEMFD)
		fds[0] = memfd_create("vcpu", MFD_CLOEXEC);
	fa_send(a, &m, sizeof(m), fds[0]);
	for (int i = 0; i < 2; i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

/* Only a service that keeps dead VMs asks for rings. */
static void test_rings(void)
{
	for (size_t i = 0; i < ARRAY_SIZE(ring_cases); i++) {
		struct fake_agent a;

		if (service.d.config.post_mortem == ring_cases[i].unasked)
			service.d.config.post_mortem = !ring_cases[i].unasked;
		open_welcomed(&a);
		send_ring(&a, &ring_cases[i]);
		expect_refusal(&a, SNAPD_MSG_ERROR, ring_cases[i].what);
	}
	service.d.config.post_mortem = false;
}

int main(void)
{
	struct rand r = rand_of(rand_seed());

	service_start(&service, NULL);
	log_set_level(LOG_LVL_ERR);
	fa_init(&good, "good", 64, 16);
	check(service_attach(&service, &good), "%s", good.last_error.text);
	test_hello();
	test_hello_framing();
	test_blocks();
	test_pieces();
	test_messages();
	test_rings();
	test_garbage(&r);
	fa_deinit(&good);
	service_stop(&service);
	printf("refused %zu bad HELLOs, %zu bad pieces and garbage, and served on\n",
	       ARRAY_SIZE(hello_cases), ARRAY_SIZE(piece_cases));
	return 0;
}
