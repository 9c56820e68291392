/* SPDX-License-Identifier: MIT */
/*
 * The QMP client against a monitor that follows a script: what it asks and in which order,
 * and that nothing a monitor does (silence at each step, hanging up at each step, endless
 * lines, deep nesting, answers to what nobody asked) blocks it beyond its time limits,
 * leaves a VM stopped, or leaves migration settings changed.
 *
 * The monitor is a thread: it reads requests and answers each from a table, but for the one at
 * which it is to misbehave.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "adapters/qemu/info.h"
#include "adapters/qemu/qmp.h"
#include "adapters/qemu/wire.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define LOG_MAX	 256
#define SHORT_MS 100 /* the client's patience */

enum misdeed {
	BEHAVE,
	SILENT, /* no answer to this request, but to later ones */
	HANG,	/* nothing any more; it keeps the connection */
	LATE,	/* the answer to this one after the time limit, with the next */
	HANG_UP,
	REFUSE,
	GARBAGE,    /* a line that is not JSON */
	NESTED,	    /* a million brackets */
	ENDLESS,    /* a line without end */
	STRANGER,   /* an answer with an id that nobody used */
	TWICE,	    /* the answer, twice */
	NO_VALUE,   /* neither return nor error */
	NOT_OBJECT, /* returns a number where an object belongs */
	NR_MISDEEDS
};

struct monitor {
	int fd;
	pthread_t thread;
	/* The script; set before the start. */
	const char *at; /* the request at which it misbehaves: its name; NULL: none */
	int nth;	/* its nth occurrence, from 1 */
	enum misdeed how;
	const char *status;	      /* of the VM at first */
	const char *migration_status; /* the event's; NULL: no event */
	const char *foreign;	      /* status of a migration of somebody else's */
	bool resumed_meanwhile;
	int not_final;	      /* so often QEMU refuses `cont` after a migration */
	bool final_at_once;   /* and it is final right after the refusal */
	bool begun_meanwhile; /* a migration of somebody else's, when ours is over */
	/* What is the case; the monitor's thread. */
	bool running, x_ignore_shared, events, auto_converge, incoming;
	long long bandwidth;
	int passed_fd;
	bool hung, refused_cont;
	/* What came; read by the test after the end. */
	char log[LOG_MAX][40];
	int nr_log;
	unsigned gone; /* events; the client's thread */
};

static void say(struct monitor *m, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static void say(struct monitor *m, const char *fmt, ...)
{
	char line[4096];
	va_list ap;
	int n;

	if (m->hung)
		return;
	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	if (write(m->fd, line, (size_t)n) != n || write(m->fd, "\n", 1) != 1)
		m->hung = true;
}

static void flood(struct monitor *m, char c, size_t n)
{
	char block[65536];

	memset(block, c, sizeof(block));
	for (size_t done = 0; done < n; done += sizeof(block))
		if (write(m->fd, block, sizeof(block)) != sizeof(block))
			return;
}

static void set_caps(struct monitor *m, json_t *args)
{
	json_t *c;
	size_t i;

	json_array_foreach(json_object_get(args, "capabilities"), i, c)
	{
		const char *name = json_string_value(json_object_get(c, "capability"));
		bool on = json_is_true(json_object_get(c, "state"));

		if (!strcmp(name, "x-ignore-shared"))
			m->x_ignore_shared = on;
		else if (!strcmp(name, "events"))
			m->events = on;
		else
			m->auto_converge = on;
	}
}

/* What the request does, and what it returns. */
static const char *obey(struct monitor *m, const char *name, json_t *args)
{
	static _Thread_local char text[512];

	if (!strcmp(name, "query-status")) {
		snprintf(text, sizeof(text), "{\"status\":\"%s\"}",
			 m->incoming				? "inmigrate"
			 : m->refused_cont && !m->final_at_once ? "finish-migrate"
			 : m->running				? "running"
								: "paused");
		return text;
	}
	if (!strcmp(name, "stop")) {
		if (m->running)
			say(m, "{\"event\":\"STOP\"}");
		m->running = false;
	} else if (!strcmp(name, "cont")) {
		if (!m->running)
			say(m, "{\"event\":\"RESUME\"}");
		m->running = true;
	} else if (!strcmp(name, "query-migrate")) {
		snprintf(text, sizeof(text), "{\"status\":\"%s\"}",
			 m->foreign	       ? m->foreign
			 : m->migration_status ? m->migration_status
					       : "none");
		return text;
	} else if (!strcmp(name, "query-migrate-parameters")) {
		snprintf(text, sizeof(text), "{\"max-bandwidth\":%lld}", m->bandwidth);
		return text;
	} else if (!strcmp(name, "query-migrate-capabilities")) {
		snprintf(text, sizeof(text),
			 "[{\"capability\":\"x-ignore-shared\",\"state\":%s},{\"capability\":"
			 "\"events\","
			 "\"state\":%s},{\"capability\":\"auto-converge\",\"state\":%s}]",
			 m->x_ignore_shared ? "true" : "false", m->events ? "true" : "false",
			 m->auto_converge ? "true" : "false");
		return text;
	} else if (!strcmp(name, "migrate-set-capabilities")) {
		set_caps(m, args);
	} else if (!strcmp(name, "migrate-set-parameters")) {
		m->bandwidth = json_integer_value(json_object_get(args, "max-bandwidth"));
	} else if (!strcmp(name, "add-fd")) {
		return "{\"fdset-id\":3,\"fd\":9}";
	} else if (!strcmp(name, "query-jobs")) {
		return "[{\"id\":\"snapd-2\",\"status\":\"concluded\"}]";
	} else if (!strcmp(name, "migrate-incoming")) {
		m->incoming = false;
	} else if (!strcmp(name, "migrate_cancel")) {
		m->foreign = NULL;
	}
	return "{}";
}

/* What follows the answer. */
static void events_after(struct monitor *m, const char *name, json_t *args)
{
	if (!strcmp(name, "migrate") && m->migration_status) {
		check(m->x_ignore_shared && m->events && !m->auto_converge, "capabilities");
		check(m->passed_fd >= 0, "descriptor");
		check(write(m->passed_fd, "QEVM state", 10) == 10, "stream");
		say(m, "{\"event\":\"MIGRATION\",\"data\":{\"status\":\"active\"}}");
		if (m->resumed_meanwhile)
			say(m, "{\"event\":\"RESUME\"}");
		say(m, "{\"event\":\"MIGRATION\",\"data\":{\"status\":\"%s\"}}",
		    m->migration_status);
		m->foreign = m->begun_meanwhile ? "active" : NULL;
	}
	if (!strcmp(name, "migrate-incoming") && m->migration_status)
		say(m, "{\"event\":\"MIGRATION\",\"data\":{\"status\":\"%s\"}}",
		    m->migration_status);
	if (!strcmp(name, "snapshot-load"))
		say(m,
		    "{\"event\":\"JOB_STATUS_CHANGE\",\"data\":{\"id\":\"%s\",\"status\":"
		    "\"concluded\"}}",
		    json_string_value(json_object_get(args, "job-id")));
}

static void misbehave(struct monitor *m, long long id, const char *name, json_t *args)
{
	switch (m->how) {
	case SILENT:
		obey(m, name, args);
		break;
	case HANG:
		m->hung = true;
		break;
	case LATE:
		usleep(2 * SHORT_MS * 1000);
		say(m, "{\"return\":%s,\"id\":%lld}", obey(m, name, args), id);
		events_after(m, name, args);
		break;
	case HANG_UP:
		shutdown(m->fd, SHUT_RDWR);
		m->hung = true;
		break;
	case REFUSE:
		say(m,
		    "{\"id\":%lld,\"error\":{\"class\":\"GenericError\",\"desc\":\"no\\nand no\"}}",
		    id);
		break;
	case GARBAGE:
		say(m, "qemu: {[}");
		break;
	case NESTED:
		flood(m, '[', 1 << 20);
		say(m, " ");
		break;
	case ENDLESS:
		flood(m, ' ', QMP_LINE_MAX + (1 << 20));
		break;
	case STRANGER:
		say(m, "{\"return\":{},\"id\":%lld}", id + 1000);
		break;
	case TWICE:
		say(m, "{\"return\":%s,\"id\":%lld}", obey(m, name, args), id);
		events_after(m, name, args);
		say(m, "{\"return\":{},\"id\":%lld}", id);
		break;
	case NO_VALUE:
		say(m, "{\"id\":%lld}", id);
		break;
	case NOT_OBJECT:
		obey(m, name, args);
		say(m, "{\"return\":17,\"id\":%lld}", id);
		events_after(m, name, args);
		break;
	default:
		check(false, "%d", m->how);
	}
}

static void serve(struct monitor *m, json_t *o)
{
	const char *name = json_string_value(json_object_get(o, "execute"));
	json_t *args = json_object_get(o, "arguments");
	long long id = json_integer_value(json_object_get(o, "id"));
	const char *value;

	check(name && m->nr_log < LOG_MAX, "requests");
	snprintf(m->log[m->nr_log++], sizeof(m->log[0]), "%s", name);
	if (m->hung)
		return;
	if (m->at && !strcmp(m->at, name) && !--m->nth) {
		misbehave(m, id, name, args);
		return;
	}
	if (m->foreign && !strncmp(name, "migrate-set", 11)) {
		say(m, "{\"id\":%lld,\"error\":{\"desc\":\"a migration is under way\"}}", id);
		return;
	}
	m->refused_cont = !strcmp(name, "cont") ? m->not_final-- > 0 : m->refused_cont;
	if (!strcmp(name, "cont") && m->refused_cont) {
		say(m, "{\"id\":%lld,\"error\":{\"desc\":\"Migration is not finalized yet\"}}", id);
		return;
	}
	value = obey(m, name, args);
	say(m, "{\"return\":%s,\"id\":%lld}", value, id);
	events_after(m, name, args);
}

/* One recvmsg(): text, and perhaps a descriptor. */
static ssize_t take_some(struct monitor *m, char *buf, size_t len)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {buf, len};
	struct msghdr h = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control.bytes,
			   .msg_controllen = sizeof(control.bytes)};
	ssize_t n = recvmsg(m->fd, &h, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&h) : NULL;

	if (c && c->cmsg_type == SCM_RIGHTS) {
		cleanup_fd(&m->passed_fd);
		memcpy(&m->passed_fd, CMSG_DATA(c), sizeof(int));
	}
	return n;
}

static void *run_monitor(void *arg)
{
	struct monitor *m = arg;
	char buf[65536];
	size_t len = 0;
	ssize_t n;

	say(m, "{\"QMP\":{\"version\":{\"qemu\":{\"major\":7}},\"capabilities\":[]}}");
	while ((n = take_some(m, buf + len, sizeof(buf) - len)) > 0) {
		size_t at = 0;

		len += (size_t)n;
		for (;;) {
			json_error_t je;
			json_t *o = json_loadb(buf + at, len - at, JSON_DISABLE_EOF_CHECK, &je);

			if (!o)
				break;
			at += (size_t)je.position;
			serve(m, o);
			json_decref(o);
		}
		memmove(buf, buf + at, len - at);
		len -= at;
	}
	return NULL;
}

static void on_event(void *opaque, enum qmp_event event)
{
	struct monitor *m = opaque;

	m->gone += event == QMP_EVENT_GONE;
}

static struct qmp *open_monitor(struct monitor *m, uint32_t timeout_ms, struct err *e)
{
	struct qmp_config c = {.timeout_ms = timeout_ms, .event = on_event, .opaque = m};
	struct qmp *q;
	int pair[2];

	check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "socketpair");
	m->fd = pair[0];
	m->passed_fd = -1;
	m->running = !m->status;
	m->incoming = m->status && !strcmp(m->status, "inmigrate");
	m->bandwidth = 1234;
	m->auto_converge = true;
	check(!pthread_create(&m->thread, NULL, run_monitor, m), "thread");
	c.fd = pair[1];
	qmp_open(&c, &q, e);
	return q;
}

static void close_monitor(struct monitor *m, struct qmp *q)
{
	qmp_close(q);
	pthread_join(m->thread, NULL);
	cleanup_fd(&m->passed_fd);
	close(m->fd);
}

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
	compatible();
	misdeeds();
	puts("the client keeps its limits");
	return 0;
}
