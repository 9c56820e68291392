/* SPDX-License-Identifier: MIT */
/* vmstate: see vmstate.h; field names as in QEMU's docs/interop/qcow2.txt. */
#include "adapters/qemu/vmstate.h"

#include <assert.h>
#include <endian.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "adapters/qemu/qmp.h"
#include "snapd/util/cleanup.h"

#define CLUSTER_BITS   16u
#define CLUSTER	       ((size_t)1 << CLUSTER_BITS)
#define L2_ENTRIES     (CLUSTER / 8)
#define OFLAG_COPIED   ((uint64_t)1 << 63)
#define REFCOUNT_ORDER 4u /* 16 bits */

enum { AT_HEADER, AT_REFTABLE, AT_REFBLOCK, AT_L1, AT_SNAP_L1, AT_SNAPSHOTS, AT_L2 };

struct qcow2_header {
	uint32_t magic;
	uint32_t version;
	uint64_t backing_file_offset;
	uint32_t backing_file_size;
	uint32_t cluster_bits;
	uint64_t size;
	uint32_t crypt_method;
	uint32_t l1_size;
	uint64_t l1_table_offset;
	uint64_t refcount_table_offset;
	uint32_t refcount_table_clusters;
	uint32_t nb_snapshots;
	uint64_t snapshots_offset;
	uint64_t incompatible_features;
	uint64_t compatible_features;
	uint64_t autoclear_features;
	uint32_t refcount_order;
	uint32_t header_length;
};
static_assert(sizeof(struct qcow2_header) == 104, "qcow2");

struct qcow2_snapshot {
	uint64_t l1_table_offset;
	uint32_t l1_size;
	uint16_t id_len;
	uint16_t name_len;
	uint32_t date_sec;
	uint32_t date_nsec;
	uint64_t vm_clock_nsec;
	uint32_t vm_state_size; /* 0: see the extra data */
	uint32_t extra_data_size;
	uint64_t extra_vm_state_size;
	uint64_t extra_disk_size;
	char id[1];
	char name[sizeof(VMSTATE_TAG) - 1];
};
static_assert(offsetof(struct qcow2_snapshot, id) == 56, "qcow2");

struct image {
	size_t nr_data; /* clusters of the stream */
	size_t nr_l2;
	size_t nr_clusters; /* of the file */
	uint8_t *meta;	    /* the clusters before the data; owned */
};

static void *cluster(struct image *m, size_t index)
{
	return m->meta + index * CLUSTER;
}

static uint64_t offset_be(size_t index)
{
	return htobe64((uint64_t)index * CLUSTER);
}

static void put_header(struct image *m)
{
	*(struct qcow2_header *)cluster(m, AT_HEADER) = (struct qcow2_header){
		.magic = htobe32(0x514649fb),
		.version = htobe32(3),
		.cluster_bits = htobe32(CLUSTER_BITS),
		.size = htobe64(CLUSTER),
		.l1_size = htobe32((uint32_t)(1 + m->nr_l2)),
		.l1_table_offset = offset_be(AT_L1),
		.refcount_table_offset = offset_be(AT_REFTABLE),
		.refcount_table_clusters = htobe32(1),
		.nb_snapshots = htobe32(1),
		.snapshots_offset = offset_be(AT_SNAPSHOTS),
		.refcount_order = htobe32(REFCOUNT_ORDER),
		.header_length = htobe32(sizeof(struct qcow2_header)),
	};
}

static void put_refcounts(struct image *m)
{
	uint16_t *block = cluster(m, AT_REFBLOCK);

	*(uint64_t *)cluster(m, AT_REFTABLE) = offset_be(AT_REFBLOCK);
	for (size_t i = 0; i < m->nr_clusters; i++)
		block[i] = htobe16(1);
}

static void put_snapshot(struct image *m, size_t stream_len)
{
	struct qcow2_snapshot s = {
		.l1_table_offset = offset_be(AT_SNAP_L1),
		.l1_size = htobe32((uint32_t)(1 + m->nr_l2)),
		.id_len = htobe16(sizeof(s.id)),
		.name_len = htobe16(sizeof(s.name)),
		.extra_data_size = htobe32(16),
		.extra_vm_state_size = htobe64(stream_len),
		.extra_disk_size = htobe64(CLUSTER),
		.id = {'1'},
	};

	memcpy(s.name, VMSTATE_TAG, sizeof(s.name));
	memcpy(cluster(m, AT_SNAPSHOTS), &s, sizeof(s));
}

/* L1 entry 0 is the disk's, and empty; the VM state begins with entry 1. */
static void put_map(struct image *m)
{
	uint64_t *l1 = cluster(m, AT_SNAP_L1), *l2 = cluster(m, AT_L2);

	for (size_t i = 0; i < m->nr_l2; i++)
		l1[1 + i] = htobe64((uint64_t)(AT_L2 + i) * CLUSTER | OFLAG_COPIED);
	for (size_t i = 0; i < m->nr_data; i++)
		l2[i] = htobe64((uint64_t)(AT_L2 + m->nr_l2 + i) * CLUSTER | OFLAG_COPIED);
}

static int write_all(int fd, const void *data, size_t len, off_t at)
{
	while (len) {
		ssize_t n = pwrite(fd, data, len, at);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n ? errno : EIO;
		data = (const char *)data + n;
		len -= (size_t)n;
		at += n;
	}
	return 0;
}

static int write_image(const struct image *m, const void *stream, size_t len, int *ret,
		       struct err *e)
{
	_cleanup_fd_ int fd = memfd_create("snapd-vmstate", MFD_CLOEXEC);
	size_t meta = (AT_L2 + m->nr_l2) * CLUSTER;
	int err;

	if (fd < 0)
		return err_errno(e, errno, "cannot make a file for device state");
	if (ftruncate(fd, (off_t)(m->nr_clusters * CLUSTER)) < 0)
		return err_errno(e, errno, "cannot make a file for device state");
	err = write_all(fd, m->meta, meta, 0);
	if (!err)
		err = write_all(fd, stream, len, (off_t)meta);
	if (err)
		return err_errno(e, err, "cannot write device state");
	*ret = steal_fd(&fd);
	return 0;
}

int vmstate_image(const void *stream, size_t len, int *ret, struct err *e)
{
	struct image m = {.nr_data = DIV_ROUND_UP(len, CLUSTER)};
	int rc;

	/* One refcount block covers 2 GiB. */
	static_assert(QMP_STATE_MAX < CLUSTER / 2 * CLUSTER - CLUSTER * 16, "qcow2");
	*ret = -1;
	if (!len || len > QMP_STATE_MAX)
		return err_set(e, EINVAL, "device state of %zu bytes", len);
	m.nr_l2 = DIV_ROUND_UP(m.nr_data, L2_ENTRIES);
	m.nr_clusters = AT_L2 + m.nr_l2 + m.nr_data;
	m.meta = calloc(AT_L2 + m.nr_l2, CLUSTER);
	if (!m.meta)
		return err_errno(e, ENOMEM, "device state");
	put_header(&m);
	put_refcounts(&m);
	put_snapshot(&m, len);
	put_map(&m);
	rc = write_image(&m, stream, len, ret, e);
	free(m.meta);
	return rc;
}
