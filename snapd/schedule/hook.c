// SPDX-License-Identifier: MIT
/* Hooks of policies: see hook.h. */
#include "snapd/schedule/hook.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000 + (uint64_t)ts.tv_nsec;
}

/* A group of its own, so that all of it can be killed; signals as a shell expects them. */
static int attributes(posix_spawnattr_t *attr)
{
	sigset_t none, all;
	int rc = posix_spawnattr_init(attr);

	sigemptyset(&none);
	sigfillset(&all);
	if (!rc)
		rc = posix_spawnattr_setpgroup(attr, 0);
	if (!rc)
		rc = posix_spawnattr_setsigmask(attr, &none);
	if (!rc)
		rc = posix_spawnattr_setsigdefault(attr, &all);
	if (!rc)
		rc = posix_spawnattr_setflags(attr, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK |
							    POSIX_SPAWN_SETSIGDEF);
	return rc;
}

static int spawn(pid_t *pid, const char *command, const char *const *env)
{
	const char *argv[] = {"sh", "-c", command, NULL};
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attr;
	int rc = posix_spawn_file_actions_init(&files);

	if (!rc)
		rc = posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
	if (!rc)
		rc = posix_spawn_file_actions_adddup2(&files, 2, 1);
	if (!rc)
		rc = posix_spawn_file_actions_addclosefrom_np(&files, 3);
	if (!rc)
		rc = attributes(&attr);
	if (!rc)
		rc = posix_spawn(pid, "/bin/sh", &files, &attr, (char *const *)argv,
				 (char *const *)env);
	posix_spawnattr_destroy(&attr);
	posix_spawn_file_actions_destroy(&files);
	return rc;
}

int hook_start(struct hook *h, const char *command, const char *const *env, uint64_t timeout_s,
	       struct err *e)
{
	const char *vars[HOOK_ENV_MAX + 2] = {
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"};
	int rc;

	for (size_t i = 0; i < HOOK_ENV_MAX && env[i]; i++)
		vars[i + 1] = env[i];
	*h = (struct hook){.pid_fd = -1};
	rc = spawn(&h->pid, command, vars);
	if (rc) {
		h->pid = 0;
		return err_errno(e, rc, "cannot run '%.80s'", command);
	}
	h->pid_fd = (int)syscall(SYS_pidfd_open, h->pid, 0);
	if (h->pid_fd < 0) {
		rc = errno;
		hook_kill(h);
		return err_errno(e, rc, "cannot watch '%.80s'", command);
	}
	h->deadline_ns = now_ns() + timeout_s * 1000000000;
	return 0;
}

static void forget(struct hook *h)
{
	if (h->pid_fd >= 0)
		close(h->pid_fd);
	*h = (struct hook){.pid_fd = -1};
}

int hook_look(struct hook *h, struct err *e)
{
	struct pollfd p = {.fd = h->pid_fd, .events = POLLIN};
	bool killed;
	int status;

	if (poll(&p, 1, 0) <= 0) {
		if (h->deadline_ns && now_ns() >= h->deadline_ns) {
			kill(-h->pid, SIGKILL);
			h->deadline_ns = 0;
		}
		return -EAGAIN;
	}
	if (waitpid(h->pid, &status, 0) != h->pid)
		status = -1;
	/* What it left behind in its group has no business to run on. */
	kill(-h->pid, SIGKILL);
	killed = !h->deadline_ns;
	forget(h);
	if (killed)
		return err_set(e, ETIMEDOUT, "hook: killed, it did not end in time");
	if (status == -1 || WIFSIGNALED(status))
		return err_set(e, EIO, "hook: killed by signal %d",
			       status == -1 ? 0 : WTERMSIG(status));
	if (WEXITSTATUS(status))
		return err_set(e, EIO, "hook: exit status %d", WEXITSTATUS(status));
	return 0;
}

void hook_kill(struct hook *h)
{
	if (h->pid <= 0)
		return;
	kill(-h->pid, SIGKILL);
	kill(h->pid, SIGKILL);
	waitpid(h->pid, NULL, 0);
	forget(h);
}
