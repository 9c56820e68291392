/* SPDX-License-Identifier: MIT */
/*
 * VMs as records: known by an id for ever, found by name and owner.
 *
 * Threads: any, see store.h.
 */
#include "snapd/store/internal.h"

#include <string.h>

void store_vm_deinit(struct store_vm *vm)
{
	free(vm->cmdline);
	vm->cmdline = NULL;
}

static int vm_from_record(struct store_vm *vm, const uint8_t id[16], const struct rec_vm *rec,
			  const void *tail, size_t tail_len, struct err *e)
{
	*vm = (struct store_vm){
		.uid = rec->uid, .page_size = rec->page_size, .created_ns = rec->created_ns};
	memcpy(vm->id, id, sizeof(vm->id));
	memcpy(vm->name, rec->name, sizeof(vm->name));
	memcpy(vm->arch, rec->arch, sizeof(vm->arch));
	vm->name[sizeof(vm->name) - 1] = vm->arch[sizeof(vm->arch) - 1] = '\0';
	vm->cmdline = malloc(tail_len + 1);
	if (!vm->cmdline)
		return err_errno(e, ENOMEM, "VM %s", vm->name);
	memcpy(vm->cmdline, tail, tail_len);
	vm->cmdline[tail_len] = '\0';
	vm->cmdline_len = tail_len;
	return 0;
}

static int vm_put(struct ix_txn *t, const struct store_vm *vm, struct err *e)
{
	struct ix_key k = ix_key_id(vm->id);
	struct rec_vm rec = {
		.uid = vm->uid, .page_size = vm->page_size, .created_ns = vm->created_ns};

	rec_string(rec.name, vm->name);
	rec_string(rec.arch, vm->arch);
	return index_put(t, IX_VMS, &k, &rec, sizeof(rec), vm->cmdline, vm->cmdline_len, e);
}

static struct ix_key vm_name_key(const struct store_vm *vm)
{
	uint32_t uid = __builtin_bswap32(vm->uid);

	return ix_key_name(&uid, sizeof(uid), vm->name);
}

static int vm_add(struct ix_txn *t, struct store_vm *vm, struct err *e)
{
	struct ix_key k = vm_name_key(vm);
	struct rec_vmname name = {0};
	int r;

	r = store_random(vm->id, sizeof(vm->id));
	if (r)
		return err_errno(e, -r, "getting random bytes");
	vm->created_ns = store_now_ns();
	memcpy(name.vm, vm->id, sizeof(name.vm));
	return index_put(t, IX_VMNAMES, &k, &name, sizeof(name), NULL, 0, e);
}

static int vm_register(struct ix_txn *t, void *arg, struct err *e)
{
	struct store_vm *vm = arg;
	struct ix_key k = vm_name_key(vm), id;
	struct rec_vmname name;
	struct rec_vm old;
	int r;

	r = index_get(t, IX_VMNAMES, &k, &name, sizeof(name), NULL, NULL, e);
	if (r == -ENOENT) {
		r = vm_add(t, vm, e);
	} else if (!r) {
		id = ix_key_id(name.vm);
		r = index_get(t, IX_VMS, &id, &old, sizeof(old), NULL, NULL, e);
		if (r == -ENOENT)
			r = err_set(e, E_CORRUPT, "the record of VM \"%s\" is missing", vm->name);
		memcpy(vm->id, name.vm, sizeof(vm->id));
		vm->created_ns = r ? 0 : old.created_ns;
	}
	return r ? r : vm_put(t, vm, e);
}

int store_vm_register(struct store *s, struct store_vm *vm, struct err *e)
{
	if (!vm->name[0] || strnlen(vm->name, sizeof(vm->name)) == sizeof(vm->name) ||
	    strnlen(vm->arch, sizeof(vm->arch)) == sizeof(vm->arch))
		return err_set(e, EINVAL, "a VM needs a name of 1 to %zu bytes",
			       sizeof(vm->name) - 1);
	for (const char *p = vm->name; *p; p++)
		if (*p <= ' ' || *p == '@' || *p == '/' || *p == 127)
			return err_set(e, EINVAL, "VM name \"%s\": no blanks, '/' or '@'",
				       vm->name);
	if (strspn(vm->name, "0123456789") == strlen(vm->name))
		return err_set(e, EINVAL, "VM name \"%s\": not only digits", vm->name);
	if (vm->page_size != 4096 && vm->page_size != 16384 && vm->page_size != 65536)
		return err_set(e, EINVAL, "VM %s: page size %u is not supported", vm->name,
			       vm->page_size);
	if (vm->cmdline_len > 65536)
		return err_set(e, EINVAL, "VM %s: its command line is too long", vm->name);
	return index_update(s->index, vm_register, vm, e);
}

static int vm_get(struct ix_txn *t, const uint8_t id[16], struct store_vm *ret, struct err *e)
{
	struct ix_key k = ix_key_id(id);
	struct rec_vm rec;
	const void *tail;
	size_t tail_len;
	int r;

	r = index_get(t, IX_VMS, &k, &rec, sizeof(rec), &tail, &tail_len, e);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no such VM");
	return r ? r : vm_from_record(ret, id, &rec, tail, tail_len, e);
}

int store_vm_get(struct store *s, const uint8_t id[16], struct store_vm *ret, struct err *e)
{
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = vm_get(&t, id, ret, e);
	index_end(&t);
	return r;
}

int store_vm_find(struct store *s, const char *name, uint32_t uid, uint8_t ret[16], struct err *e)
{
	uint32_t be = __builtin_bswap32(uid);
	struct ix_key k = ix_key_name(&be, sizeof(be), name);
	struct rec_vmname rec;
	struct ix_txn t;
	int r;

	r = index_begin(s->index, &t, e);
	if (r)
		return r;
	r = index_get(&t, IX_VMNAMES, &k, &rec, sizeof(rec), NULL, NULL, e);
	index_end(&t);
	if (r == -ENOENT)
		return err_set(e, ENOENT, "there is no VM \"%.63s\"", name);
	if (!r)
		memcpy(ret, rec.vm, sizeof(rec.vm));
	return r;
}
