/* SPDX-License-Identifier: MIT */
/*
 * io_uring_reader: requests, in groups → memory, several groups under way; see
 * io_uring_reader.h.  On the thread of its caller.
 *
 * `depth` ops, each idle or with a request of the group that was queued first; groups
 * are in a list until their last request was started.
 */
#include "snapd/io_uring_reader.h"

#include <assert.h>
#include <limits.h>
#include <stdlib.h>

#include "snapd/io_uring_ring.h"
#include "snapd/util/cleanup.h"

struct read_op {
	struct read_req *req; /* borrowed while the read runs; NULL: idle */
	struct read_group *group;
	size_t done; /* bytes to go on behind */
	size_t got;  /* bytes there are; more than `done` inside the last block */
	uint32_t retries;
};

struct reader {
	struct io_uring ring;
	uint32_t depth, nr_flight;
	int broken;			 /* -errno of the ring */
	struct read_op *ops;		 /* owned, depth */
	struct read_group *first, *last; /* with requests to be started; borrowed */
};

int reader_create(uint32_t depth, struct reader **ret, struct err *e)
{
	struct reader *r = calloc(1, sizeof(*r));
	int err;

	if (!r)
		return err_set(e, ENOMEM, "no memory for the reader");
	r->depth = depth ? MIN(depth, DEPTH_MAX) : 32;
	r->ops = calloc(r->depth, sizeof(*r->ops));
	err = r->ops ? ring_init(&r->ring, r->depth, e)
		     : err_set(e, ENOMEM, "no memory for the reader");
	if (err < 0) {
		free(r->ops);
		free(r);
		return err;
	}
	*ret = r;
	return 0;
}

void reader_destroy(struct reader *r)
{
	if (!r)
		return;
	io_uring_queue_exit(&r->ring);
	free(r->ops);
	free(r);
}

static void prep_read(struct reader *r, struct read_op *op)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&r->ring);
	struct read_req *req = op->req;

	assert(sqe); /* no more than depth ops */
	io_uring_prep_read(sqe, req->fd, (uint8_t *)req->dst + op->done,
			   (unsigned int)(req->len - op->done), req->offset + op->done);
	io_uring_sqe_set_data(sqe, op);
}

/*
 * Take the result of a read; true when the request has its own.  A read that
 * stops inside a block is done again from that block's start, as O_DIRECT wants;
 * when that brings nothing more, the file ends there.
 */
static bool advance_read(struct read_op *op, int res)
{
	struct read_req *req = op->req;
	size_t got;

	if (is_transient(res) && ++op->retries <= RETRIES_MAX)
		return false;
	if (res < 0) {
		req->res = res;
		return true;
	}
	got = op->done + (size_t)res;
	if (got >= req->len || got <= op->got) {
		req->res = (int)MAX(got, op->got);
		return true;
	}
	op->got = got;
	op->done = got / IO_ALIGN * IO_ALIGN;
	op->retries = 0;
	return false;
}

static void start_read(struct reader *r, struct read_op *op, struct read_group *g)
{
	struct read_req *req = &g->reqs[g->next++];

	if (!req->len || req->len > INT_MAX) {
		req->res = req->len ? -EINVAL : 0;
		g->left--;
		return;
	}
	*op = (struct read_op){.req = req, .group = g};
	r->nr_flight++;
	prep_read(r, op);
}

/* Start what was queued first, a request in each idle op. */
static void fill_ops(struct reader *r)
{
	for (uint32_t i = 0; i < r->depth && r->first; i++) {
		while (!r->ops[i].req && r->first) {
			struct read_group *g = r->first;

			if (g->next < g->nr) {
				start_read(r, &r->ops[i], g);
			} else {
				r->first = g->behind;
				r->last = r->first ? r->last : NULL;
			}
		}
	}
}

static void submit_reads(struct reader *r)
{
	if (r->broken)
		return;
	if (r->nr_flight < r->depth)
		fill_ops(r);
	r->broken = ring_submit(&r->ring);
}

static void reap_read(struct reader *r, struct io_uring_cqe *cqe)
{
	struct read_op *op = io_uring_cqe_get_data(cqe);

	if (advance_read(op, cqe->res)) {
		op->req = NULL;
		op->group->left--;
		r->nr_flight--;
	} else {
		prep_read(r, op);
	}
	io_uring_cqe_seen(&r->ring, cqe);
}

void reader_queue(struct reader *r, struct read_group *g, struct read_req *reqs, size_t nr)
{
	*g = (struct read_group){.reqs = reqs, .nr = nr, .left = nr};
	if (!nr)
		return;
	*(r->last ? &r->last->behind : &r->first) = g;
	r->last = g;
	submit_reads(r);
}

int reader_wait(struct reader *r, struct read_group *g)
{
	struct io_uring_cqe *cqe;

	while (g->left && !r->broken) {
		r->broken = ring_wait(&r->ring, &cqe);
		if (r->broken)
			break;
		do
			reap_read(r, cqe);
		while (r->nr_flight && io_uring_peek_cqe(&r->ring, &cqe) == 0);
		submit_reads(r);
	}
	return g->left ? r->broken : 0;
}

int reader_run(struct reader *r, struct read_req *reqs, size_t nr)
{
	struct read_group g;

	reader_queue(r, &g, reqs, nr);
	return reader_wait(r, &g);
}
