/* SPDX-License-Identifier: MIT */
/*
 * control: QEMU's monitor and the agent's callbacks.  Enter: quiesce, save, load, unquiesce on the
 * agent's connection thread; events, on a thread of our own, which also opens the monitor
 * when QEMU's main loop has come so far.  Leave: QMP commands (qmp.h), READY, ABOUT.
 *
 *   OPENING ──► (INCOMING) ──► UP ──hung up──► DOWN     READY is told in UP
 *
 * INCOMING: a migration of the operator's comes in.  To stop or to continue the VM then would
 * change what QEMU does when it is there, so the service hears of the VM afterwards.  With
 * SNAPD_RESTORE the stream is ours: the VM waits for it in UP.
 *
 * One mutex for the monitor: a callback holds it for one command; the thread only to take
 * what has arrived, so that QEMU does not keep events for us without end.  It is held
 * while QEMU's main loop is to answer: so no thread of QEMU's may ever want it.  What those
 * have to say goes under another one.
 *
 * A VM that somebody else had stopped stays stopped after a snapshot or rollback.  One
 * that was restored runs.
 */
#include "adapters/qemu/adapter.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "adapters/qemu/env.h"
#include "adapters/qemu/info.h"
#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"

#define STOP_MS	    10000u
#define CONT_MS	    10000u
#define STATE_MS    10000u /* and as long for cont: the service waits for 30 s */
#define LOAD_MS	    60000u
/* Its main loop answers when the machine is made, which takes minutes for much RAM. */
#define OPEN_MS	    600000u
#define INCOMING_US 50000u
/* From KVM_CREATE_VM to a monitor on a path: QEMU may prepare its RAM first. */
#define CONNECT_MS  60000

static struct {
	/* constant after start */
	struct snapd_vm *vm;
	bool restores;
	pthread_t thread;
	struct sockaddr_un path; /* of the monitor, where it was not given as a descriptor */

	pthread_mutex_t lock;
	struct qmp *qmp;     /* owned; NULL: OPENING, or DOWN */
	_Atomic int monitor; /* qmp's descriptor, or that of the monitor to be; -1: none */
	json_t *info;	     /* owned; NULL: not read */
	bool waits;	     /* to be restored */
	bool was_running;

	pthread_mutex_t about_lock; /* QEMU's threads, too; nothing that waits is done under it */
	char *about;		    /* owned */
	char refusal[320];

	_Atomic bool ended;
} control = {
	.lock = PTHREAD_MUTEX_INITIALIZER, .about_lock = PTHREAD_MUTEX_INITIALIZER, .monitor = -1};

/* ---- what people see ---- */

/* about_lock held. */
static void about_update(void)
{
	const char *refusal = control.refusal[0] ? control.refusal : NULL;

	if (snapd_vm_about(control.vm, control.about, refusal) < 0)
		snapd_vm_about(control.vm, NULL, refusal);
}

void control_refuse(const char *reason)
{
	pthread_mutex_lock(&control.about_lock);
	snprintf(control.refusal, sizeof(control.refusal), "%s", reason);
	if (control.vm)
		about_update();
	pthread_mutex_unlock(&control.about_lock);
}

static char *describe(const json_t *info)
{
	json_t *o = json_object();
	char *text;

	json_object_set_new(o, "name", json_string("QEMU"));
	json_object_set(o, "version", json_object_get(info, "version"));
	json_object_set(o, "machine", json_object_get(info, "machine"));
	json_object_set(o, "cpu", json_object_get(info, "cpu"));
	json_object_set(o, "ram", json_object_get(info, "ram"));
	json_object_set(o, "disks", json_object_get(info, "disks"));
	text = json_dumps(o, JSON_COMPACT);
	json_decref(o);
	return text;
}

/* ---- the monitor's thread ---- */

static void on_log(void *opaque, const char *line)
{
	adapter_log("%s", line);
}

/* False: hung up before. */
static bool wait_for_greeting(int fd)
{
	struct pollfd p = {fd, POLLIN, 0};

	while (poll(&p, 1, -1) < 0)
		if (errno != EINTR)
			return false;
	return p.revents & POLLIN;
}

/* lock held. */
static int open_monitor(struct err *e)
{
	const struct qmp_config config = {
		.fd = control.monitor, .timeout_ms = OPEN_MS, .log = on_log};
	int r = qmp_open(&config, &control.qmp, e);

	control.monitor = -1;
	if (!r)
		control.monitor = qmp_fd(control.qmp);
	if (!r)
		r = qemu_info_read(control.qmp, &control.info, e);
	if (r)
		return r;
	pthread_mutex_lock(&control.about_lock);
	control.about = describe(control.info);
	about_update();
	pthread_mutex_unlock(&control.about_lock);
	return 0;
}

static int read_status(enum qmp_run *status, struct err *e)
{
	int r;

	pthread_mutex_lock(&control.lock);
	r = qmp_status(control.qmp, status, e);
	control.waits = *status == QMP_INCOMING && control.restores;
	pthread_mutex_unlock(&control.lock);
	return r;
}

/* Until no migration of the operator's comes in. */
static int wait_incoming(struct err *e)
{
	enum qmp_run status = QMP_RUNNING;
	int r = read_status(&status, e);

	while (!r && status == QMP_INCOMING && !control.restores && !atomic_load(&control.ended)) {
		usleep(INCOMING_US);
		r = read_status(&status, e);
	}
	return r;
}

static int poll_monitor(struct err *e)
{
	int r;

	pthread_mutex_lock(&control.lock);
	r = qmp_poll(control.qmp, e);
	pthread_mutex_unlock(&control.lock);
	return r;
}

/* Until it hangs up. */
static int follow(struct err *e)
{
	struct pollfd p = {control.monitor, POLLIN, 0};
	int r = 0;

	while (!r) {
		if (poll(&p, 1, -1) < 0 && errno != EINTR)
			return err_errno(e, errno, "poll");
		if (p.revents)
			r = poll_monitor(e);
	}
	return r;
}

/* A socket that QEMU has yet to make; the descriptor, or -errno. */
static int connect_monitor(void)
{
	int r = -ENOENT;

	for (int ms = 0; r < 0 && ms < CONNECT_MS && !atomic_load(&control.ended); ms += 10) {
		_cleanup_fd_ int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			return -errno;
		if (!connect(fd, (struct sockaddr *)&control.path, sizeof(control.path)))
			return steal_fd(&fd);
		r = -errno;
		usleep(10000);
	}
	return r;
}

static void *control_thread(void *arg)
{
	struct err e = {0};
	int r;

	if (control.monitor < 0)
		control.monitor = connect_monitor();
	if (control.monitor < 0 || !wait_for_greeting(control.monitor)) {
		if (!atomic_load(&control.ended))
			adapter_refuse("QEMU has no monitor for snapd");
		return NULL;
	}
	pthread_mutex_lock(&control.lock);
	r = open_monitor(&e);
	pthread_mutex_unlock(&control.lock);
	if (!r)
		r = wait_incoming(&e);
	if (r < 0) {
		if (!atomic_load(&control.ended))
			adapter_refuse("QEMU's monitor: %s", e.text);
		return NULL;
	}
	snapd_vm_ready(control.vm);
	follow(&e);
	control_refuse(e.text); /* most likely QEMU is about to exit: nothing to complain of */
	return NULL;
}

/* "fd:N", or a path. */
static int monitor_of(const char *where)
{
	char *end;
	long n;

	if (strncmp(where, "fd:", 3) != 0) {
		control.path.sun_family = AF_UNIX;
		if (strlen(where) >= sizeof(control.path.sun_path))
			return -ENAMETOOLONG;
		memcpy(control.path.sun_path, where, strlen(where) + 1);
		return 0;
	}
	n = strtol(where + 3, &end, 10);
	if (*end || n < 0 || n > INT32_MAX || fcntl((int)n, F_SETFD, FD_CLOEXEC) < 0)
		return -EINVAL;
	control.monitor = (int)n;
	return 0;
}

int control_start(struct snapd_vm *vm, const char *where)
{
	const char *restore = getenv("SNAPD_RESTORE");
	sigset_t all, old;
	int r;

	control.vm = vm;
	control.restores = restore && *restore;
	r = monitor_of(where);
	if (r < 0)
		return r;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&control.thread, NULL, control_thread, NULL);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return -r;
}

void control_end(void)
{
	atomic_store(&control.ended, true);
	/* Whoever waits for an answer has it now. */
	if (control.monitor >= 0)
		shutdown(control.monitor, SHUT_RDWR);
}

/* ---- the callbacks ---- */

static int failed(int r, const struct err *e)
{
	if (r < 0)
		snapd_vm_reason(control.vm, e->text);
	return r;
}

/* lock held. */
static int monitor_is_up(struct err *e)
{
	return control.qmp ? 0 : err_set(e, ENOTCONN, "QEMU's monitor is not there");
}

static int prepare(void *opaque)
{
	struct err e = {0};
	int r;

	pthread_mutex_lock(&control.lock);
	r = monitor_is_up(&e);
	if (!r && !control.waits)
		r = qmp_look(control.qmp, STOP_MS, &e);
	pthread_mutex_unlock(&control.lock);
	return failed(r, &e);
}

static int quiesce(void *opaque)
{
	struct err e = {0};
	int r;

	pthread_mutex_lock(&control.lock);
	r = monitor_is_up(&e);
	control.was_running = true;
	if (!r && !control.waits)
		r = qmp_stop(control.qmp, STOP_MS, &control.was_running, &e);
	pthread_mutex_unlock(&control.lock);
	return failed(r, &e);
}

static void unquiesce(void *opaque)
{
	struct err e = {0};
	int r = 0;

	pthread_mutex_lock(&control.lock);
	if (control.was_running && !control.waits)
		r = qmp_cont(control.qmp, CONT_MS, &e);
	else if (control.qmp)
		qmp_settle(control.qmp);
	pthread_mutex_unlock(&control.lock);
	if (r < 0 && !atomic_load(&control.ended))
		adapter_log("QEMU was not resumed: %s", e.text);
}

static int put_stream(struct snapd_state_writer *w, int fd, size_t len, struct err *e)
{
	void *p = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, 0);
	int r;

	if (p == MAP_FAILED)
		return err_errno(e, errno, "cannot map QEMU's device state");
	r = snapd_state_put(w, QEMU_STATE_RECORD, 0, 1, p, len);
	real_munmap(p, len);
	return r < 0 ? err_errno(e, -r, "QEMU's device state") : 0;
}

static int put_info(struct snapd_state_writer *w, struct err *e)
{
	_cleanup_free_ char *text = json_dumps(control.info, JSON_COMPACT);
	int r = text ? snapd_state_put(w, QEMU_INFO_RECORD, 0, 1, text, strlen(text)) : -ENOMEM;

	return r < 0 ? err_errno(e, -r, "QEMU's description") : 0;
}

static int save(void *opaque, struct snapd_state_writer *w)
{
	_cleanup_fd_ int fd = -1;
	struct err e = {0};
	size_t len = 0;
	int r;

	pthread_mutex_lock(&control.lock);
	r = monitor_is_up(&e);
	if (!r)
		r = qmp_save(control.qmp, STATE_MS, &fd, &len, &e);
	if (!r)
		r = put_stream(w, fd, len, &e);
	if (!r)
		r = put_info(w, &e);
	pthread_mutex_unlock(&control.lock);
	return failed(r, &e);
}

/* A QEMU of another version, machine or CPU may take a stream and go wrong later.  lock held. */
static int check_info(const struct snapd_state_reader *state, struct err *e)
{
	const void *text;
	uint16_t version;
	json_t *then;
	size_t len;
	int r;

	if (getenv(SNAPD_QEMU_ENV_ANY))
		return 0;
	if (snapd_state_get(state, QEMU_INFO_RECORD, 0, &version, &text, &len) || version != 1)
		return err_set(e, EINVAL, "the snapshot does not say what QEMU it is of");
	then = json_loadb(text, len, 0, NULL);
	r = qemu_info_compatible(then, control.info, e);
	json_decref(then);
	return r;
}

static int check(void *opaque, const struct snapd_state_reader *state)
{
	struct err e = {0};
	int r;

	pthread_mutex_lock(&control.lock);
	r = monitor_is_up(&e);
	if (!r)
		r = check_info(state, &e);
	pthread_mutex_unlock(&control.lock);
	return failed(r, &e);
}

/* lock held. */
static int load_stream(const struct snapd_state_reader *state, struct err *e)
{
	const void *stream;
	uint16_t version;
	size_t len;
	int r = monitor_is_up(e);

	if (!r &&
	    (snapd_state_get(state, QEMU_STATE_RECORD, 0, &version, &stream, &len) || version != 1))
		r = err_set(e, EINVAL, "the snapshot has no device state of QEMU's");
	if (!r)
		r = qmp_load(control.qmp, LOAD_MS, stream, len, e);
	if (!r)
		control.waits = false;
	return r;
}

static int load(void *opaque, const struct snapd_state_reader *state)
{
	struct err e = {0};
	int r;

	pthread_mutex_lock(&control.lock);
	r = load_stream(state, &e);
	pthread_mutex_unlock(&control.lock);
	return failed(r, &e);
}

static void log_line(void *opaque, enum snapd_log_level level, const char *line)
{
	if (level <= SNAPD_LOG_NOTICE)
		adapter_log("%s", line);
}

const struct snapd_vm_callbacks control_callbacks = {
	.size_bytes = sizeof(struct snapd_vm_callbacks),
	.prepare = prepare,
	.quiesce = quiesce,
	.unquiesce = unquiesce,
	.save = save,
	.load = load,
	.log = log_line,
	.check = check,
};
