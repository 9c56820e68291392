/* SPDX-License-Identifier: MIT */
/*
 * cmdline: see cmdline.h.  The arguments are first split into options (options.c), then looked at
 * one after the other, memory backends (backends.c) and what a restore exchanges (replacements.c)
 * last, then written down again.
 */
#include "adapters/qemu/cmdline.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/qemu/cmdline_priv.h"
#include "adapters/qemu/env.h"
#include "adapters/qemu/props.h"
#include "snapd/util/cleanup.h"

#define RAM_DEFAULT_BYTES (128ull << 20) /* of every PC machine */
#define RAM_ALIGN	  8192u		 /* as QEMU rounds -m */

void cmdline_deinit(struct cmdline *c)
{
	strv_deinit(&c->argv);
	strv_deinit(&c->notes);
	free(c->guest);
	c->guest = NULL;
}

/* ---- questions ---- */

static bool is_machine(const struct option *o)
{
	return option_is(o, "machine") || option_is(o, "M");
}

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
	return !*o->name || option_is(o, "append") || option_is(o, "name") ||
	       option_is(o, "kernel") || option_is(o, "initrd");
}

static bool is_question(const struct option *o)
{
	return option_is(o, "version") || option_is(o, "h") || option_is(o, "help") ||
	       option_is(o, "audio-help") || option_is(o, "dump-vmstate") ||
	       (is_machine(o) && !strcmp(props_get(o->props, "type"), "none")) ||
	       (o->given && !is_free_text(o) && asks_for_help(o->given));
}

/* ---- taking out ---- */

static bool is_ours(const struct option *o)
{
	return (o->props &&
		((option_is(o, "chardev") &&
		  !strcmp(props_get(o->props, "id"), SNAPD_QEMU_ID_QMP)) ||
		 (option_is(o, "object") &&
		  !strcmp(props_get(o->props, "id"), SNAPD_QEMU_ID_RAM)) ||
		 (option_is(o, "mon") &&
		  !strcmp(props_get(o->props, "chardev"), SNAPD_QEMU_ID_QMP)) ||
		 (is_machine(o) && !strcmp(o->given, "memory-backend=" SNAPD_QEMU_ID_RAM))));
}

static void take_out(struct parsed *p, bool restore)
{
	for (size_t i = 0; i < p->n; i++)
		p->o[i].gone = is_ours(&p->o[i]) || (restore && (option_is(&p->o[i], "incoming") ||
								 option_is(&p->o[i], "loadvm")));
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
		parsed_note(p, "dirty-ring-size=%s is taken out: the adapter has the ring", size);
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
			if (option_is(&p->o[i], table[t].name))
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
	int rc = options_split(p, argv, e);

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
		rc = backends_fix(p, e);
	if (!rc)
		rc = replacements_apply(p, req, e);
	if (!rc && req->recorded)
		rc = replacements_no_descriptors(p, e);
	if (rc)
		return rc;
	strv_add(&p->out->argv, argv[0]);
	options_join(p);
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
