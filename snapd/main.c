/* SPDX-License-Identifier: MIT */
/*
 * snapd: start, run, stop.  Only wiring.
 *
 * Signals are taken through a signalfd by the control loop; they are blocked
 * before the first thread starts, so that no other thread ever sees them.
 *
 * Stop order: no new VMMs; VM threads (each abandons its epoch, unless it is being
 * committed, and lets its VM run); the API; job threads; the store.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/api/api.h"
#include "snapd/backup/backup.h"
#include "snapd/core/daemon.h"
#include "snapd/core/job.h"
#include "snapd/core/systemd.h"
#include "snapd/core/tags.h"
#include "snapd/daemon/agents.h"
#include "snapd/daemon/config.h"
#include "snapd/daemon/logging.h"
#include "snapd/daemon/loop.h"
#include "snapd/schedule/scheduler.h"
#include "snapd/store.h"
#include "snapd/upkeep/scrub.h"
#include "snapd/util/busguard.h"
#include "snapd/util/log.h"
#include "snapd/vm/vm.h"

enum exit_code { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_STORE = 3 };

static struct signals {
	struct loop_source src; /* first: the loop hands it back */
	struct daemon *d;
} signals;

static void reload(struct daemon *d)
{
	struct err e = {};

	if (vm_tags_reload(d->tags, &e))
		log_err("tags of VMs stay as they were: %s", e.text);
	policies_reload(d);
}

static void on_signal(struct loop_source *src, uint32_t events)
{
	struct signals *s = (struct signals *)src;
	struct signalfd_siginfo si;

	if (read(src->fd, &si, sizeof(si)) != sizeof(si))
		return;
	if (si.ssi_signo == SIGHUP) {
		systemd_notify("RELOADING=1");
		reload(s->d);
		systemd_notify("READY=1");
		return;
	}
	log_event(LOG_STOPPING, LOG_LVL_NOTICE, "stopping: %s", strsignal((int)si.ssi_signo));
	s->d->stopping = true;
}

static int watch_signals(struct daemon *d, struct err *e)
{
	sigset_t set;
	int err;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	signals.d = d;
	signals.src.fn = on_signal;
	signals.src.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals.src.fd < 0)
		return err_errno(e, errno, "signalfd");
	err = loop_add(d, &signals.src, EPOLLIN);
	return err ? err_errno(e, -err, "watch signals") : 0;
}

/* Before any thread. */
static void set_up_process(void)
{
	struct rlimit files;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGHUP);
	sigprocmask(SIG_BLOCK, &set, NULL);
	signal(SIGPIPE, SIG_IGN);
	/* Each VM has several descriptors. */
	if (!getrlimit(RLIMIT_NOFILE, &files) && files.rlim_cur < files.rlim_max) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	busguard_install();
}

/* The disk failed in a commit: only opening the store again tells what it has.  VMs run on,
 * and the service manager starts us again.  On the thread of the commit. */
static void on_doubt(void *opaque)
{
	struct daemon *d = opaque;

	if (atomic_exchange(&d->in_doubt, true))
		return;
	log_event(LOG_STORE_IN_DOUBT, LOG_LVL_ERR,
		  "store %s: the disk failed in a commit, which may be there or not: ending, to be "
		  "started again",
		  d->config.store_dir);
	d->stopping = true;
	daemon_wake(d);
}

static int open_store(struct daemon *d, struct err *e)
{
	struct store_config config = {.dir = d->config.store_dir,
				      .create = true,
				      .segment_bytes = d->config.segment_bytes,
				      .max_bytes = d->config.store_max_bytes,
				      .dedup = (enum store_dedup)d->config.dedup,
				      .dedup_bytes = d->config.dedup_bytes,
				      .compression = d->config.compression,
				      .key_file = d->config.encryption_key,
				      .in_doubt = on_doubt,
				      .in_doubt_opaque = d,
				      .pool = d->pool};

	return store_open(&config, &d->store, e);
}

/* What is started is stopped by stop(), also after a failure half way. */
static int start(struct daemon *d, struct err *e)
{
	int err = watch_signals(d, e);

	if (!err)
		err = systemd_watchdog_start(d, e);
	if (!err)
		err = jobs_start(d);
	if (!err)
		err = vm_tags_open(d->config.vm_tags, d->config.store_dir, &d->tags, e);
	if (!err)
		err = backup_start(d, e);
	if (!err)
		err = policies_start(d, e);
	if (!err)
		err = scrub_start(d, e);
	if (!err)
		err = api_start(d, e);
	return err ? err : agents_start(d, e);
}

static void stop(struct daemon *d)
{
	d->stopping = true;
	systemd_notify("STOPPING=1");
	agents_stop(d);
	policies_stop(d);
	vm_stop_all(d);
	api_stop(d);
	scrub_stop(d);
	if (d->jobs)
		jobs_stop(d);
	backup_stop(d);
	vm_tags_close(d->tags);
	systemd_watchdog_stop();
	if (signals.src.fd > 0)
		close(signals.src.fd);
}

static int serve(struct daemon *d)
{
	struct err e = {};
	int err = start(d, &e);

	if (!err) {
		log_event(LOG_STARTED, LOG_LVL_NOTICE,
			  "snapd " SNAPD_VERSION " serves %s, store %s", d->config.api_socket,
			  d->config.store_dir);
		systemd_notify("READY=1");
		err = loop_run(d);
	}
	if (err)
		log_err("%s", e.text[0] ? e.text : strerror(-err));
	stop(d);
	return err || d->in_doubt ? EXIT_FAILED : EXIT_OK;
}

static int run(struct daemon *d)
{
	struct err e = {};
	int code;

	log_set_level((enum log_level)d->config.log_level);
	logging_start((enum log_format)d->config.log_format, JOURNAL_SOCKET);
	if (d->config.rekey) {
		if (!store_rekey(d->config.store_dir, d->config.encryption_key, d->config.rekey,
				 &e))
			return EXIT_OK;
		log_err("%s", e.text);
		return EXIT_STORE;
	}
	if (open_store(d, &e)) {
		log_err("%s", e.text);
		return EXIT_STORE;
	}
	code = serve(d);
	store_close(d->store);
	return code;
}

int main(int argc, char **argv)
{
	struct daemon d;
	struct err e = {};
	int code, outcome;

	set_up_process();
	if (daemon_init(&d, &e)) {
		log_err("%s", e.text);
		return EXIT_FAILED;
	}
	outcome = config_from_args(&d.config, argc, argv, &e);
	if (outcome < 0)
		fprintf(stderr, "snapd: %s\nsnapd: --help shows the options\n", e.text);
	code = outcome == CONFIG_RUN ? run(&d) : outcome < 0 ? EXIT_USAGE : EXIT_OK;
	daemon_deinit(&d);
	logging_stop();
	return code;
}
