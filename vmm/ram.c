/* SPDX-License-Identifier: MIT */
/*
 * ram: guest memory as the VMM has it: the files behind it, the memslots that show them,
 * and what lies behind an address that no memslot shows just now.
 *
 * ram_map_slot() and ram_unmap_slot() are called by main before the guest runs, by the
 * puncher, and by vCPU 0's thread; the areas' `backing` changes only under area.lock.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vmm/machine.h"

/* An open file without a name. */
static int ram_file(const char *name, enum ram_backing backing)
{
	char path[64];
	int fd;

	if (backing != RAM_SHM)
		return memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING |
						  (backing == RAM_HUGETLB ? MFD_HUGETLB : 0));
	snprintf(path, sizeof(path), "/%s-%d", name, (int)getpid());
	fd = shm_open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0)
		shm_unlink(path);
	return fd;
}

/* No one can seal a file in /dev/shm. */
static int fix_size(int fd, size_t len_bytes, enum ram_backing backing)
{
	if (ftruncate(fd, (off_t)len_bytes))
		return -errno;
	if (backing != RAM_SHM && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		return -errno;
	return 0;
}

int ram_block_create(struct ram_block *b, const char *name, size_t len_bytes,
		     enum ram_backing backing)
{
	_cleanup_fd_ int fd = ram_file(name, backing);
	struct stat st;
	void *hva;
	int rc;

	if (fd < 0 || fstat(fd, &st))
		return -errno;
	if (backing == RAM_HUGETLB)
		len_bytes = ALIGN_UP(len_bytes, (size_t)st.st_blksize);
	rc = fix_size(fd, len_bytes, backing);
	if (rc)
		return rc;
	hva = mmap(NULL, len_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (hva == MAP_FAILED)
		return -errno;
	*b = (struct ram_block){.fd = steal_fd(&fd), .hva = hva, .len_bytes = len_bytes};
	return 0;
}

void ram_block_destroy(struct ram_block *b)
{
	if (b->fd < 0)
		return;
	munmap(b->hva, b->len_bytes);
	close(b->fd);
	*b = (struct ram_block){.fd = -1};
}

/* Whole GiB, so that a PD entry never spans two regions. */
static uint64_t gib_after(uint64_t gpa, uint64_t len_bytes)
{
	return ALIGN_UP(gpa + len_bytes, GUEST_GIB);
}

static void layout_low(struct machine *m, struct guest_params *p, uint64_t *low_bytes)
{
	uint64_t table = ALIGN_UP((p->main_pages + p->dimm_pages) * 8, GUEST_PAGE);

	p->device_table_gpa = GUEST_TABLE_GPA + table;
	p->device_gpa = p->device_table_gpa + ALIGN_UP(p->device_pages * 8, GUEST_PAGE);
	m->spare_gpa = p->device_gpa + p->device_pages * GUEST_PAGE;
	*low_bytes = ALIGN_UP(m->spare_gpa + (SPARE_PAGES + 1) * GUEST_PAGE, 2ull << 20);
}

static void layout_areas(struct machine *m)
{
	struct guest_params *p = &m->params;
	uint64_t window = gib_after(p->dimm_gpa, p->dimm_pages * GUEST_PAGE);
	uint32_t i;

	p->area_pages = DIV_ROUND_UP(p->main_pages, GUEST_MAX_AREAS);
	m->nr_areas = (uint32_t)DIV_ROUND_UP(p->main_pages, p->area_pages);
	for (i = 0; i < m->nr_areas; i++) {
		struct area *a = &m->areas[i];
		uint64_t offset = i * p->area_pages * GUEST_PAGE;

		pthread_mutex_init(&a->lock, NULL);
		a->gpa = GUEST_MAIN_GPA + offset;
		a->window_gpa = window + offset;
		a->nr_pages = MIN(p->area_pages, p->main_pages - i * p->area_pages);
		a->backing = &m->main;
		a->backing_offset = offset;
		a->own.fd = -1;
	}
}

static void ram_layout(struct machine *m, uint64_t *low_bytes)
{
	const struct options *opt = m->opt;
	struct guest_params *p = &m->params;

	p->main_pages = opt->mem_bytes / GUEST_PAGE;
	p->dimm_pages = opt->dimm_bytes / GUEST_PAGE;
	p->dimm_gpa = gib_after(GUEST_MAIN_GPA, opt->mem_bytes);
	p->device_pages = opt->device_rate > 0 ? 64 : 0;
	layout_low(m, p, low_bytes);
	layout_areas(m);
}

/* What a CPU in SMM sees: RAM once more, and SMRAM. */
static int ram_map_smm(struct machine *m)
{
	int rc = ram_map_slot(m, 1, SLOT_SMM_LOW, 0, &m->low, 0, m->low.len_bytes);

	if (rc == 0)
		rc = ram_map_slot(m, 1, SLOT_SMM_MAIN, GUEST_MAIN_GPA, &m->main, 0,
				  m->main.len_bytes);
	if (rc == 0)
		rc = ram_map_slot(m, 1, SLOT_SMRAM, SMRAM_GPA, &m->smram, 0, m->smram.len_bytes);
	return rc;
}

static int ram_map_all(struct machine *m)
{
	uint32_t i;
	int rc = ram_map_slot(m, 0, SLOT_LOW, 0, &m->low, 0, m->low.len_bytes);

	for (i = 0; rc == 0 && i < m->nr_areas; i++) {
		struct area *a = &m->areas[i];

		rc = ram_map_slot(m, 0, SLOT_AREA0 + i * AREA_SLOT_IDS, a->gpa, a->backing,
				  a->backing_offset, a->nr_pages * GUEST_PAGE);
		a->ids = 1;
	}
	if (rc == 0 && m->params.dimm_pages)
		rc = ram_map_slot(m, 0, SLOT_DIMM, m->params.dimm_gpa, &m->dimm, 0,
				  m->dimm.len_bytes);
	if (rc == 0 && m->opt->smm)
		rc = ram_map_smm(m);
	return rc;
}

int ram_create(struct machine *m)
{
	uint64_t low_bytes;
	int rc;

	ram_layout(m, &low_bytes);
	rc = ram_block_create(&m->low, "snapvm-low", low_bytes, m->opt->backing);
	if (rc == 0)
		rc = ram_block_create(&m->main, "snapvm-main", m->opt->mem_bytes, m->opt->backing);
	if (rc == 0 && m->opt->smm)
		rc = ram_block_create(&m->smram, "snapvm-smram", SMRAM_PAGES * GUEST_PAGE,
				      m->opt->backing);
	if (rc == 0 && m->opt->dimm_bytes)
		rc = ram_block_create(&m->dimm, "snapvm-dimm", m->opt->dimm_bytes, m->opt->backing);
	if (rc) {
		fprintf(stderr, "snapvm: cannot make guest memory: %s\n", strerror(-rc));
		return rc;
	}
	rc = ram_map_all(m);
	if (rc)
		fprintf(stderr, "snapvm: cannot map guest memory: %s\n", snapd_vm_error(m->agent));
	return rc;
}

void ram_destroy(struct machine *m)
{
	uint32_t i;

	for (i = 0; i < m->nr_areas; i++) {
		ram_block_destroy(&m->areas[i].own);
		pthread_mutex_destroy(&m->areas[i].lock);
	}
	ram_block_destroy(&m->smram);
	ram_block_destroy(&m->dimm);
	ram_block_destroy(&m->main);
	ram_block_destroy(&m->low);
}

int ram_map_slot(struct machine *m, uint32_t as_id, uint32_t slot, uint64_t gpa,
		 const struct ram_block *b, uint64_t offset, uint64_t len_bytes)
{
	const struct snapd_memslot s = {.slot = slot,
					.as_id = (uint16_t)as_id,
					.gpa = gpa,
					.size_bytes = len_bytes,
					.hva = (char *)b->hva + offset,
					.fd = b->fd,
					.fd_offset = offset};

	return snapd_vm_memslot(m->agent, &s);
}

int ram_unmap_slot(struct machine *m, uint32_t slot, uint32_t flags)
{
	const struct snapd_memslot s = {.slot = slot, .flags = (uint16_t)flags, .fd = -1};

	return snapd_vm_memslot(m->agent, &s);
}

_Atomic uint64_t *ram_word(struct machine *m, uint64_t gpa)
{
	return (_Atomic uint64_t *)((char *)m->low.hva + gpa);
}

uint64_t ram_ctl(struct machine *m, uint32_t vcpu, size_t field)
{
	return atomic_load(ram_word(m, guest_ctl_gpa(vcpu) + field));
}

void ram_store_marked(struct machine *m, uint64_t gpa, uint64_t value)
{
	pthread_mutex_lock(&m->write_lock);
	atomic_store(ram_word(m, gpa), value);
	snapd_vm_mark_dirty(m->agent, gpa, sizeof(value));
	pthread_mutex_unlock(&m->write_lock);
}

struct area *ram_area_of(struct machine *m, uint64_t gpa, uint64_t *offset)
{
	uint32_t i;

	for (i = 0; i < m->nr_areas; i++) {
		struct area *a = &m->areas[i];
		uint64_t len = a->nr_pages * GUEST_PAGE;

		if (gpa - a->gpa < len)
			*offset = gpa - a->gpa;
		else if (gpa - a->window_gpa < len)
			*offset = gpa - a->window_gpa;
		else
			continue;
		return a;
	}
	return NULL;
}

/* The guest's words are atomic for the guest, so they are here. */
static void copy_access(void *dst, const void *src, size_t len)
{
	if (len == 8)
		__atomic_store_n((uint64_t *)dst,
				 __atomic_load_n((const uint64_t *)src, __ATOMIC_ACQUIRE),
				 __ATOMIC_RELEASE);
	else
		memcpy(dst, src, len);
}

int ram_hole_load(struct machine *m, uint64_t gpa, void *data, size_t len)
{
	uint64_t offset;
	struct area *a = ram_area_of(m, gpa, &offset);

	if (!a || offset + len > a->nr_pages * GUEST_PAGE)
		return -EFAULT;
	pthread_mutex_lock(&a->lock);
	copy_access(data, (char *)a->backing->hva + a->backing_offset + offset, len);
	pthread_mutex_unlock(&a->lock);
	return 0;
}

int ram_hole_store(struct machine *m, uint64_t gpa, const void *data, size_t len)
{
	uint64_t offset;
	struct area *a = ram_area_of(m, gpa, &offset);

	if (!a || offset + len > a->nr_pages * GUEST_PAGE)
		return -EFAULT;
	pthread_mutex_lock(&a->lock);
	copy_access((char *)a->backing->hva + a->backing_offset + offset, data, len);
	/* The page was last seen at one of the two; a mark where there is nothing is ignored. */
	snapd_vm_mark_dirty(m->agent, a->gpa + offset, len);
	snapd_vm_mark_dirty(m->agent, a->window_gpa + offset, len);
	pthread_mutex_unlock(&a->lock);
	return 0;
}
