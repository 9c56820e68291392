/* SPDX-License-Identifier: MIT */
/*
 * Goal: where io_uring is forbidden, the reason names what to enable; where too
 * little memory may be locked, the writer says what to raise, and writes all the
 * same.
 * Method: children with a seccomp filter over io_uring_setup, or without
 * privileges and with RLIMIT_MEMLOCK of 1 MiB.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "snapd/io_uring_reader.h"
#include "snapd/io_uring_writer.h"
#include "snapd/util/log.h"
#include "tests/lib/rand.h"

#define SKIP 77

static bool forbid_setup(int error)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned int)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = {sizeof(filter) / sizeof(filter[0]), filter};

	return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
	       prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) == 0;
}

static void check_reason(int r, int error, const struct err *e)
{
	CHECK(r == -error && e->code == -error);
	CHECK(strstr(e->text, "sysctl kernel.io_uring_disabled"));
	CHECK(strstr(e->text, "seccomp") || strstr(e->text, "switched off"));
}

static int with_seccomp(int error)
{
	struct writer *w = NULL;
	struct reader *rd = NULL;
	struct err e = {0};

	if (!forbid_setup(error))
		return SKIP;
	check_reason(writer_create(&(struct writer_config){0}, &w, &e), error, &e);
	CHECK(!w);
	err_clear(&e);
	check_reason(reader_create(0, &rd, &e), error, &e);
	CHECK(!rd);
	return 0;
}

static char logged[1024];

static void keep_line(const struct log_record *r)
{
	snprintf(logged, sizeof(logged), "%s", r->text);
}

/* Three buffers through unregistered memory, and back. */
static void write_and_read(struct writer *w, int fd)
{
	static _Alignas(4096) uint8_t got[3 << 20];
	struct read_req req = {.fd = fd, .dst = got, .len = sizeof(got)};
	struct reader *rd;
	struct wbuf *b;

	for (uint32_t i = 0; i < 3; i++) {
		CHECK(writer_buf_get(w, &b) == 0);
		memset(b->data, (int)i + 1, 1 << 20);
		CHECK(writer_submit(w, b, fd, (uint64_t)i << 20, 1 << 20) == 0);
	}
	CHECK(writer_barrier(w, NULL) == 0);
	CHECK(reader_create(4, &rd, NULL) == 0);
	CHECK(reader_run(rd, &req, 1) == 0 && req.res == sizeof(got));
	for (size_t i = 0; i < sizeof(got); i++)
		CHECK(got[i] == (i >> 20) + 1);
	reader_destroy(rd);
}

static int with_memlock(int arg)
{
	struct rlimit small = {1 << 20, 1 << 20}; /* enough for the rings, not the buffers */
	int fd = open("memlock-file", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	struct writer *w;

	CHECK(fd >= 0);
	unlink("memlock-file");
	CHECK(setrlimit(RLIMIT_MEMLOCK, &small) == 0);
	if (geteuid() == 0 && setresuid(65534, 65534, 65534) < 0)
		return SKIP;
	log_set_writer(keep_line);
	if (writer_create(&(struct writer_config){0}, &w, NULL) < 0)
		return SKIP; /* the ring alone was too much */
	log_set_writer(NULL);
	CHECK(strstr(logged, "LimitMEMLOCK"));
	write_and_read(w, fd);
	writer_destroy(w);
	return 0;
}

/* Run fn(arg) in a child of its own; false: it was skipped. */
static bool in_child(const char *name, int (*fn)(int), int arg)
{
	pid_t pid = fork();
	int status;

	CHECK(pid >= 0);
	if (pid == 0)
		exit(fn(arg));
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == SKIP));
	printf("%s: %s\n", name, WEXITSTATUS(status) ? "cannot be arranged here" : "as it should");
	fflush(stdout);
	return WEXITSTATUS(status) == 0;
}

int main(void)
{
	struct reader *rd;
	struct err e = {0};
	bool ran;

	ran = in_child("io_uring_setup gives EPERM", with_seccomp, EPERM);
	ran |= in_child("io_uring_setup gives ENOSYS", with_seccomp, ENOSYS);
	if (reader_create(1, &rd, &e) < 0) {
		printf("%s\n", e.text);
		return ran ? 0 : SKIP;
	}
	reader_destroy(rd);
	ran |= in_child("RLIMIT_MEMLOCK of 1 MiB", with_memlock, 0);
	if (!ran)
		printf("skipped: no seccomp filters and no privileges to drop\n");
	return ran ? 0 : SKIP;
}
