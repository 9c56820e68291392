/* SPDX-License-Identifier: MIT */
/*
 * Attach and detach: configuration → dirty sources that are on, the shared memory
 * file, two running threads; and the small things every file uses.  On the
 * caller's thread.
 */
#include "agent/vm.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <fcntl.h>

#define MAX_VCPUS_DEFAULT 256u
#define MAX_VCPUS_LIMIT	  4096u
#define HARVEST_MIN_US	  1000u
#define HARVEST_MAX_US	  50000u
#define ATTACH_WAIT_MS	  5000u

#ifndef KVM_CAP_DISABLE_QUIRKS2
#define KVM_CAP_DISABLE_QUIRKS2 213
#endif
#ifndef KVM_X86_QUIRK_SLOT_ZAP_ALL
#define KVM_X86_QUIRK_SLOT_ZAP_ALL (1 << 7)
#endif

_Thread_local struct err agent_err;

const char *snapd_vm_error(const struct snapd_vm *vm)
{
	return agent_err.code ? agent_err.text : "";
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

void vm_log(struct snapd_vm *vm, enum snapd_log_level level, const char *fmt, ...)
{
	char line[640];
	va_list ap;

	if (!vm->cb.log)
		return;
	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	pthread_mutex_lock(&vm->log_lock);
	vm->cb.log(vm->opaque, level, line);
	pthread_mutex_unlock(&vm->log_lock);
}

int vm_ioctl(struct snapd_vm *vm, unsigned long request, void *arg)
{
	return arch_ioctl(&vm->kvm, vm->kvm.vm_fd, request, arg);
}

void wake_fd(int fd)
{
	uint64_t one = 1;

	(void)!write(fd, &one, sizeof(one));
}

bool grow_array(void *array_ptr, size_t *cap, size_t want, size_t elem_bytes)
{
	void **array = array_ptr, *bigger;
	size_t n = MAX((size_t)16, *cap * 2);

	if (want <= *cap)
		return true;
	bigger = reallocarray(*array, n, elem_bytes);
	if (!bigger)
		return false;
	*array = bigger;
	*cap = n;
	return true;
}

/* The VM's answer, where it has one of its own; else the system's. */
int vm_check_extension(struct snapd_vm *vm, uint32_t cap)
{
	int r = arch_cap(&vm->kvm, cap);

	if (!r && vm->kvm.kvm_fd >= 0)
		r = arch_ioctl_value(&vm->kvm, vm->kvm.kvm_fd, KVM_CHECK_EXTENSION, cap);
	return MAX(r, 0);
}

int vm_enable_cap(struct snapd_vm *vm, uint32_t cap, uint64_t arg)
{
	struct kvm_enable_cap enable = {.cap = cap, .args = {arg}};

	return vm_ioctl(vm, KVM_ENABLE_CAP, &enable);
}

/*
 * SLOT_ZAP_ALL, an x86 quirk: deleting any slot drops every shadow page.  With it,
 * one slot that comes and goes cures a rollback in 0.1 ms.  Without it, a VM that
 * punches holes all the time need not fault its whole working set in again, all of
 * it "dirty", each time.  It can be disabled for good only, so that is done when the
 * VM has shown to be of the second kind.  slots_lock held.
 */
void quirk_count_delete(struct snapd_vm *vm)
{
#ifdef __x86_64__
	if (!vm->zap_all || vm->keep_quirk || ++vm->nr_deletes < QUIRK_DELETES)
		return;
	if (vm_check_extension(vm, KVM_CAP_DISABLE_QUIRKS2) & KVM_X86_QUIRK_SLOT_ZAP_ALL)
		vm->zap_all =
			vm_enable_cap(vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL) < 0;
	vm->keep_quirk = vm->zap_all;
#endif
}

static bool name_is_good(const char *s)
{
	size_t n = strlen(s);

	return n && n < SNAPD_NAME_MAX &&
	       strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == n;
}

static const char *or_env(const char *given, const char *var, const char *fallback)
{
	const char *env = getenv(var);

	return given ? given : env && *env ? env : fallback;
}

static int config_strings(struct snapd_vm *vm, const struct snapd_vm_config *c, struct err *e)
{
	char name[32];
	const char *s;

	snprintf(name, sizeof(name), "vm-%d", (int)getpid());
	s = or_env(c->name, "SNAPD_VM_NAME", name);
	if (!name_is_good(s))
		return err_set(e, EINVAL,
			       "VM name \"%.80s\": 1 to %u letters, digits, '.', '_', '-'", s,
			       SNAPD_NAME_MAX - 1);
	snprintf(vm->name, sizeof(vm->name), "%s", s);
	s = or_env(c->socket, "SNAPD_AGENT_SOCKET", SNAPD_AGENT_SOCKET_DEFAULT);
	if (strlen(s) >= sizeof(vm->socket))
		return err_set(e, EINVAL, "socket path \"%.120s\" is too long", s);
	snprintf(vm->socket, sizeof(vm->socket), "%s", s);
	s = or_env(c->restore, "SNAPD_RESTORE", "");
	if (strlen(s) >= sizeof(vm->restore))
		return err_set(e, EINVAL, "snapshot selector \"%.140s\" is too long", s);
	snprintf(vm->restore, sizeof(vm->restore), "%s", s);
	return 0;
}

static int config_numbers(struct snapd_vm *vm, const struct snapd_vm_config *c, struct err *e)
{
	uint32_t min_us = c->harvest_min_us ? c->harvest_min_us : HARVEST_MIN_US;
	uint32_t max_us = c->harvest_max_us ? c->harvest_max_us : MAX(HARVEST_MAX_US, min_us);

	if (c->ring_entries & (c->ring_entries - 1))
		return err_set(e, EINVAL, "ring_entries %u is not a power of two", c->ring_entries);
	if (c->max_vcpus > MAX_VCPUS_LIMIT)
		return err_set(e, EINVAL, "max_vcpus %u: at most %u", c->max_vcpus,
			       MAX_VCPUS_LIMIT);
	if (max_us < min_us)
		return err_set(e, EINVAL, "harvest_max_us %u is below harvest_min_us %u", max_us,
			       min_us);
	if (!dirty_is_known(c->dirty))
		return err_set(e, EINVAL, "no way of dirty tracking has the number %u", c->dirty);
	vm->want_dirty = (enum snapd_dirty)c->dirty;
	vm->log.initially_set = c->flags & SNAPD_ATTACH_LOG_INITIALLY_SET;
	vm->track_host = c->flags & SNAPD_ATTACH_TRACK_HOST_WRITES;
	vm->vmm_state = c->flags & SNAPD_ATTACH_VMM_STATE;
	vm->ring_entries = c->ring_entries;
	vm->max_vcpus = c->max_vcpus ? c->max_vcpus : MAX_VCPUS_DEFAULT;
	vm->harvest_min_ns = (uint64_t)min_us * 1000;
	vm->harvest_max_ns = (uint64_t)max_us * 1000;
	vm->kick_signal = c->kick_signal ? c->kick_signal : SIGRTMIN + 4;
	return 0;
}

/* A VMM built with an older header has a shorter struct: what it does not know is not called. */
static int config_callbacks(struct snapd_vm *vm, const struct snapd_vm_callbacks *c, struct err *e)
{
	if (!c)
		return 0;
	if (c->size_bytes < offsetof(struct snapd_vm_callbacks, check))
		return err_set(e, EINVAL, "snapd_vm_callbacks.size_bytes %u: at least %zu",
			       c->size_bytes, offsetof(struct snapd_vm_callbacks, check));
	memcpy(&vm->cb, c, MIN(c->size_bytes, sizeof(vm->cb)));
	return 0;
}

static int config_take(struct snapd_vm *vm, const struct snapd_vm_config *c, struct err *e)
{
	int r;

	if (c->size_bytes < sizeof(*c))
		return err_set(e, EINVAL, "snapd_vm_config.size_bytes %u: this library needs %zu",
			       c->size_bytes, sizeof(*c));
	if (c->flags & ~(SNAPD_ATTACH_REQUIRE_SERVICE | SNAPD_ATTACH_KEEP_ZAP_QUIRK |
			 SNAPD_ATTACH_LOG_INITIALLY_SET | SNAPD_ATTACH_TRACK_HOST_WRITES |
			 SNAPD_ATTACH_VMM_STATE))
		return err_set(e, EINVAL, "unknown attach flags 0x%x", c->flags);
	vm->kvm = (struct arch_vm){c->kvm ? c->kvm : &arch_kvm_kernel, c->kvm_fd, c->vm_fd};
	vm->arch = arch_host();
	vm->opaque = c->opaque;
	r = config_callbacks(vm, c->callbacks, e);
	if (r >= 0)
		r = config_strings(vm, c, e);
	return r < 0 ? r : config_numbers(vm, c, e);
}

/* The sets; see protocol.h for the layout. */
static int shm_create(struct snapd_vm *vm, struct err *e)
{
	const size_t set = gpaset_bytes(SNAPD_SHM_FRAMES);
	const size_t slots =
		(size_t)SLOT_TABLE_SPACES * vm->table.nr_ids * sizeof(*vm->shown_slots);
	void *p;

	vm->shm_bytes = 4096 + 3 * set + ALIGN_UP(slots, (size_t)4096);
	vm->shm_fd = memfd_create("snapd-sets", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (vm->shm_fd < 0 || ftruncate(vm->shm_fd, (off_t)vm->shm_bytes) < 0 ||
	    fcntl(vm->shm_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0)
		return err_errno(e, errno, "cannot make the memfd for the dirty sets");
	p = mmap(NULL, vm->shm_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		 vm->shm_fd, 0);
	if (p == MAP_FAILED)
		return err_errno(e, errno, "cannot map the dirty sets");
	vm->shm = p;
	vm->shm->magic = SNAPD_SHM_MAGIC;
	vm->shm->major = SNAPD_PROTO_MAJOR;
	vm->shm->header_bytes = sizeof(*vm->shm);
	vm->shm->nr_frames = SNAPD_SHM_FRAMES;
	vm->shm->dirty_off = 4096;
	vm->shm->inflight_off = 4096 + set;
	vm->shm->discarded_off = 4096 + 2 * set;
	vm->shm->slots_off = 4096 + 3 * set;
	vm->shm->nr_slots = vm->table.nr_ids;
	vm->shm->total_bytes = vm->shm_bytes;
	gpaset_init(&vm->dirty, (char *)p + 4096, SNAPD_SHM_FRAMES);
	gpaset_init(&vm->discarded, (char *)p + 4096 + 2 * set, SNAPD_SHM_FRAMES);
	vm->shown_slots = (void *)((char *)p + 4096 + 3 * set);
	return 0;
}

static int tables_create(struct snapd_vm *vm, struct err *e)
{
	int nr_ids = vm_check_extension(vm, KVM_CAP_NR_MEMSLOTS), nr_spaces;

	vm->page_size = (uint32_t)sysconf(_SC_PAGESIZE);
	vm->page_shift = (uint32_t)__builtin_ctz(vm->page_size);
	vm->address_spaces = MIN(vm->arch->address_spaces, (uint32_t)SLOT_TABLE_SPACES);
	nr_spaces = vm_check_extension(vm, KVM_CAP_MULTI_ADDRESS_SPACE);
	nr_spaces = MAX(1, nr_spaces);
	vm->address_spaces = MIN(vm->address_spaces, (uint32_t)nr_spaces);
	vm->next_high_gfn = 1ull << 40;
	nr_ids = nr_ids <= 0 ? 32 : MIN(nr_ids, 0x7fff);
	if (slot_table_init(&vm->table, (uint32_t)nr_ids) < 0)
		return err_set(e, ENOMEM, "no memory for the slot table");
	vm->frames = malloc(REAP_FRAMES * sizeof(*vm->frames));
	vm->vcpus = calloc(vm->max_vcpus, sizeof(struct snapd_vcpu *));
	vm->vcpu_fds = calloc(vm->max_vcpus, sizeof(int));
	vm->conn.buf = malloc(SNAPD_MSG_MAX);
	vm->unplugged_mem = set_create(&vm->unplugged);
	vm->conn_wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	vm->harvest_wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!vm->frames || !vm->vcpus || !vm->vcpu_fds || !vm->conn.buf || !vm->unplugged_mem ||
	    vm->conn_wake < 0 || vm->harvest_wake < 0)
		return err_set(e, ENOMEM, "no memory or descriptors for the VM's tables");
	if (getrandom(vm->instance, sizeof(vm->instance), 0) != (ssize_t)sizeof(vm->instance))
		return err_errno(e, errno, "getrandom");
	return 0;
}

static void locks_init(struct snapd_vm *vm)
{
	pthread_condattr_t attr;

	pthread_mutex_init(&vm->slots_lock, NULL);
	pthread_cond_init(&vm->slots_thawed, NULL);
	pthread_rwlock_init(&vm->map_lock, NULL);
	pthread_mutex_init(&vm->harvest_lock, NULL);
	pthread_mutex_init(&vm->run_lock, NULL);
	pthread_mutex_init(&vm->log_lock, NULL);
	pthread_mutex_init(&vm->about_lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&vm->run_changed, &attr);
	pthread_condattr_destroy(&attr);
}

/* Both threads with every signal blocked: none may make a RESET return short, and
 * the VMM's signals are its own. */
static int threads_start(struct snapd_vm *vm, struct err *e)
{
	sigset_t all, old;
	int r;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	r = pthread_create(&vm->harvest_thread, NULL, reap_thread, vm);
	vm->harvest_started = !r;
	if (!r) {
		r = pthread_create(&vm->conn_thread, NULL, conn_thread, vm);
		vm->conn_started = !r;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return r ? err_errno(e, r, "cannot start the agent's threads") : 0;
}

static int wait_for_service(struct snapd_vm *vm, struct err *e)
{
	uint64_t end = now_ns() + ATTACH_WAIT_MS * 1000000ull;
	int r;

	while ((r = atomic_load(&vm->connect_result)) > 0 && now_ns() < end)
		usleep(1000);
	if (r == -EEXIST)
		return err_set(e, EEXIST, "the service has a live VM named \"%s\" already",
			       vm->name);
	if (r)
		return err_set(e, ENOTCONN, "no service on %s%s%s", vm->socket, r < 0 ? ": " : "",
			       r < 0 ? strerror(-r) : "");
	return 0;
}

static int host_describe(struct snapd_vm *vm, struct err *e)
{
	const void *blob;
	size_t len;
	int r;

	if (state_writer_init(&vm->host) < 0)
		return err_set(e, ENOMEM, "no memory to describe the host");
	r = vm->arch->host_save(&vm->kvm, &vm->host, e);
	if (r >= 0 && state_writer_finish(&vm->host, &blob, &len) < 0)
		r = err_set(e, ENOMEM, "no memory to describe the host");
	vm->shadows = vm->arch->shadows(&vm->kvm, NULL);
	return r < 0 ? r : state_reader_init(&vm->host_said, blob, len, e);
}

static int vm_setup(struct snapd_vm *vm, const struct snapd_vm_config *c, struct err *e)
{
	int r = config_take(vm, c, e);

	if (r >= 0)
		r = vcpu_signal_init(vm->kick_signal, e);
	if (r >= 0)
		r = sources_attach(vm, e);
	if (r >= 0)
		r = tables_create(vm, e);
	if (r >= 0)
		r = shm_create(vm, e);
	if (r >= 0)
		r = host_describe(vm, e);
	if (r < 0)
		return r;
	vm->zap_all = true;
	/* Slots of a VMM that brings them itself cannot be deleted to cure a rollback. */
	vm->keep_quirk = vm->vmm_state || c->flags & SNAPD_ATTACH_KEEP_ZAP_QUIRK;
	if (vm->restore[0]) {
		atomic_store(&vm->restore_wait, true);
		vcpus_hold(vm);
	}
	r = threads_start(vm, e);
	if (r >= 0 && c->flags & SNAPD_ATTACH_REQUIRE_SERVICE)
		r = wait_for_service(vm, e);
	return r;
}

int snapd_vm_attach(const struct snapd_vm_config *config, struct snapd_vm **ret)
{
	struct snapd_vm *vm;
	int r;

	*ret = NULL;
	err_clear(&agent_err);
	vm = calloc(1, sizeof(*vm));
	if (!vm)
		return err_set(&agent_err, ENOMEM, "no memory for a VM");
	vm->pagemap.uffd = vm->pagemap.fd = -1;
	vm->shm_fd = vm->conn_wake = vm->harvest_wake = vm->conn.fd = -1;
	atomic_store(&vm->connect_result, 1);
	locks_init(vm);
	r = vm_setup(vm, config, &agent_err);
	if (r < 0) {
		snapd_vm_detach(vm);
		return r;
	}
	*ret = vm;
	return 0;
}

static void threads_stop(struct snapd_vm *vm)
{
	atomic_store(&vm->exiting, true);
	if (vm->conn_started) {
		wake_fd(vm->conn_wake);
		pthread_join(vm->conn_thread, NULL);
		vm->conn_started = false;
	}
	if (vm->harvest_started) {
		wake_fd(vm->harvest_wake);
		pthread_join(vm->harvest_thread, NULL);
		vm->harvest_started = false;
	}
}

void snapd_vm_leave(struct snapd_vm *vm)
{
	threads_stop(vm);
	cleanup_fd(&vm->conn.fd);
}

static void sets_destroy(struct snapd_vm *vm)
{
	struct snapd_consumer *next;

	for (struct snapd_consumer *c = vm->consumers; c; c = next) {
		next = c->next;
		consumer_free(c);
	}
	devlogs_deinit(vm);
	if (vm->unplugged_mem)
		munmap(vm->unplugged_mem, set_bytes());
	if (vm->shm)
		munmap(vm->shm, vm->shm_bytes);
	cleanup_fd(&vm->shm_fd);
}

static void locks_destroy(struct snapd_vm *vm)
{
	pthread_mutex_destroy(&vm->slots_lock);
	pthread_cond_destroy(&vm->slots_thawed);
	pthread_rwlock_destroy(&vm->map_lock);
	pthread_mutex_destroy(&vm->harvest_lock);
	pthread_mutex_destroy(&vm->run_lock);
	pthread_cond_destroy(&vm->run_changed);
	pthread_mutex_destroy(&vm->log_lock);
	pthread_mutex_destroy(&vm->about_lock);
}

void snapd_vm_detach(struct snapd_vm *vm)
{
	if (!vm)
		return;
	threads_stop(vm);
	for (uint32_t i = 0; i < atomic_load(&vm->nr_vcpus); i++)
		vcpu_free(vm->vcpus[i]);
	free(vm->vcpus);
	free(vm->vcpu_fds);
	sources_detach(vm);
	slots_deinit(vm);
	backing_deinit(vm);
	sets_destroy(vm);
	slot_table_deinit(&vm->table);
	state_writer_deinit(&vm->host);
	free(vm->about);
	free(vm->refusal);
	free(vm->frames);
	free(vm->conn.buf);
	cleanup_fd(&vm->conn.fd);
	cleanup_fd(&vm->conn_wake);
	cleanup_fd(&vm->harvest_wake);
	locks_destroy(vm);
	free(vm);
}

void snapd_vm_get_stats(struct snapd_vm *vm, struct snapd_vm_stats *ret)
{
	const struct snapd_shm *s = vm->shm;

	*ret = (struct snapd_vm_stats){
		.harvested = atomic_load(&s->harvested),
		.reset = atomic_load(&s->reset),
		.published = atomic_load(&s->published),
		.ring_full = atomic_load(&s->ring_full),
		.unresolved = atomic_load(&s->unresolved),
		.host_marks = atomic_load(&s->host_marks),
		.kicks = atomic_load(&s->kicks),
		.pauses = atomic_load(&s->pauses),
		.reconnects = atomic_load(&s->reconnects),
		.slot_changes = atomic_load(&s->slot_changes),
	};
}

int snapd_state_put(struct snapd_state_writer *w, const char *name, uint32_t instance,
		    uint16_t version, const void *data, size_t len_bytes)
{
	return state_put(w, name, instance, version, data, len_bytes);
}

int snapd_state_get(const struct snapd_state_reader *r, const char *name, uint32_t instance,
		    uint16_t *version, const void **data, size_t *len_bytes)
{
	return state_get(r, name, instance, version, data, len_bytes);
}
