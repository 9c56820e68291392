/* SPDX-License-Identifier: MIT */
/* The host records that all architectures share; see host.h. */
#include "snapd/arch/host.h"

#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/utsname.h>

#include "snapd/util/cleanup.h"

#define RECORD_VERSION 1
#define CAPS_MAX       64

static uint32_t page_size(void)
{
	return sysconf(_SC_PAGESIZE);
}

static int caps_save(const struct arch_vm *vm, const uint32_t *caps, size_t nr_caps,
		     struct snapd_state_writer *w)
{
	struct host_cap out[CAPS_MAX];

	assert(nr_caps <= CAPS_MAX);
	for (size_t i = 0; i < nr_caps; i++)
		out[i] = (struct host_cap){
			.cap = caps[i],
			.value = arch_cap(vm, caps[i]),
		};
	return state_put(w, "host.caps", 0, RECORD_VERSION, out, nr_caps * sizeof(out[0]));
}

int host_machine_save(const struct arch_vm *vm, const uint32_t *caps, size_t nr_caps,
		      struct snapd_state_writer *w, struct err *e)
{
	struct host_machine m = {.page_size = page_size()};
	struct utsname u;
	int r;

	if (uname(&u) < 0)
		return err_errno(e, errno, "uname");
	snprintf(m.arch, sizeof(m.arch), "%s", arch_host()->name);
	snprintf(m.kernel, sizeof(m.kernel), "%.63s", u.release);
	r = state_put(w, "host.machine", 0, RECORD_VERSION, &m, sizeof(m));
	if (!r)
		r = caps_save(vm, caps, nr_caps, w);
	return r ? err_errno(e, -r, "recording the host") : 0;
}

/* A name that ends in '!' is of a record that a loader must understand.  Of a VMM's own
 * state, and of devices, the caller judges. */
static int check_required_names(const struct snapd_state_reader *r, struct err *e)
{
	const struct state_record *rec = NULL;

	while ((rec = state_next(r, rec)))
		if (rec->name[strlen(rec->name) - 1] == '!' && strncmp(rec->name, "dev.", 4) != 0 &&
		    strcmp(rec->name, STATE_VMM) != 0)
			return err_set(e, ENOTSUP,
				       "the snapshot needs a loader that knows its record %s",
				       rec->name);
	return 0;
}

int host_machine_check(const struct snapd_state_reader *r, struct err *e)
{
	const char *arch = arch_host()->name;
	struct host_machine m;
	const void *data;
	uint16_t version;
	size_t len;

	if (state_get(r, "host.machine", 0, &version, &data, &len))
		return err_set(e, E_CORRUPT, "the snapshot does not say what host it is from");
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP,
			       "record host.machine has version %u, this program knows %u", version,
			       RECORD_VERSION);
	if (len != sizeof(m))
		return err_set(e, E_CORRUPT, "record host.machine has a wrong length of %zu bytes",
			       len);
	memcpy(&m, data, sizeof(m));
	if (strncmp(m.arch, arch, sizeof(m.arch)) != 0)
		return err_set(e, ENOTSUP, "the snapshot is of a %.16s guest, this host is %s",
			       m.arch, arch);
	if (m.page_size != page_size())
		return err_set(e, ENOTSUP, "the snapshot has pages of %u bytes, this host of %u",
			       m.page_size, page_size());
	return check_required_names(r, e);
}
