/* SPDX-License-Identifier: MIT */
/*
 * simring: io_uring's library calls, carried out in the process.  What is submitted
 * waits; it is done, one request at a time and in an order drawn from a seed, when
 * the program waits for a completion.  So a program that relies on an order that
 * io_uring does not promise is met with another one, and between a write and its
 * completion nothing has reached the file.  Each write and sync is logged or failed
 * by simdisk.c.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <liburing.h>

#include "tests/lib/rand.h"
#include "tests/lib/simdisk_priv.h"

#define FILES_MAX 64u

struct pending {
	struct io_uring_sqe sqe;
	size_t op;	/* simdisk's, of a write */
	uint64_t began; /* of a sync */
};

struct simring {
	unsigned sq_head, sq_tail, sq_flags, cq_head, cq_tail, cq_flags, nr_pending, depth;
	int files[FILES_MAX];
	struct rand rand;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
	struct pending *pending;
};

static uint64_t next_seed = 1;

void disk_ring_seed(uint64_t seed)
{
	next_seed = seed;
}

static struct simring *sim_of(struct io_uring *ring)
{
	return ring->sq.ring_ptr;
}

static void sim_free(struct simring *sim)
{
	free(sim->sqes);
	free(sim->cqes);
	free(sim->pending);
	free(sim);
}

int io_uring_queue_init(unsigned entries, struct io_uring *ring, unsigned flags)
{
	unsigned depth = 1;
	struct simring *sim;

	if (sim_may_fail("io_uring_setup", false, NULL))
		return -ENOMEM;
	while (depth < entries)
		depth *= 2;
	sim = calloc(1, sizeof(*sim));
	if (!sim)
		return -ENOMEM;
	sim->depth = depth;
	sim->rand = rand_of(next_seed);
	sim->sqes = calloc(depth, sizeof(*sim->sqes));
	sim->cqes = calloc(2 * depth, sizeof(*sim->cqes));
	sim->pending = calloc(2 * depth, sizeof(*sim->pending));
	if (!sim->sqes || !sim->cqes || !sim->pending) {
		sim_free(sim);
		return -ENOMEM;
	}
	memset(sim->files, -1, sizeof(sim->files));
	*ring = (struct io_uring){.features = IORING_FEAT_EXT_ARG, .ring_fd = -1};
	ring->sq = (struct io_uring_sq){.khead = &sim->sq_head,
					.ktail = &sim->sq_tail,
					.kflags = &sim->sq_flags,
					.sqes = sim->sqes,
					.ring_ptr = sim,
					.ring_mask = depth - 1,
					.ring_entries = depth};
	ring->cq = (struct io_uring_cq){.khead = &sim->cq_head,
					.ktail = &sim->cq_tail,
					.kflags = &sim->cq_flags,
					.cqes = sim->cqes,
					.ring_mask = 2 * depth - 1,
					.ring_entries = 2 * depth};
	return 0;
}

void io_uring_queue_exit(struct io_uring *ring)
{
	sim_free(sim_of(ring));
}

int io_uring_register_buffers(struct io_uring *ring, const struct iovec *iov, unsigned nr)
{
	return sim_may_fail("io_uring_register", false, NULL) ? -ENOMEM : 0;
}

int io_uring_register_files_sparse(struct io_uring *ring, unsigned nr)
{
	CHECK(nr <= FILES_MAX);
	return sim_may_fail("io_uring_register", false, NULL) ? -ENOMEM : 0;
}

int io_uring_register_files_update(struct io_uring *ring, unsigned at, const int *files,
				   unsigned nr)
{
	if (sim_may_fail("io_uring_register", false, NULL) && files[0] >= 0)
		return -ENOMEM;
	memcpy(&sim_of(ring)->files[at], files, nr * sizeof(*files));
	return (int)nr;
}

static int fd_of(const struct simring *sim, const struct io_uring_sqe *sqe)
{
	int fd = sqe->flags & IOSQE_FIXED_FILE ? sim->files[sqe->fd] : sqe->fd;

	CHECK(fd >= 0);
	return fd;
}

static bool is_write(const struct io_uring_sqe *sqe)
{
	return sqe->opcode == IORING_OP_WRITE || sqe->opcode == IORING_OP_WRITE_FIXED;
}

int io_uring_submit(struct io_uring *ring)
{
	struct simring *sim = sim_of(ring);
	unsigned nr = ring->sq.sqe_tail - sim->sq_head;

	if (sim_may_fail("io_uring_enter", false, NULL))
		return -EAGAIN;
	while (sim->sq_head != ring->sq.sqe_tail) {
		struct pending *p = &sim->pending[sim->nr_pending++];

		CHECK(sim->nr_pending <= 2 * sim->depth);
		*p = (struct pending){.sqe = sim->sqes[sim->sq_head++ & ring->sq.ring_mask]};
		p->began = sim_clock();
		if (is_write(&p->sqe))
			p->op = sim_begin_write(fd_of(sim, &p->sqe), p->sqe.off,
						(const void *)(uintptr_t)p->sqe.addr, p->sqe.len);
	}
	return (int)nr;
}

static int do_write(const struct pending *p, int fd)
{
	size_t len = p->sqe.len;
	int error = sim_may_fail("write of the ring", true, &len), r;

	if (error && !sim_done_all_the_same())
		return -error;
	r = (int)syscall(SYS_pwrite64, fd, (void *)(uintptr_t)p->sqe.addr, len, p->sqe.off);
	if (r < 0)
		return -errno;
	sim_end_write(p->op, (size_t)r);
	return error ? -error : r;
}

static int do_read(const struct pending *p, int fd)
{
	int r = sim_may_fail("read of the ring", false, NULL);

	if (r)
		return -r;
	r = (int)syscall(SYS_pread64, fd, (void *)(uintptr_t)p->sqe.addr, (size_t)p->sqe.len,
			 p->sqe.off);
	return r < 0 ? -errno : r;
}

static int do_sync(const struct pending *p, int fd)
{
	int r = sim_may_fail("fdatasync of the ring", true, NULL);

	if (r) {
		sim_note_lost(fd);
		return -r;
	}
	if (syscall(SYS_fdatasync, fd))
		return -errno;
	sim_note_sync(fd, p->began, true);
	return 0;
}

static int carry_out(struct simring *sim, const struct pending *p)
{
	int fd = fd_of(sim, &p->sqe);

	if (is_write(&p->sqe))
		return do_write(p, fd);
	if (p->sqe.opcode == IORING_OP_READ)
		return do_read(p, fd);
	CHECK(p->sqe.opcode == IORING_OP_FSYNC);
	return do_sync(p, fd);
}

static void complete_one(struct io_uring *ring)
{
	struct simring *sim = sim_of(ring);
	uint32_t i = (uint32_t)rand_below(&sim->rand, sim->nr_pending);
	struct pending p = sim->pending[i];
	struct io_uring_cqe *cqe = &sim->cqes[sim->cq_tail & ring->cq.ring_mask];

	sim->pending[i] = sim->pending[--sim->nr_pending];
	cqe->user_data = p.sqe.user_data;
	cqe->flags = 0;
	cqe->res = carry_out(sim, &p);
	sim->cq_tail++;
}

int __io_uring_get_cqe(struct io_uring *ring, struct io_uring_cqe **ret, unsigned submit,
		       unsigned wait_nr, sigset_t *mask)
{
	struct simring *sim = sim_of(ring);

	if (sim->cq_head == sim->cq_tail) {
		CHECK(!wait_nr || sim->nr_pending);
		if (!sim->nr_pending || (!wait_nr && rand_below(&sim->rand, 4)))
			return -EAGAIN;
		complete_one(ring);
	}
	*ret = &sim->cqes[sim->cq_head & ring->cq.ring_mask];
	return 0;
}
