/* SPDX-License-Identifier: MIT */
/*
 * snapvm: the reference VMM of snapd, and the guest of its tests and demos.  Built on
 * the public agent API only; read machine.c first.
 *
 * main waits for a signal, the end of the time, or a failure, and writes the status.
 */
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "vmm/machine.h"

enum exit_code { EXIT_RIGHT = 0, EXIT_WRONG = 1, EXIT_USAGE = 2, EXIT_NO_KVM = 77 };

static double now_s(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static bool all_done(struct machine *m)
{
	uint32_t i;

	for (i = 0; i < m->opt->nr_vcpus; i++)
		if (!atomic_load(&m->vcpus[i].done))
			return false;
	return true;
}

static bool over(struct machine *m, double seconds)
{
	return atomic_load(&m->fatal) || all_done(m) ||
	       (m->opt->duration_s > 0 && seconds >= m->opt->duration_s);
}

static void wait_for_end(struct machine *m, const sigset_t *signals, const char *status)
{
	const struct timespec step = {.tv_nsec = 20000000};
	double start = now_s(), told = -1, seconds = 0;
	int sig = -1;

	while (sig < 0 && !over(m, seconds)) {
		sig = sigtimedwait(signals, NULL, &step);
		seconds = now_s() - start;
		if (status[0] && seconds - told >= 0.2) {
			told = seconds;
			if (report_status(m, status, seconds))
				machine_fail(m, "cannot write %s: %s", status, strerror(errno));
		}
	}
	machine_stop(m);
	if (status[0])
		(void)report_status(m, status, now_s() - start);
	report_final(m, now_s() - start);
}

/* --run-dir: where the process and its state can be found by the VM's name. */
static int enter_run_dir(const struct options *opt, char *status, size_t len)
{
	const char *name = opt->name ? opt->name : "snapvm";
	char path[3072];
	FILE *f;

	status[0] = '\0';
	if (opt->status)
		snprintf(status, len, "%s", opt->status);
	if (!opt->run_dir)
		return 0;
	if (!opt->status)
		snprintf(status, len, "%.2000s/%.1000s.json", opt->run_dir, name);
	snprintf(path, sizeof(path), "%.2000s/%.1000s.pid", opt->run_dir, name);
	f = fopen(path, "we");
	if (!f || fprintf(f, "%d\n", (int)getpid()) < 0 || fclose(f)) {
		fprintf(stderr, "snapvm: %s: %s\n", path, strerror(errno));
		return -errno;
	}
	return 0;
}

static void block_signals(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGINT);
	/* Every thread made from here on leaves them to main. */
	pthread_sigmask(SIG_BLOCK, set, NULL);
}

int main(int argc, char **argv)
{
	static struct machine machine;
	struct options opt;
	char status[3072];
	sigset_t signals;
	int rc = options_parse(&opt, argc, argv);

	if (rc)
		return rc > 0 ? EXIT_RIGHT : EXIT_USAGE;
	if (enter_run_dir(&opt, status, sizeof(status)))
		return EXIT_WRONG;
	block_signals(&signals);
	rc = machine_create(&machine, &opt);
	if (rc == 0)
		rc = machine_start(&machine);
	if (rc == 0)
		wait_for_end(&machine, &signals, status);
	else
		machine_stop(&machine);
	machine_destroy(&machine);
	if (rc)
		return rc == -ENODEV && !opt.sim ? EXIT_NO_KVM : EXIT_WRONG;
	return machine.failure[0] ? EXIT_WRONG : EXIT_RIGHT;
}
