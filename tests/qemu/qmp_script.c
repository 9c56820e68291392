/* SPDX-License-Identifier: MIT */
/*
 * The QMP client against a monitor that follows a script: what it asks and in which order,
 * and that nothing a monitor does (silence at each step, hanging up at each step, endless
 * lines, deep nesting, answers to what nobody asked) blocks it beyond its time limits,
 * leaves a VM stopped, or leaves migration settings changed.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "adapters/qemu/info.h"
#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"
#include "tests/qemu/monitor.h"

static bool as_it_was(const struct monitor *m)
{
	return !m->x_ignore_shared && !m->events && m->auto_converge && m->bandwidth == 1234;
}

/* One snapshot as the adapter takes it. */
static int snapshot(struct qmp *q, struct err *e)
{
	_cleanup_fd_ int fd = -1;
	bool running;
	size_t len;
	int rc = qmp_stop(q, 0, &running, e);

	if (rc)
		return rc;
	rc = qmp_save(q, 0, &fd, &len, e);
	if (!rc)
		check(len == 10, "%zu", len);
	if (running && qmp_cont(q, 0, e) && !rc)
		rc = e->code;
	return rc;
}

static void well_behaved(void)
{
	struct monitor m = {.migration_status = "completed"};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);

	check(q, "%s", e.text);
	for (int i = 0; i < 3; i++)
		check(!snapshot(q, &e), "%s", e.text);
	close_monitor(&m, q);
	check(m.running && as_it_was(&m), "as it was");
	check(m.gone == 0, "%u", m.gone);
}

static void loads(const char *status)
{
	struct monitor m = {.migration_status = "completed", .status = status};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);
	enum qmp_run run;

	check(q, "%s", e.text);
	check(!qmp_load(q, 0, "QEVM", 4, &e), "%s", e.text);
	check(!qmp_status(q, &run, &e) && run == QMP_PAUSED, "%d", run);
	close_monitor(&m, q);
	check(!m.running && as_it_was(&m), "as it was");
}

/* Whatever goes wrong at whatever request: bounded, reported in a line, and if QEMU still
 * works off what it is sent, the VM runs and the settings are as they were.  (On a loaded machine
 * the client may lose its patience before that request: then that is what goes wrong.) */
struct misdeed_run {
	const char *at;
	int nth;
	enum misdeed how;
	pthread_t thread;
};

static void *one_misdeed(void *arg)
{
	const struct misdeed_run *r = arg;
	struct monitor m = {
		.migration_status = "completed", .at = r->at, .nth = r->nth, .how = r->how};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, SHORT_MS, &e);
	int rc = q ? snapshot(q, &e) : e.code;
	bool works = r->how == SILENT || r->how == LATE || r->how == NOT_OBJECT;
	bool refuses = r->how == REFUSE || r->how == NO_VALUE;

	check(!rc || *e.text, "%s %d: no reason for %d", r->at, r->how, rc);
	check(!strchr(e.text, '\n'), "%s", e.text);
	if (q) {
		/* What is owed comes, or does not; what was sent is worked off. */
		for (int i = 0; i < (works ? 5 : r->how == HANG ? 0 : 50) && !m.gone; i++) {
			usleep(SHORT_MS * 1000);
			qmp_poll(q, NULL);
			if (refuses || r->how == TWICE)
				break;
		}
	}
	close_monitor(&m, q);
	if (q && (works || (refuses && strcmp(r->at, "cont") != 0)))
		check(m.running, "%s %d: the VM stays stopped (%s)", r->at, r->how, e.text);
	if (q && (works || (refuses && strncmp(r->at, "migrate-set", 11) != 0)))
		check(as_it_was(&m), "%s %d: settings (%s)", r->at, r->how, e.text);
	if (q && m.nth <= 0 && r->how != HANG && !works && !refuses && r->how != TWICE)
		check(rc && m.gone == 1, "%s %d: %d, %u", r->at, r->how, rc, m.gone);
	return NULL;
}

/* All at once: nearly all of them wait. */
static void misdeeds(void)
{
	static const struct {
		const char *at;
		int nth;
	} steps[] = {{"qmp_capabilities", 1},
		     {"query-status", 1},
		     {"query-migrate", 1},
		     {"query-migrate-parameters", 1},
		     {"query-migrate-capabilities", 1},
		     {"stop", 1},
		     {"migrate-set-capabilities", 1},
		     {"migrate-set-parameters", 1},
		     {"getfd", 1},
		     {"migrate", 1},
		     {"migrate-set-capabilities", 2},
		     {"cont", 1}};
	struct misdeed_run runs[ARRAY_SIZE(steps) * NR_MISDEEDS];
	size_t nr = 0;

	for (size_t i = 0; i < ARRAY_SIZE(steps); i++)
		for (int how = SILENT; how < NR_MISDEEDS; how++) {
			runs[nr] = (struct misdeed_run){steps[i].at, steps[i].nth, how, 0};
			check(!pthread_create(&runs[nr].thread, NULL, one_misdeed, &runs[nr]),
			      "thread");
			nr++;
		}
	for (size_t i = 0; i < nr; i++)
		pthread_join(runs[i].thread, NULL);
}

/* Q1: `cont` went out behind the `stop` that got no answer; Q2: no more work meanwhile. */
static void undone_stop(void)
{
	struct monitor m = {.migration_status = "completed", .at = "stop", .nth = 1, .how = SILENT};
	struct err e = {0}, busy = {0};
	struct qmp *q = open_monitor(&m, 100, &e);
	bool running;

	m.how = HANG;
	check(qmp_stop(q, 0, &running, &e) == -ETIMEDOUT, "%s", e.text);
	check(qmp_stop(q, 0, &running, &busy) == -EBUSY, "%s", busy.text);
	check(strstr(busy.text, "owes"), "%s", busy.text);
	close_monitor(&m, q);
	check(!strcmp(m.log[m.nr_log - 1], "cont") && !strcmp(m.log[m.nr_log - 2], "stop"), "%s",
	      m.log[m.nr_log - 1]);
}

static void refused_states(void)
{
	static const char *const states[] = {"active", "setup", "postcopy-active", "device"};
	struct err e = {0};
	bool running;

	for (size_t i = 0; i < ARRAY_SIZE(states); i++) {
		struct monitor m = {.foreign = states[i]};
		struct qmp *q = open_monitor(&m, 2000, &e);

		check(qmp_stop(q, 0, &running, &e) == -EBUSY, "%s", states[i]);
		err_clear(&e);
		close_monitor(&m, q);
		check(m.running && as_it_was(&m), "as it was");
	}
	{
		struct monitor m = {.status = "inmigrate"};
		struct qmp *q = open_monitor(&m, 2000, &e);

		check(qmp_stop(q, 0, &running, &e) == -EBUSY, "incoming");
		err_clear(&e);
		close_monitor(&m, q);
	}
}

/* QEMU tells that a migration is complete before it would go on. */
static void not_finalized(int times, bool final_at_once)
{
	struct monitor m = {.migration_status = "completed",
			    .not_final = times,
			    .final_at_once = final_at_once};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);

	check(!snapshot(q, &e), "%s", e.text);
	close_monitor(&m, q);
	check(m.running && as_it_was(&m), "as it was");
}

static void failed_migration(void)
{
	struct monitor m = {.migration_status = "failed"};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);

	check(snapshot(q, &e) == -EIO, "%s", e.text);
	close_monitor(&m, q);
	check(m.running && as_it_was(&m), "as it was");
}

static void resumed_by_somebody(void)
{
	struct monitor m = {.migration_status = "completed", .resumed_meanwhile = true};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);

	check(snapshot(q, &e) == -EBUSY && strstr(e.text, "somebody"), "%s", e.text);
	close_monitor(&m, q);
	check(as_it_was(&m), "as it was");
}

static int asked(const struct monitor *m, const char *name)
{
	for (int i = 0; i < m->nr_log; i++)
		if (!strcmp(m->log[i], name))
			return i;
	return LOG_MAX;
}

/* Q3: it has our settings and is cancelled before the VM goes on, whoever takes QEMU's answers. */
static void migration_meanwhile(bool polled)
{
	struct monitor m = {.migration_status = "completed", .begun_meanwhile = true};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);
	_cleanup_fd_ int fd = -1;
	bool running;
	size_t len;

	check(!qmp_stop(q, 0, &running, &e) && !qmp_save(q, 0, &fd, &len, &e), "%s", e.text);
	for (int i = 0; polled && i < 10; i++) {
		usleep(5000);
		check(!qmp_poll(q, &e), "%s", e.text);
	}
	check(!qmp_cont(q, 0, &e), "%s", e.text);
	close_monitor(&m, q);
	check(m.running && as_it_was(&m), "as it was");
	check(asked(&m, "migrate_cancel") < asked(&m, "cont"), "%d", asked(&m, "migrate_cancel"));
}

/* What was asked before is not asked in the pause. */
static void looked_before(void)
{
	struct monitor m = {.migration_status = "completed"}, foreign = {.foreign = "active"};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);
	int requests;
	bool running;

	check(!qmp_look(q, 0, &e), "%s", e.text);
	requests = m.nr_log;
	check(!qmp_stop(q, 0, &running, &e) && running, "%s", e.text);
	check(m.nr_log == requests + 1, "%d requests", m.nr_log - requests);
	check(!qmp_cont(q, 0, &e) && !qmp_stop(q, 0, &running, &e), "%s", e.text);
	check(m.nr_log > requests + 3, "a look is for one stop");
	close_monitor(&m, q);
	q = open_monitor(&foreign, 2000, &e);
	check(qmp_look(q, 0, &e) == -EBUSY, "%s", e.text);
	close_monitor(&foreign, q);
}

/* Devices that were plugged in, with a name or without one. */
static void foreign_memory(const char *device, const char *at, bool refused)
{
	struct monitor m = {.migration_status = "completed", .device = device, .device_at = at};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);
	bool running;

	check(qmp_look(q, 0, &e) == (refused ? -ENOTSUP : 0), "%s", e.text);
	check(!refused || strstr(e.text, "other processes write its memory"), "%s", e.text);
	err_clear(&e);
	check(qmp_stop(q, 0, &running, &e) == (refused ? -ENOTSUP : 0), "%s", e.text);
	close_monitor(&m, q);
	check(m.running == refused && as_it_was(&m), "as it was");
}

/* A VM that somebody paused is nobody else's to continue. */
static void paused_before(void)
{
	struct monitor m = {.migration_status = "completed", .status = "paused"};
	struct err e = {0};
	struct qmp *q = open_monitor(&m, 2000, &e);

	/* The first one's settings are on their way back when the second begins. */
	check(!snapshot(q, &e), "%s", e.text);
	check(!snapshot(q, &e), "%s", e.text);
	qmp_settle(q);
	check(as_it_was(&m), "as it was");
	close_monitor(&m, q);
	check(!m.running && as_it_was(&m), "as it was");
}

static json_t *info(const char *text)
{
	json_t *o = json_loads(text, 0, NULL);

	check(o, "%s", text);
	return o;
}

static void compatible(void)
{
#define INFO(version, machine, cpu, word)                                         \
	"{\"version\":\"" version "\",\"machine\":\"" machine "\",\"cpu\":\"" cpu \
	"\",\"vcpus\":1,\"cpu_features\":{\"0x1.0:ECX\":" word "}}"
	static const struct {
		const char *now, *reason;
	} cases[] = {
		{INFO("7.2.22", "pc-q35-7.2", "host", "5"), NULL},
		{INFO("8.0.0", "pc-q35-7.2", "host", "5"), "QEMU 7.2.22"},
		{INFO("7.2.22", "pc-q35-8.0", "host", "5"), "machine type pc-q35-7.2"},
		{INFO("7.2.22", "pc-q35-7.2", "max", "5"), "CPU model host"},
		{INFO("7.2.22", "pc-q35-7.2", "host", "4"), "CPUID 0x1.0:ECX is 0x5, and 0x4"},
		{"{\"version\":\"7.2.22\",\"machine\":\"pc-q35-7.2\",\"cpu\":\"host\",\"vcpus\":2}",
		 "number of vCPUs"},
	};
	json_t *then = info(cases[0].now);

	for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
		json_t *now = info(cases[i].now);
		struct err e = {0};
		int rc = qemu_info_compatible(then, now, &e);

		check(cases[i].reason ? rc == -EINVAL && strstr(e.text, cases[i].reason) : !rc,
		      "%zu: %d %s", i, rc, e.text);
		json_decref(now);
	}
	json_decref(then);
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN); /* the monitor's */
	well_behaved();
	loads("paused");
	loads("inmigrate");
	undone_stop();
	refused_states();
	not_finalized(3, false);
	not_finalized(1, true);
	failed_migration();
	resumed_by_somebody();
	paused_before();
	migration_meanwhile(false);
	migration_meanwhile(true);
	looked_before();
	foreign_memory(",{\"name\":\"s\",\"type\":\"child<ivshmem-plain>\"}", "/machine/peripheral",
		       true);
	foreign_memory(",{\"name\":\"device[0]\",\"type\":\"child<ivshmem-doorbell>\"}",
		       "/machine/peripheral-anon", true);
	foreign_memory(",{\"name\":\"n\",\"type\":\"child<e1000>\"}", "/machine/peripheral", false);
	compatible();
	misdeeds();
	puts("the client keeps its limits");
	return 0;
}
