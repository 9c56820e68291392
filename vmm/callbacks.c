/* SPDX-License-Identifier: MIT */
/*
 * callbacks: what the agent asks of a VMM around a snapshot, a rollback, a restore.
 * All run on the agent's thread.
 *
 * quiesce waits until the machine is complete: before, there is no state to save, and
 * its memory is being filled.  It takes write_lock and unquiesce gives it back: in between no host
 * thread writes guest memory, and the state of device and puncher stands still.
 */
#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#include "vmm/machine.h"

static int on_quiesce(void *opaque)
{
	struct machine *m = opaque;

	while (!atomic_load(&m->started)) {
		if (atomic_load(&m->stopping))
			return -ECANCELED;
		usleep(1000);
	}
	pthread_mutex_lock(&m->write_lock);
	return 0;
}

static void on_unquiesce(void *opaque)
{
	struct machine *m = opaque;

	pthread_mutex_unlock(&m->write_lock);
}

static int on_save(void *opaque, struct snapd_state_writer *w)
{
	struct machine *m = opaque;
	int rc = device_save(m, w);

	if (rc == 0)
		rc = punch_save(m, w);
	if (rc == 0)
		rc = spare_save_tables(m);
	if (rc == 0 && m->opt->digest)
		rc = digest_save(m, w);
	return rc;
}

static int on_load(void *opaque, const struct snapd_state_reader *r)
{
	struct machine *m = opaque;
	int rc = device_load(m, r);

	if (rc == 0)
		rc = punch_load(m, r);
	/* write_lock is held: host threads go on at unquiesce, as of now in the new world. */
	atomic_fetch_add(&m->layout_gen, 1);
	atomic_store(&m->live, true);
	return rc;
}

static void on_layout(void *opaque, const struct snapd_memslot *slots, size_t nr_slots)
{
	punch_layout(opaque, slots, nr_slots);
}

static void on_log(void *opaque, enum snapd_log_level level, const char *line)
{
	struct machine *m = opaque;

	if (level <= SNAPD_LOG_WARN || !m->opt->quiet)
		fprintf(stderr, "<%d>snapvm: %s\n", (int)level, line);
}

const struct snapd_vm_callbacks machine_callbacks = {
	.size_bytes = sizeof(struct snapd_vm_callbacks),
	.quiesce = on_quiesce,
	.unquiesce = on_unquiesce,
	.save = on_save,
	.load = on_load,
	.layout = on_layout,
	.log = on_log,
};
