/* SPDX-License-Identifier: MIT */
/*
 * A VMM that keeps all state itself (SNAPD_ATTACH_VMM_STATE), as a program of its own: it stops
 * its vCPU by not running it, and its state is a number.  The test speaks the service's side.
 *
 *   told      blocks of RAM whole, whatever slots show; private memory never; READY when said
 *   pause     what the state consists of; who runs a vCPU in between spoils it, and so does a slot
 *             that changes while state is saved; a kick gets the vCPU out all the same
 *   words     a callback's reason and a refusal reach the service
 *   load      what loading writes is dirty afterwards
 *   leave     goodbye, with the vCPU still there
 */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "snapd/state.h"
#include "snapd/util/cleanup.h"
#include "tests/lib/agent_vm.h"
#include "tests/lib/check.h"

#define PAGES	     512u
#define PRIVATE_SLOT 5u
#define EXTRA_SLOT   6u
#define PRIVATE_GPA  (KVM_GUEST_DATA_GPA + (1ull << 30))

static GUEST_FN void write_pages(uint64_t gpa, uint64_t nr, uint64_t unused, uint64_t value)
{
	for (;; value++) {
		for (uint64_t i = 0; i < nr; i++)
			guest_write(gpa + i * KVM_GUEST_PAGE, value);
		guest_tell(value);
	}
}

static struct agent_vm a;
static struct fake_service s;

/* What the callbacks are to do, and did. */
static struct {
	int prepare_result, quiesce_result;
	bool add_slot, run_vcpu;
	uint32_t nr_prepare, nr_quiesce, nr_unquiesce, nr_load;
	pthread_t runner;
	_Atomic int run_result;
	uint64_t loaded;
} vmm;

static int on_prepare(void *opaque)
{
	vmm.nr_prepare++;
	return vmm.prepare_result;
}

static int on_quiesce(void *opaque)
{
	check(vmm.nr_prepare > vmm.nr_quiesce++, "without prepare");
	if (vmm.quiesce_result < 0)
		snapd_vm_reason(a.vm, "the monitor is busy");
	return vmm.quiesce_result;
}

static void on_unquiesce(void *opaque)
{
	vmm.nr_unquiesce++;
}

static void *run_thread(void *arg)
{
	vmm.run_result = snapd_vcpu_run(a.vcpus[0].v);
	return NULL;
}

static bool vcpu_waits(void)
{
	struct snapd_vm_stats before, after;

	/* It is in the agent, and the guest does not move: no entry comes. */
	usleep(50000);
	snapd_vm_get_stats(a.vm, &before);
	usleep(50000);
	snapd_vm_get_stats(a.vm, &after);
	return vmm.run_result == 1 && before.harvested == after.harvested;
}

static int on_save(void *opaque, struct snapd_state_writer *w)
{
	static const uint64_t state = 42;

	if (vmm.add_slot)
		check(!agent_vm_slot(&a, EXTRA_SLOT, PRIVATE_GPA * 2, PAGES / 2, 1), "%s",
		      snapd_vm_error(NULL));
	if (vmm.run_vcpu) {
		vmm.run_result = 1;
		check(!pthread_create(&vmm.runner, NULL, run_thread, NULL), "thread");
		check(vcpu_waits(), "a vCPU ran in the pause");
	}
	return snapd_state_put(w, "dev.vmm", 0, 1, &state, sizeof(state));
}

/* Devices write memory as they load. */
static int on_load(void *opaque, const struct snapd_state_reader *r)
{
	uint16_t version;
	const void *data;
	size_t len;

	vmm.nr_load++;
	if (snapd_state_get(r, "dev.vmm", 0, &version, &data, &len))
		return -ENOENT;
	memcpy(&vmm.loaded, data, sizeof(vmm.loaded));
	a.g.data[(PAGES - 1) * KVM_GUEST_PAGE] ^= 1;
	return 0;
}

static const struct snapd_vm_callbacks callbacks = {.size_bytes = sizeof(struct snapd_vm_callbacks),
						    .prepare = on_prepare,
						    .quiesce = on_quiesce,
						    .unquiesce = on_unquiesce,
						    .save = on_save,
						    .load = on_load};

static void run_once(void)
{
	uint64_t told;

	check(!snapd_vcpu_run(a.vcpus[0].v), "%s", snapd_vm_error(NULL));
	check(kvm_guest_told(&a.g, 0, &told), "no word from the guest");
}

/* ---- told ---- */

static uint64_t frames_told(void)
{
	uint64_t n = 0;

	for (uint32_t i = 0; i < s.nr_pieces; i++)
		n += s.pieces[i].nr_frames;
	return n;
}

static void test_told(void)
{
	const struct snapd_ram ram = {.hva = a.g.data,
				      .size_bytes = PAGES * KVM_GUEST_PAGE,
				      .gpa = KVM_GUEST_DATA_GPA,
				      .fd = a.g.data_fd};
	struct snapd_memslot m = {.slot = PRIVATE_SLOT,
				  .flags = SNAPD_SLOT_PRIVATE,
				  .gpa = PRIVATE_GPA,
				  .size_bytes = PAGES * KVM_GUEST_PAGE,
				  .fd = -1};

	m.hva = mmap(NULL, m.size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		     0);
	check(!snapd_vm_ram(a.vm, &ram), "%s", snapd_vm_error(NULL));
	check(snapd_vm_ram(a.vm, &ram) == -EEXIST, "twice");
	check(!agent_vm_slot(&a, AGENT_VM_DATA_SLOT, KVM_GUEST_DATA_GPA, 0, PAGES / 4), "%s",
	      snapd_vm_error(NULL));
	check(!snapd_vm_memslot(a.vm, &m), "%s", snapd_vm_error(NULL));
	agent_vm_add(&a, GUEST_CODE(write_pages), KVM_GUEST_DATA_GPA, PAGES / 4, 0, 1);
	fake_accept_on(a.listen_fd, &s);
	check(s.hello.flags & SNAPD_HELLO_VMM_STATE, "HELLO");
	fake_welcome(&s);
	run_once();
	fake_sync(&s); /* all else is told by then */
	check(!s.ready_vcpus, "READY before it was said");
	snapd_vm_ready(a.vm);
	fake_until_ready(&s);
	check(frames_told() == PAGES + KVM_GUEST_SYS_BYTES / KVM_GUEST_PAGE,
	      "%llu frames: all of the block, and nothing private",
	      (unsigned long long)frames_told());
}

/* ---- pause ---- */

static void read_state(int fd, struct snapd_state_reader *r)
{
	static _Alignas(8) uint8_t buf[1 << 20];
	ssize_t n = pread(fd, buf, sizeof(buf), 0);

	check(n > 0 && !state_reader_init(r, buf, (size_t)n, NULL), "state of %zd bytes", n);
}

static bool has(const struct snapd_state_reader *r, const char *name)
{
	uint16_t version;
	const void *data;
	size_t len;

	return !state_get(r, name, 0, &version, &data, &len);
}

static void refused(const char *text)
{
	struct snapd_msg_pause m = {.timeout_ms = 10000};

	fake_send(&s, &m, sizeof(m), SNAPD_MSG_PAUSE, -1);
	check(fake_answer(&s) == SNAPD_MSG_FAILED, "not refused for \"%s\"", text);
	check(strstr(s.in.error.text, text), "\"%s\" lacks \"%s\"", s.in.error.text, text);
}

static void test_pause(void)
{
	struct snapd_state_reader r;
	int fd = fake_pause(&s, 0);

	read_state(fd, &r);
	check(has(&r, STATE_VMM) && has(&r, "dev.vmm") && has(&r, "pieces") && has(&r, "layout"),
	      "records");
	check(!has(&r, "x86.regs"), "vCPU state of KVM's");
	close(fd);
	fake_resume(&s);
	check(vmm.nr_prepare == 1 && vmm.nr_quiesce == 1 && vmm.nr_unquiesce == 1, "callbacks");
	run_once();
	vmm.add_slot = true;
	refused("slots changed");
	vmm.add_slot = false;
	check(vmm.nr_unquiesce == 2, "it goes on");
	close(fake_pause(&s, 0));
	fake_resume(&s);
}

static void test_intruder(void)
{
	struct kvm_run *run = snapd_vcpu_kvm_run(a.vcpus[0].v);
	struct snapd_msg_resume resume = {0};
	int fd;

	vmm.run_vcpu = true;
	refused("resumed in the middle");
	vmm.run_vcpu = false;
	pthread_join(vmm.runner, NULL);
	check(vmm.run_result == 0, "run: %d, once the pause was over", vmm.run_result);

	/* Between PAUSED and RESUME; and its VMM wants it out. */
	fd = fake_pause(&s, 0);
	close(fd);
	vmm.run_result = 1;
	check(!pthread_create(&vmm.runner, NULL, run_thread, NULL), "thread");
	check(vcpu_waits(), "a vCPU ran in the pause");
	__atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
	pthread_join(vmm.runner, NULL);
	check(vmm.run_result == -EINTR, "kicked: %d", vmm.run_result);
	__atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
	fake_send(&s, &resume, sizeof(resume), SNAPD_MSG_RESUME, -1);
	check(fake_answer(&s) == SNAPD_MSG_FAILED, "RESUMED after somebody ran it");
	run_once();
}

/* ---- words ---- */

static void test_words(void)
{
	uint32_t before = vmm.nr_quiesce;

	vmm.quiesce_result = -EBUSY;
	refused("the monitor is busy");
	check(s.in.error.code == EBUSY, "code %d", s.in.error.code);
	vmm.quiesce_result = 0;
	vmm.prepare_result = -EBUSY;
	refused("the VMM cannot be stopped now");
	vmm.prepare_result = 0;
	check(!snapd_vm_about(a.vm, "{\"name\": \"test\"}", "it has a bad day"), "%s",
	      snapd_vm_error(NULL));
	refused("it has a bad day");
	check(s.nr_abouts && !strcmp(s.about.refusal, "it has a bad day"), "ABOUT");
	check(!memcmp(s.about.json, "{\"name\": \"test\"}", s.about.json_len), "ABOUT");
	check(vmm.nr_quiesce == before + 1, "a VM that is refused is not stopped");
	check(!snapd_vm_about(a.vm, NULL, NULL), "%s", snapd_vm_error(NULL));
}

/* ---- load ---- */

static bool is_dirty(uint64_t page)
{
	for (uint32_t i = 0; i < s.nr_pieces; i++) {
		const struct snapd_piece *p = &s.pieces[i];
		uint64_t gfn = KVM_GUEST_DATA_GPA / KVM_GUEST_PAGE + page;

		if (gfn >= p->home_gfn && gfn < p->home_gfn + p->nr_frames)
			return gpaset_test(&s.dirty, p->first_frame + gfn - p->home_gfn);
	}
	check(false, "page %llu was not told", (unsigned long long)page);
	return false;
}

static void test_load(void)
{
	int fd = fake_pause(&s, 0);
	uint64_t len = s.in.paused.state_bytes;

	fake_resume(&s);
	run_once();
	fake_pause_to_rewrite(&s, (struct snapd_point){1, 1});
	gpaset_clear(&s.dirty, SNAPD_SHM_FRAMES);
	fake_load(&s, fd, len);
	check(vmm.nr_load == 1 && vmm.loaded == 42, "loaded");
	check(is_dirty(PAGES - 1), "what loading wrote, where no slot shows it, is not dirty");
	check(!is_dirty(PAGES / 2), "what it did not write is");
	fake_resume(&s);
	run_once();
	close(fd);
}

int main(void)
{
	const struct agent_vm_config config = {.data_bytes = PAGES * KVM_GUEST_PAGE,
					       .flags = SNAPD_ATTACH_VMM_STATE |
							SNAPD_ATTACH_TRACK_HOST_WRITES,
					       .callbacks = &callbacks,
					       .no_data_slot = true};

	agent_vm_create(&a, &config);
	test_told();
	test_pause();
	test_intruder();
	test_words();
	test_load();
	snapd_vm_leave(a.vm);
	check(fake_is_closed(&s) && s.said_bye, "no goodbye");
	run_once();
	fake_close(&s);
	agent_vm_destroy(&a);
	printf("a VMM that keeps its state: as agent.h says\n");
	return 0;
}
