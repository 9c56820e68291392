/* SPDX-License-Identifier: MIT */
/*
 * options: a command line's words → options with their values' properties → words again.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/qemu/cmdline_priv.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"

void *must(void *p)
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

int options_split(struct parsed *p, char *const *argv, struct err *e)
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

void options_join(struct parsed *p)
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

void parsed_deinit(struct parsed *p)
{
	for (size_t i = 0; i < p->n; i++) {
		free(p->o[i].changed);
		json_decref(p->o[i].props);
	}
	free(p->o);
}

bool option_is(const struct option *o, const char *name)
{
	return !strcmp(o->name, name);
}

bool begins(const char *s, const char *with)
{
	return !strncmp(s, with, strlen(with));
}

void parsed_note(struct parsed *p, const char *fmt, ...)
{
	_cleanup_free_ char *text = NULL;
	va_list ap;

	va_start(ap, fmt);
	if (vasprintf(&text, fmt, ap) < 0)
		abort();
	va_end(ap);
	strv_add(&p->out->notes, text);
}
