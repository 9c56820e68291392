/* SPDX-License-Identifier: MIT */
/*
 * Any text as a file of AWS credentials: refused with a reason, or keys that are there, and end.
 * First byte 1: of another profile than the default.
 */
#include <errno.h>
#include <sodium.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snapd/backup/s3_creds.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	static int fd = -1;
	char path[64];
	struct objstore_opts opts = {.credentials_file = path};
	const struct s3_creds *c = NULL;
	struct err e = {0};
	int r;

	if (!len)
		return 0;
	if (fd < 0) {
		static const char *const names[] = {"AWS_ACCESS_KEY_ID",
						    "AWS_SECRET_ACCESS_KEY",
						    "CREDENTIALS_DIRECTORY",
						    "AWS_SHARED_CREDENTIALS_FILE",
						    "AWS_CONFIG_FILE",
						    "AWS_PROFILE",
						    "HOME"};

		for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
			unsetenv(names[i]);
		fd = memfd_create("credentials", MFD_CLOEXEC);
		PROMISE(fd >= 0 && !fchmod(fd, 0600) && sodium_init() >= 0);
	}
	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	opts.profile = data[0] & 1 ? "other" : NULL;
	PROMISE(!ftruncate(fd, 0) && pwrite(fd, data + 1, len - 1, 0) == (ssize_t)len - 1);
	r = s3_creds_load(&opts, &c, &e);
	PROMISE(r <= 0 && (r == 0) == !e.text[0] && (r == 0) == (c != NULL));
	if (r)
		return 0;
	PROMISE(c->access_key[0] &&
		strnlen(c->access_key, sizeof(c->access_key)) < sizeof(c->access_key));
	PROMISE(c->secret_key[0] &&
		strnlen(c->secret_key, sizeof(c->secret_key)) < sizeof(c->secret_key));
	PROMISE(strnlen(c->token, sizeof(c->token)) < sizeof(c->token));
	PROMISE(strnlen(c->region, sizeof(c->region)) < sizeof(c->region));
	s3_creds_free(c);
	return 0;
}
