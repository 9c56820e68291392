/* SPDX-License-Identifier: MIT */
/*
 * Goal: a job ends exactly once and says how; cancelling works in the queue and
 * while it runs; one user cannot take all threads; the registry stays bounded; a
 * stream carries bytes whole between its two sides and survives either going away.
 * Method: a daemon without store or sockets, whose wake_fd is polled here.
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "snapd/core/daemon.h"
#include "snapd/core/job.h"
#include "snapd/core/stream.h"
#include "snapd/util/log.h"
#include "tests/lib/check.h"

#define CHECK(cond) check(cond, "in %s", __func__)

static struct daemon d;
static _Atomic int gate;    /* jobs wait until it is open */
static _Atomic int running; /* jobs at the gate */
static _Atomic int nr_over;

static int at_gate(struct job *job, struct err *e)
{
	atomic_fetch_add(&running, 1);
	while (!atomic_load(&gate) && !atomic_load(&job->cancel))
		usleep(1000);
	atomic_fetch_sub(&running, 1);
	if (atomic_load(&job->cancel))
		return err_set(e, ECANCELED, "as asked");
	job->result = json_pack("{si}", "answer", 42);
	return 0;
}

static int fails(struct job *job, struct err *e)
{
	return err_set(e, E_CORRUPT, "bad \x80 page");
}

static void let_go(struct job *job)
{
	atomic_fetch_add(&nr_over, 1);
	stream_unref(job->ctx, STREAM_JOB);
}

static struct job *make(uint32_t uid, int (*fn)(struct job *, struct err *))
{
	struct job *job = job_new(&d, JOB_VERIFY, uid, json_object(), fn);

	CHECK(job);
	job->over = let_go;
	return job;
}

static void await(struct job *job, enum job_state state)
{
	for (int i = 0; i < 10000 && job_state_of(job) != state; i++)
		usleep(1000);
	CHECK(job_state_of(job) == state);
}

static void await_running(int n)
{
	for (int i = 0; i < 10000 && atomic_load(&running) != n; i++)
		usleep(1000);
	CHECK(atomic_load(&running) == n);
}

static void test_outcomes(void)
{
	struct job *ok = make(1, at_gate), *bad = make(1, fails), *never = make(1, fails);
	json_t *o;

	atomic_store(&nr_over, 0);
	atomic_store(&gate, 1);
	CHECK(!job_run_detached(ok) && !job_run_detached(bad));
	await(ok, JOB_DONE);
	await(bad, JOB_FAILED);
	o = job_to_json(ok);
	CHECK(json_integer_value(json_object_get(json_object_get(o, "result"), "answer")) == 42);
	json_decref(o);
	o = job_to_json(bad);
	CHECK(!strcmp(json_string_value(json_object_get(json_object_get(o, "error"), "code")),
		      "corrupt"));
	CHECK(!strcmp(json_string_value(json_object_get(json_object_get(o, "error"), "text")),
		      "bad ? page"));
	json_decref(o);
	job_fail(never, ENOTCONN, "no VM");
	job_fail(never, EIO, "a second time");
	CHECK(job_state_of(never) == JOB_FAILED && never->err.code == -ENOTCONN);
	for (int i = 0; i < 1000 && atomic_load(&nr_over) < 3; i++)
		usleep(1000);
	CHECK(atomic_load(&nr_over) == 3);
	CHECK(job_count(&d, JOB_VERIFY, JOB_DONE) == 1);
	CHECK(job_count(&d, JOB_VERIFY, JOB_FAILED) == 2);
	job_unref(ok);
	job_unref(bad);
	job_unref(never);
}

/* Eight of one user run, the ninth waits, another user's runs all the same; a
 * queued one is cancelled at once, a running one when it looks. */
static void test_fair_and_cancel(void)
{
	struct job *mine[9], *other = make(3, at_gate);

	atomic_store(&gate, 0);
	for (int i = 0; i < 9; i++) {
		mine[i] = make(2, at_gate);
		CHECK(!job_run_detached(mine[i]));
	}
	CHECK(!job_run_detached(other));
	await_running(9);
	CHECK(job_state_of(mine[8]) == JOB_QUEUED);
	CHECK(job_state_of(other) == JOB_RUNNING);
	job_cancel(mine[8]);
	CHECK(job_state_of(mine[8]) == JOB_CANCELLED);
	job_cancel(mine[0]);
	await(mine[0], JOB_CANCELLED);
	atomic_store(&gate, 1);
	for (int i = 1; i < 8; i++)
		await(mine[i], JOB_DONE);
	await(other, JOB_DONE);
	for (int i = 0; i < 9; i++)
		job_unref(mine[i]);
	job_unref(other);
}

static void test_queue_bounded(void)
{
	struct job *jobs[80];
	int rc = 0, n = 0;

	atomic_store(&gate, 0);
	while (!rc && n < 80) {
		jobs[n] = make(4, at_gate);
		rc = job_run_detached(jobs[n++]);
		if (n == 8)
			await_running(8);
	}
	CHECK(rc == -EBUSY && n == 8 + 64 + 1);
	job_fail(jobs[n - 1], EBUSY, "queue is full");
	atomic_store(&gate, 1);
	for (int i = 0; i < n - 1; i++)
		await(jobs[i], JOB_DONE);
	for (int i = 0; i < n; i++)
		job_unref(jobs[i]);
}

static void test_registry_bounded(void)
{
	uint64_t first = 0;
	json_t *list;

	for (int i = 0; i < 1100; i++) {
		struct job *job = make(5, fails);

		first = first ? first : job->id;
		job_fail(job, ECANCELED, "never mind");
		job_unref(job);
	}
	CHECK(!job_find(&d, first));
	list = job_list_json(&d, 0);
	CHECK(json_array_size(list) <= 1026);
	json_decref(list);
	list = job_list_json(&d, 6);
	CHECK(json_array_size(list) == 0);
	json_decref(list);
}

/* ---- streams ---- */

#define STREAM_TEST_BYTES (24u << 20)

static uint8_t pattern(size_t i)
{
	return (uint8_t)(i * 2654435761u >> 13);
}

static int writes_all(struct job *job, struct err *e)
{
	struct stream *s = job->ctx;
	uint8_t buf[70001];
	int rc = 0;

	for (size_t at = 0; !rc && at < STREAM_TEST_BYTES; at += sizeof(buf)) {
		for (size_t i = 0; i < sizeof(buf); i++)
			buf[i] = pattern(at + i);
		rc = stream_job_write(s, job, buf, sizeof(buf));
	}
	if (!rc)
		stream_end(s);
	if (!rc)
		job->result = json_object();
	return rc ? err_errno(e, -rc, "write") : 0;
}

static int reads_all(struct job *job, struct err *e)
{
	struct stream *s = job->ctx;
	size_t at = 0, len = 1;
	uint8_t buf[50000];
	int rc;

	while (!(rc = stream_job_read(s, job, buf, len))) {
		for (size_t i = 0; i < len; i++)
			if (buf[i] != pattern(at + i))
				rc = -EILSEQ;
		at += len;
		len = len % sizeof(buf) + 1;
	}
	job->result = json_pack("{sI}", "bytes", (json_int_t)at);
	return rc == -ENODATA ? 0 : err_errno(e, -rc, "read");
}

static void wait_for_wake(struct stream *s)
{
	struct pollfd p = {.fd = d.wake_fd, .events = POLLIN};
	uint64_t n;

	while (!stream_client_ready(s)) {
		CHECK(poll(&p, 1, 10000) == 1);
		CHECK(read(d.wake_fd, &n, sizeof(n)) == sizeof(n));
	}
}

static struct job *start(int (*fn)(struct job *, struct err *), struct stream **s)
{
	struct job *job = make(7, fn);

	CHECK(!stream_create(&d, s));
	job->ctx = *s;
	CHECK(!job_run_detached(job));
	return job;
}

static void test_stream_out(void)
{
	uint8_t buf[123457];
	struct stream *s;
	struct job *job = start(writes_all, &s);
	size_t at = 0;
	long n;

	while ((n = stream_client_read(s, buf, sizeof(buf))) >= 0) {
		for (long i = 0; i < n; i++)
			CHECK(buf[i] == pattern(at + (size_t)i));
		at += (size_t)n;
		if (!n)
			wait_for_wake(s);
	}
	CHECK(n == -1 && at >= STREAM_TEST_BYTES);
	await(job, JOB_DONE);
	stream_unref(s, STREAM_CLIENT);
	job_unref(job);
}

static void test_stream_in(void)
{
	uint8_t buf[99991];
	struct stream *s;
	struct job *job = start(reads_all, &s);
	size_t at = 0;

	while (at < STREAM_TEST_BYTES) {
		size_t n;

		for (size_t i = 0; i < sizeof(buf); i++)
			buf[i] = pattern(at + i);
		n = stream_client_write(s, buf, sizeof(buf));
		at += n;
		if (n < sizeof(buf))
			wait_for_wake(s);
	}
	stream_end(s);
	await(job, JOB_DONE);
	stream_unref(s, STREAM_CLIENT);
	job_unref(job);
}

/* A client that vanishes ends the job that writes to it, and the one that reads. */
static void test_stream_cut(void)
{
	struct stream *s;
	struct job *job = start(writes_all, &s);
	uint8_t buf[4096];
	long n;

	stream_unref(s, STREAM_CLIENT);
	await(job, JOB_FAILED);
	CHECK(job->err.code == -EPIPE);
	job_unref(job);
	job = start(reads_all, &s);
	stream_unref(s, STREAM_CLIENT);
	await(job, JOB_FAILED);
	job_unref(job);
	job = start(writes_all, &s); /* nobody reads: cancel reaches it */
	job_cancel(job);
	await(job, JOB_CANCELLED);
	while ((n = stream_client_read(s, buf, sizeof(buf))) >= 0)
		if (!n)
			wait_for_wake(s);
	CHECK(n == -2);
	stream_unref(s, STREAM_CLIENT);
	job_unref(job);
}

int main(void)
{
	struct err e = {0};

	log_set_level(LOG_LVL_ERR);
	CHECK(!daemon_init(&d, &e) && !jobs_start(&d));
	test_outcomes();
	test_fair_and_cancel();
	test_queue_bounded();
	test_registry_bounded();
	test_stream_out();
	test_stream_in();
	test_stream_cut();
	jobs_stop(&d);
	daemon_deinit(&d);
	puts("ok");
	return 0;
}
