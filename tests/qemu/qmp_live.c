/* SPDX-License-Identifier: MIT */
/*
 * The QMP client against a real QEMU (without KVM, so everywhere): state is saved while
 * the firmware runs, loaded in place and into a second QEMU, and RAM that is shared is
 * left out; the operator's migration settings are as they were; what QEMU is, is told.
 */
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "adapters/qemu/info.h"
#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/check.h"

#define QEMU	  "qemu-system-x86_64"
#define RAM_BYTES (32u << 20)

struct guest {
	pid_t pid;
	int ram; /* memfd */
	struct qmp *q;
	unsigned stops, resumes;
};

static void count_event(void *opaque, enum qmp_event event)
{
	struct guest *g = opaque;

	g->stops += event == QMP_EVENT_STOP;
	g->resumes += event == QMP_EVENT_RESUME;
}

static void show(void *opaque, const char *line)
{
	printf("# %s\n", line);
}

static void run_qemu(int monitor, int ram, bool incoming)
{
	char chardev[64], backend[128];

	fcntl(monitor, F_SETFD, 0);
	fcntl(ram, F_SETFD, 0);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	snprintf(chardev, sizeof(chardev), "socket,id=m,fd=%d", monitor);
	snprintf(backend, sizeof(backend),
		 "memory-backend-file,id=ram,size=%u,share=on,mem-path=/proc/self/fd/%d", RAM_BYTES,
		 ram);
	execlp(QEMU, QEMU, "-nodefaults", "-display", "none", "-accel", "tcg", "-machine",
	       "pc,memory-backend=ram", "-m", "32", "-object", backend, "-device", "VGA",
	       "-chardev", chardev, "-mon", "chardev=m,mode=control", incoming ? "-incoming" : NULL,
	       "defer", NULL);
	_exit(77);
}

static void start(struct guest *g, bool incoming)
{
	struct err e = {0};
	int pair[2];

	*g = (struct guest){.ram = memfd_create("ram", MFD_CLOEXEC)};
	check(!ftruncate(g->ram, RAM_BYTES), "see above");
	check(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "see above");
	g->pid = fork();
	check(g->pid >= 0, "see above");
	if (!g->pid)
		run_qemu(pair[1], g->ram, incoming);
	close(pair[1]);
	if (qmp_open(&(struct qmp_config){.fd = pair[0],
					  .timeout_ms = 20000,
					  .event = count_event,
					  .log = show,
					  .opaque = g},
		     &g->q, &e)) {
		int status;

		waitpid(g->pid, &status, 0);
		if (WIFEXITED(status) && WEXITSTATUS(status) == 77) {
			puts("SKIP: no " QEMU);
			exit(77);
		}
		printf("%s\n", e.text);
		exit(1);
	}
}

static void end(struct guest *g)
{
	qmp_close(g->q);
	kill(g->pid, SIGKILL);
	waitpid(g->pid, NULL, 0);
	close(g->ram);
}

/* Loading looks into RAM: it has to be what it was. */
static void copy_ram(int from, int to)
{
	off_t at = 0;

	while (at < RAM_BYTES)
		check(copy_file_range(from, &at, to, &(off_t){at}, RAM_BYTES - (size_t)at, 0) > 0,
		      "RAM");
}

#define OK(call)                                           \
	do {                                               \
		struct err e = {0};                        \
		if ((call) != 0) {                         \
			printf("%s: %s\n", #call, e.text); \
			exit(1);                           \
		}                                          \
	} while (0)

static json_t *settings(struct qmp *q)
{
	json_t *caps = NULL, *params = NULL;

	OK(qmp_ask(q, 0, "query-migrate-capabilities", NULL, &caps, &e));
	OK(qmp_ask(q, 0, "query-migrate-parameters", NULL, &params, &e));
	return json_pack("{so so}", "caps", caps, "params", params);
}

static void wait_for_firmware(void)
{
	usleep(300000);
}

static void *map_stream(int fd, size_t len)
{
	void *stream = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);

	check(stream != MAP_FAILED, "see above");
	check(len > 1000 && len < (24u << 20), "see above");
	check(!memcmp(stream, "QEVM", 4), "see above");
	return stream;
}

int main(void)
{
	_cleanup_fd_ int fd = -1, fd2 = -1;
	json_t *before, *after, *info, *info2;
	struct guest a, b;
	enum qmp_run run;
	size_t len, len2;
	bool running;
	void *stream;
	int ram = memfd_create("copy", MFD_CLOEXEC);

	start(&a, false);
	wait_for_firmware();
	OK(qmp_status(a.q, &run, &e));
	check(run == QMP_RUNNING, "see above");
	OK(qmp_ask(a.q, 0, "migrate-set-capabilities",
		   json_pack("{s[{ss sb}]}", "capabilities", "capability", "auto-converge", "state",
			     1),
		   NULL, &e));
	OK(qmp_ask(a.q, 0, "migrate-set-parameters", json_pack("{si}", "max-bandwidth", 1234567),
		   NULL, &e));
	before = settings(a.q);

	OK(qmp_stop(a.q, 0, &running, &e));
	check(running && a.stops == 1, "see above");
	OK(qmp_save(a.q, 0, &fd, &len, &e));
	stream = map_stream(fd, len);
	copy_ram(a.ram, ram);
	OK(qmp_cont(a.q, 0, &e));
	check(a.resumes == 1, "see above");
	after = settings(a.q);
	check(json_equal(before, after), "see above");

	/* In place, again and again; what is saved then is what was loaded. */
	for (int i = 0; i < 3; i++) {
		usleep(20000);
		OK(qmp_stop(a.q, 0, &running, &e));
		check(running, "see above");
		copy_ram(ram, a.ram);
		OK(qmp_load(a.q, 0, stream, len, &e));
		if (i < 2)
			OK(qmp_cont(a.q, 0, &e));
	}
	OK(qmp_status(a.q, &run, &e));
	check(run == QMP_PAUSED, "see above");
	OK(qmp_stop(a.q, 0, &running, &e));
	check(!running, "see above");
	json_decref(after);
	after = settings(a.q);
	check(json_equal(before, after), "see above");

	{
		struct err e = {0};

		/* A stream that is cut off is refused; the VM can be loaded again. */
		check(qmp_load(a.q, 0, stream, len / 2, &e) == -E_CORRUPT, "see above");
		printf("cut off: %s\n", e.text);
	}
	OK(qmp_load(a.q, 0, stream, len, &e));
	OK(qmp_cont(a.q, 0, &e));

	/* Into another one. */
	start(&b, true);
	copy_ram(ram, b.ram);
	OK(qmp_status(b.q, &run, &e));
	check(run == QMP_INCOMING, "see above");
	OK(qemu_info_read(a.q, &info, &e));
	OK(qemu_info_read(b.q, &info2, &e));
	OK(qemu_info_compatible(info, info2, &e));
	OK(qmp_load(b.q, 0, stream, len, &e));
	OK(qmp_status(b.q, &run, &e));
	check(run == QMP_PAUSED, "see above");
	OK(qmp_save(b.q, 0, &fd2, &len2, &e));
	OK(qmp_cont(b.q, 0, &e));
	OK(qmp_status(b.q, &run, &e));
	check(run == QMP_RUNNING, "see above");
	check(json_array_size(json_object_get(info, "ram")) >= 2, "see above");
	check(json_array_size(json_object_get(info, "argv")) >= 1, "see above");
	printf("%zu bytes of device state, %zu saved again; QEMU %s, %s, %s\n", len, len2,
	       json_string_value(json_object_get(info, "version")),
	       json_string_value(json_object_get(info, "machine")),
	       json_string_value(json_object_get(info, "cpu")));
	json_decref(info);
	json_decref(info2);
	json_decref(before);
	json_decref(after);
	munmap(stream, len);
	end(&a);
	end(&b);
	return 0;
}
