/* SPDX-License-Identifier: MIT */
/*
 * simkvm_cpu: the simulated CPU: runs steps, leaves anywhere, and has its registers in
 * the structs that the ioctls of x86_64 carry.  Runs on the thread that calls KVM_RUN.
 *
 * A step that has to leave jumps out of the program; its next run starts from the top
 * and replays: loads below `regs.rax` answer from the log, stores below it do nothing.
 * At the step's end log and count start again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "snapd/util/cleanup.h"
#include "vmm/simkvm_internal.h"

/* Between two questions whether to go on: soon after one was granted, and later seldom. */
#define TURN_MIN_NS 20000
#define TURN_MAX_NS 1000000

/* State that a vCPU has and this CPU has no use for: kept, and given back. */
static const struct state_kind {
	unsigned long get, set;
	size_t len_bytes;
} state_kinds[] = {
	{KVM_GET_SREGS, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
	{KVM_GET_FPU, KVM_SET_FPU, sizeof(struct kvm_fpu)},
	{KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
	{KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
	{KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(struct kvm_debugregs)},
	{KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events)},
};
static_assert(ARRAY_SIZE(state_kinds) == SIM_STATE_KINDS, "room in struct simkvm_cpu");

/* ---- instructions ---- */

static bool told_to_leave(struct simkvm_cpu *cpu)
{
	return __atomic_load_n(&cpu->run->immediate_exit, __ATOMIC_SEQ_CST);
}

/* `done` instructions of the step are behind us; the value becomes KVM_RUN's. */
static _Noreturn void leave(struct simkvm_cpu *cpu, uint64_t done, int exit_reason)
{
	cpu->regs.rax = done;
	cpu->run->exit_reason = (uint32_t)exit_reason;
	longjmp(cpu->leave, exit_reason == KVM_EXIT_INTR ? EINTR : -1);
}

/* Is this instruction done already?  If not, may it be begun? */
static bool replayed(struct simkvm_cpu *cpu)
{
	if (cpu->at < cpu->regs.rax) {
		cpu->at++;
		return true;
	}
	if (told_to_leave(cpu))
		leave(cpu, cpu->at, KVM_EXIT_INTR);
	if (sim_ring_soft_full(cpu))
		leave(cpu, cpu->at, KVM_EXIT_DIRTY_RING_FULL);
	return false;
}

static void log_load(struct simkvm_cpu *cpu, uint64_t value)
{
	if (cpu->log.nr == SIMKVM_STEP_LOADS)
		abort(); /* the program is not one */
	cpu->log.values[cpu->log.nr++] = value;
}

static _Noreturn void leave_mmio(struct simkvm_cpu *cpu, uint64_t gpa, const uint64_t *value)
{
	struct kvm_run *run = cpu->run;

	run->mmio.phys_addr = gpa;
	run->mmio.len = 8;
	run->mmio.is_write = value != NULL;
	memset(run->mmio.data, 0, sizeof(run->mmio.data));
	if (value)
		memcpy(run->mmio.data, value, 8);
	cpu->owed = value ? OWED_STORE : OWED_LOAD;
	leave(cpu, cpu->at, KVM_EXIT_MMIO);
}

uint64_t simkvm_load(struct simkvm_cpu *cpu, uint64_t gpa)
{
	uint64_t value = 0;
	void *p;

	if (replayed(cpu))
		return cpu->log.values[cpu->loads++];
	pthread_mutex_lock(&cpu->lock);
	p = sim_touch(cpu, gpa, TOUCH_LOAD);
	if (p)
		value = __atomic_load_n((uint64_t *)p, __ATOMIC_ACQUIRE);
	pthread_mutex_unlock(&cpu->lock);
	if (!p)
		leave_mmio(cpu, gpa, NULL);
	log_load(cpu, value);
	cpu->loads++;
	cpu->regs.rax = ++cpu->at;
	return value;
}

void simkvm_store(struct simkvm_cpu *cpu, uint64_t gpa, uint64_t value)
{
	void *p;

	if (replayed(cpu))
		return;
	pthread_mutex_lock(&cpu->lock);
	p = sim_touch(cpu, gpa, TOUCH_STORE);
	if (p)
		__atomic_store_n((uint64_t *)p, value, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&cpu->lock);
	if (!p)
		leave_mmio(cpu, gpa, &value);
	cpu->regs.rax = ++cpu->at;
}

void simkvm_enter_space(struct simkvm_cpu *cpu, uint32_t as_id)
{
	cpu->space = as_id;
}

void simkvm_leave(struct simkvm_cpu *cpu)
{
	__atomic_store_n(&cpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
}

/* ---- KVM_RUN ---- */

/* The VMM has done what the last exit asked for. */
static void complete_io(struct simkvm_cpu *cpu)
{
	uint64_t value;

	if (cpu->owed == OWED_NOTHING)
		return;
	if (cpu->owed == OWED_LOAD) {
		memcpy(&value, cpu->run->mmio.data, sizeof(value));
		log_load(cpu, value);
	}
	cpu->regs.rax++;
	cpu->owed = OWED_NOTHING;
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Between steps, until the next is due. */
static void rest(struct simkvm_cpu *cpu)
{
	uint64_t period = cpu->sim->config.period_ns, now = now_ns();

	if (cpu->next_step_ns + 10 * period < now)
		cpu->next_step_ns = now;
	while (now < cpu->next_step_ns) {
		struct timespec t = {.tv_nsec = (long)MIN(cpu->next_step_ns - now, 100000ull)};

		if (told_to_leave(cpu))
			leave(cpu, 0, KVM_EXIT_INTR);
		nanosleep(&t, NULL);
		now = now_ns();
	}
	cpu->next_step_ns += period;
}

/* Likewise, until somebody lets it go on. */
static void wait_turn(struct simkvm_cpu *cpu)
{
	const struct simkvm_config *config = &cpu->sim->config;
	struct timespec t = {.tv_nsec = TURN_MIN_NS};

	while (!config->may_step(cpu->regs.rdi, config->opaque)) {
		if (told_to_leave(cpu))
			leave(cpu, 0, KVM_EXIT_INTR);
		nanosleep(&t, NULL);
		t.tv_nsec = MIN(t.tv_nsec * 2, TURN_MAX_NS);
	}
}

static _Noreturn void run_steps(struct simkvm_cpu *cpu)
{
	const struct simkvm_config *config = &cpu->sim->config;

	for (;;) {
		if (config->period_ns && !cpu->regs.rax)
			rest(cpu);
		if (config->may_step && !cpu->regs.rax)
			wait_turn(cpu);
		cpu->at = 0;
		cpu->loads = 0;
		cpu->space = 0;
		config->step(cpu, cpu->regs.rdi, config->opaque);
		cpu->regs.rax = 0;
		cpu->log.nr = 0;
	}
}

static int cpu_run(struct simkvm_cpu *cpu)
{
	int rc;

	complete_io(cpu);
	if (told_to_leave(cpu)) {
		cpu->run->exit_reason = KVM_EXIT_INTR;
		return -EINTR;
	}
	rc = setjmp(cpu->leave);
	if (rc == 0)
		run_steps(cpu);
	return rc == EINTR ? -EINTR : 0;
}

/* ---- registers ---- */

int sim_cpuid_supported(struct kvm_cpuid2 *c)
{
	if (c->nent < 1)
		return -E2BIG;
	c->nent = 1;
	c->entries[0] = (struct kvm_cpuid_entry2){
		.eax = 0, .ebx = 0x4b6d6953, .ecx = 0x4350556d, .edx = 0x7553206d};
	return 0;
}

static size_t cpuid_bytes(const struct kvm_cpuid2 *c)
{
	return sizeof(*c) + c->nent * sizeof(c->entries[0]);
}

static int set_cpuid(struct simkvm_cpu *cpu, const struct kvm_cpuid2 *c)
{
	struct kvm_cpuid2 *copy;

	if (c->nent > 256)
		return -E2BIG;
	copy = malloc(cpuid_bytes(c));
	if (!copy)
		return -ENOMEM;
	memcpy(copy, c, cpuid_bytes(c));
	free(cpu->cpuid);
	cpu->cpuid = copy;
	return 0;
}

static int get_cpuid(struct simkvm_cpu *cpu, struct kvm_cpuid2 *c)
{
	uint32_t nent = cpu->cpuid ? cpu->cpuid->nent : 0;

	if (c->nent < nent)
		return -E2BIG;
	if (cpu->cpuid)
		memcpy(c, cpu->cpuid, cpuid_bytes(cpu->cpuid));
	c->nent = nent;
	return 0;
}

static int set_xsave(struct simkvm_cpu *cpu, const struct sim_log *log)
{
	if (log->nr > SIMKVM_STEP_LOADS)
		return -EINVAL;
	cpu->log = *log;
	return 0;
}

static int set_regs(struct simkvm_cpu *cpu, const struct kvm_regs *regs)
{
	cpu->regs = *regs;
	cpu->owed = OWED_NOTHING; /* whatever was under way belongs to other registers */
	return 0;
}

static int state_ioctl(struct simkvm_cpu *cpu, unsigned long request, void *arg)
{
	size_t i;

	for (i = 0; i < SIM_STATE_KINDS; i++) {
		if (request == state_kinds[i].get)
			memcpy(arg, cpu->state[i], state_kinds[i].len_bytes);
		else if (request == state_kinds[i].set)
			memcpy(cpu->state[i], arg, state_kinds[i].len_bytes);
		else
			continue;
		return 0;
	}
	return -ENOTTY;
}

int sim_cpu_ioctl(struct simkvm_cpu *cpu, unsigned long request, void *arg)
{
	switch (request) {
	case KVM_RUN:
		return cpu_run(cpu);
	case KVM_GET_REGS:
		*(struct kvm_regs *)arg = cpu->regs;
		return 0;
	case KVM_SET_REGS:
		return set_regs(cpu, arg);
	case KVM_GET_XSAVE:
		*(struct sim_log *)arg = cpu->log;
		return 0;
	case KVM_SET_XSAVE:
		return set_xsave(cpu, arg);
	case KVM_GET_CPUID2:
		return get_cpuid(cpu, arg);
	case KVM_SET_CPUID2:
		return set_cpuid(cpu, arg);
	case KVM_GET_TSC_KHZ:
		return 1000000; /* CLOCK_MONOTONIC in nanoseconds */
	case KVM_SET_TSC_KHZ:
		return (uintptr_t)arg == 1000000 ? 0 : -EINVAL;
	case KVM_GET_MSRS:
	case KVM_SET_MSRS:
		return 0; /* none of them */
	case KVM_GET_LAPIC:
		return -EINVAL;
	default:
		return state_ioctl(cpu, request, arg);
	}
}

/* ---- life ---- */

void sim_cpu_destroy(struct simkvm_cpu *cpu)
{
	size_t i;

	if (!cpu)
		return;
	if (cpu->run)
		munmap(cpu->run, cpu->map_bytes);
	for (i = 0; i < SIM_STATE_KINDS; i++)
		free(cpu->state[i]);
	free(cpu->cpuid);
	pthread_mutex_destroy(&cpu->lock);
	free(cpu);
}

/* The vCPU's file: kvm_run first, the ring where KVM has it; so whoever maps the
 * descriptor, in whatever process, sees what it would see of KVM's. */
static int cpu_map(struct simkvm_cpu *cpu, int fd)
{
	struct simkvm *sim = cpu->sim;
	size_t ring = sim->ring_entries * sizeof(struct kvm_dirty_gfn);
	struct stat st;
	void *p;

	cpu->map_bytes = (size_t)SIM_RING_PAGE * sim->page_size + ring;
	if (ftruncate(fd, (off_t)cpu->map_bytes) || fstat(fd, &st))
		return -errno;
	p = mmap(NULL, cpu->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -errno;
	cpu->run = p;
	cpu->ring = ring ? (void *)((char *)p + (size_t)SIM_RING_PAGE * sim->page_size) : NULL;
	cpu->dev = st.st_dev;
	cpu->ino = st.st_ino;
	return 0;
}

static int cpu_init(struct simkvm_cpu *cpu, int fd)
{
	size_t i;

	for (i = 0; i < SIM_STATE_KINDS; i++) {
		cpu->state[i] = calloc(1, state_kinds[i].len_bytes);
		if (!cpu->state[i])
			return -ENOMEM;
	}
	return cpu_map(cpu, fd);
}

int sim_cpu_create(struct simkvm *sim, uint32_t id)
{
	_cleanup_fd_ int fd = memfd_create("simkvm-vcpu", MFD_CLOEXEC);
	uint32_t n = atomic_load(&sim->nr_cpus), i;
	struct simkvm_cpu *cpu;
	int rc;

	if (fd < 0)
		return -errno;
	if (n == SIMKVM_MAX_VCPUS)
		return -EINVAL;
	for (i = 0; i < n; i++)
		if (sim->cpus[i]->id == id)
			return -EEXIST;
	cpu = calloc(1, sizeof(*cpu));
	if (!cpu)
		return -ENOMEM;
	cpu->sim = sim;
	cpu->id = id;
	pthread_mutex_init(&cpu->lock, NULL);
	rc = cpu_init(cpu, fd);
	if (rc) {
		sim_cpu_destroy(cpu);
		return rc;
	}
	sim->cpus[n] = cpu;
	atomic_store(&sim->nr_cpus, n + 1);
	return steal_fd(&fd);
}
