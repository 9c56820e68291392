/* SPDX-License-Identifier: MIT */
/*
 * Goal: what a manifest says is read as it was written; cut off anywhere, or with a field that
 * cannot be, it is refused with a reason.
 * Method: there and back; every truncation; fields that are wrong, one by one.
 */
#include <errno.h>

#include "snapd/backup/manifest.h"
#include "tests/lib/damage.h"

static struct manifest make_manifest(void)
{
	static const char cmdline[] = "vmm\0--mem\0"
				      "1G";
	struct manifest m = {.m = {.snapshot = 7,
				   .timeline = 2,
				   .epoch = 9,
				   .taken_ns = 5,
				   .pushed_ns = 6,
				   .state_bytes = 100,
				   .nr_pages = 3,
				   .page_size = 4096,
				   .flags = BK_SNAPSHOT_PINNED,
				   .nr_layers = 2,
				   .cmdline_bytes = sizeof(cmdline),
				   .vm = "web",
				   .arch = "x86_64",
				   .host = "here",
				   .name = "before",
				   .note = "upgrade",
				   .tags = "a,b"},
			     .layers = {{.nr_maps = 2, .nr_frames = 3},
					{.nr_maps = 1, .nr_frames = 1}}};

	m.cmdline = (char *)copy_of(cmdline, sizeof(cmdline));
	for (uint8_t i = 1; i <= 3; i++) {
		struct bk_name name = {{i}};

		CHECK(!manifest_add_map(&m, &name));
	}
	return m;
}

static int decode_manifest(const uint8_t *payload, size_t len)
{
	_cleanup_free_ uint8_t *copy = copy_of(payload, len);
	struct manifest got;
	struct err e = {0};
	int rc = manifest_decode(copy, len, &got, &e);

	CHECK((rc == 0) == !e.text[0] && (!rc || (!got.maps && !got.cmdline)));
	manifest_deinit(&got);
	return rc;
}

/* What encode() makes of a manifest with this change. */
#define CHANGED(change)                                     \
	({                                                  \
		struct manifest m_ = make_manifest();       \
		struct manifest *m = &m_;                   \
		uint8_t *bytes_;                            \
		size_t len_;                                \
		int rc_;                                    \
		change;                                     \
		CHECK(!manifest_encode(m, &bytes_, &len_)); \
		rc_ = decode_manifest(bytes_, len_);        \
		free(bytes_);                               \
		manifest_deinit(m);                         \
		rc_;                                        \
	})
#define REFUSED(change) CHECK(CHANGED(change) == -E_CORRUPT)

/* As many layers as no reader has room for, and all else right. */
static void test_many_layers(void)
{
	enum { NR = BK_LAYERS_MAX + 1 };
	struct manifest m = make_manifest();
	uint8_t payload[sizeof(m.m) + NR * (sizeof(struct bk_layer) + BK_NAME_BYTES)] = {0};
	struct bk_layer *layer = (struct bk_layer *)(payload + sizeof(m.m));

	m.m.nr_layers = m.m.nr_maps = NR;
	m.m.cmdline_bytes = 0;
	memcpy(payload, &m.m, sizeof(m.m));
	for (uint32_t i = 0; i < NR; i++)
		memcpy(&layer[i], &(struct bk_layer){.nr_maps = 1}, sizeof(*layer));
	CHECK(decode_manifest(payload, sizeof(payload)) == -E_CORRUPT);
	manifest_deinit(&m);
}

static void test_manifest_refuses(void)
{
	test_many_layers();
	CHECK(CHANGED(m->m.page_size = 65536) == 0);
	REFUSED(m->m.page_size = 8192);
	REFUSED(m->m.flags = 4);
	REFUSED(m->m.state_bytes = 0);
	REFUSED(m->m.state_bytes = UINT64_MAX);
	REFUSED(m->m.taken_ns = UINT64_MAX);
	REFUSED(m->m.nr_pages = UINT64_MAX);
	REFUSED(m->m.nr_layers = 0);
	REFUSED(m->m.nr_layers = 1);
	REFUSED(m->layers[1].nr_maps = 0);
	REFUSED(m->layers[1].nr_maps = 2);
	REFUSED(m->layers[0].reserved = 1);
	REFUSED(m->cmdline[m->m.cmdline_bytes - 1] = 'x');
	REFUSED(memset(m->m.vm, 'v', sizeof(m->m.vm)));
	REFUSED(m->m.vm[0] = '\0');
	REFUSED(memcpy(m->m.vm, "../x", 5));
	REFUSED(memcpy(m->m.name, "a/b", 4));
	REFUSED(m->m.host[1] = '\n');
	REFUSED(m->m.note[200] = 'x'); /* behind the NUL */
	REFUSED(m->m.tags[0] = 0x7f);
}

static void test_manifest(void)
{
	struct manifest m = make_manifest(), got;
	struct err e = {0};
	uint8_t *payload;
	size_t len;

	CHECK(manifest_frames(&m, 0) == 4 && manifest_frames(&m, 1) == 1);
	CHECK(!manifest_encode(&m, &payload, &len));
	CHECK(!manifest_decode(payload, len, &got, &e));
	CHECK(!memcmp(&got.m, &m.m, sizeof(m.m)) &&
	      !memcmp(got.layers, m.layers, sizeof(m.layers)) &&
	      !memcmp(got.maps, m.maps, 3 * sizeof(*m.maps)) &&
	      !memcmp(got.cmdline, m.cmdline, m.m.cmdline_bytes));
	for (size_t n = 0; n < len; n++)
		CHECK(decode_manifest(payload, n) == -E_CORRUPT);
	free(payload);
	manifest_deinit(&got);
	manifest_deinit(&m);
	test_manifest_refuses();
}

int main(void)
{
	test_manifest();
	printf("manifests: there and back; damaged: refused\n");
	return 0;
}
