/* SPDX-License-Identifier: MIT */
/* info: see info.h. */
#include "adapters/qemu/info.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/util/cleanup.h"

#define ARGV_MAX (1u << 20)

static void cleanup_json(json_t **o)
{
	json_decref(*o);
}

#define _cleanup_json_ _cleanup_(cleanup_json)

static json_t *copy_of(const json_t *o, const char *key)
{
	json_t *value = json_object_get(o, key);

	return value ? json_incref(value) : json_null();
}

static int read_version(struct qmp *q, json_t *info, struct err *e)
{
	_cleanup_json_ json_t *o = NULL;
	const json_t *v;
	char text[64];
	int rc = qmp_ask(q, 0, "query-version", NULL, &o, e);

	if (rc)
		return rc;
	v = json_object_get(o, "qemu");
	snprintf(text, sizeof(text), "%lld.%lld.%lld",
		 (long long)json_integer_value(json_object_get(v, "major")),
		 (long long)json_integer_value(json_object_get(v, "minor")),
		 (long long)json_integer_value(json_object_get(v, "micro")));
	json_object_set_new(info, "version", json_string(text));
	json_object_set_new(info, "package", copy_of(o, "package"));
	return 0;
}

/* A text property of an object; `suffix` is taken off its end. */
static int read_property(struct qmp *q, const char *path, const char *property, const char *suffix,
			 json_t *info, const char *key, struct err *e)
{
	_cleanup_json_ json_t *o = NULL;
	size_t len, cut = strlen(suffix);
	const char *text;
	int rc;

	rc = qmp_ask(q, 0, "qom-get", json_pack("{ss ss}", "path", path, "property", property), &o,
		     e);
	if (rc)
		return rc;
	text = json_string_value(o);
	if (!text)
		return err_set(e, EPROTO, "QEMU's %s of %s is no text", property, path);
	len = strlen(text);
	if (len > cut && !strcmp(text + len - cut, suffix))
		len -= cut;
	json_object_set_new(info, key, json_stringn(text, len));
	return 0;
}

/* x86: CPUID words as the guest sees them.  Another CPU has no such property. */
static void read_features(struct qmp *q, const char *cpu, json_t *info)
{
	_cleanup_json_ json_t *words = NULL, *features = json_object();
	json_t *w;
	size_t i;

	if (qmp_ask(q, 0, "qom-get", json_pack("{ss ss}", "path", cpu, "property", "feature-words"),
		    &words, NULL))
		return;
	json_array_foreach(words, i, w)
	{
		const char *reg = json_string_value(json_object_get(w, "cpuid-register"));
		json_int_t leaf = json_integer_value(json_object_get(w, "cpuid-input-eax"));
		json_t *sub = json_object_get(w, "cpuid-input-ecx");
		char key[64];

		snprintf(key, sizeof(key), "0x%llx.%lld:%s", (unsigned long long)leaf,
			 (long long)json_integer_value(sub), reg ? reg : "");
		json_object_set(features, key, json_object_get(w, "features"));
	}
	json_object_set(info, "cpu_features", features);
}

static int read_cpu(struct qmp *q, json_t *info, struct err *e)
{
	_cleanup_json_ json_t *cpus = NULL;
	const char *path;
	int rc = qmp_ask(q, 0, "query-cpus-fast", NULL, &cpus, e);

	if (rc)
		return rc;
	path = json_string_value(json_object_get(json_array_get(cpus, 0), "qom-path"));
	if (!path)
		return err_set(e, EPROTO, "QEMU tells of no CPU");
	json_object_set_new(info, "vcpus", json_integer((json_int_t)json_array_size(cpus)));
	read_features(q, path, info);
	return read_property(q, path, "type", "-cpu", info, "cpu", e);
}

/* "info ramblock" is the only place that lists all of them; in words, for people: a
 * line that does not look as expected is left out. */
static int read_ram(struct qmp *q, json_t *info, struct err *e)
{
	_cleanup_json_ json_t *text = NULL, *list = json_array();
	char name[128], page[64], unit[16];
	unsigned long long offset, used;
	int rc;

	rc = qmp_ask(q, 0, "human-monitor-command",
		     json_pack("{ss}", "command-line", "info ramblock"), &text, e);
	if (rc)
		return rc;
	for (const char *line = json_string_value(text); line; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (sscanf(line, " %127s %63s %15s 0x%llx 0x%llx", name, page, unit, &offset,
			   &used) == 5)
			json_array_append_new(list, json_pack("{ss sI}", "id", name, "bytes",
							      (json_int_t)used));
	}
	json_object_set(info, "ram", list);
	return 0;
}

/* Files that the guest can write: what no snapshot holds. */
static int read_disks(struct qmp *q, json_t *info, struct err *e)
{
	_cleanup_json_ json_t *drives = NULL, *list = json_array();
	json_t *d;
	size_t i;
	int rc = qmp_ask(q, 0, "query-block", NULL, &drives, e);

	if (rc)
		return rc;
	json_array_foreach(drives, i, d)
	{
		json_t *in = json_object_get(d, "inserted"), *file = json_object_get(in, "file");

		if (json_is_string(file) && json_is_false(json_object_get(in, "ro")))
			json_array_append_new(list, json_pack("{sO sO}", "file", file, "format",
							      json_object_get(in, "drv")));
	}
	json_object_set(info, "disks", list);
	return 0;
}

static int read_argv(json_t *info, struct err *e)
{
	_cleanup_fd_ int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	_cleanup_free_ char *buf = malloc(ARGV_MAX);
	json_t *argv = json_array();
	size_t len = 0;
	ssize_t n = 0;

	json_object_set_new(info, "argv", argv);
	if (fd < 0 || !buf)
		return err_errno(e, errno, "cannot read the command line");
	while (len < ARGV_MAX && (n = read(fd, buf + len, ARGV_MAX - len)) > 0)
		len += (size_t)n;
	if (n || (len && buf[len - 1]))
		return err_set(e, E2BIG, "the command line cannot be recorded");
	for (size_t at = 0; at < len; at += strlen(buf + at) + 1)
		if (json_array_append_new(argv, json_string(buf + at)))
			return err_set(e, EILSEQ, "argument %zu of the command line is no UTF-8",
				       json_array_size(argv));
	return 0;
}

int qemu_info_read(struct qmp *q, json_t **ret, struct err *e)
{
	_cleanup_json_ json_t *info = json_object();
	int rc = read_version(q, info, e);

	*ret = NULL;
	if (!rc)
		rc = read_property(q, "/machine", "type", "-machine", info, "machine", e);
	if (!rc)
		rc = read_cpu(q, info, e);
	if (!rc)
		rc = read_ram(q, info, e);
	if (!rc)
		rc = read_disks(q, info, e);
	if (!rc)
		rc = read_argv(info, e);
	if (!rc)
		*ret = steal_ptr(&info);
	return rc;
}

/* ---- comparison ---- */

static int same_text(const json_t *then, const json_t *now, const char *key, const char *what,
		     struct err *e)
{
	const char *a = json_string_value(json_object_get(then, key));
	const char *b = json_string_value(json_object_get(now, key));

	if (a && b && !strcmp(a, b))
		return 0;
	return err_set(e, EINVAL, "the snapshot is of %s %s, this is %s", what, a ? a : "unknown",
		       b ? b : "unknown");
}

int qemu_info_compatible(const json_t *then, const json_t *now, struct err *e)
{
	const json_t *a = json_object_get(then, "cpu_features");
	const json_t *b = json_object_get(now, "cpu_features");
	const char *key;
	json_t *word;
	int rc = same_text(then, now, "version", "QEMU", e);

	if (!rc)
		rc = same_text(then, now, "machine", "machine type", e);
	if (!rc)
		rc = same_text(then, now, "cpu", "CPU model", e);
	if (rc)
		return rc;
	if (!json_equal(json_object_get(then, "vcpus"), json_object_get(now, "vcpus")))
		return err_set(e, EINVAL, "the snapshot has another number of vCPUs");
	json_object_foreach((json_t *)a, key, word)
	{
		json_t *here = json_object_get(b, key);

		if (!json_equal(word, here))
			return err_set(e, EINVAL,
				       "the snapshot's CPU features differ: CPUID %s is 0x%llx, "
				       "and 0x%llx here",
				       key, (unsigned long long)json_integer_value(word),
				       (unsigned long long)json_integer_value(here));
	}
	return 0;
}
