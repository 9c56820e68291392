/* SPDX-License-Identifier: MIT */
/*
 * Any bytes as a state blob: refused with a reason, or records that lie within it.
 * A right hash is no proof of good will (import files are made by anyone), so the
 * same bytes are tried again with size and hash put right, and what is then valid
 * goes through the checks and loaders of this architecture, against a KVM that
 * takes everything.
 */
#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

#include "snapd/arch/arch.h"
#include "tests/fuzz/fuzz.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

static int willing_ioctl(void *opaque, int fd, unsigned long request, void *arg)
{
	switch (request) {
	case KVM_RUN:
		errno = EINTR;
		return -1;
	case KVM_CHECK_EXTENSION:
		return 4096;
#if defined(__x86_64__)
	case KVM_GET_IRQCHIP:
	case KVM_GET_PIT2:
	case KVM_GET_LAPIC:
		errno = ENXIO;
		return -1;
#endif
	default:
		return 0;
	}
}

static void load(const struct snapd_state_reader *reader)
{
	static const struct snapd_kvm_ops ops = {.ioctl = willing_ioctl};
	static const struct arch_vm vm = {.kvm = &ops, .kvm_fd = -1, .vm_fd = -1};
	static struct kvm_run run;
	struct err e = {0};
	int r = arch_host()->host_check(&vm, NULL, reader, &e);

	PROMISE(!r == !e.code);
	err_clear(&e);
	r = arch_host()->vm_load(&vm, reader, &e);
	PROMISE(!r == !e.code);
	err_clear(&e);
	r = arch_host()->vcpu_load(&vm, -1, &run, 0, reader, &e);
	PROMISE(!r == !e.code);
}

static void read_blob(const uint8_t *blob, size_t len)
{
	const struct state_record *rec = NULL;
	struct snapd_state_reader reader;
	struct err e = {0};
	uint32_t nr = 0;
	int r = state_reader_init(&reader, blob, len, &e);

	PROMISE(!r || (e.code == r && e.text[0]));
	while ((rec = state_next(&reader, rec))) {
		uint16_t version;
		const void *data;
		size_t bytes;

		PROMISE((const uint8_t *)(rec + 1) + rec->len_bytes <= blob + len);
		PROMISE(strlen(rec->name) < STATE_NAME_MAX);
		PROMISE(state_get(&reader, rec->name, rec->instance, &version, &data, &bytes) == 0);
		if (++nr > 64)
			break;
	}
	PROMISE(nr == (r ? 0 : reader.nr_records) || nr > 64);
	if (!r)
		load(&reader);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
	struct state_header *h = malloc(len + 1);
	uint8_t *blob = (uint8_t *)h;

	if (!blob)
		return 0;
	memcpy(blob, data, len);
	read_blob(blob, len);
	if (len >= sizeof(*h)) {
		memcpy(h->magic, STATE_MAGIC, sizeof(h->magic));
		h->major = STATE_MAJOR;
		h->total_bytes = len;
		h->hash = XXH3_64bits(blob + sizeof(*h), len - sizeof(*h));
		read_blob(blob, len);
	}
	free(h);
	return 0;
}
