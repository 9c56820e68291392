/* SPDX-License-Identifier: MIT */
/*
 * cmdline: see cmdline.h.  The arguments are first split into options (name, value), then
 * looked at one after the other, then written down again.
 */
#include "adapters/qemu/cmdline.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>

#include "adapters/qemu/env.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"

#include <linux/magic.h>

#ifndef HUGETLBFS_MAGIC
#define HUGETLBFS_MAGIC 0x958458f6
#endif
#define RAM_DEFAULT_BYTES (128ull << 20) /* of every PC machine */
#define RAM_ALIGN	  8192u		 /* as QEMU rounds -m */

static void *must(void *p)
{
	if (!p)
		abort();
	return p;
}

void strv_add(struct strv *s, const char *text)
{
	s->v = must(realloc(s->v, (s->n + 2) * sizeof(*s->v)));
	s->v[s->n++] = must(strdup(text));
	s->v[s->n] = NULL;
}

void strv_deinit(struct strv *s)
{
	for (size_t i = 0; i < s->n; i++)
		free(s->v[i]);
	free(s->v);
	*s = (struct strv){0};
}

void cmdline_deinit(struct cmdline *c)
{
	strv_deinit(&c->argv);
	strv_deinit(&c->notes);
	free(c->guest);
	c->guest = NULL;
}

/* ---- splitting ---- */

struct option {
	const char *text;  /* as it stands; borrowed */
	const char *name;  /* without dashes; "" for a disk image without an option */
	const char *given; /* its value; borrowed; NULL: it takes none */
	char *changed;	   /* instead; owned */
	json_t *props;	   /* of the value; owned */
	bool gone;
};

struct parsed {
	struct option *o; /* owned */
	size_t n;
	struct cmdline *out;
	/* what was found */
	const char *accel; /* the first; borrowed from props */
	unsigned long long ram_bytes;
	bool has_backend; /* main memory, or all of a NUMA machine's, is an object */
};

/* Options without a value in QEMU 4 to 9 (qemu-options.hx: no HAS_ARG). */
static bool takes_value(const char *name)
{
	static const char *const none[] = {
		"h",
		"help",
		"version",
		"audio-help",
		"mem-prealloc",
		"snapshot",
		"usb",
		"nographic",
		"portrait",
		"full-screen",
		"win2k-hack",
		"no-fd-bootchk",
		"no-acpi",
		"no-hpet",
		"singlestep",
		"one-insn-per-tb",
		"preconfig",
		"S",
		"s",
		"enable-kvm",
		"enable-hax",
		"xen-attach",
		"xen-domid-restrict",
		"no-reboot",
		"no-shutdown",
		"daemonize",
		"nodefaults",
		"no-user-config",
		"nouserconfig",
		"only-migratable",
		"enable-fips",
		"semihosting",
		"old-param",
		"sdl",
		"curses",
		"enable-sync-profile",
		"perfmap",
		"jitdump",
		"async-teardown",
		"alt-grab",
		"ctrl-grab",
		"no-quit",
		"no-frame",
		"no-kvm",
		"no-kvm-irqchip",
		"no-kvm-pit",
		"no-kvm-pit-reinjection",
		"rtc-td-hack",
		"tdf",
		"nodefconfig",
		"trace-unassigned",
	};

	for (size_t i = 0; i < ARRAY_SIZE(none); i++)
		if (!strcmp(none[i], name))
			return false;
	return true;
}

/* The key of a value's first piece, per option whose value is looked at. */
static const char *implied_key(const char *name)
{
	static const struct {
		const char *name, *key;
	} keys[] = {
		{"machine", "type"}, {"M", "type"},	     {"accel", "accel"},
		{"m", "size"},	     {"object", "qom-type"}, {"device", "driver"},
		{"netdev", "type"},  {"nic", "type"},	     {"net", "type"},
		{"numa", "type"},    {"name", "guest"},	     {"chardev", "backend"},
		{"mon", "chardev"},  {"blockdev", "driver"},
	};

	for (size_t i = 0; i < ARRAY_SIZE(keys); i++)
		if (!strcmp(keys[i].name, name))
			return keys[i].key;
	return NULL;
}

static int split(struct parsed *p, char *const *argv, struct err *e)
{
	for (size_t i = 1; argv[i]; i++) {
		struct option *o;

		p->o = must(realloc(p->o, (p->n + 1) * sizeof(*p->o)));
		o = &p->o[p->n++];
		*o = (struct option){.text = argv[i], .name = "", .given = argv[i]};
		if (argv[i][0] != '-' || !argv[i][1])
			continue;
		o->name = argv[i] + 1 + (argv[i][1] == '-');
		o->given = NULL;
		if (!takes_value(o->name))
			continue;
		o->given = argv[++i];
		if (!o->given)
			return err_set(e, EINVAL, "%s needs a value", argv[i - 1]);
		o->props = props_parse(o->given, implied_key(o->name));
	}
	return 0;
}

static void join(struct parsed *p)
{
	for (size_t i = 0; i < p->n; i++) {
		const struct option *o = &p->o[i];
		const char *value = o->changed ? o->changed : o->given;

		if (o->gone)
			continue;
		if (*o->name)
			strv_add(&p->out->argv, o->text);
		if (value)
			strv_add(&p->out->argv, value);
	}
}

static void parsed_deinit(struct parsed *p)
{
	for (size_t i = 0; i < p->n; i++) {
		free(p->o[i].changed);
		json_decref(p->o[i].props);
	}
	free(p->o);
}

static bool is(const struct option *o, const char *name)
{
	return !strcmp(o->name, name);
}

static bool is_machine(const struct option *o)
{
	return is(o, "machine") || is(o, "M");
}

static bool begins(const char *s, const char *with)
{
	return !strncmp(s, with, strlen(with));
}

__attribute__((format(printf, 2, 3))) static void note(struct parsed *p, const char *fmt, ...)
{
	_cleanup_free_ char *text = NULL;
	va_list ap;

	va_start(ap, fmt);
	if (vasprintf(&text, fmt, ap) < 0)
		abort();
	va_end(ap);
	strv_add(&p->out->notes, text);
}

/* ---- questions ---- */

static bool asks_for_help(const char *value)
{
	size_t n = strlen(value);

	return !strcmp(value, "?") || !strcmp(value, "help") || begins(value, "help,") ||
	       (n > 5 && !strcmp(value + n - 5, ",help")) ||
	       (n > 5 && !strcmp(value + n - 5, "=help")) ||
	       (n > 2 && !strcmp(value + n - 2, ",?"));
}

/* A free text may be "help", too. */
static bool is_free_text(const struct option *o)
{
	return !*o->name || is(o, "append") || is(o, "name") || is(o, "kernel") || is(o, "initrd");
}

static bool is_question(const struct option *o)
{
	return is(o, "version") || is(o, "h") || is(o, "help") || is(o, "audio-help") ||
	       is(o, "dump-vmstate") ||
	       (is_machine(o) && !strcmp(props_get(o->props, "type"), "none")) ||
	       (o->given && !is_free_text(o) && asks_for_help(o->given));
}

/* ---- taking out ---- */

static bool is_ours(const struct option *o)
{
	return (o->props &&
		((is(o, "chardev") && !strcmp(props_get(o->props, "id"), SNAPD_QEMU_ID_QMP)) ||
		 (is(o, "object") && !strcmp(props_get(o->props, "id"), SNAPD_QEMU_ID_RAM)) ||
		 (is(o, "mon") && !strcmp(props_get(o->props, "chardev"), SNAPD_QEMU_ID_QMP)) ||
		 (is_machine(o) && !strcmp(o->given, "memory-backend=" SNAPD_QEMU_ID_RAM))));
}

static void take_out(struct parsed *p, bool restore)
{
	for (size_t i = 0; i < p->n; i++)
		p->o[i].gone = is_ours(&p->o[i]) ||
			       (restore && (is(&p->o[i], "incoming") || is(&p->o[i], "loadvm")));
}

/* ---- looking at each option ---- */

static int see_accel(struct parsed *p, struct option *o, struct err *e)
{
	size_t nr = 0;

	if (!p->accel)
		p->accel = props_get(o->props, "accel");
	if (*props_get(o->props, "dirty-ring-size")) {
		const char *size = props_get(o->props, "dirty-ring-size");

		o->changed = props_replace(o->given, (const char *const[]){"dirty-ring-size", NULL},
					   size, "0", &nr);
		note(p, "dirty-ring-size=%s is taken out: the adapter has the ring", size);
	}
	return 0;
}

static int see_enable_kvm(struct parsed *p, struct option *o, struct err *e)
{
	if (!p->accel)
		p->accel = "kvm";
	return 0;
}

static int see_machine(struct parsed *p, struct option *o, struct err *e)
{
	const char *backend = props_get(o->props, "memory-backend");

	if (*props_get(o->props, "accel") && !p->accel)
		p->accel = props_get(o->props, "accel");
	if (*props_get(o->props, "confidential-guest-support") ||
	    *props_get(o->props, "memory-encryption"))
		return err_set(e, EINVAL, "the memory of a confidential guest cannot be read");
	p->has_backend |= *backend != '\0';
	return 0;
}

static int see_memory(struct parsed *p, struct option *o, struct err *e)
{
	const char *size = props_get(o->props, "size");

	if (!*size)
		return 0;
	p->ram_bytes = props_size(size, 1 << 20);
	if (!p->ram_bytes)
		return err_set(e, EINVAL, "-m %s: not a size", o->given);
	return 0;
}

static int see_mem_path(struct parsed *p, struct option *o, struct err *e)
{
	return err_set(e, EINVAL,
		       "-mem-path maps its file private: use -object memory-backend-file,share=on "
		       "and -machine memory-backend=");
}

static int see_readconfig(struct parsed *p, struct option *o, struct err *e)
{
	return err_set(e, EINVAL,
		       "-readconfig %s: what it configures cannot be checked; put it on "
		       "the command line",
		       o->given);
}

static int see_numa(struct parsed *p, struct option *o, struct err *e)
{
	p->has_backend |= *props_get(o->props, "memdev") != '\0';
	return 0;
}

static int see_device(struct parsed *p, struct option *o, struct err *e)
{
	static const struct {
		const char *driver, *why;
	} refused[] = {
		{"vfio-", "a device writes guest memory by DMA, which nobody sees (VFIO)"},
		{"vhost-user-", "another process writes guest memory unseen (vhost-user)"},
		{"vhost-vdpa", "a device writes guest memory by DMA, which nobody sees (vDPA)"},
		{"ivshmem", "other processes write its memory unseen"},
		{"x-pci-proxy", "another process writes guest memory unseen"},
	};
	const char *driver = props_get(o->props, "driver");

	for (size_t i = 0; i < ARRAY_SIZE(refused); i++)
		if (begins(driver, refused[i].driver))
			return err_set(e, EINVAL, "-device %s: %s", driver, refused[i].why);
	return 0;
}

static int see_net(struct parsed *p, struct option *o, struct err *e)
{
	const char *type = props_get(o->props, "type");

	if (!strcmp(type, "vhost-user") || !strcmp(type, "vhost-vdpa"))
		return err_set(e, EINVAL, "-%s %s: something else writes guest memory unseen",
			       o->name, type);
	return 0;
}

static int see_object(struct parsed *p, struct option *o, struct err *e)
{
	const char *type = props_get(o->props, "qom-type");

	if (begins(type, "sev-") || begins(type, "tdx-"))
		return err_set(e, EINVAL, "the memory of a confidential guest cannot be read (%s)",
			       type);
	if (!strcmp(type, "memory-backend-epc"))
		return err_set(e, EINVAL, "SGX memory cannot be read");
	return 0;
}

static int see_name(struct parsed *p, struct option *o, struct err *e)
{
	const char *guest = props_get(o->props, "guest");

	if (*guest) {
		free(p->out->guest);
		p->out->guest = must(strdup(guest));
	}
	return 0;
}

static int look(struct parsed *p, struct err *e)
{
	static const struct {
		const char *name;
		int (*see)(struct parsed *p, struct option *o, struct err *e);
	} table[] = {
		{"accel", see_accel},
		{"enable-kvm", see_enable_kvm},
		{"machine", see_machine},
		{"M", see_machine},
		{"m", see_memory},
		{"mem-path", see_mem_path},
		{"readconfig", see_readconfig},
		{"numa", see_numa},
		{"device", see_device},
		{"netdev", see_net},
		{"nic", see_net},
		{"net", see_net},
		{"object", see_object},
		{"name", see_name},
	};
	int rc = 0;

	for (size_t i = 0; !rc && i < p->n; i++)
		for (size_t t = 0; !rc && !p->o[i].gone && t < ARRAY_SIZE(table); t++)
			if (is(&p->o[i], table[t].name))
				rc = table[t].see(p, &p->o[i], e);
	return rc;
}

static int check_accel(const struct parsed *p, struct err *e)
{
	if (!p->accel || !strcmp(p->accel, "kvm") || begins(p->accel, "kvm:"))
		return 0;
	return err_set(e, EINVAL, "accelerator %s: only KVM can tell what a guest writes",
		       p->accel);
}

/* ---- memory backends ---- */

static bool on_hugetlbfs(const char *path)
{
	struct statfs fs;

	return !statfs(path, &fs) && fs.f_type == HUGETLBFS_MAGIC;
}

/* Of an existing file, or where QEMU would make one.  What does not exist is QEMU's to refuse. */
static bool on_tmpfs(const char *path)
{
	_cleanup_free_ char *dir = must(strdup(path));
	char *slash = strrchr(dir, '/');
	struct statfs fs;

	if (statfs(path, &fs)) {
		if (slash)
			*slash = '\0';
		if (statfs(slash ? *dir ? dir : "/" : ".", &fs))
			return true;
	}
	return fs.f_type == TMPFS_MAGIC;
}

static void set_prop(struct option *o, const char *key, const char *value)
{
	const char *text = o->changed ? o->changed : o->given;
	char *changed = NULL;

	json_object_set_new(o->props, key, json_string(value));
	if (*text == '{') {
		json_t *json = must(json_loads(text, 0, NULL));

		json_object_set_new(json, key,
				    !strcmp(value, "on") ? json_true() : json_string(value));
		changed = json_dumps(json, JSON_COMPACT);
		json_decref(json);
	} else if (asprintf(&changed, "%s,%s=%s", text, key, value) < 0) {
		abort();
	}
	free(o->changed);
	o->changed = must(changed);
}

/* memory-backend-ram is anonymous memory, which no other process can see. */
static void ram_to_memfd(struct parsed *p, struct option *o)
{
	static const char from[] = "memory-backend-ram";
	const char *at = strstr(o->given, from);
	char *changed;

	if (asprintf(&changed, "%.*smemory-backend-memfd%s", (int)(at - o->given), o->given,
		     at + strlen(from)) < 0)
		abort();
	o->changed = changed;
	json_object_set_new(o->props, "qom-type", json_string("memory-backend-memfd"));
	note(p, "memory %s becomes a memfd: private memory cannot be shared",
	     props_get(o->props, "id"));
}

static int fix_backend(struct parsed *p, struct option *o, struct err *e)
{
	const char *type = props_get(o->props, "qom-type"), *id = props_get(o->props, "id");
	const char *path = props_get(o->props, "mem-path");

	if (!begins(type, "memory-backend-"))
		return 0;
	if (props_on(o->props, "hugetlb") || on_hugetlbfs(path))
		return err_set(e, EINVAL, "memory %s is of huge pages, which is not supported", id);
	if (props_on(o->props, "pmem"))
		return err_set(e, EINVAL, "memory %s is persistent memory, not guest RAM", id);
	if (!strcmp(type, "memory-backend-file") && !props_on(o->props, "share"))
		return err_set(e, EINVAL,
			       "memory %s maps %s private: add share=on, or use "
			       "memory-backend-memfd",
			       id, path);
	if (!strcmp(type, "memory-backend-file") && !on_tmpfs(path))
		return err_set(
			e, EINVAL,
			"memory %s is a file on a disk, %s, which is not supported: use a file in "
			"/dev/shm, or memory-backend-memfd",
			id, path);
	if (!strcmp(type, "memory-backend-ram"))
		ram_to_memfd(p, o);
	if (!props_on(o->props, "share"))
		set_prop(o, "share", "on");
	return 0;
}

static int fix_backends(struct parsed *p, struct err *e)
{
	int rc = 0;

	for (size_t i = 0; !rc && i < p->n; i++)
		if (is(&p->o[i], "object") && !p->o[i].gone)
			rc = fix_backend(p, &p->o[i], e);
	return rc;
}

/* ---- replacing, for a restore ---- */

static size_t replace_in(struct option *o, const char *const *keys, const struct replacement *r)
{
	const char *text = o->changed ? o->changed : o->given;
	size_t nr = 0;
	char *changed = props_replace(text, keys, r->from, r->to, &nr);

	free(o->changed);
	o->changed = changed;
	return nr;
}

static size_t replace_disk(struct option *o, const struct replacement *r)
{
	static const char *const keys[] = {"file", "filename", "file.filename", NULL};
	static const char *const whole[] = {"",	     "hda", "hdb",    "hdc", "hdd",
					    "cdrom", "fda", "pflash", "sd",  "mtdblock"};

	if (is(o, "drive") || is(o, "blockdev"))
		return replace_in(o, keys, r);
	for (size_t i = 0; i < ARRAY_SIZE(whole); i++)
		if (is(o, whole[i]) && !strcmp(o->given, r->from)) {
			free(o->changed);
			o->changed = must(strdup(r->to));
			return 1;
		}
	return 0;
}

static size_t replace_mac(struct option *o, const struct replacement *r)
{
	static const char *const keys[] = {"mac", "macaddr", NULL};

	return is(o, "device") || is(o, "nic") || is(o, "net") ? replace_in(o, keys, r) : 0;
}

static int replace_all(struct parsed *p, const struct replacement *r, size_t nr, const char *what,
		       size_t (*replace)(struct option *o, const struct replacement *r),
		       struct err *e)
{
	for (size_t i = 0; i < nr; i++) {
		size_t found = 0;

		for (size_t k = 0; k < p->n; k++)
			if (p->o[k].given && !p->o[k].gone)
				found += replace(&p->o[k], &r[i]);
		if (!found)
			return err_set(e, EINVAL, "the command line has no %s %s", what, r[i].from);
	}
	return 0;
}

/* A descriptor is of the process that started QEMU then. */
static int no_descriptors(const struct parsed *p, struct err *e)
{
	static const char *const keys[] = {"fd", "fds", "vhostfd", "vhostfds", "sock_fd"};

	for (size_t i = 0; i < p->n; i++)
		for (size_t k = 0; !p->o[i].gone && k < ARRAY_SIZE(keys); k++)
			if (*props_get(p->o[i].props, keys[k]))
				return err_set(e, EINVAL,
					       "%s %.200s: names a descriptor that another program "
					       "opened; --print shows the line to be edited",
					       p->o[i].text, p->o[i].given);
	return 0;
}

/* ---- the whole ---- */

__attribute__((format(printf, 3, 4))) static void add(struct parsed *p, const char *option,
						      const char *fmt, ...)
{
	_cleanup_free_ char *value = NULL;
	va_list ap;

	va_start(ap, fmt);
	if (vasprintf(&value, fmt, ap) < 0)
		abort();
	va_end(ap);
	strv_add(&p->out->argv, option);
	strv_add(&p->out->argv, value);
}

static void add_ours(struct parsed *p, const struct cmdline_request *req)
{
	unsigned long long bytes = p->ram_bytes ? p->ram_bytes : RAM_DEFAULT_BYTES;

	if (!p->accel)
		add(p, "-accel", "kvm");
	if (!p->has_backend) {
		add(p, "-object",
		    "memory-backend-memfd,id=" SNAPD_QEMU_ID_RAM ",size=%lluB,share=on",
		    ALIGN_UP(bytes, RAM_ALIGN));
		add(p, "-machine", "memory-backend=" SNAPD_QEMU_ID_RAM);
	}
	add(p, "-chardev", "socket,id=" SNAPD_QEMU_ID_QMP ",fd=%d", req->monitor_fd);
	add(p, "-mon", "chardev=" SNAPD_QEMU_ID_QMP ",mode=control");
	if (req->restore)
		add(p, "-incoming", "defer");
}

static int complete(const struct cmdline_request *req, char *const *argv, struct parsed *p,
		    struct err *e)
{
	int rc = split(p, argv, e);

	if (rc)
		return rc;
	for (size_t i = 0; i < p->n; i++)
		if (is_question(&p->o[i]))
			return CMDLINE_PASS;
	take_out(p, req->restore);
	rc = look(p, e);
	if (!rc)
		rc = check_accel(p, e);
	if (!rc)
		rc = fix_backends(p, e);
	if (!rc)
		rc = replace_all(p, req->disks, req->nr_disks, "disk", replace_disk, e);
	if (!rc)
		rc = replace_all(p, req->macs, req->nr_macs, "MAC address", replace_mac, e);
	if (!rc && req->recorded)
		rc = no_descriptors(p, e);
	if (rc)
		return rc;
	strv_add(&p->out->argv, argv[0]);
	join(p);
	add_ours(p, req);
	return 0;
}

int cmdline_complete(const struct cmdline_request *req, char *const *argv, struct cmdline *ret,
		     struct err *e)
{
	struct parsed p = {.out = ret};
	int rc;

	*ret = (struct cmdline){0};
	rc = complete(req, argv, &p, e);
	parsed_deinit(&p);
	if (rc)
		cmdline_deinit(ret);
	return rc;
}
