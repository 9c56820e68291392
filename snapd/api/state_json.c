/* SPDX-License-Identifier: MIT */
/*
 * state_json: a snapshot's state and description as JSON, for people and for
 * `snapctl export`.  On a job thread: the state is read from disk.
 *
 * Every record is given with its payload (base64), from which an import rebuilds
 * the blob; beside it, where the payload is of a kind that we know, what it means.
 */
#include "snapd/transfer/transfer.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "snapd/core/json.h"
#include "snapd/core/contents.h"
#include "snapd/core/daemon.h"
#include "snapd/util/cleanup.h"

/* ---- payloads that we know ---- */

static json_t *layout_json(const void *data, size_t len)
{
	const struct state_slot *s = data;
	json_t *a = json_array();

	for (size_t i = 0; i < len / sizeof(*s); i++)
		json_array_append_new(
			a, json_pack("{sI sI sb sI sI so}", "slot", (json_int_t)s[i].slot, "as_id",
				     (json_int_t)s[i].as_id, "readonly", s[i].flags & 1, "gpa",
				     (json_int_t)s[i].gpa, "pages", (json_int_t)s[i].nr_pages,
				     "home_gfn",
				     s[i].home_gfn == UINT64_MAX
					     ? json_null()
					     : json_integer((json_int_t)s[i].home_gfn)));
	return a;
}

static json_t *pieces_json(const void *data, size_t len)
{
	const struct state_piece *p = data;
	json_t *a = json_array();

	for (size_t i = 0; i < len / sizeof(*p); i++)
		json_array_append_new(a, json_pack("{sI sI sI sI}", "home_gfn",
						   (json_int_t)p[i].home_gfn, "pages",
						   (json_int_t)p[i].nr_pages, "block",
						   (json_int_t)p[i].block, "block_page",
						   (json_int_t)p[i].block_page));
	return a;
}

/* struct kvm_regs of x86: sixteen general registers, rip, rflags. */
static json_t *x86_regs_json(const void *data, size_t len)
{
	static const char *const names[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi",
					    "rsp", "rbp", "r8",	 "r9",	"r10", "r11",
					    "r12", "r13", "r14", "r15", "rip", "rflags"};
	json_t *o = json_object();
	char hex[20];
	uint64_t v;

	for (size_t i = 0; i < ARRAY_SIZE(names) && 8 * i + 8 <= len; i++) {
		memcpy(&v, (const char *)data + 8 * i, 8);
		snprintf(hex, sizeof(hex), "0x%llx", (unsigned long long)v);
		json_object_set_new(o, names[i], json_string(hex));
	}
	return o;
}

static json_t *hex_json(const void *data, size_t len)
{
	const uint8_t *p = data;
	char text[2 * 64 + 1] = "";

	for (size_t i = 0; i < len && i < 64; i++)
		sprintf(text + 2 * i, "%02x", p[i]);
	return json_string(text);
}

/* The payload is JSON itself. */
static json_t *text_json(const void *data, size_t len)
{
	return json_loadb(data, len, JSON_REJECT_DUPLICATES, NULL);
}

static const struct {
	const char *name;
	uint16_t version;
	json_t *(*decode)(const void *data, size_t len);
} decoders[] = {
	{"layout", 1, layout_json},	 {"pieces", 1, pieces_json},
	{"x86.regs", 1, x86_regs_json},	 {"note.ram-sha256", 1, hex_json},
	{"dev.qemu.info", 1, text_json},
};

/* ---- all records ---- */

static json_t *base64(const void *data, size_t len)
{
	_cleanup_free_ char *text = malloc(len / 3 * 4 + 5);

	if (!text)
		return NULL;
	EVP_EncodeBlock((unsigned char *)text, data, (int)len);
	return json_string(text);
}

static json_t *record_json(const struct state_record *rec, bool with_payload)
{
	const void *data = rec + 1;
	char name[STATE_NAME_MAX + 1] = {0};
	json_t *o;

	memcpy(name, rec->name, STATE_NAME_MAX);
	o = json_pack("{ss si si sI}", "name", name, "instance", (int)rec->instance, "version",
		      (int)rec->version, "bytes", (json_int_t)rec->len_bytes);
	for (size_t i = 0; i < ARRAY_SIZE(decoders); i++)
		if (!strcmp(decoders[i].name, name) && decoders[i].version == rec->version)
			json_object_set_new(o, "decoded", decoders[i].decode(data, rec->len_bytes));
	if (with_payload)
		json_object_set_new(o, "payload", base64(data, rec->len_bytes));
	return o;
}

static json_t *records_json(const struct snapd_state_reader *r, bool with_payload)
{
	const struct state_record *rec = NULL;
	json_t *a = json_array();

	while ((rec = state_next(r, rec)))
		json_array_append_new(a, record_json(rec, with_payload));
	return a;
}

int state_job(struct job *job, struct err *e)
{
	uint64_t id = (uint64_t)json_integer_value(json_object_get(job->args, "snapshot"));
	_cleanup_(contents_deinit) struct contents c = {0};
	struct daemon *d = job->daemon;
	struct transfer *t = job->ctx;
	json_t *o;
	int rc;

	atomic_store(&job->phase, "reading state");
	rc = contents_open(d->store, id, false, &c, e);
	if (rc)
		return rc;
	o = json_pack("{ss so so* sI so}", "format", "snapd-state-1", "snapshot",
		      snapshot_json(&c.snap), "vm", snapshot_vm_json(d->store, &c.snap),
		      "ram_bytes", (json_int_t)c.nr_pages * c.snap.page_size, "records",
		      records_json(&c.reader, t->with_payload));
	t->text = o ? json_text(o, JSON_INDENT(1)) : NULL;
	json_decref(o);
	if (!t->text)
		return err_errno(e, ENOMEM, "state");
	job->result = json_pack("{sI}", "bytes", (json_int_t)strlen(t->text));
	return 0;
}
