/* SPDX-License-Identifier: MIT */
/*
 * x86_step: what all steps share: records in and out, the words of a failure, and the
 * records of fixed length, which are all alike.
 */
#include "snapd/arch/x86_64_step.h"

#include <string.h>

#define RECORD_VERSION	1
#define FIXED_BYTES_MAX 1024

bool x86_is_lacking(const struct x86_step *s, int r)
{
	return (r == -ENOTTY && !s->required) || (s->may_lack && (r == -ENXIO || r == -EINVAL));
}

int x86_put(const struct x86_target *t, const struct x86_step *s, uint32_t instance,
	    const void *data, size_t len_bytes, struct snapd_state_writer *w, struct err *e)
{
	int r = state_put(w, s->record, instance, RECORD_VERSION, data, len_bytes);

	return r ? err_errno(e, -r, "%s: recording %s", t->who, s->record) : 0;
}

int x86_get_failed(const struct x86_target *t, const struct x86_step *s, int r, struct err *e)
{
	return err_errno(e, -r, "%s: KVM_GET_%s", t->who, s->what);
}

int x86_set_failed(const struct x86_target *t, const struct x86_step *s, int r, struct err *e)
{
	return err_errno(e, -r, "%s: KVM_SET_%s", t->who, s->what);
}

int x86_bad_length(const struct x86_target *t, const struct x86_step *s, size_t len_bytes,
		   struct err *e)
{
	return err_set(e, E_CORRUPT, "%s: record %s has a wrong length of %zu bytes", t->who,
		       s->record, len_bytes);
}

int x86_find(const struct x86_target *t, const struct x86_step *s, uint32_t instance,
	     const struct snapd_state_reader *r, const void **data, size_t *len_bytes,
	     struct err *e)
{
	uint16_t version;

	if (state_get(r, s->record, instance, &version, data, len_bytes))
		return 0;
	if (version != RECORD_VERSION)
		return err_set(e, ENOTSUP, "%s: record %s has version %u, this program knows %u",
			       t->who, s->record, version, RECORD_VERSION);
	return 1;
}

int x86_check_lacking(const struct x86_target *t, const struct x86_step *s, void *scratch,
		      struct err *e)
{
	int r;

	if (s->required)
		return err_set(e, E_CORRUPT, "%s: the snapshot has no record %s for it", t->who,
			       s->record);
	if (!s->may_lack)
		return 0;
	r = arch_ioctl(t->vm, t->fd, s->get, scratch);
	if (r >= 0)
		return err_set(e, ENOTSUP,
			       "%s: it has an in-kernel %s, the snapshot was taken of a VM without",
			       t->who, s->what);
	return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
}

int x86_fixed_save(const struct x86_target *t, const struct x86_step *s,
		   struct snapd_state_writer *w, struct err *e)
{
	_Alignas(8) uint8_t buf[FIXED_BYTES_MAX] = {0};
	int r = arch_ioctl(t->vm, t->fd, s->get, buf);

	if (r < 0)
		return x86_is_lacking(s, r) ? 0 : x86_get_failed(t, s, r, e);
	return x86_put(t, s, t->instance, buf, s->len_bytes, w, e);
}

int x86_fixed_load(const struct x86_target *t, const struct x86_step *s,
		   const struct snapd_state_reader *reader, struct err *e)
{
	_Alignas(8) uint8_t buf[FIXED_BYTES_MAX] = {0};
	const void *data;
	size_t len;
	int r = x86_find(t, s, t->instance, reader, &data, &len, e);

	if (r < 0)
		return r;
	if (r == 0)
		return x86_check_lacking(t, s, buf, e);
	if (len != s->len_bytes)
		return x86_bad_length(t, s, len, e);
	memcpy(buf, data, len);
	r = arch_ioctl(t->vm, t->fd, s->set, buf);
	return r < 0 ? x86_set_failed(t, s, r, e) : 0;
}
