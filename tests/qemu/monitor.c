/* SPDX-License-Identifier: MIT */
/* See monitor.h. */
#include "tests/qemu/monitor.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <jansson.h>

#include "adapters/qemu/wire.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

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
	} else if (!strcmp(name, "qom-list")) {
		snprintf(text, sizeof(text), "[{\"name\":\"type\",\"type\":\"string\"}%s]",
			 m->device && !strcmp(m->device_at,
					      json_string_value(json_object_get(args, "path")))
				 ? m->device
				 : "");
		return text;
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

struct qmp *open_monitor(struct monitor *m, uint32_t timeout_ms, struct err *e)
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

void close_monitor(struct monitor *m, struct qmp *q)
{
	qmp_close(q);
	pthread_join(m->thread, NULL);
	cleanup_fd(&m->passed_fd);
	close(m->fd);
}
