/* SPDX-License-Identifier: MIT */
/*
 * The policies and their lines; see scheduler.h.
 *
 * The thread looks at every line when one may be due, at least once a second, and every
 * LINE_BUSY_MS while one is in the middle of something.  That is cheap (no line does more
 * than compare two numbers), and no event can be missed: a clock that is set, a VM that comes
 * back, a job that ends.
 *
 * Locks: policies->lock (the list, the lines) → vms_lock, vm.lock; → jobs' locks; → that of tags.
 * Files are written by the control thread under files_lock alone.
 */
#include "snapd/schedule/scheduler.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/core/tags.h"
#include "snapd/schedule/chores.h"
#include "snapd/schedule/line.h"
#include "snapd/policy/policy.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/vm/vm.h"

#define LOOK_IDLE_MS 1000
#define POLICIES_MAX 1000

struct entry {
	struct policy *policy; /* owned */
	struct line **lines;   /* owned, and so is each */
	size_t nr_lines;
	struct chores chores;
	bool known; /* it was looked for VMs that are not there, and what they left to push */
};

struct policies {
	struct daemon *d;
	pthread_t thread;
	bool started;
	int wake_fd;
	_Atomic bool stop;
	pthread_mutex_t lock;
	struct entry *entries; /* owned; by name */
	size_t nr;
};

static int64_t now_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return ts.tv_sec;
}

static void wake(struct policies *ps)
{
	(void)!write(ps->wake_fd, &(uint64_t){1}, sizeof(uint64_t));
}

/* ---- the list ---- */

static struct entry *find(struct policies *ps, const char *name)
{
	for (size_t i = 0; i < ps->nr; i++)
		if (!strcmp(ps->entries[i].policy->name, name))
			return &ps->entries[i];
	return NULL;
}

static void drop_lines(struct entry *en)
{
	chores_stop(&en->chores);
	for (size_t i = 0; i < en->nr_lines; i++) {
		line_stop(en->lines[i]);
		free(en->lines[i]);
	}
	free(en->lines);
}

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct entry *)a)->policy->name,
		      ((const struct entry *)b)->policy->name);
}

/* Under the lock.  Takes the policy, or not at all; lines of an older one go on with it. */
static int install(struct policies *ps, struct policy *p)
{
	struct entry *en = find(ps, p->name), *entries;

	if (en) {
		policy_free(en->policy);
		en->policy = p;
		en->known = false;
		return 0;
	}
	if (ps->nr == POLICIES_MAX)
		return -E2BIG;
	entries = realloc(ps->entries, (ps->nr + 1) * sizeof(*entries));
	if (!entries)
		return -ENOMEM;
	ps->entries = entries;
	ps->entries[ps->nr++] = (struct entry){.policy = p};
	qsort(ps->entries, ps->nr, sizeof(*ps->entries), by_name);
	return 0;
}

static void read_one(struct policies *ps, const char *file)
{
	size_t len = strlen(file);
	char name[NAME_MAX + 1];
	struct policy *p = NULL;
	struct err e = {0};

	if (file[0] == '.' || len <= 5 || strcmp(file + len - 5, ".conf") != 0)
		return;
	snprintf(name, sizeof(name), "%.*s", (int)(len - 5), file);
	if (policy_read(ps->d->config.policy_dir, name, &p, &e)) {
		log_event(LOG_POLICY_LEFT_OUT, LOG_LVL_ERR, "policy left out: %s", e.text);
	} else if (install(ps, p)) {
		log_event(LOG_POLICY_LEFT_OUT, LOG_LVL_ERR,
			  "policy %s left out: there are too many", name);
		policy_free(p);
	}
}

static int read_all(struct policies *ps, struct err *e)
{
	DIR *dir = opendir(ps->d->config.policy_dir);
	const struct dirent *file;

	if (!dir && errno == ENOENT)
		return 0;
	if (!dir)
		return err_errno(e, errno, "cannot read %s", ps->d->config.policy_dir);
	while ((file = readdir(dir)))
		read_one(ps, file->d_name);
	closedir(dir);
	return 0;
}

/* ---- the thread ---- */

static struct line *find_line(const struct entry *en, const char *vm, uint32_t uid)
{
	for (size_t i = 0; i < en->nr_lines; i++)
		if (en->lines[i]->uid == uid && !strcmp(en->lines[i]->vm, vm))
			return en->lines[i];
	return NULL;
}

static void add_line(struct policies *ps, struct entry *en, const char *vm, uint32_t uid,
		     bool attached)
{
	struct line **lines = realloc(en->lines, (en->nr_lines + 1) * sizeof(struct line *));

	if (!lines)
		return; /* the next look tries again */
	en->lines = lines;
	lines[en->nr_lines] = malloc(sizeof(struct line));
	if (!lines[en->nr_lines])
		return;
	line_init(lines[en->nr_lines], ps->d, en->policy, vm, uid, now_s());
	lines[en->nr_lines++]->attached = attached;
}

static bool covers(const struct policies *ps, const struct entry *en, const char *vm, uint32_t uid)
{
	char tags[VM_TAGS_MAX] = "";

	if (*policy_text(en->policy, "vm_tags"))
		vm_tags_of(ps->d->tags, vm, uid, tags);
	return policy_covers(en->policy, vm, uid, tags);
}

/* Of one VM the newest first. */
static int by_vm(const void *a, const void *b)
{
	const struct store_snapshot *x = a, *y = b;
	int order = strcmp(x->vm_name, y->vm_name);

	if (!order && x->uid != y->uid)
		order = x->uid < y->uid ? -1 : 1;
	return order ? order : x->id < y->id ? 1 : -1;
}

/*
 * A VM that was gone when the service started may have left snapshots that no line would push:
 * a line for each whose newest was not.  (They are pushed in the order of their ids.)  The list
 * is read once for each policy that is new or changed.
 */
static void add_absent(struct policies *ps, struct entry *en)
{
	const char *repository = policy_text(en->policy, "backup");
	char tag[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX)];
	_cleanup_free_ struct store_snapshot *list = NULL;
	const struct store_snapshot *last = NULL;
	size_t nr = 0;

	en->known = true;
	if (!*repository || store_snapshot_list(ps->d->store, NULL, &list, &nr, NULL))
		return;
	snprintf(tag, sizeof(tag), POLICY_TAG_PREFIX "%s", en->policy->name);
	qsort(list, nr, sizeof(*list), by_vm);
	for (size_t i = 0; i < nr; i++) {
		const struct store_snapshot *s = &list[i];

		if (!keep_has_tag(s->tags, tag) ||
		    (last && last->uid == s->uid && !strcmp(last->vm_name, s->vm_name)))
			continue;
		last = s;
		if (!find_line(en, s->vm_name, s->uid) && covers(ps, en, s->vm_name, s->uid) &&
		    !backup_was_pushed(ps->d, repository, s->id))
			add_line(ps, en, s->vm_name, s->uid, false);
	}
}

/* A line for each VM that is there; those of VMs that are not stay for a while, but for a policy
 * that does not cover them any more. */
static void match(struct policies *ps, struct entry *en, const struct vm_name *vms, size_t nr)
{
	int64_t at_s = now_s();
	size_t kept = 0;

	if (!en->known)
		add_absent(ps, en);
	for (size_t i = 0; i < en->nr_lines; i++) {
		struct line *l = en->lines[i];

		if (l->attached)
			l->there_s = at_s;
		l->attached = false;
		if (line_is_over(l, en->policy, at_s) ||
		    (l->state == LINE_IDLE && !covers(ps, en, l->vm, l->uid))) {
			line_stop(l);
			free(l);
		} else {
			en->lines[kept++] = l;
		}
	}
	en->nr_lines = kept;
	for (size_t i = 0; i < nr; i++) {
		struct line *l = find_line(en, vms[i].name, vms[i].uid);

		if (l)
			l->attached = true;
		else if (covers(ps, en, vms[i].name, vms[i].uid))
			add_line(ps, en, vms[i].name, vms[i].uid, true);
	}
}

/* Every line, once.  Returns how long nothing can be due for, in milliseconds. */
static uint32_t look(struct policies *ps)
{
	_cleanup_free_ struct vm_name *vms = NULL;
	uint32_t sleep_ms = UINT32_MAX;
	size_t nr = 0;

	if (vm_list_ready(ps->d, &vms, &nr))
		return sleep_ms;
	pthread_mutex_lock(&ps->lock);
	for (size_t i = 0; i < ps->nr; i++) {
		struct entry *en = &ps->entries[i];

		match(ps, en, vms, nr);
		chores_step(&en->chores, ps->d, en->policy, now_s());
		for (size_t l = 0; l < en->nr_lines; l++) {
			line_step(en->lines[l], ps->d, en->policy, now_s());
			sleep_ms = MIN(sleep_ms, line_sleep_ms(en->lines[l], en->policy));
		}
	}
	pthread_mutex_unlock(&ps->lock);
	return sleep_ms;
}

/* Up to the next full second, when something may be due. */
static uint32_t idle_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return LOOK_IDLE_MS - (uint32_t)(ts.tv_nsec / 1000000);
}

static void *scheduler_thread(void *arg)
{
	struct policies *ps = arg;
	struct pollfd p = {.fd = ps->wake_fd, .events = POLLIN};
	uint64_t n;

	while (!ps->stop) {
		uint32_t sleep_ms = look(ps);

		if (poll(&p, 1, (int)MIN(sleep_ms, idle_ms())) > 0)
			(void)!read(ps->wake_fd, &n, sizeof(n));
	}
	return NULL;
}

/* Those whose file is gone. */
static void drop_fileless(struct policies *ps)
{
	size_t kept = 0;

	for (size_t i = 0; i < ps->nr; i++) {
		struct entry *en = &ps->entries[i];
		char path[PATH_MAX];

		snprintf(path, sizeof(path), "%s/%s.conf", ps->d->config.policy_dir,
			 en->policy->name);
		if (access(path, F_OK) && errno == ENOENT) {
			drop_lines(en);
			policy_free(en->policy);
		} else {
			ps->entries[kept++] = *en;
		}
	}
	ps->nr = kept;
}

void policies_reload(struct daemon *d)
{
	struct policies *ps = d->policies;
	struct err e = {0};

	pthread_mutex_lock(&ps->lock);
	if (read_all(ps, &e))
		log_err("policies: %s", e.text);
	else
		drop_fileless(ps);
	log_notice("policies read: %zu", ps->nr);
	pthread_mutex_unlock(&ps->lock);
	wake(ps);
}

static int start_thread(struct policies *ps)
{
	sigset_t all, old;
	int rc;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	rc = pthread_create(&ps->thread, NULL, scheduler_thread, ps);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	ps->started = !rc;
	return -rc;
}

int policies_start(struct daemon *d, struct err *e)
{
	struct policies *ps = calloc(1, sizeof(*ps));
	int rc;

	if (!ps)
		return err_errno(e, ENOMEM, "policies");
	d->policies = ps;
	ps->d = d;
	pthread_mutex_init(&ps->lock, NULL);
	ps->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (ps->wake_fd < 0)
		return err_errno(e, errno, "eventfd");
	rc = read_all(ps, e);
	if (rc)
		return rc;
	rc = start_thread(ps);
	return rc ? err_errno(e, -rc, "start the scheduler") : 0;
}

void policies_stop(struct daemon *d)
{
	struct policies *ps = d->policies;

	if (!ps)
		return;
	ps->stop = true;
	if (ps->started) {
		wake(ps);
		pthread_join(ps->thread, NULL);
	}
	for (size_t i = 0; i < ps->nr; i++) {
		drop_lines(&ps->entries[i]);
		policy_free(ps->entries[i].policy);
	}
	free(ps->entries);
	if (ps->wake_fd >= 0)
		close(ps->wake_fd);
	pthread_mutex_destroy(&ps->lock);
	free(ps);
	d->policies = NULL;
}

/* ---- what clients see and do: control thread ---- */

static json_t *entry_json(const struct policies *ps, const struct entry *en, uint32_t view)
{
	json_t *settings = json_object(), *lines = json_array();

	for (size_t i = 0; policy_setting(i); i++)
		if (*en->policy->text[i])
			json_object_set_new(settings, policy_setting(i),
					    json_string(en->policy->text[i]));
	for (size_t i = 0; i < en->nr_lines; i++)
		if (!view || en->lines[i]->uid == view)
			json_array_append_new(lines, line_json(en->lines[i]));
	return json_pack("{ss sb so so so}", "name", en->policy->name, "paused", en->policy->paused,
			 "settings", settings, "lines", lines, "chores",
			 chores_json(&en->chores, ps->d, en->policy, now_s()));
}

json_t *policies_json(struct daemon *d, uint32_t view)
{
	struct policies *ps = d->policies;
	json_t *list = json_array();

	pthread_mutex_lock(&ps->lock);
	for (size_t i = 0; i < ps->nr; i++)
		json_array_append_new(list, entry_json(ps, &ps->entries[i], view));
	pthread_mutex_unlock(&ps->lock);
	return list;
}

json_t *policy_json(struct daemon *d, const char *name, uint32_t view)
{
	struct policies *ps = d->policies;
	json_t *one = NULL;
	struct entry *en;

	pthread_mutex_lock(&ps->lock);
	en = find(ps, name);
	if (en)
		one = entry_json(ps, en, view);
	pthread_mutex_unlock(&ps->lock);
	return one;
}

/* Consumes the policy.  The file first: what it does not have is gone after a restart. */
static int keep_policy(struct daemon *d, struct policy *p, struct err *e)
{
	struct policies *ps = d->policies;
	int rc;

	if (mkdir(d->config.policy_dir, 0755) && errno != EEXIST)
		rc = err_errno(e, errno, "cannot make %s", d->config.policy_dir);
	else
		rc = policy_write(d->config.policy_dir, p, e);
	if (!rc) {
		pthread_mutex_lock(&ps->lock);
		rc = install(ps, p);
		pthread_mutex_unlock(&ps->lock);
		if (rc)
			rc = err_errno(e, -rc, "policy %s", p->name);
	}
	if (rc)
		policy_free(p);
	else
		wake(ps);
	return rc;
}

int policy_put(struct daemon *d, const char *name, json_t *settings, struct err *e)
{
	_cleanup_(cleanup_policy) struct policy *p = NULL;
	const char *key;
	json_t *value;
	int rc = policy_new(name, &p, e);

	json_object_foreach(settings, key, value)
	{
		if (!rc && !json_is_string(value))
			rc = err_set(e, EINVAL, "%.40s: want a text, as in the file", key);
		if (!rc)
			rc = policy_set(p, key, json_string_value(value), e);
	}
	if (!rc)
		rc = policy_finish(p, e);
	return rc ? rc : keep_policy(d, steal_ptr(&p), e);
}

int policy_change(struct daemon *d, const char *name, const char *key, const char *value,
		  struct err *e)
{
	json_t *now = policy_json(d, name, 0);
	int rc;

	if (!now)
		return err_set(e, ENOENT, "there is no policy %.64s", name);
	json_object_set_new(json_object_get(now, "settings"), key, json_string(value));
	rc = policy_put(d, name, json_object_get(now, "settings"), e);
	json_decref(now);
	return rc;
}

int policy_remove(struct daemon *d, const char *name, struct err *e)
{
	struct policies *ps = d->policies;
	char path[PATH_MAX];
	struct entry *en, gone = {0};

	pthread_mutex_lock(&ps->lock);
	en = find(ps, name);
	snprintf(path, sizeof(path), "%s/%s.conf", d->config.policy_dir, en ? name : "");
	if (en && (!unlink(path) || errno == ENOENT)) {
		gone = *en;
		memmove(en, en + 1, (size_t)(ps->entries + ps->nr - en - 1) * sizeof(*en));
		ps->nr--;
	}
	pthread_mutex_unlock(&ps->lock);
	if (!en)
		return err_set(e, ENOENT, "there is no policy %.64s", name);
	if (!gone.policy)
		return err_errno(e, errno, "cannot remove %s", path);
	drop_lines(&gone);
	policy_free(gone.policy);
	return 0;
}

int policy_run_now(struct daemon *d, const char *name, const char *vm, unsigned int *nr,
		   struct err *e)
{
	struct policies *ps = d->policies;
	struct entry *en;

	*nr = 0;
	pthread_mutex_lock(&ps->lock);
	en = find(ps, name);
	for (size_t i = 0; en && i < en->nr_lines; i++) {
		struct line *l = en->lines[i];

		if (!l->attached || (vm && strcmp(l->vm, vm) != 0))
			continue;
		l->wanted = true;
		++*nr;
	}
	pthread_mutex_unlock(&ps->lock);
	if (!en)
		return err_set(e, ENOENT, "there is no policy %.64s", name);
	if (vm && !*nr)
		return err_set(e, ENOENT, "policy %s covers no attached VM %.64s", name, vm);
	wake(ps);
	return 0;
}

bool policies_hold(struct daemon *d, const char *tags, char ret[256])
{
	char tag[POLICY_NAME_MAX + sizeof(POLICY_TAG_PREFIX)];
	struct policies *ps = d->policies;
	bool held = false;

	if (!ps)
		return false;
	pthread_mutex_lock(&ps->lock);
	for (size_t i = 0; !held && i < ps->nr; i++) {
		const struct policy *p = ps->entries[i].policy;

		snprintf(tag, sizeof(tag), POLICY_TAG_PREFIX "%s", p->name);
		held = *policy_text(p, "backup") && p->backup_hold && keep_has_tag(tags, tag);
		if (held)
			snprintf(ret, 256, "%s", policy_text(p, "backup"));
	}
	pthread_mutex_unlock(&ps->lock);
	return held;
}
