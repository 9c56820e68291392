/* SPDX-License-Identifier: MIT */
/* Files of settings: see inifile.h. */
#include "snapd/util/inifile.h"

#include <assert.h>
#include <errno.h>
#include <ini.h>
#include <stdio.h>
#include <string.h>

#include "snapd/util/cleanup.h"

static_assert(INIFILE_LINE_MAX + 2 == INI_MAX_LINE, "inih keeps room for LF and NUL");

struct reading {
	FILE *f;
	inifile_fn fn;
	void *arg;
	struct err why;
	int line, bad_line; /* read so far; 0: none is bad */
};

static void refuse(struct reading *r)
{
	if (!r->bad_line)
		r->bad_line = r->line;
}

static bool has_end(const char *s, size_t len)
{
	return len && s[len - 1] == '\n';
}

/* As fgets(), for inih. */
static char *next_line(char *str, int size, void *arg)
{
	struct reading *r = arg;
	size_t len;

	if (r->bad_line || !fgets(str, size, r->f))
		return NULL;
	r->line++;
	len = strlen(str);
	if (len > INIFILE_LINE_MAX + has_end(str, len) || (!has_end(str, len) && !feof(r->f))) {
		err_set(&r->why, EINVAL, "more than %d bytes, or a NUL", INIFILE_LINE_MAX);
		refuse(r);
		return NULL;
	}
	len = strspn(str, " \t");
	memmove(str, str + len, strlen(str + len) + 1);
	return str;
}

static int on_setting(void *arg, const char *section, const char *key, const char *value)
{
	struct reading *r = arg;

	if (!r->bad_line && r->fn(r->arg, section, key, value, &r->why))
		refuse(r);
	return !r->bad_line;
}

int inifile_read(const char *path, inifile_fn fn, void *arg, struct err *e)
{
	struct reading r = {.f = fopen(path, "re"), .fn = fn, .arg = arg};
	int line, failed;

	if (!r.f)
		return err_errno(e, errno, "cannot read %s", path);
	errno = 0;
	line = ini_parse_stream(next_line, &r, on_setting, &r);
	failed = ferror(r.f) ? errno : line < 0 ? ENOMEM : 0;
	fclose(r.f);
	if (failed)
		return err_errno(e, failed, "cannot read %s", path);
	/* What inih refuses itself has no words; a bad line of ours may come after it. */
	if (line && (!r.bad_line || line < r.bad_line))
		return err_set(e, EINVAL, "%s line %d: not 'name = value'", path, line);
	if (r.bad_line)
		return err_set(e, EINVAL, "%s line %d: %s", path, r.bad_line, r.why.text);
	return 0;
}
