/* SPDX-License-Identifier: MIT */
/*
 * Memslots come and go under two running vCPUs, and nothing is lost.
 *
 * Data memory is 8 chunks.  Slots over random runs of free chunks are added under
 * random ids, deleted, moved to another GPA; half of the time with vCPUs running,
 * whose stores into holes come out as MMIO and are applied and marked, as a VMM
 * must.  In between, snapshots made from the sets alone must equal RAM, and at
 * times the VM is rolled back to one: memory, registers and slots as they were.
 *
 * Also: memory unplugged for good, and another file at the same address.
 *
 *   agent_slots [BACKEND [ROUNDS]]     default: ring 200
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"
#include "tests/lib/rand.h"

#define CHUNKS	    8u
#define CHUNK_PAGES 256u
#define PAGES	    (CHUNKS * CHUNK_PAGES)
#define CHUNK_BYTES (CHUNK_PAGES * KVM_GUEST_PAGE)
#define MOVED	    0x40000000ull /* offset of the other place for a chunk */
#define MAX_IDS	    32u

GUEST_FN static void guest_scatter(uint64_t first, uint64_t step)
{
	for (uint64_t n = 1, p = first;; n++) {
		guest_write(KVM_GUEST_DATA_GPA + p * KVM_GUEST_PAGE + first * 8, n);
		p = (p + step) % PAGES;
	}
}

/* The VMM's own idea of its slots; main thread and layout callback (then the main
 * thread waits for LOADED). */
static struct snapd_memslot slots[MAX_IDS];
static uint32_t nr_slots, layouts;

static void on_layout(void *opaque, const struct snapd_memslot *s, size_t n)
{
	layouts++;
	nr_slots = 0;
	for (size_t i = 0; i < n; i++)
		if (s[i].slot != AGENT_VM_SYS_SLOT)
			slots[nr_slots++] = s[i];
}

/* Two marks and a change of slots between them would miss what moved. */
static pthread_mutex_t slots_lock = PTHREAD_MUTEX_INITIALIZER;

/* A store that hit a hole: device-like, the VMM applies and marks it. */
static void on_hole(struct agent_vcpu *v, struct kvm_run *run)
{
	uint64_t at = run->mmio.phys_addr - KVM_GUEST_DATA_GPA;

	check(at < PAGES * KVM_GUEST_PAGE && run->mmio.is_write, "MMIO at 0x%llx",
	      (unsigned long long)run->mmio.phys_addr);
	memcpy(v->vm->g.data + at, run->mmio.data, run->mmio.len);
	pthread_mutex_lock(&slots_lock);
	/* a mark is by the address at which memory is, or was last: one of these */
	check(!snapd_vm_mark_dirty(v->vm->vm, run->mmio.phys_addr, run->mmio.len), "mark");
	check(!snapd_vm_mark_dirty(v->vm->vm, run->mmio.phys_addr + MOVED, run->mmio.len), "mark");
	pthread_mutex_unlock(&slots_lock);
}

static bool chunk_is_free(struct agent_vm *a, uint64_t chunk)
{
	for (uint32_t i = 0; i < nr_slots; i++)
		if (chunk * CHUNK_BYTES >= slots[i].fd_offset &&
		    chunk * CHUNK_BYTES < slots[i].fd_offset + slots[i].size_bytes)
			return false;
	return true;
}

static uint32_t free_id(struct rand *r)
{
	uint32_t id, i;

	do {
		id = 1 + (uint32_t)rand_below(r, 20);
		for (i = 0; i < nr_slots && slots[i].slot != id; i++)
			;
	} while (i < nr_slots);
	return id;
}

static void add_some(struct agent_vm *a, struct rand *r)
{
	uint64_t first = rand_below(r, CHUNKS), n = 0, max = 1 + rand_below(r, CHUNKS);
	struct snapd_memslot m;

	while (first + n < CHUNKS && n < max && chunk_is_free(a, first + n))
		n++;
	if (!n)
		return;
	m = (struct snapd_memslot){.slot = free_id(r),
				   .gpa = KVM_GUEST_DATA_GPA + first * CHUNK_BYTES +
					  (rand_below(r, 5) ? 0 : MOVED),
				   .size_bytes = n * CHUNK_BYTES,
				   .hva = a->g.data + first * CHUNK_BYTES,
				   .fd = a->g.data_fd,
				   .fd_offset = first * CHUNK_BYTES};
	pthread_mutex_lock(&slots_lock);
	check(!snapd_vm_memslot(a->vm, &m), "%s", snapd_vm_error(NULL));
	pthread_mutex_unlock(&slots_lock);
	slots[nr_slots++] = m;
}

static void delete_one(struct agent_vm *a, struct rand *r)
{
	uint32_t i;

	if (!nr_slots)
		return;
	i = (uint32_t)rand_below(r, nr_slots);
	pthread_mutex_lock(&slots_lock);
	check(!agent_vm_unslot(a, slots[i].slot, 0), "%s", snapd_vm_error(NULL));
	pthread_mutex_unlock(&slots_lock);
	slots[i] = slots[--nr_slots];
}

static void churn(struct agent_vm *a, struct rand *r)
{
	bool paused = rand_below(r, 2);

	if (paused)
		check(!snapd_vm_pause(a->vm, 0), "%s", snapd_vm_error(NULL));
	for (uint64_t n = 1 + rand_below(r, 4); n; n--) {
		if (rand_below(r, 5) < 2)
			delete_one(a, r);
		else
			add_some(a, r);
	}
	if (paused)
		snapd_vm_resume(a->vm);
}

struct saved {
	int state; /* -1: none */
	uint64_t len;
	uint8_t *ram[2];
	struct snapd_memslot slots[MAX_IDS];
	uint32_t nr_slots;
};

static void snapshot(struct fake_service *s, struct fake_copy *c, struct saved *keep)
{
	int state = fake_pause(s, 0);

	fake_copy_dirty(s, c);
	fake_copy_check(c, "snapshot");
	if (!keep) {
		close(state);
	} else {
		if (keep->state >= 0)
			close(keep->state);
		keep->state = state;
		keep->len = s->in.paused.state_bytes;
		for (uint32_t i = 0; i < c->nr; i++)
			memcpy(keep->ram[i], c->ram[i], c->size[i]);
		memcpy(keep->slots, slots, sizeof(slots));
		keep->nr_slots = nr_slots;
	}
	fake_resume(s);
}

static bool same_slots(const struct saved *k)
{
	uint32_t found = 0;

	for (uint32_t i = 0; i < k->nr_slots; i++)
		for (uint32_t j = 0; j < nr_slots; j++)
			found += k->slots[i].slot == slots[j].slot &&
				 k->slots[i].gpa == slots[j].gpa &&
				 k->slots[i].size_bytes == slots[j].size_bytes &&
				 k->slots[i].hva == slots[j].hva;
	return found == k->nr_slots && nr_slots == k->nr_slots;
}

static void rollback(struct fake_service *s, struct fake_copy *c, const struct saved *to)
{
	fake_pause(s, SNAPD_PAUSE_NO_STATE);
	fake_rewrite(s, (struct snapd_point){1, 1});
	for (uint32_t i = 0; i < c->nr; i++) {
		memcpy(c->map[i], to->ram[i], c->size[i]);
		memcpy(c->ram[i], to->ram[i], c->size[i]);
	}
	gpaset_clear(&s->dirty, s->shm->nr_frames);
	fake_load(s, to->state, to->len);
	check(same_slots(to), "the layout is not the snapshot's");
	fake_resume(s);
}

static void test_churn(struct rand *r, const struct agent_backend *b, int rounds)
{
	const struct snapd_vm_callbacks cb = {.size_bytes = sizeof(struct snapd_vm_callbacks),
					      .layout = on_layout};
	struct agent_vm_config config = {.data_bytes = PAGES * KVM_GUEST_PAGE,
					 .callbacks = &cb,
					 .no_data_slot = true,
					 .dirty = b->dirty,
					 .flags = b->flags};
	struct saved keep = {.state = -1};
	struct snapd_vm_stats st;
	static struct agent_vm a;
	static struct fake_service s;
	struct fake_copy c;
	uint32_t rollbacks = 0;

	nr_slots = 0;
	agent_vm_create(&a, &config);
	a.mmio = on_hole;
	/* one piece for all, so that pieces are split by slots and not by birth */
	if (rand_below(r, 2)) {
		check(!agent_vm_slot(&a, 30, KVM_GUEST_DATA_GPA, 0, PAGES), "slot");
		check(!agent_vm_unslot(&a, 30, 0), "slot");
	} else {
		for (uint32_t i = 0; i < CHUNKS; i++) {
			check(!agent_vm_slot(&a, 30, KVM_GUEST_DATA_GPA + i * CHUNK_BYTES,
					     i * CHUNK_PAGES, CHUNK_PAGES),
			      "slot");
			check(!agent_vm_unslot(&a, 30, 0), "slot");
		}
	}
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 0, 1, 0, 0);
	agent_vm_add(&a, GUEST_CODE(guest_scatter), 1, 1025, 0, 0);
	fake_open(&a, &s);
	fake_copy_init(&c, &s);
	for (uint32_t i = 0; i < c.nr; i++)
		keep.ram[i] = malloc(c.size[i]);
	agent_vm_start(&a, 0);
	agent_vm_start(&a, 1);
	for (int i = 0; i < rounds; i++) {
		for (uint64_t n = rand_below(r, 4); n; n--)
			churn(&a, r);
		usleep((useconds_t)rand_below(r, 3000));
		if (rand_below(r, 3) == 0) {
			fake_sync(&s);
			fake_copy_dirty(&s, &c);
		}
		snapshot(&s, &c, keep.state < 0 || rand_below(r, 4) == 0 ? &keep : NULL);
		if (rand_below(r, 5) == 0) {
			churn(&a, r);
			rollback(&s, &c, &keep);
			rollbacks++;
		}
	}
	snapd_vm_get_stats(a.vm, &st);
	printf("churn: %llu slot changes, %u rollbacks, %u layouts, %llu marks\n",
	       (unsigned long long)st.slot_changes, rollbacks, layouts,
	       (unsigned long long)st.host_marks);
	check(!st.unresolved, "%llu unresolved", (unsigned long long)st.unresolved);
	if (keep.state >= 0)
		close(keep.state);
	for (uint32_t i = 0; i < c.nr; i++)
		free(keep.ram[i]);
	fake_copy_deinit(&c);
	fake_close(&s);
	agent_vm_destroy(&a);
}

static void add_file(struct agent_vm *a, uint32_t slot, uint64_t gpa, int fd, void *hva, uint64_t n)
{
	struct snapd_memslot m = {
		.slot = slot, .gpa = gpa, .size_bytes = n * KVM_GUEST_PAGE, .hva = hva, .fd = fd};

	check(!snapd_vm_memslot(a->vm, &m), "%s", snapd_vm_error(NULL));
}

static uint64_t nr_dirty(struct fake_service *s, uint32_t piece)
{
	const struct snapd_piece *p = &s->pieces[piece];
	uint64_t n = 0;

	for (uint64_t i = 0; i < p->nr_frames; i++)
		n += gpaset_test(&s->dirty, p->first_frame + i);
	return n;
}

static void test_gone(void)
{
	const uint64_t gpa = KVM_GUEST_DATA_GPA + MOVED, n = 64;
	struct agent_vm_config config = {.data_bytes = 1 << 20};
	static struct agent_vm a;
	static struct fake_service s;
	int fd[2] = {memfd_create("one", MFD_CLOEXEC), memfd_create("two", MFD_CLOEXEC)};
	void *hva[2];

	for (int i = 0; i < 2; i++) {
		check(!ftruncate(fd[i], (off_t)(n * KVM_GUEST_PAGE)), "file");
		hva[i] = mmap(NULL, n * KVM_GUEST_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd[i],
			      0);
	}
	agent_vm_create(&a, &config);
	fake_open(&a, &s);
	check(s.nr_pieces == 2, "%u pieces", s.nr_pieces);
	add_file(&a, 7, gpa, fd[0], hva[0], n);
	fake_sync(&s);
	check(s.nr_pieces == 3 && s.pieces[2].home_gfn == gpa / KVM_GUEST_PAGE, "a piece");
	check(nr_dirty(&s, 2) == n, "a new piece is dirty");
	gpaset_clear(&s.dirty, s.shm->nr_frames);

	/* out of sight is not gone: same piece, and clean, in two slots */
	check(!agent_vm_unslot(&a, 7, 0), "delete");
	add_file(&a, 8, gpa, fd[0], hva[0], n / 2);
	fake_sync(&s);
	check(s.nr_pieces == 3 && nr_dirty(&s, 2) == 0, "the same piece, clean");
	check(!snapd_vm_mark_dirty(a.vm, gpa + (n - 1) * KVM_GUEST_PAGE, 1), "mark");
	check(nr_dirty(&s, 2) == 1, "a mark in the hole");

	/* half of it unplugged: the piece lives */
	check(!agent_vm_unslot(&a, 8, SNAPD_SLOT_GONE), "unplug");
	fake_sync(&s);
	check(!s.gone[2], "half gone");

	/* another file at its GPA: another piece, with a key above 2^40 */
	add_file(&a, 8, gpa, fd[1], hva[1], n);
	fake_sync(&s);
	check(s.nr_pieces == 4 && s.pieces[3].home_gfn >= 1ull << 40, "another key");
	check(nr_dirty(&s, 3) == n, "dirty");
	check(!agent_vm_unslot(&a, 8, SNAPD_SLOT_GONE), "unplug");
	fake_sync(&s);
	check(s.gone[3] && nr_dirty(&s, 3) == 0, "gone, bits dropped");

	/* the first one, whole again, then gone: its key is free */
	add_file(&a, 9, gpa, fd[0], hva[0], n);
	check(!agent_vm_unslot(&a, 9, SNAPD_SLOT_GONE), "unplug");
	fake_sync(&s);
	check(s.gone[2], "gone");
	add_file(&a, 9, gpa, fd[1], hva[1], n);
	fake_sync(&s);
	check(s.nr_pieces == 5 && s.pieces[4].home_gfn == gpa / KVM_GUEST_PAGE, "its key is free");
	check(nr_dirty(&s, 4) == n, "dirty");

	/* told anew after a reconnect: the living only */
	fake_close(&s);
	fake_open(&a, &s);
	check(s.nr_pieces == 3 && s.nr_blocks == 3, "%u pieces", s.nr_pieces);
	fake_close(&s);
	agent_vm_destroy(&a);
	for (int i = 0; i < 2; i++) {
		munmap(hva[i], n * KVM_GUEST_PAGE);
		close(fd[i]);
	}
	printf("gone: dropped\n");
}

int main(int argc, char **argv)
{
	const struct agent_backend *b = agent_backend(argc > 1 ? argv[1] : "ring");
	int rounds = argc > 2 ? atoi(argv[2]) : 200;
	struct rand r = rand_of(rand_seed());

	if (b->dirty == SNAPD_DIRTY_RING)
		test_gone();
	test_churn(&r, b, rounds / 2);
	test_churn(&r, b, rounds / 2);
	printf("ok\n");
	return 0;
}
