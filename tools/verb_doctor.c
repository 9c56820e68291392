/* SPDX-License-Identifier: MIT */
/*
 * verb_doctor: can this host run snapd and VMs under it, and if not, what mends it?
 *
 * Each check looks at one thing by trying it (a capability is asked for, a system call
 * made), never by a version.  Nothing is changed.  `bad` keeps snapd from working; `poor`
 * makes it slower or less complete.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "include/snapd/protocol.h"
#include "snapd/util/cleanup.h"
#include "tools/client.h"
#include "tools/human.h"
#include "tools/out.h"
#include "tools/snapctl.h"

#define STORE_DIR    "/var/lib/snapd"
#define FILES_WANTED 65536u
#define FREE_WANTED  (10ull << 30)

#ifndef KVM_CAP_DIRTY_LOG_RING_ACQ_REL
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL 223
#endif

#ifdef __aarch64__
#define QEMU_ARCH "aarch64"
#else
#define QEMU_ARCH "x86_64"
#endif

enum health { GOOD, POOR, BAD };

struct finding {
	enum health health;
	char what[128]; /* is the case */
	char mend[160]; /* what to do; "" when it is good */
};

__attribute__((format(printf, 3, 4))) static void found(struct finding *f, enum health health,
							const char *fmt, ...)
{
	va_list ap;

	f->health = health;
	va_start(ap, fmt);
	vsnprintf(f->what, sizeof(f->what), fmt, ap);
	va_end(ap);
}

static void mend(struct finding *f, const char *how)
{
	snprintf(f->mend, sizeof(f->mend), "%s", how);
}

/* ---- KVM ---- */

/* -1 with errno; ENOTTY: it is something else. */
static int kvm_open(void)
{
	int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);

	if (fd < 0 || ioctl(fd, KVM_GET_API_VERSION, 0) == KVM_API_VERSION)
		return fd;
	close(fd);
	errno = ENOTTY;
	return -1;
}

static void check_kvm(struct finding *f)
{
	_cleanup_fd_ int fd = kvm_open();

	if (fd >= 0) {
		found(f, GOOD, "/dev/kvm can be used, API %d", KVM_API_VERSION);
	} else if (errno == ENOTTY) {
		found(f, BAD, "/dev/kvm is not KVM of API %d", KVM_API_VERSION);
		mend(f, "another device stands there: see ls -l /dev/kvm, remove it and load kvm");
	} else {
		found(f, BAD, "/dev/kvm: %s", strerror(errno));
		mend(f, errno == EACCES || errno == EPERM
				? "add the user that runs VMs to group kvm"
				: "load kvm_intel, kvm_amd or, on arm64, a kernel with KVM; enable "
				  "virtualisation in the firmware");
	}
}

static void check_ring(struct finding *f)
{
	_cleanup_fd_ int fd = kvm_open();
	int bytes, log;

	if (fd < 0) {
		found(f, POOR, "not known while /dev/kvm can't be used");
		return;
	}
	bytes = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
	if (bytes <= 0)
		bytes = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_LOG_RING);
	log = ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (bytes > 0) {
		found(f, GOOD, "dirty ring, up to %zu entries",
		      (size_t)bytes / sizeof(struct kvm_dirty_gfn));
		return;
	}
	found(f, POOR, "no dirty ring; the dirty log %s is used instead",
	      log > 0 ? "with PROTECT2" : "alone");
	mend(f, "Linux 5.11 (x86) or 6.1 (arm64) and later have the ring");
}

static void check_pagemap(struct finding *f)
{
	/* PAGEMAP_SCAN with nothing to scan: _IOWR('f', 16, struct pm_scan_arg), 96 bytes. */
	uint64_t arg[12] = {sizeof(arg)};
	_cleanup_fd_ int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

	if (fd >= 0 && !ioctl(fd, _IOC(_IOC_READ | _IOC_WRITE, 'f', 16, sizeof(arg)), arg)) {
		found(f, GOOD, "PAGEMAP_SCAN is there");
		return;
	}
	found(f, POOR, "no PAGEMAP_SCAN: writes of devices that do not mark them can't be found");
	mend(f, "Linux 6.7 and later have it; VMMs whose devices mark what they write need it not");
}

static void check_userfaultfd(struct finding *f)
{
	struct uffdio_api api = {.api = UFFD_API};
	_cleanup_fd_ int fd =
		(int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* user mode only */);

	if (fd >= 0 && !ioctl(fd, UFFDIO_API, &api)) {
		found(f, GOOD, "userfaultfd can be used");
		return;
	}
	found(f, POOR, "userfaultfd: %s", strerror(errno));
	mend(f, "sysctl vm.unprivileged_userfaultfd=1, or a kernel with CONFIG_USERFAULTFD");
}

/* ---- the service ---- */

static void check_uring(struct finding *f)
{
	struct io_uring_params params = {0};
	_cleanup_fd_ int fd = (int)syscall(SYS_io_uring_setup, 8, &params);

	if (fd >= 0) {
		found(f, GOOD, "io_uring can be used");
		return;
	}
	found(f, BAD, "io_uring: %s", strerror(errno));
	mend(f, errno == EPERM ? "sysctl kernel.io_uring_disabled=0, or allow io_uring_* in the "
				 "seccomp filter"
			       : "a kernel with CONFIG_IO_URING");
}

static void check_files(struct finding *f)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	found(f, limit.rlim_max >= FILES_WANTED ? GOOD : POOR,
	      "at most %llu open files (hard limit)", (unsigned long long)limit.rlim_max);
	if (f->health != GOOD)
		mend(f, "LimitNOFILE=524288 in the unit, or `ulimit -Hn 524288`");
}

static void check_locked(struct finding *f)
{
	struct rlimit limit;
	char text[24];

	getrlimit(RLIMIT_MEMLOCK, &limit);
	if (!geteuid() || limit.rlim_cur >= 64u << 20) {
		found(f, GOOD, "enough memory can be locked for registered buffers");
		return;
	}
	found(f, POOR, "only %s can be locked: buffers are not registered",
	      human_bytes(text, sizeof(text), limit.rlim_cur));
	mend(f, "LimitMEMLOCK=infinity in the unit");
}

static void check_store(struct finding *f)
{
	char path[] = STORE_DIR "/.doctor.XXXXXX", text[24];
	struct statvfs fs;
	int fd = -1;

	if (statvfs(STORE_DIR, &fs)) {
		found(f, errno == ENOENT ? POOR : BAD, STORE_DIR ": %s", strerror(errno));
		mend(f, "snapd makes it at its first start; or give --store a directory on a local "
			"disk");
		return;
	}
	fd = mkostemp(path, O_DIRECT | O_CLOEXEC);
	if (fd < 0 && errno == EINVAL) {
		found(f, BAD, STORE_DIR ": its file system has no O_DIRECT");
		mend(f, "keep the store on ext4, xfs or btrfs");
		return;
	}
	if (fd >= 0) {
		unlink(path);
		close(fd);
	}
	found(f, fs.f_bavail * fs.f_frsize >= FREE_WANTED ? GOOD : POOR, STORE_DIR " has %s free",
	      human_bytes(text, sizeof(text), fs.f_bavail * fs.f_frsize));
	if (f->health != GOOD)
		mend(f, "give it 10 GiB or more, or prune and run `snapctl store gc`");
}

/* Only for QEMU's VMs; other VMMs link the agent. */
static void check_qemu(struct finding *f)
{
	static const char *const places[] = {"/usr/bin", "/usr/local/bin"};
	char path[64];

	for (size_t i = 0; i < ARRAY_SIZE(places); i++) {
		snprintf(path, sizeof(path), "%s/snapd-qemu", places[i]);
		if (access(path, X_OK))
			continue;
		snprintf(path, sizeof(path), "%s/qemu-system-" QEMU_ARCH, places[i]);
		if (!access(path, X_OK) || !access("/usr/bin/qemu-system-" QEMU_ARCH, X_OK)) {
			found(f, GOOD, "snapd-qemu and QEMU are installed");
			return;
		}
		found(f, POOR, "no qemu-system-" QEMU_ARCH " for snapd-qemu to start");
		mend(f, "install QEMU 7.2 or later; not needed for other VMMs");
		return;
	}
	found(f, POOR, "snapd-qemu is not installed");
	mend(f, "install it from snapd's packages; not needed for other VMMs");
}

static bool answers(const char *path, int type)
{
	struct sockaddr_un un = {.sun_family = AF_UNIX};
	_cleanup_fd_ int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);

	snprintf(un.sun_path, sizeof(un.sun_path), "%s", path);
	return fd >= 0 && !connect(fd, (struct sockaddr *)&un, sizeof(un));
}

static void check_socket(struct finding *f, const char *what, const char *path, int type)
{
	if (answers(path, type)) {
		found(f, GOOD, "%s answers at %.80s", what, path);
		return;
	}
	found(f, BAD, "%s at %.60s: %s", what, path, strerror(errno));
	mend(f, errno == EACCES ? "join the group that snapd.conf names as socket_group"
				: "start it: systemctl start snapd");
}

static const char *socket_path(const struct args *a)
{
	return a->socket && *a->socket ? a->socket : SNAPD_API_SOCKET_DEFAULT;
}

#define SKEW_POOR_S 60	/* nothing fails yet */
#define SKEW_BAD_S  900 /* S3 refuses requests */

static void judge_repository(struct finding *f, const json_t *status)
{
	long long ahead_s = json_integer_value(json_object_get(status, "clock_ahead_s"));
	long long skew_s = ahead_s < 0 ? -ahead_s : ahead_s;

	found(f,
	      skew_s >= SKEW_BAD_S    ? BAD
	      : skew_s >= SKEW_POOR_S ? POOR
				      : GOOD,
	      "%.70s answers%s, clock %+lld s",
	      json_string_value(json_object_get(status, "repository")),
	      json_is_true(json_object_get(status, "encrypted")) ? ", encrypted" : "", ahead_s);
	if (f->health != GOOD)
		mend(f,
		     "set this host's clock: systemctl enable --now systemd-timesyncd, or chrony");
}

static void blame_repository(struct finding *f, int code, const char *why)
{
	if (strstr(why, "set `backup`")) {
		found(f, GOOD, "none is set; policies may name their own");
	} else if (strstr(why, "only root")) {
		found(f, POOR, "not known: only root may use backups");
		mend(f, "run it as root");
	} else if (code == EXIT_NOT_FOUND) {
		found(f, POOR, "%.120s", why);
		mend(f, "the first push makes it: snapctl backup push");
	} else {
		found(f, BAD, "%.120s", why);
		mend(f,
		     "snapd.conf(5): backup_endpoint, backup_credentials, backup_ca, backup_key; "
		     "and whether the server runs");
	}
}

/* The service's, with its credentials: it is asked to open it. */
static void check_repository(struct finding *f, const struct args *a)
{
	char why[256] = "";
	json_t *status = NULL;
	struct args quiet = *a;
	int rc;

	quiet.no_progress = true;
	if (!answers(socket_path(a), SOCK_STREAM)) {
		found(f, POOR, "not known: the service does not answer");
		return;
	}
	fail_into(why, sizeof(why));
	rc = run_job(&quiet, "POST", json_pack("{sb}", "brief", 1), &status, "/v1/backup/status",
		     NULL, NULL);
	fail_into(NULL, 0);
	if (!rc)
		judge_repository(f, status);
	else
		blame_repository(f, rc, why);
	json_decref(status);
}

static const char *agent_path(void)
{
	const char *env = getenv("SNAPD_AGENT_SOCKET");

	return env && *env ? env : SNAPD_AGENT_SOCKET_DEFAULT;
}

/* ---- all of them ---- */

static const struct {
	const char *name;
	void (*fn)(struct finding *f);
} checks[] = {
	{"kvm", check_kvm},
	{"dirty-ring", check_ring},
	{"pagemap-scan", check_pagemap},
	{"userfaultfd", check_userfaultfd},
	{"io_uring", check_uring},
	{"open-files", check_files},
	{"locked-memory", check_locked},
	{"store", check_store},
	{"qemu", check_qemu},
};

#define NR_CHECKS (ARRAY_SIZE(checks) + 3)

static json_t *report_json(const struct finding *all, const char *const *names)
{
	static const char *const words[] = {"good", "poor", "bad"};
	json_t *list = json_array();

	for (size_t i = 0; i < NR_CHECKS; i++)
		json_array_append_new(list, json_pack("{ss ss ss ss}", "check", names[i], "health",
						      words[all[i].health], "found", all[i].what,
						      "mend", all[i].mend));
	return json_pack("{so}", "checks", list);
}

static void print_report(const struct finding *all, const char *const *names)
{
	static const char *const words[] = {"ok", "poor", "BAD"};
	struct utsname uts;

	uname(&uts);
	printf("Linux %s, %s\n", uts.release, uts.machine);
	for (size_t i = 0; i < NR_CHECKS; i++) {
		printf("%-5s %-14s %s\n", words[all[i].health], names[i], all[i].what);
		if (*all[i].mend)
			printf("%21s-> %s\n", "", all[i].mend);
	}
}

int verb_doctor(const struct args *a)
{
	struct finding all[NR_CHECKS] = {0};
	const char *names[NR_CHECKS];
	size_t n = ARRAY_SIZE(checks);
	bool bad = false;

	for (size_t i = 0; i < n; i++) {
		names[i] = checks[i].name;
		checks[i].fn(&all[i]);
	}
	names[n] = "service";
	check_socket(&all[n++], "snapd", socket_path(a), SOCK_STREAM);
	names[n] = "agent-socket";
	check_socket(&all[n++], "the agents' socket", agent_path(), SOCK_SEQPACKET);
	names[n] = "backup";
	check_repository(&all[n], a);
	for (size_t i = 0; i < NR_CHECKS; i++)
		bad |= all[i].health == BAD;
	if (a->json) {
		json_t *o = report_json(all, names);

		print_json(o);
		json_decref(o);
	} else {
		print_report(all, names);
	}
	return bad ? EXIT_FAILED : EXIT_DONE;
}
