/* SPDX-License-Identifier: MIT */
/* A slow check of every byte; see scrub.h. */
#include "snapd/upkeep/scrub.h"

#include <errno.h>
#include <limits.h>
#include <linux/ioprio.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "snapd/core/json.h"
#include "snapd/core/daemon.h"
#include "snapd/store/check.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/log.h"
#include "snapd/util/savefile.h"

#define STATE_FILE "scrub.json"
#define LINES_MAX  100u /* of damages that are kept as text; the count tells the rest */
#define RETRY_S	   60	/* after a step that failed, such as for want of memory */
#define LOOK_S	   3600 /* the clock may be set meanwhile */
#define SAVE_S	   10	/* of reading that a crash has done again */

const char *const scrub_action_names[SCRUB_NR_ACTIONS] = {
	[SCRUB_NOW] = "now",
	[SCRUB_PAUSE] = "pause",
	[SCRUB_RESUME] = "resume",
	[SCRUB_CANCEL] = "cancel",
};

struct pass {
	uint64_t began_s, ended_s; /* CLOCK_REALTIME; 0: it has not */
	uint64_t bytes, pages;
	uint64_t damages;
	json_t *lines; /* owned: the first of them, {kind, text} */
};

struct scrub {
	struct daemon *d;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t changed; /* CLOCK_MONOTONIC */
	/* lock: */
	uint64_t since_s;	   /* CLOCK_REALTIME: the newest pass began, or the first start */
	struct pass now, last;	   /* under way; the newest that ended */
	uint32_t next;		   /* segment where `now` goes on */
	bool active, paused;	   /* there is `now`; nothing is to be read */
	bool stop, asked, cancel;  /* for the thread */
	bool unsaved;		   /* the file is older than this */
	uint64_t saved_s, retry_s; /* CLOCK_MONOTONIC: of the file; not before */
	char said[512];		   /* why the last step failed; "" */
	/* The thread's progress, read by anyone. */
	_Atomic bool halt; /* stop, cancel or pause: leave the step */
	_Atomic uint64_t step_bytes, total, bytes_read, passes;
};

static uint64_t realtime_s(void)
{
	return (uint64_t)time(NULL);
}

static uint64_t monotonic_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec;
}

/* ---- the file ---- */

static json_t *pass_json(const struct pass *p)
{
	return json_pack("{sI sI sI sI sI so}", "began_s", (json_int_t)p->began_s, "ended_s",
			 (json_int_t)p->ended_s, "bytes", (json_int_t)p->bytes, "pages",
			 (json_int_t)p->pages, "nr_damages", (json_int_t)p->damages, "damages",
			 json_deep_copy(p->lines));
}

/* Not more than it can be: the file may be anybody's work. */
static int pass_load(json_t *o, struct pass *ret)
{
	json_int_t began, ended, bytes, pages, damages;
	json_t *lines, *copy;

	if (json_unpack(o, "{sI sI sI sI sI so}", "began_s", &began, "ended_s", &ended, "bytes",
			&bytes, "pages", &pages, "nr_damages", &damages, "damages", &lines) ||
	    began < 0 || ended < 0 || bytes < 0 || pages < 0 || damages < 0 ||
	    !json_is_array(lines) || json_array_size(lines) > LINES_MAX)
		return -EINVAL;
	for (size_t i = 0; i < json_array_size(lines); i++)
		if (!json_is_string(json_object_get(json_array_get(lines, i), "kind")) ||
		    !json_is_string(json_object_get(json_array_get(lines, i), "text")))
			return -EINVAL;
	copy = json_deep_copy(lines);
	if (!copy)
		return -ENOMEM;
	json_decref(ret->lines);
	*ret = (struct pass){.began_s = (uint64_t)began,
			     .ended_s = (uint64_t)ended,
			     .bytes = (uint64_t)bytes,
			     .pages = (uint64_t)pages,
			     .damages = (uint64_t)damages,
			     .lines = copy};
	return 0;
}

static int state_load(struct scrub *s, json_t *o)
{
	json_int_t version, since, next;
	json_t *now, *last;
	int active, paused;

	if (json_unpack(o, "{sI sI sI sb sb so so}", "version", &version, "since_s", &since, "next",
			&next, "active", &active, "paused", &paused, "now", &now, "last", &last) ||
	    version != 1 || since < 0 || next < 0 || next > UINT32_MAX || pass_load(now, &s->now) ||
	    pass_load(last, &s->last))
		return -EINVAL;
	s->since_s = (uint64_t)since;
	s->next = (uint32_t)next;
	s->active = active;
	s->paused = paused;
	return 0;
}

static void load(struct scrub *s)
{
	char path[PATH_MAX];
	json_t *o;

	if (snprintf(path, sizeof(path), "%s/" STATE_FILE, s->d->config.store_dir) >=
		    (int)sizeof(path) ||
	    access(path, F_OK))
		return;
	o = json_load_file(path, JSON_REJECT_DUPLICATES, NULL);
	if (state_load(s, o))
		log_warn("%s is not what snapd wrote: the period of the scrub begins anew", path);
	json_decref(o);
}

/* Of a consistent state, without holding the lock across the disk. */
static void save(struct scrub *s)
{
	_cleanup_free_ char *text = NULL;
	struct err e = {0};
	json_t *o;

	pthread_mutex_lock(&s->lock);
	o = json_pack("{si sI sI sb sb so so}", "version", 1, "since_s", (json_int_t)s->since_s,
		      "next", (json_int_t)s->next, "active", s->active, "paused", s->paused, "now",
		      pass_json(&s->now), "last", pass_json(&s->last));
	text = o ? json_text(o, JSON_INDENT(1) | JSON_SORT_KEYS) : NULL;
	json_decref(o);
	pthread_mutex_unlock(&s->lock);
	if (!text)
		err_errno(&e, ENOMEM, "scrub");
	else
		savefile(s->d->config.store_dir, STATE_FILE, text, &e);
	if (e.code)
		log_warn("where the scrub stands is not kept: %s", e.text);
}

/* ---- one step ---- */

/* What a step found; told once it came to its end: one that is left is done again. */
struct step {
	struct scrub *s;
	json_t *lines; /* owned */
};

static bool on_step(void *opaque, uint64_t done, uint64_t total)
{
	struct scrub *s = ((struct step *)opaque)->s;

	atomic_store(&s->step_bytes, done);
	atomic_store(&s->total, total);
	return atomic_load(&s->halt);
}

static void on_damage(void *opaque, const struct store_damage *d)
{
	struct step *st = opaque;

	json_array_append_new(st->lines, json_pack("{ss ss}", "kind", damage_kind_names[d->kind],
						   "text", d->text));
}

/* Under the lock. */
static void add_step(struct scrub *s, const struct store_check_result *r, json_t *lines)
{
	json_t *line;
	size_t i;

	s->now.bytes += r->bytes_read;
	s->now.pages += r->pages_read;
	s->now.damages += r->damages;
	atomic_fetch_add(&s->bytes_read, r->bytes_read);
	atomic_store(&s->step_bytes, 0);
	json_array_foreach(lines, i, line) if (json_array_size(s->now.lines) < LINES_MAX)
		json_array_append(s->now.lines, line);
}

static void log_damages(json_t *lines)
{
	json_t *line;
	size_t i;

	json_array_foreach(lines, i, line)
		log_event(LOG_STORE_DAMAGED, LOG_LVL_ERR, "scrub: %s",
			  json_string_value(json_object_get(line, "text")));
}

/* Under the lock: the pass has read everything. */
static void end_pass(struct scrub *s)
{
	json_t *old;

	s->now.ended_s = MAX(realtime_s(), 1ull);
	log_event(LOG_SCRUBBED, s->now.damages ? LOG_LVL_ERR : LOG_LVL_NOTICE,
		  "scrub: %llu MiB read in %llu s, %llu damages",
		  (unsigned long long)s->now.bytes >> 20,
		  (unsigned long long)(s->now.ended_s - MIN(s->now.began_s, s->now.ended_s)),
		  (unsigned long long)s->now.damages);
	old = s->last.lines;
	json_array_clear(old);
	s->last = s->now;
	s->now = (struct pass){.lines = old};
	s->active = false;
	atomic_fetch_add(&s->passes, 1);
}

/* What the step did is counted, or, left early, not.  A failure is tried again later. */
static void end_step(struct scrub *s, int rc, uint32_t next, const struct store_check_result *r,
		     json_t *lines, const struct err *e)
{
	pthread_mutex_lock(&s->lock);
	atomic_store(&s->step_bytes, 0);
	if (!rc) {
		add_step(s, r, lines);
		s->next = next;
		*s->said = '\0';
		if (!next)
			end_pass(s);
	} else if (rc != -ECANCELED) {
		snprintf(s->said, sizeof(s->said), "%s", e->text);
		log_warn("scrub: %s", e->text);
	}
	pthread_mutex_unlock(&s->lock);
}

static int step(struct scrub *s, uint32_t from)
{
	struct step st = {.s = s, .lines = json_array()};
	struct store_check_config c = {.read_data = true,
				       .rate_bytes = s->d->config.scrub_rate,
				       .step = on_step,
				       .damage = on_damage,
				       .opaque = &st};
	struct store_check_result r = {0};
	struct err e = {0};
	uint32_t next = from;
	int rc = store_scrub_step(s->d->store, &c, from, &next, &r, &e);

	if (!rc)
		log_damages(st.lines);
	end_step(s, rc, next, &r, st.lines, &e);
	json_decref(st.lines);
	return rc;
}

/* ---- when ---- */

/* Under the lock: seconds until a pass begins by itself; 0: now. */
static uint64_t due_in(const struct scrub *s)
{
	uint64_t period = s->d->config.scrub_period_s, now = realtime_s();
	uint64_t from = MIN(s->since_s, now); /* the clock was set back */

	if (!period)
		return UINT64_MAX;
	return now - from >= period ? 0 : period - (now - from);
}

/* Under the lock. */
static void begin_pass(struct scrub *s)
{
	json_array_clear(s->now.lines);
	s->now = (struct pass){.began_s = realtime_s(), .lines = s->now.lines};
	s->since_s = s->now.began_s;
	s->next = 0;
	s->active = s->unsaved = true;
	s->asked = false;
	log_info("scrub: begins");
}

/* Under the lock. */
static void wait_s(struct scrub *s, uint64_t seconds)
{
	struct timespec until;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)MIN(seconds, (uint64_t)LOOK_S);
	pthread_cond_timedwait(&s->changed, &s->lock, &until);
}

/* Under the lock: forget the pass that is under way; the next comes when it is due. */
static void drop_pass(struct scrub *s)
{
	json_array_clear(s->now.lines);
	s->now = (struct pass){.lines = s->now.lines};
	s->active = s->asked = false;
	s->unsaved = true;
}

/* Reads behind everyone else's; a kernel or a sandbox that refuses takes them in turn. */
static void be_idle(void)
{
	if (syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)))
		log_info("scrub: no idle I/O class: %m");
}

/* Under the lock: seconds until there is something to read; 0: now. */
static uint64_t idle_for(const struct scrub *s)
{
	uint64_t now = monotonic_s();

	if (s->paused)
		return UINT64_MAX;
	if (s->retry_s > now)
		return s->retry_s - now;
	return s->active || s->asked ? 0 : due_in(s);
}

/* Under the lock, which is let go meanwhile. */
static void save_unlocked(struct scrub *s)
{
	s->unsaved = false;
	s->saved_s = monotonic_s();
	pthread_mutex_unlock(&s->lock);
	save(s);
	pthread_mutex_lock(&s->lock);
}

/* Under the lock, which is let go meanwhile. */
static void read_on(struct scrub *s)
{
	uint32_t from;
	int rc;

	if (!s->active)
		begin_pass(s);
	from = s->next;
	pthread_mutex_unlock(&s->lock);
	rc = step(s, from);
	pthread_mutex_lock(&s->lock);
	s->unsaved = true;
	s->retry_s = rc && rc != -ECANCELED ? monotonic_s() + RETRY_S : 0;
}

static void *scrub_thread(void *arg)
{
	struct scrub *s = arg;

	pthread_setname_np(pthread_self(), "scrub");
	be_idle();
	pthread_mutex_lock(&s->lock);
	while (!s->stop) {
		uint64_t wait;

		if (s->cancel)
			drop_pass(s);
		s->cancel = false;
		atomic_store(&s->halt, s->paused);
		wait = idle_for(s);
		if (s->unsaved && (wait || monotonic_s() - s->saved_s >= SAVE_S))
			save_unlocked(s);
		else if (wait)
			wait_s(s, wait);
		else
			read_on(s);
	}
	pthread_mutex_unlock(&s->lock);
	if (s->unsaved)
		save(s);
	return NULL;
}

/* ---- from outside ---- */

static void scrub_free(struct scrub *s)
{
	json_decref(s->now.lines);
	json_decref(s->last.lines);
	pthread_cond_destroy(&s->changed);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

static int start_thread(struct scrub *s)
{
	sigset_t all, old;
	int rc;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, &old);
	rc = pthread_create(&s->thread, NULL, scrub_thread, s);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -rc;
}

int scrub_start(struct daemon *d, struct err *e)
{
	struct scrub *s = calloc(1, sizeof(*s));
	pthread_condattr_t attr;
	int rc;

	if (!s)
		return err_errno(e, ENOMEM, "scrub");
	s->d = d;
	s->since_s = realtime_s();
	s->unsaved = true;
	s->now.lines = json_array();
	s->last.lines = json_array();
	pthread_mutex_init(&s->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&s->changed, &attr);
	pthread_condattr_destroy(&attr);
	load(s);
	rc = s->now.lines && s->last.lines ? start_thread(s) : -ENOMEM;
	if (rc) {
		scrub_free(s);
		return err_errno(e, -rc, "scrub");
	}
	d->scrub = s;
	return 0;
}

void scrub_stop(struct daemon *d)
{
	struct scrub *s = d->scrub;

	if (!s)
		return;
	pthread_mutex_lock(&s->lock);
	s->stop = true;
	atomic_store(&s->halt, true);
	pthread_cond_signal(&s->changed);
	pthread_mutex_unlock(&s->lock);
	pthread_join(s->thread, NULL);
	scrub_free(s);
	d->scrub = NULL;
}

int scrub_act(struct scrub *s, enum scrub_action action, struct err *e)
{
	int rc = 0;

	pthread_mutex_lock(&s->lock);
	if (action == SCRUB_CANCEL && (s->cancel || (!s->active && !s->asked)))
		rc = err_set(e, ENOENT, "no scrub is under way");
	s->asked |= action == SCRUB_NOW && !s->active;
	s->cancel |= action == SCRUB_CANCEL && !rc;
	if (action != SCRUB_CANCEL)
		s->paused = action == SCRUB_PAUSE;
	s->unsaved = true;
	if (s->cancel || s->paused)
		atomic_store(&s->halt, true);
	pthread_cond_signal(&s->changed);
	pthread_mutex_unlock(&s->lock);
	return rc;
}

/* Under the lock. */
static const char *state_name(const struct scrub *s)
{
	if (s->paused)
		return "paused";
	if ((s->active || s->asked) && !s->cancel)
		return "running";
	return s->d->config.scrub_period_s ? "idle" : "off";
}

json_t *scrub_json(struct scrub *s)
{
	uint64_t wait, done;
	json_t *o;

	pthread_mutex_lock(&s->lock);
	wait = s->paused ? UINT64_MAX : s->active || s->asked ? 0 : due_in(s);
	done = s->now.bytes + atomic_load(&s->step_bytes);
	o = json_pack("{ss sI sI sI sI so so so ss}", "state", state_name(s), "period_s",
		      (json_int_t)s->d->config.scrub_period_s, "rate",
		      (json_int_t)s->d->config.scrub_rate, "done", (json_int_t)done, "total",
		      (json_int_t)MAX(done, atomic_load(&s->total)), "next_s",
		      wait == UINT64_MAX ? json_null()
					 : json_integer(realtime_s() + (json_int_t)wait),
		      "pass", s->active ? pass_json(&s->now) : json_null(), "last",
		      s->last.ended_s ? pass_json(&s->last) : json_null(), "said", s->said);
	pthread_mutex_unlock(&s->lock);
	return o;
}

void scrub_figures(struct scrub *s, struct scrub_figures *ret)
{
	pthread_mutex_lock(&s->lock);
	*ret = (struct scrub_figures){.running = (s->active || s->asked) && !s->paused,
				      .paused = s->paused,
				      .period_s = s->d->config.scrub_period_s,
				      .bytes_read = atomic_load(&s->bytes_read),
				      .passes = atomic_load(&s->passes),
				      .damages = MAX(s->last.damages, s->now.damages),
				      .ended_s = s->last.ended_s};
	pthread_mutex_unlock(&s->lock);
}
