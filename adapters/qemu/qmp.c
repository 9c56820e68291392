/* SPDX-License-Identifier: MIT */
/* qmp: see qmp.h.  Requests and answers, events, stop and cont; qmp_state.c has device state. */
#include "adapters/qemu/qmp_priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "snapd/util/cleanup.h"

#define TIMEOUT_DEFAULT_MS 5000u
#define FINAL_POLL_US	   200u

uint64_t qmp_deadline(const struct qmp *q, uint32_t timeout_ms)
{
	return wire_now_ns() + (timeout_ms ? timeout_ms : q->config.timeout_ms) * 1000000ull;
}

void qmp_log(const struct qmp *q, const char *line)
{
	if (q->config.log)
		q->config.log(q->config.opaque, line);
}

/* ---- events ---- */

static void tell(struct qmp *q, enum qmp_event event)
{
	if (q->config.event && !q->gone)
		q->config.event(q->config.opaque, event);
	q->gone |= event == QMP_EVENT_GONE;
}

static const char *text_of(const json_t *o, const char *key)
{
	const char *s = json_string_value(json_object_get(o, key));

	return s ? s : "";
}

static void on_migration(struct qmp *q, const char *status)
{
	if (!strcmp(status, "completed"))
		q->migration = MIGRATION_COMPLETED;
	else if (!strcmp(status, "failed") || !strcmp(status, "cancelled"))
		q->migration = MIGRATION_FAILED;
}

static void on_event(struct qmp *q, const json_t *o)
{
	static const struct {
		const char *name;
		enum qmp_event event;
	} names[] = {{"STOP", QMP_EVENT_STOP},
		     {"RESUME", QMP_EVENT_RESUME},
		     {"RESET", QMP_EVENT_RESET},
		     {"SHUTDOWN", QMP_EVENT_SHUTDOWN}};
	const json_t *data = json_object_get(o, "data");
	const char *name = text_of(o, "event");

	if (!strcmp(name, "MIGRATION"))
		on_migration(q, text_of(data, "status"));
	else if (!strcmp(name, "JOB_STATUS_CHANGE"))
		q->job_concluded |= q->job[0] && !strcmp(text_of(data, "id"), q->job) &&
				    !strcmp(text_of(data, "status"), "concluded");
	for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
		if (strcmp(name, names[i].name) != 0)
			continue;
		q->stop_seen |= names[i].event == QMP_EVENT_STOP;
		q->resume_seen |= names[i].event == QMP_EVENT_RESUME;
		tell(q, names[i].event);
	}
}

/* ---- answers ---- */

/* One message; *ret gets it if it is an answer (Q2), else NULL. */
static int take(struct qmp *q, uint64_t deadline, json_t **ret, struct err *e)
{
	json_t *o, *id;
	int rc = wire_recv(&q->wire, deadline, &o, e);

	*ret = NULL;
	if (rc) {
		if (q->wire.fd < 0)
			tell(q, QMP_EVENT_GONE);
		return rc;
	}
	if (json_object_get(o, "event")) {
		on_event(q, o);
		json_decref(o);
		return 0;
	}
	id = json_object_get(o, "id");
	if (!json_is_integer(id) || json_integer_value(id) <= q->answered ||
	    json_integer_value(id) > q->posted) {
		json_decref(o);
		rc = wire_kill(&q->wire, EPROTO, "QEMU's monitor answered what was not asked", e);
		tell(q, QMP_EVENT_GONE);
		return rc;
	}
	q->answered = json_integer_value(id);
	/* Here, since any thread may take it that polls. */
	if (q->answered >= q->settle_first && q->answered <= q->settle_last)
		q->settle_refused |= !json_object_get(o, "return");
	*ret = o;
	return 0;
}

int qmp_post(struct qmp *q, const char *command, json_t *args, int fd, uint64_t deadline,
	     struct err *e)
{
	json_t *o = json_pack("{ss sI so*}", "execute", command, "id", q->posted + 1, "arguments",
			      args);
	_cleanup_free_ char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
	int rc;

	json_decref(o);
	if (!text)
		return err_errno(e, ENOMEM, "%s", command);
	rc = wire_send(&q->wire, text, strlen(text), fd, deadline, e);
	if (!rc)
		q->posted++;
	else if (q->wire.fd < 0)
		tell(q, QMP_EVENT_GONE);
	return rc;
}

static int outcome(const char *command, json_t *answer, json_t **ret, struct err *e)
{
	json_t *error = json_object_get(answer, "error"),
	       *value = json_object_get(answer, "return");
	int rc = 0;

	if (error || !value)
		rc = err_set(e, EIO, "QEMU refused %s: %s", command,
			     *text_of(error, "desc") ? text_of(error, "desc") : "no reason given");
	else if (ret)
		*ret = json_incref(value);
	json_decref(answer);
	return rc;
}

int qmp_await(struct qmp *q, json_int_t id, const char *command, uint64_t deadline, json_t **ret,
	      struct err *e)
{
	struct err why = {0};
	json_t *answer;
	int rc;

	while (q->answered < id) {
		rc = take(q, deadline, &answer, &why);
		if (rc == -ETIMEDOUT && q->wire.fd >= 0)
			return err_set(e, ETIMEDOUT, "QEMU did not answer %s in time", command);
		if (rc)
			return err_set(e, -rc, "%s: %s", command, why.text);
		if (answer && q->answered == id)
			return outcome(command, answer, ret, e);
		json_decref(answer);
	}
	return err_set(e, EIO, "QEMU's answer to %s was passed over", command);
}

int qmp_call(struct qmp *q, uint64_t deadline, const char *command, json_t *args, int fd,
	     json_t **ret, struct err *e)
{
	int rc = qmp_post(q, command, args, fd, deadline, e);

	return rc ? rc : qmp_await(q, q->posted, command, deadline, ret, e);
}

int qmp_call_all(struct qmp *q, uint64_t deadline, const struct qmp_question *questions, size_t nr,
		 json_t **rets, struct err *e)
{
	json_int_t first = q->posted + 1;
	int rc = 0, later;

	memset(rets, 0, nr * sizeof(*rets));
	for (size_t i = 0; i < nr && !rc; i++) {
		const char *path = questions[i].path;

		rc = qmp_post(q, questions[i].command,
			      path ? json_pack("{ss}", "path", path) : NULL, -1, deadline, e);
	}
	for (size_t i = 0; i < nr && first + (json_int_t)i <= q->posted; i++) {
		later = qmp_await(q, first + (json_int_t)i, questions[i].command, deadline,
				  &rets[i], e);
		rc = rc ? rc : later;
	}
	return rc;
}

int qmp_wait(struct qmp *q, bool (*done)(const struct qmp *q), uint64_t deadline, struct err *e)
{
	json_t *answer;
	int rc = 0;

	while (!rc && !done(q)) {
		rc = take(q, deadline, &answer, e);
		if (!rc)
			json_decref(answer);
	}
	return rc;
}

int qmp_ready(struct qmp *q, struct err *e)
{
	int rc;

	qmp_settle(q);
	rc = qmp_poll(q, e);
	if (!rc && q->answered != q->posted)
		rc = err_set(e, EBUSY, "QEMU still owes %lld answers: its main loop hangs",
			     (long long)(q->posted - q->answered));
	return rc;
}

int qmp_ask(struct qmp *q, uint32_t timeout_ms, const char *command, json_t *args, json_t **ret,
	    struct err *e)
{
	int rc = qmp_ready(q, e);

	if (rc) {
		json_decref(args);
		return rc;
	}
	return qmp_call(q, qmp_deadline(q, timeout_ms), command, args, -1, ret, e);
}

int qmp_poll(struct qmp *q, struct err *e)
{
	struct err late = {0};
	json_t *answer;
	int rc;

	do {
		rc = take(q, 0, &answer, &late);
		if (!rc)
			json_decref(answer);
	} while (!rc);
	return q->wire.fd >= 0 ? 0 : err_set(e, -rc, "%s", late.text);
}

/* ---- the session ---- */

static int connect_to(const char *path, struct err *e)
{
	_cleanup_fd_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	struct sockaddr_un un = {.sun_family = AF_UNIX};

	if (strlen(path) >= sizeof(un.sun_path))
		return err_set(e, ENAMETOOLONG, "monitor socket %s: the path is too long", path);
	memcpy(un.sun_path, path, strlen(path));
	if (fd < 0 || connect(fd, (struct sockaddr *)&un, sizeof(un)) < 0)
		return err_errno(e, errno, "monitor socket %s", path);
	return steal_fd(&fd);
}

static int greet(struct qmp *q, struct err *e)
{
	uint64_t deadline = qmp_deadline(q, 0);
	json_t *o;
	int rc = wire_recv(&q->wire, deadline, &o, e);

	if (rc)
		return rc;
	if (!json_is_object(json_object_get(o, "QMP")))
		rc = err_set(e, EPROTO, "what answers is no QEMU monitor");
	json_decref(o);
	return rc ? rc : qmp_call(q, deadline, "qmp_capabilities", NULL, -1, NULL, e);
}

int qmp_open(const struct qmp_config *config, struct qmp **ret, struct err *e)
{
	int fd = config->fd >= 0 ? config->fd : connect_to(config->path, e);
	struct qmp *q;
	int rc;

	*ret = NULL;
	if (fd < 0)
		return fd;
	q = calloc(1, sizeof(*q));
	if (!q) {
		close(fd);
		return err_errno(e, ENOMEM, "monitor");
	}
	q->config = *config;
	q->config.timeout_ms = config->timeout_ms ? config->timeout_ms : TIMEOUT_DEFAULT_MS;
	wire_init(&q->wire, fd);
	rc = greet(q, e);
	if (rc) {
		qmp_close(q);
		return rc;
	}
	*ret = q;
	return 0;
}

void qmp_close(struct qmp *q)
{
	if (!q)
		return;
	qmp_settings_forget(q);
	wire_deinit(&q->wire);
	free(q);
}

int qmp_fd(const struct qmp *q)
{
	return q->wire.fd;
}

/* ---- run states ---- */

static enum qmp_run run_of(const char *status)
{
	static const struct {
		const char *status;
		enum qmp_run run;
	} states[] = {
		{"running", QMP_RUNNING},	    {"inmigrate", QMP_INCOMING},
		{"finish-migrate", QMP_MIGRATING},  {"colo", QMP_MIGRATING},
		{"shutdown", QMP_UNRUNNABLE},	    {"guest-panicked", QMP_UNRUNNABLE},
		{"internal-error", QMP_UNRUNNABLE}, {"preconfig", QMP_UNRUNNABLE},
	};

	for (size_t i = 0; i < ARRAY_SIZE(states); i++)
		if (!strcmp(states[i].status, status))
			return states[i].run;
	return QMP_PAUSED;
}

static int run_in(const json_t *o, enum qmp_run *ret, struct err *e)
{
	if (!*text_of(o, "status"))
		return err_set(e, EPROTO, "QEMU's monitor names no status");
	*ret = run_of(text_of(o, "status"));
	return 0;
}

int qmp_read_status(struct qmp *q, uint64_t deadline, enum qmp_run *ret, struct err *e)
{
	json_t *o = NULL;
	int rc = qmp_call(q, deadline, "query-status", NULL, -1, &o, e);

	if (!rc)
		rc = run_in(o, ret, e);
	json_decref(o);
	return rc;
}

int qmp_status(struct qmp *q, enum qmp_run *ret, struct err *e)
{
	int rc = qmp_ready(q, e);

	return rc ? rc : qmp_read_status(q, qmp_deadline(q, 0), ret, e);
}

/* `o` is of query-migrate: the operator's migration, under way? */
static int no_migration(const json_t *o, struct err *e)
{
	static const char *const over[] = {"", "none", "completed", "failed", "cancelled"};

	for (size_t i = 0; i < ARRAY_SIZE(over); i++)
		if (!strcmp(text_of(o, "status"), over[i]))
			return 0;
	return err_set(e, EBUSY, "a migration is under way (%s)", text_of(o, "status"));
}

/* `o` is of qom-list: devices, of which none may have memory that others write.  The launcher
 * refuses them on the command line; these were plugged in later. */
static int no_foreign_memory(const json_t *o, struct err *e)
{
	static const char prefix[] = "child<ivshmem";
	const json_t *device;
	size_t i;

	json_array_foreach(o, i, device) if (
		!strncmp(text_of(device, "type"), prefix,
			 strlen(prefix))) return err_set(e, ENOTSUP,
							 "device %s is ivshmem: other processes "
							 "write its memory unseen",
							 text_of(device, "name"));
	return 0;
}

/* What has to be known before a stop. */
static int look_around(struct qmp *q, uint64_t deadline, enum qmp_run *run, struct err *e)
{
	static const struct qmp_question questions[] = {
		{"query-migrate", NULL},
		{"query-migrate-parameters", NULL},
		{"query-migrate-capabilities", NULL},
		{"query-status", NULL},
		{"qom-list", "/machine/peripheral"},
		{"qom-list", "/machine/peripheral-anon"},
	};
	json_t *o[ARRAY_SIZE(questions)];
	int rc = qmp_call_all(q, deadline, questions, ARRAY_SIZE(questions), o, e);

	if (!rc)
		rc = no_migration(o[0], e);
	if (!rc)
		rc = qmp_settings_keep(q, o[1], o[2], e);
	if (!rc)
		rc = run_in(o[3], run, e);
	for (size_t i = 4; !rc && i < ARRAY_SIZE(questions); i++)
		rc = no_foreign_memory(o[i], e);
	for (size_t i = 0; i < ARRAY_SIZE(questions); i++)
		json_decref(o[i]);
	return rc;
}

/* Q1: whatever becomes of the stop, `cont` stands behind it. */
static void undo_stop(struct qmp *q)
{
	if (qmp_post(q, "cont", NULL, -1, wire_now_ns(), NULL))
		qmp_log(q, "QEMU may be stopped: its monitor takes no more commands");
}

int qmp_look(struct qmp *q, uint32_t timeout_ms, struct err *e)
{
	int rc = qmp_ready(q, e);

	q->looked = false;
	if (!rc)
		rc = look_around(q, qmp_deadline(q, timeout_ms), &q->run, e);
	if (!rc && (q->run == QMP_INCOMING || q->run == QMP_MIGRATING))
		rc = err_set(e, EBUSY, "a migration is under way");
	q->looked = !rc;
	return rc;
}

int qmp_stop(struct qmp *q, uint32_t timeout_ms, bool *was_running, struct err *e)
{
	uint64_t deadline = qmp_deadline(q, timeout_ms);
	int rc = q->looked ? qmp_ready(q, e) : qmp_look(q, timeout_ms, e);

	*was_running = false;
	q->looked = false;
	if (rc)
		return rc;
	q->stop_seen = q->resume_seen = false;
	rc = qmp_call(q, deadline, "stop", NULL, -1, NULL, e);
	if (rc && q->posted != q->answered && q->run == QMP_RUNNING)
		undo_stop(q);
	/* Without the event somebody else was first: it is theirs to continue. */
	*was_running = !rc && q->run == QMP_RUNNING && q->stop_seen;
	return rc;
}

/* A migration, ours too, is told to be complete some time before QEMU takes `cont` again
 * ("Migration is not finalized yet").  It may become final between the refusal and the look at
 * the state: so a refusal counts only if the state was no migration's before it. */
static int cont_when_final(struct qmp *q, uint64_t deadline, struct err *e)
{
	enum qmp_run run = QMP_MIGRATING;
	struct err why = {0};
	bool was_final;
	int rc;

	for (;;) {
		was_final = run != QMP_MIGRATING;
		err_clear(&why);
		rc = qmp_call(q, deadline, "cont", NULL, -1, NULL, &why);
		if (rc != -EIO || was_final || qmp_read_status(q, deadline, &run, NULL) ||
		    wire_now_ns() > deadline)
			return rc ? err_set(e, -rc, "%s", why.text) : 0;
		if (run == QMP_MIGRATING)
			usleep(FINAL_POLL_US);
	}
}

int qmp_cont(struct qmp *q, uint32_t timeout_ms, struct err *e)
{
	int rc;

	qmp_settle(q);
	rc = qmp_poll(q, e);
	/* Answers may be owed: all the more should this stand behind what they answer. */
	return rc ? rc : cont_when_final(q, qmp_deadline(q, timeout_ms), e);
}
