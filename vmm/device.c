/* SPDX-License-Identifier: MIT */
/*
 * device: a device that writes guest memory by itself, as a network card does: KVM
 * never sees these writes, so the agent is told of each.
 *
 * One thread, or lockstep's; every write happens under machine.write_lock, which the quiesce
 * callback takes: between quiesce and unquiesce the device stands still.  Each write
 * stamps one page of the device region and then its entry in the device table; the
 * guest checks one against the other (wl_check_device()).
 *
 * State: the random sequence and the number of writes, which must be the sum of the
 * table.  A load that finds another sum means that memory and device state are not of
 * one instant; it fails.
 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "vmm/machine.h"

struct device {
	struct machine *machine;
	pthread_t thread;
	/* machine.write_lock */
	uint64_t rng;
	uint64_t writes;
};

struct device_state { /* "snapvm.device" version 1 */
	uint64_t rng;
	uint64_t writes;
};

static void write_page(struct device *d, uint64_t index)
{
	struct machine *m = d->machine;
	uint64_t table_gpa = m->params.device_table_gpa + index * 8;
	uint64_t gpa = m->params.device_gpa + index * GUEST_PAGE;
	_Atomic uint64_t *table = ram_word(m, table_gpa), *page = ram_word(m, gpa);
	uint64_t counter = atomic_load(table) + 1;
	uint64_t seq = atomic_load(&page[GUEST_DEV_SEQ]);

	atomic_store(&page[GUEST_DEV_SEQ], seq + 1);
	atomic_store(&page[GUEST_DEV_INDEX], index);
	atomic_store(&page[GUEST_DEV_COUNTER], counter);
	atomic_store(&page[GUEST_DEV_CHECKSUM], guest_checksum(index, ~0ull, counter));
	atomic_store(&page[guest_payload_word(counter)], counter);
	atomic_store(&page[GUEST_DEV_SEQ], seq + 2);
	atomic_store(table, counter);
	if (m->opt->track_host)
		return;
	snapd_vm_mark_dirty(m->agent, gpa, GUEST_PAGE);
	snapd_vm_mark_dirty(m->agent, table_gpa, 8);
}

void device_step(struct machine *m)
{
	struct device *d = m->device;

	if (!d)
		return;
	pthread_mutex_lock(&m->write_lock);
	if (atomic_load(&m->live)) {
		d->rng = guest_rng_next(d->rng);
		write_page(d, guest_mix(d->rng) % m->params.device_pages);
		d->writes++;
	}
	pthread_mutex_unlock(&m->write_lock);
}

static void *device_thread(void *arg)
{
	struct device *d = arg;
	uint64_t period_ns = (uint64_t)(1e9 / d->machine->opt->device_rate);
	struct timespec rest = {.tv_sec = 0, .tv_nsec = (long)MIN(period_ns, 50000000ull)};
	uint64_t slept_ns = 0;

	while (!atomic_load(&d->machine->stopping)) {
		nanosleep(&rest, NULL);
		slept_ns += (uint64_t)rest.tv_nsec;
		if (slept_ns >= period_ns) {
			slept_ns = 0;
			device_step(d->machine);
		}
	}
	return NULL;
}

int device_start(struct machine *m)
{
	struct device *d;
	int rc;

	if (!m->params.device_pages)
		return 0;
	d = calloc(1, sizeof(*d));
	if (!d)
		return -ENOMEM;
	d->machine = m;
	d->rng = guest_mix(m->opt->seed ^ 0xde71ce) | 1;
	/* A callback may want it before the thread runs. */
	pthread_mutex_lock(&m->write_lock);
	m->device = d;
	pthread_mutex_unlock(&m->write_lock);
	if (m->opt->lockstep)
		return 0;
	rc = pthread_create(&d->thread, NULL, device_thread, d);
	if (rc) {
		m->device = NULL;
		free(d);
	}
	return -rc;
}

void device_stop(struct machine *m)
{
	if (m->device && !m->opt->lockstep)
		pthread_join(m->device->thread, NULL);
}

uint64_t device_writes(struct machine *m)
{
	uint64_t n = 0;

	pthread_mutex_lock(&m->write_lock);
	if (m->device)
		n = m->device->writes;
	pthread_mutex_unlock(&m->write_lock);
	return n;
}

int device_save(struct machine *m, struct snapd_state_writer *w)
{
	struct device_state s;

	if (!m->device)
		return 0;
	s = (struct device_state){.rng = m->device->rng, .writes = m->device->writes};
	return snapd_state_put(w, "snapvm.device", 0, 1, &s, sizeof(s));
}

static uint64_t table_sum(struct machine *m)
{
	uint64_t i, sum = 0;

	for (i = 0; i < m->params.device_pages; i++)
		sum += atomic_load(ram_word(m, m->params.device_table_gpa + i * 8));
	return sum;
}

int device_load(struct machine *m, const struct snapd_state_reader *r)
{
	struct device_state s;
	const void *data;
	uint16_t version;
	size_t len;
	int rc;

	if (!m->device)
		return 0;
	rc = snapd_state_get(r, "snapvm.device", 0, &version, &data, &len);
	if (rc)
		return rc;
	if (version != 1 || len != sizeof(s))
		return -EPROTO;
	memcpy(&s, data, sizeof(s));
	if (s.writes != table_sum(m))
		return -EUCLEAN;
	m->device->rng = s.rng;
	m->device->writes = s.writes;
	return 0;
}
