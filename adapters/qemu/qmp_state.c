/* SPDX-License-Identifier: MIT */
/* qmp_state: device state out of QEMU and into it; see qmp.h. */
#include "adapters/qemu/qmp_priv.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "adapters/qemu/vmstate.h"
#include "snapd/util/cleanup.h"

/* For putting things back after the caller's time is over. */
#define GRACE_MS      1000u
#define CANCEL_TRIES  50
#define BANDWIDTH_MAX ((json_int_t)1 << 40)

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

#define _cleanup_json_ _cleanup_(cleanup_json)

static uint64_t grace(const struct qmp *q)
{
	return qmp_deadline(q, MIN(q->config.timeout_ms, GRACE_MS));
}

/* ---- Q3: the operator's migration settings ---- */

void qmp_settings_forget(struct qmp *q)
{
	json_decref(q->capabilities);
	q->capabilities = NULL;
}

int qmp_settings_keep(struct qmp *q, json_t *parameters, json_t *capabilities, struct err *e)
{
	json_t *bandwidth = json_object_get(parameters, "max-bandwidth");

	qmp_settings_forget(q);
	if (!json_is_integer(bandwidth) || !json_is_array(capabilities))
		return err_set(e, EPROTO, "QEMU's monitor does not tell its migration settings");
	q->max_bandwidth = json_integer_value(bandwidth);
	q->capabilities = json_incref(capabilities);
	return 0;
}

static int settings_read(struct qmp *q, uint64_t deadline, struct err *e)
{
	static const struct qmp_question questions[] = {{"query-migrate-parameters", NULL},
							{"query-migrate-capabilities", NULL}};
	json_t *o[ARRAY_SIZE(questions)];
	int rc = qmp_call_all(q, deadline, questions, ARRAY_SIZE(questions), o, e);

	if (!rc)
		rc = qmp_settings_keep(q, o[0], o[1], e);
	json_decref(o[0]);
	json_decref(o[1]);
	return rc;
}

/* What is ours while state is saved or loaded. */
static bool wanted(const char *capability)
{
	return !strcmp(capability, "x-ignore-shared") || !strcmp(capability, "events");
}

/* Arguments of migrate-set-capabilities for what differs: to ours, or back. */
static json_t *changes(const struct qmp *q, bool back)
{
	json_t *list = json_array(), *c;
	size_t i;

	json_array_foreach(q->capabilities, i, c)
	{
		const char *name = json_string_value(json_object_get(c, "capability"));
		bool on = json_is_true(json_object_get(c, "state"));

		if (name && wanted(name) != on)
			json_array_append_new(list, json_pack("{ss sb}", "capability", name,
							      "state", back ? on : !on));
	}
	return json_pack("{so}", "capabilities", list);
}

static bool can_ignore_shared(const struct qmp *q)
{
	json_t *c;
	size_t i;

	json_array_foreach(q->capabilities, i, c)
	{
		const char *name = json_string_value(json_object_get(c, "capability"));

		if (name && !strcmp(name, "x-ignore-shared"))
			return true;
	}
	return false;
}

static int settings_ours(struct qmp *q, uint64_t deadline, struct err *e)
{
	int rc = q->capabilities ? 0 : settings_read(q, deadline, e);

	if (!rc && !can_ignore_shared(q))
		rc = err_set(e, ENOTSUP, "this QEMU cannot leave shared RAM out (x-ignore-shared)");
	if (!rc)
		rc = qmp_call(q, deadline, "migrate-set-capabilities", changes(q, false), -1, NULL,
			      e);
	return rc;
}

/* Both go out before the first answer: who answers late works them off all the same (Q1). */
static int put_back(struct qmp *q, uint64_t deadline, struct err *e)
{
	int rc;

	q->settle_refused = false;
	q->settle_first = q->settle_last = q->posted + 1;
	rc = qmp_post(q, "migrate-set-capabilities", changes(q, true), -1, deadline, e);
	if (!rc) {
		q->settle_last++;
		rc = qmp_post(q, "migrate-set-parameters",
			      json_pack("{sI}", "max-bandwidth", q->max_bandwidth), -1, deadline,
			      e);
	}
	return rc;
}

static bool is_put_back(const struct qmp *q)
{
	return q->answered >= q->settle_last;
}

static int await_put_back(struct qmp *q, uint64_t deadline)
{
	int rc = qmp_wait(q, is_put_back, deadline, NULL);

	return !rc && q->settle_refused ? -EIO : rc;
}

/* A migration that somebody began meanwhile has our settings, which lose its RAM: it must
 * not come to an end.  While one is under way QEMU refuses to change them. */
void qmp_settle(struct qmp *q)
{
	uint64_t deadline = grace(q);
	int rc;

	if (!q->settle_first)
		return;
	rc = await_put_back(q, deadline);
	if (rc == -EIO)
		qmp_log(q, "a migration that began during a snapshot is cancelled: it would have "
			   "left RAM out");
	for (int i = 0; rc == -EIO && i < CANCEL_TRIES; i++) {
		qmp_call(q, deadline, "migrate_cancel", NULL, -1, NULL, NULL);
		rc = put_back(q, deadline, NULL);
		rc = rc ? rc : await_put_back(q, deadline);
	}
	if (rc)
		qmp_log(q, "QEMU did not confirm its old migration settings: x-ignore-shared may "
			   "be on");
	q->settle_first = q->settle_last = 0;
	qmp_settings_forget(q);
}

/* On their way; qmp_settle() waits for the answers. */
static void settings_back(struct qmp *q)
{
	if (q->capabilities && q->wire.fd >= 0)
		put_back(q, grace(q), NULL);
}

/* ---- save ---- */

static bool migration_over(const struct qmp *q)
{
	return q->migration != MIGRATION_NONE;
}

static bool job_over(const struct qmp *q)
{
	return q->job_concluded;
}

/* Sealed: a stream that grows beyond what we keep fails by itself. */
static int state_file(struct err *e)
{
	_cleanup_fd_ int fd = memfd_create("snapd-qemu-state", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0 || ftruncate(fd, QMP_STATE_MAX) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_GROW) < 0)
		return err_errno(e, errno, "cannot make a file for device state");
	return steal_fd(&fd);
}

static json_t *fd_uri(const char *name)
{
	char uri[64];

	snprintf(uri, sizeof(uri), "fd:%s", name);
	return json_pack("{ss}", "uri", uri);
}

static void new_name(struct qmp *q, char *ret, size_t len)
{
	snprintf(ret, len, "snapd-%u", ++q->nr_names);
}

/* Why the migration that has ended did not succeed. */
static int migration_failed(struct qmp *q, uint64_t deadline, struct err *e)
{
	_cleanup_json_ json_t *o = NULL;
	const char *reason;
	int rc = qmp_call(q, deadline, "query-migrate", NULL, -1, &o, e);

	if (rc)
		return rc;
	reason = json_string_value(json_object_get(o, "error-desc"));
	return err_set(e, EIO, "QEMU could not save its devices' state: %s",
		       reason ? reason : "no reason given");
}

/* All at once: each answer that is waited for lengthens the pause.  If QEMU refuses one, it refuses
 * the next as well, or what has begun is cancelled. */
static int begin_migration(struct qmp *q, int fd, uint64_t deadline, struct err *e)
{
	static const char *const names[] = {"migrate-set-parameters", "getfd", "migrate"};
	json_int_t first = q->posted + 1;
	char name[32];
	int rc, later;

	new_name(q, name, sizeof(name));
	rc = qmp_post(q, names[0], json_pack("{sI}", "max-bandwidth", BANDWIDTH_MAX), -1, deadline,
		      e);
	if (!rc)
		rc = qmp_post(q, names[1], json_pack("{ss}", "fdname", name), fd, deadline, e);
	if (!rc)
		rc = qmp_post(q, names[2], fd_uri(name), -1, deadline, e);
	for (size_t i = 0; i < ARRAY_SIZE(names) && first + (json_int_t)i <= q->posted; i++) {
		later = qmp_await(q, first + (json_int_t)i, names[i], deadline, NULL, e);
		rc = rc ? rc : later;
	}
	return rc;
}

static int migrate_to(struct qmp *q, int fd, uint64_t deadline, struct err *e)
{
	int rc;

	q->migration = MIGRATION_NONE;
	rc = begin_migration(q, fd, deadline, e);
	if (!rc)
		rc = qmp_wait(q, migration_over, deadline, e);
	if (!rc && q->migration == MIGRATION_FAILED)
		rc = migration_failed(q, deadline, e);
	if (rc && q->wire.fd >= 0 && !migration_over(q))
		/* It may begin yet, or go on: nothing of ours may be under way. */
		qmp_call(q, grace(q), "migrate_cancel", NULL, -1, NULL, NULL);
	return rc;
}

/* QEMU wrote through the descriptor that it was passed: the offset is common. */
static int stream_length(int fd, size_t *len, struct err *e)
{
	off_t end = lseek(fd, 0, SEEK_CUR);

	if (end <= 0)
		return err_set(e, EIO, "QEMU wrote no device state");
	if (end >= (off_t)QMP_STATE_MAX)
		return err_set(e, EFBIG, "device state of more than %u MiB", QMP_STATE_MAX >> 20);
	if (ftruncate(fd, end) < 0)
		return err_errno(e, errno, "device state");
	*len = (size_t)end;
	return 0;
}

int qmp_save(struct qmp *q, uint32_t timeout_ms, int *ret, size_t *len, struct err *e)
{
	uint64_t deadline = qmp_deadline(q, timeout_ms);
	_cleanup_fd_ int fd = -1;
	int rc = qmp_ready(q, e);

	*ret = -1;
	*len = 0;
	if (!rc)
		rc = fd = state_file(e);
	if (rc < 0)
		return rc;
	rc = settings_ours(q, deadline, e);
	if (!rc)
		rc = migrate_to(q, fd, deadline, e);
	settings_back(q);
	if (!rc)
		rc = stream_length(fd, len, e);
	if (!rc && q->resume_seen)
		rc = err_set(e, EBUSY, "the VM was continued by somebody during the snapshot");
	if (rc)
		qmp_settle(q);
	else
		*ret = steal_fd(&fd);
	return rc;
}

/* ---- load in place ---- */

struct image_node {
	char node[32];
	json_int_t fdset; /* -1: none */
	bool added;
};

static int add_image(struct qmp *q, struct image_node *n, int fd, uint64_t deadline, struct err *e)
{
	_cleanup_json_ json_t *o = NULL;
	char file[48];
	int rc;

	new_name(q, n->node, sizeof(n->node));
	rc = qmp_call(q, deadline, "add-fd", NULL, fd, &o, e);
	if (rc)
		return rc;
	n->fdset = json_integer_value(json_object_get(o, "fdset-id"));
	snprintf(file, sizeof(file), "/dev/fdset/%lld", (long long)n->fdset);
	rc = qmp_call(q, deadline, "blockdev-add",
		      json_pack("{ss ss s{ss ss}}", "driver", "qcow2", "node-name", n->node, "file",
				"driver", "file", "filename", file),
		      -1, NULL, e);
	n->added = !rc;
	return rc;
}

static void remove_image(struct qmp *q, const struct image_node *n)
{
	uint64_t deadline = grace(q);

	if (n->added && qmp_call(q, deadline, "blockdev-del",
				 json_pack("{ss}", "node-name", n->node), -1, NULL, NULL))
		qmp_log(q, "QEMU keeps the image of a device state");
	if (n->fdset >= 0)
		qmp_call(q, deadline, "remove-fd", json_pack("{sI}", "fdset-id", n->fdset), -1,
			 NULL, NULL);
}

/* The error of our job among those of query-jobs; 0 when it has none. */
static int job_outcome(struct qmp *q, uint64_t deadline, struct err *e)
{
	_cleanup_json_ json_t *jobs = NULL;
	json_t *job;
	size_t i;
	int rc = qmp_call(q, deadline, "query-jobs", NULL, -1, &jobs, e);

	if (rc)
		return rc;
	rc = err_set(NULL, EIO, "%s", "");
	json_array_foreach(jobs, i, job)
	{
		const char *id = json_string_value(json_object_get(job, "id"));
		const char *error = json_string_value(json_object_get(job, "error"));

		if (!id || strcmp(id, q->job) != 0)
			continue;
		rc = error ? err_set(e, E_CORRUPT, "QEMU refused the device state: %s", error) : 0;
	}
	if (rc == -EIO)
		err_set(e, EIO, "QEMU forgot that it was to load device state");
	return rc;
}

static int load_image(struct qmp *q, const char *node, uint64_t deadline, struct err *e)
{
	int rc;

	new_name(q, q->job, sizeof(q->job));
	q->job_concluded = false;
	rc = qmp_call(q, deadline, "snapshot-load",
		      json_pack("{ss ss ss s[s]}", "job-id", q->job, "tag", VMSTATE_TAG, "vmstate",
				node, "devices", node),
		      -1, NULL, e);
	if (!rc)
		rc = qmp_wait(q, job_over, deadline, e);
	if (!rc) {
		rc = job_outcome(q, deadline, e);
		qmp_call(q, deadline, "job-dismiss", json_pack("{ss}", "id", q->job), -1, NULL,
			 NULL);
	}
	q->job[0] = '\0';
	return rc;
}

static int load_in_place(struct qmp *q, const void *stream, size_t len, uint64_t deadline,
			 struct err *e)
{
	struct image_node n = {.fdset = -1};
	_cleanup_fd_ int fd = -1;
	int rc = vmstate_image(stream, len, &fd, e);

	if (rc)
		return rc;
	rc = add_image(q, &n, fd, deadline, e);
	if (!rc)
		rc = load_image(q, n.node, deadline, e);
	remove_image(q, &n);
	return rc;
}

/* ---- load into a fresh QEMU ---- */

static int stream_file(const void *stream, size_t len, struct err *e)
{
	_cleanup_fd_ int fd = memfd_create("snapd-qemu-state", MFD_CLOEXEC);
	const char *at = stream;

	if (fd < 0)
		return err_errno(e, errno, "cannot make a file for device state");
	for (size_t done = 0; done < len;) {
		ssize_t n = write(fd, at + done, len - done);

		if (n < 0)
			return err_errno(e, errno, "cannot write device state");
		done += (size_t)n;
	}
	if (lseek(fd, 0, SEEK_SET) < 0)
		return err_errno(e, errno, "device state");
	return steal_fd(&fd);
}

static int load_incoming(struct qmp *q, const void *stream, size_t len, uint64_t deadline,
			 struct err *e)
{
	_cleanup_fd_ int fd = stream_file(stream, len, e);
	enum qmp_run run;
	char name[32];
	int rc;

	if (fd < 0)
		return fd;
	new_name(q, name, sizeof(name));
	q->migration = MIGRATION_NONE;
	rc = qmp_call(q, deadline, "getfd", json_pack("{ss}", "fdname", name), fd, NULL, e);
	if (!rc)
		rc = qmp_call(q, deadline, "migrate-incoming", fd_uri(name), -1, NULL, e);
	if (!rc)
		rc = qmp_wait(q, migration_over, deadline, e);
	if (!rc && q->migration == MIGRATION_FAILED)
		rc = err_set(e, E_CORRUPT, "QEMU refused the device state; its log has the reason");
	if (!rc)
		rc = qmp_read_status(q, deadline, &run, e);
	if (!rc && run != QMP_PAUSED)
		rc = err_set(e, EIO, "QEMU took the device state, and is not paused");
	return rc;
}

int qmp_load(struct qmp *q, uint32_t timeout_ms, const void *stream, size_t len, struct err *e)
{
	uint64_t deadline = qmp_deadline(q, timeout_ms);
	enum qmp_run run;
	int rc = qmp_ready(q, e);

	if (!rc)
		rc = qmp_read_status(q, deadline, &run, e);
	if (rc)
		return rc;
	if (run == QMP_RUNNING || run == QMP_MIGRATING)
		return err_set(e, EBUSY, "device state goes into a stopped VM only");
	qmp_settings_forget(q);
	rc = settings_ours(q, deadline, e);
	if (!rc)
		rc = run == QMP_INCOMING ? load_incoming(q, stream, len, deadline, e)
					 : load_in_place(q, stream, len, deadline, e);
	settings_back(q);
	qmp_settle(q);
	return rc;
}
