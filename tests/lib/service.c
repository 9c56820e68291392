/* SPDX-License-Identifier: MIT */
/* The daemon in the test's own process; see service.h. */
#include "tests/lib/service.h"

#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "snapd/util/busguard.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/backup/backup.h"
#include "snapd/vm/priv.h"
#include "tests/lib/check.h"

static json_t *last_result;

static void open_store(struct service *s)
{
	struct store_config c = {.dir = s->dir, .create = true, .segment_bytes = 4 << 20};
	struct err e = {};

	check(!store_open(&c, &s->d.store, &e), "%s", e.text);
	check(!jobs_start(&s->d) && !backup_start(&s->d, NULL), "jobs");
}

void service_start(struct service *s, void (*config)(struct daemon_config *c))
{
	struct err e = {};

	signal(SIGPIPE, SIG_IGN);
	busguard_install();
	log_set_level(getenv("SNAPD_TEST_VERBOSE") ? LOG_LVL_DEBUG : LOG_LVL_ERR);
	check(!daemon_init(&s->d, &e), "%s", e.text);
	s->d.config.staging_max_bytes = 64 << 20;
	if (config)
		config(&s->d.config);
	snprintf(s->dir, sizeof(s->dir), "%s/snapd-test.XXXXXX",
		 getenv("SNAPD_TEST_DIR") ? getenv("SNAPD_TEST_DIR") : "/tmp");
	check(mkdtemp(s->dir), "%s", s->dir);
	open_store(s);
}

static void close_store(struct service *s)
{
	s->d.stopping = true;
	vm_stop_all(&s->d);
	jobs_stop(&s->d);
	backup_stop(&s->d);
	store_close(s->d.store);
	s->d.stopping = false;
}

void service_restart(struct service *s)
{
	close_store(s);
	open_store(s);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

void service_stop(struct service *s)
{
	close_store(s);
	daemon_deinit(&s->d);
	nftw(s->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	json_decref(last_result);
	last_result = NULL;
}

void service_await(struct service *s, const struct fake_agent *a, int state)
{
	for (int i = 0; i < 2000; i++) {
		struct vm *vm = vm_find(&s->d, a->hello.name, a->hello.name[0] ? getuid() : 0);
		int now = vm ? vm->state : VM_GONE;

		vm_unref(vm);
		if (now == state)
			return;
		/* A refusal after WELCOME never gets there. */
		if (state == VM_READY && a->ended > 1)
			return;
		usleep(5000);
		vm_reap(&s->d);
	}
	check(0, "VM %s comes to state %s", a->hello.name, vm_state_names[state]);
}

bool service_attach(struct service *s, struct fake_agent *a)
{
	int fd = fa_connect(a);

	vm_reap(&s->d);
	check(!vm_accept(&s->d, fd), "accept");
	if (!fa_attach(a))
		return false;
	service_await(s, a, VM_READY);
	return a->ended <= 1;
}

static int run_job(struct service *s, struct fake_agent *a, enum job_kind kind, json_t *args,
		   int (*fn)(struct job *, struct err *), struct err *e)
{
	struct vm *vm = vm_find(&s->d, a->hello.name, getuid());
	struct job *job = job_new(&s->d, kind, getuid(), args, fn);
	int err = vm ? vm_submit(vm, job) : -ENOTCONN;

	if (!err) {
		pthread_mutex_lock(&job->lock);
		while (job->state < JOB_DONE)
			pthread_cond_wait(&job->changed, &job->lock);
		err = job->state == JOB_DONE ? 0 : job->err.code;
		if (e)
			*e = job->err;
		json_decref(last_result);
		last_result = job->result ? json_deep_copy(job->result) : NULL;
		check(err || job->result, "a job that is done has a result");
		check(err <= 0, "error codes are negative");
		check(!job->total || job->done <= job->total, "progress: %llu of %llu",
		      (unsigned long long)job->done, (unsigned long long)job->total);
		pthread_mutex_unlock(&job->lock);
	}
	job_unref(job);
	vm_unref(vm);
	return err;
}

int64_t service_result(const char *key)
{
	return json_integer_value(json_object_get(last_result, key));
}

const json_t *service_json(void)
{
	return last_result;
}

int service_self_check(struct service *s, struct fake_agent *a, struct err *e)
{
	return run_job(s, a, JOB_SELF_CHECK, json_object(), self_check_job, e);
}

static int take_snapshot(struct service *s, struct fake_agent *a, json_t *args, uint64_t *id,
			 struct err *e)
{
	int err = run_job(s, a, JOB_SNAPSHOT, args, snapshot_job, e);

	if (!err)
		*id = (uint64_t)json_integer_value(
			json_object_get(json_object_get(last_result, "snapshot"), "id"));
	return err;
}

int service_snapshot(struct service *s, struct fake_agent *a, const char *name, uint64_t *id,
		     struct err *e)
{
	return take_snapshot(s, a, json_pack("{s:s}", "name", name ? name : ""), id, e);
}

int service_snapshot_checked(struct service *s, struct fake_agent *a, uint64_t *id, struct err *e)
{
	return take_snapshot(s, a, json_pack("{s:b}", "self_check", 1), id, e);
}

int service_rollback(struct service *s, struct fake_agent *a, uint64_t id, struct err *e)
{
	char text[24];

	snprintf(text, sizeof(text), "%llu", (unsigned long long)id);
	return run_job(s, a, JOB_ROLLBACK,
		       json_pack("{s:s,s:b}", "snapshot", text, "check", !s->unchecked),
		       rollback_job, e);
}

void service_compare(struct service *s, const struct fake_agent *a, uint64_t id,
		     uint8_t *const bytes[FA_BLOCKS])
{
	_Alignas(4096) static uint8_t page[FA_PAGE], zero[FA_PAGE];
	struct store_snapshot snap;
	struct store_reader *reader;
	struct pagemap *map;
	struct err e = {};

	check(!store_snapshot_get(s->d.store, id, &snap, &e), "%s", e.text);
	check(!store_map_load(s->d.store, snap.point, false, &map, &e), "%s", e.text);
	check(!store_reader_create(s->d.store, FA_PAGE, &reader, &e), "%s", e.text);
	for (int b = 0; b < FA_BLOCKS; b++) {
		for (uint64_t i = 0; i < a->block_pages[b]; i++) {
			uint64_t gfn = a->home_gfn[b] + i;
			struct page_read req = {
				.gfn = gfn, .loc = pagemap_get(map, gfn), .dst = page};
			const uint8_t *is = page;

			check(req.loc, "snapshot %llu has GFN 0x%llx", (unsigned long long)id,
			      (unsigned long long)gfn);
			if (req.loc == LOC_ZERO_PAGE)
				is = zero;
			else
				check(!store_read_pages(reader, &req, 1, &e), "%s", e.text);
			check(!memcmp(is, bytes[b] + i * FA_PAGE, FA_PAGE),
			      "snapshot %llu, GFN 0x%llx: bytes as they were",
			      (unsigned long long)id, (unsigned long long)gfn);
		}
	}
	store_reader_destroy(reader);
	pagemap_destroy(map);
}
