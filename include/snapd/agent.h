/* SPDX-License-Identifier: MIT */
/*
 * libsnapd-agent: what a VMM links to have its guest's memory harvested,
 * snapshotted, rolled back and restored by snapd.
 *
 * A VMM adopts it by replacing four things:
 *
 *   ioctl(KVM_CREATE_VM) is followed by            snapd_vm_attach()
 *   ioctl(KVM_SET_USER_MEMORY_REGION) becomes      snapd_vm_memslot()
 *   ioctl(KVM_CREATE_VCPU) is followed by          snapd_vcpu_attach()
 *   ioctl(KVM_RUN) becomes                         snapd_vcpu_run()
 *
 * and, when it emulates devices, by handing in callbacks that stop them, save
 * them and load them.  (A VMM that has all of that already, for its own migration,
 * gives SNAPD_ATTACH_VMM_STATE.)  Everything else (dirty ring set-up, harvesting, RESET,
 * ring-full, pausing, vCPU and VM state, the connection to the service and its
 * loss and return) happens inside.
 *
 * Without a running service the guest runs all the same: dirty frames gather
 * in the sets, and the agent connects as soon as the service is there.
 *
 * Life of a VM, and what may be called when:
 *
 *   attach ──► memslot*, vcpu_attach* ──► vcpu_run (each vCPU on its own
 *   thread) ──► detach (after every vCPU thread has left vcpu_run for good)
 *
 * snapd_vm_memslot(), marks, device log and consumer calls may be made at any
 * time between attach and detach, from any thread but a callback.
 *
 * Errors: 0, or a negative errno; snapd_vm_error() has the reason in words.
 * The library never exits, never prints (see the log callback), blocks every
 * signal in its own threads, and uses exactly one signal, for kicking vCPUs
 * (unblocked on the threads that run vCPUs).
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvm_run;
struct snapd_vm;	   /* opaque; made by snapd_vm_attach() */
struct snapd_vcpu;	   /* opaque; freed with its VM */
struct snapd_devlog;	   /* opaque; a dirty log that a device writes */
struct snapd_consumer;	   /* opaque; a named set of dirty frames of its own */
struct snapd_state_writer; /* opaque; valid within the save callback */
struct snapd_state_reader; /* opaque; valid within the load and check callbacks */

/*
 * Where KVM calls go: NULL means the kernel.  A simulated or instrumented KVM
 * gives its own.  Semantics are those of ioctl(2), mmap(2), munmap(2).
 */
struct snapd_kvm_ops {
	int (*ioctl)(void *opaque, int fd, unsigned long request, void *arg);
	void *(*mmap)(void *opaque, size_t len_bytes, int prot, int flags, int fd, int64_t offset);
	int (*munmap)(void *opaque, void *addr, size_t len_bytes);
	void *opaque;
};

/*
 * One memslot.  `slot`, `as_id`, `gpa`, `hva`, READONLY are the VMM's, as it
 * would give them to KVM; the agent keeps kernel slot ids of its own and never
 * reuses one while a ring may still hold entries of it, so the VMM may delete,
 * reuse and resize its ids as it likes.
 */
#define SNAPD_SLOT_READONLY (1u << 0)
/* With size_bytes = 0: the memory behind the slot is gone for good (hot-unplug),
 * not only out of sight; its pending dirty bits and its identity are dropped. */
#define SNAPD_SLOT_GONE	    (1u << 1)
/* Writable memory that the VMM saves with its devices (SNAPD_ATTACH_VMM_STATE; video memory):
 * of no snapshot's RAM, but its writes are in consumers' sets.  fd is -1; what it is, is its
 * hva: slots over the same hva show the same memory. */
#define SNAPD_SLOT_PRIVATE  (1u << 2)

struct snapd_memslot {
	uint32_t slot;	     /* the VMM's id, unique in its address space */
	uint16_t as_id;	     /* KVM address space, 0 unless SMM */
	uint16_t flags;	     /* SNAPD_SLOT_* */
	uint64_t gpa;	     /* bytes, page aligned */
	uint64_t size_bytes; /* 0 deletes the slot */
	void *hva;	     /* the VMM's own MAP_SHARED mapping of fd at fd_offset */
	int fd; /* memfd, hugetlbfs or shm file; borrowed, duplicated inside; -1 for ROM */
	uint32_t reserved;
	uint64_t fd_offset; /* bytes, page aligned */
};

/*
 * A block of RAM of which slots show parts, now these, now those.  A VMM that knows its
 * blocks tells of each before its first slot; then what a snapshot's RAM consists of does
 * not depend on what was ever shown, and with SNAPD_ATTACH_TRACK_HOST_WRITES writes to
 * parts that no slot shows are found as well.
 */
struct snapd_ram {
	void *hva;	     /* the VMM's own MAP_SHARED mapping of fd at fd_offset */
	uint64_t size_bytes; /* page aligned */
	uint64_t fd_offset;
	uint64_t gpa; /* of its first page, roughly: names the pages; ~0: none in particular */
	int fd;	      /* as in snapd_memslot */
	uint32_t reserved;
};

enum snapd_log_level {
	SNAPD_LOG_ERR = 3,
	SNAPD_LOG_WARN = 4,
	SNAPD_LOG_NOTICE = 5,
	SNAPD_LOG_INFO = 6,
	SNAPD_LOG_DEBUG = 7,
};

/*
 * All callbacks are optional and run on the agent's own thread, never on a
 * vCPU's.  Between quiesce and unquiesce every vCPU is stopped.  They must not
 * call back into the agent, except that quiesce, save and load may mark memory:
 * snapd_vm_mark_dirty(), snapd_vm_mark_file_dirty(), snapd_vm_discarded(); and
 * for snapd_vm_reason().
 *
 *   prepare    what can be found out while the VM runs, right before quiesce: it does not
 *              count as pause.  0, or -errno to refuse the snapshot.
 *   quiesce    stop every writer of guest memory other than vCPUs, and finish
 *              its snapd_vm_mark_dirty() calls.  0, or -errno to refuse the
 *              snapshot.
 *   save       describe the devices with snapd_state_put().
 *   load       bring the devices to that state with snapd_state_get(); guest
 *              memory already is what it was.
 *   check      could load() take that state?  0, or -errno to refuse the rollback or restore
 *              before anything is touched.  The VM may be running.
 *   layout     after a rollback or restore changed the memslots: the VMM's
 *              view, as if it had made these snapd_vm_memslot() calls itself;
 *              `fd` is the agent's own, valid in the call.  Memory that the
 *              snapshot does not have (plugged in since) is given up as if by
 *              SNAPD_SLOT_GONE.
 *   unquiesce  go on.
 *   log        one line, no newline; one at a time, from any of the agent's threads.
 *
 * Memslots stand still from quiesce's return to unquiesce: snapd_vm_memslot() then
 * waits.  Whoever changes slots and memory in steps that belong together must be
 * waited for in quiesce, and kept from beginning until unquiesce; save, load and
 * layout must not wait for a thread that may be inside snapd_vm_memslot().
 */
struct snapd_vm_callbacks {
	uint32_t size_bytes; /* sizeof(struct snapd_vm_callbacks): lets the struct grow */
	uint32_t reserved;
	int (*quiesce)(void *opaque);
	void (*unquiesce)(void *opaque);
	int (*save)(void *opaque, struct snapd_state_writer *w);
	int (*load)(void *opaque, const struct snapd_state_reader *r);
	void (*layout)(void *opaque, const struct snapd_memslot *slots, size_t nr_slots);
	void (*log)(void *opaque, enum snapd_log_level level, const char *line);
	int (*check)(void *opaque, const struct snapd_state_reader *r);
	int (*prepare)(void *opaque);
};

/* Fail the attach when the service cannot be reached, rather than go on
 * without it and connect later. */
#define SNAPD_ATTACH_REQUIRE_SERVICE (1u << 0)
/* Leave SLOT_ZAP_ALL alone.  By default the agent disables that x86 quirk where
 * KVM allows once the VMM has deleted many slots, so that punching holes does not
 * make the whole working set fault and be reported dirty again each time. */
#define SNAPD_ATTACH_KEEP_ZAP_QUIRK  (1u << 1)

/* With SNAPD_DIRTY_LOG, have KVM_DIRTY_LOG_INITIALLY_SET: a new memslot is dirty as a
 * whole, and write-protected only when that was harvested. */
#define SNAPD_ATTACH_LOG_INITIALLY_SET (1u << 2)

/*
 * Find what the VMM and its devices write to guest memory, so that it need not be marked:
 * with PAGEMAP_SCAN over the mappings given as snapd_memslot.hva (Linux 6.7), in
 * the pause.  Still to be marked: writes through other mappings or with write(2), device
 * logs, discards, and writes to memory while no slot shows it.  In the quiesce
 * callback every I/O that has guest pages pinned must end, O_DIRECT and io_uring among
 * them; buffers registered with io_uring stay pinned and have to be marked.
 * KVM gets a mapping of its own of each RAM file; another userfaultfd over
 * the VMM's mapping makes snapd_vm_memslot() fail with EBUSY.
 */
#define SNAPD_ATTACH_TRACK_HOST_WRITES (1u << 3)

/*
 * The VMM stops its vCPUs itself, and what its save callback puts holds their state, and
 * KVM's, and which memslots there are; loading it sets all of that.  For a VMM that can
 * migrate, such as QEMU.
 *
 *   quiesce    also stops the vCPUs: when it returns, no thread is in snapd_vcpu_run(), and
 *              one that comes in before unquiesce waits there.  If that happens, somebody
 *              has resumed the VM meanwhile: the snapshot is given up.
 *   unquiesce  also starts them again
 *   save, load may change memslots (the VMM's own threads may).  load may write guest memory:
 *              the service puts the snapshot's bytes there once more.
 *
 * No vCPU, VM or memslot state is read or written by the agent, nor are vCPUs kicked.  The service
 * hears of the VM being ready with snapd_vm_ready(), not before; to restore, too, where
 * vCPUs need not have run.  Only snapshots made so can be restored so.
 */
#define SNAPD_ATTACH_VMM_STATE (1u << 4)

/*
 * How the pages that vCPUs write are found.  The set of dirty pages is the same with
 * each; docs/benchmarks.md ("backends") has what they cost.
 *
 *   AUTO     the ring where KVM has it, else the log: they cost the guest the same, and the
 *            ring's pause is shorter.  A host with far too few processors for guests that
 *            write half of their memory between two snapshots is better off with LOG
 *   RING     KVM_CAP_DIRTY_LOG_RING: Linux 5.11 on x86, 6.4 on arm64
 *   LOG      KVM_GET_DIRTY_LOG: every KVM.  Deleting a memslot then makes every vCPU
 *            leave the guest for a moment
 *   PAGEMAP  as SNAPD_ATTACH_TRACK_HOST_WRITES, for vCPUs as well; KVM logs nothing.  All
 *            dirty pages are copied in the pause: what is found earlier is found again
 */
enum snapd_dirty {
	SNAPD_DIRTY_AUTO = 0,
	SNAPD_DIRTY_RING = 1,
	SNAPD_DIRTY_LOG = 2,
	SNAPD_DIRTY_PAGEMAP = 3,
};

struct snapd_vm_config {
	uint32_t size_bytes;	 /* sizeof(struct snapd_vm_config): lets the struct grow */
	uint32_t flags;		 /* SNAPD_ATTACH_* */
	int kvm_fd;		 /* /dev/kvm; borrowed */
	int vm_fd;		 /* from KVM_CREATE_VM, no vCPU made yet; borrowed until detach */
	const char *name;	 /* NULL: $SNAPD_VM_NAME, else "vm-PID" */
	const char *socket;	 /* NULL: $SNAPD_AGENT_SOCKET, else /run/snapd/agent.sock */
	const char *restore;	 /* snapshot to start from; NULL: $SNAPD_RESTORE, else none */
	uint32_t ring_entries;	 /* per vCPU, a power of two; 0: as many as the kernel allows */
	int kick_signal;	 /* 0: SIGRTMIN + 4.  The agent installs its handler. */
	uint32_t max_vcpus;	 /* 0: 256 */
	uint32_t harvest_min_us; /* pacing of the harvest thread; 0: 1000 */
	uint32_t harvest_max_us; /* 0: 50000 */
	const struct snapd_vm_callbacks *callbacks; /* NULL: none; borrowed until detach */
	void *opaque;				    /* handed to every callback */
	const struct snapd_kvm_ops *kvm;	    /* NULL: the kernel; borrowed until detach */
	uint32_t dirty;				    /* enum snapd_dirty */
	uint32_t reserved;
};

/*
 * Attach a VM: enable dirty tracking, make its sets, start the agent's thread
 * and connect to the service.
 *
 * Must come before the first KVM_CREATE_VCPU: the kernel enables the ring only
 * then (Documentation/virt/kvm/api.rst, KVM_CAP_DIRTY_LOG_RING).
 *
 * -EINVAL  bad configuration, or a vCPU exists already
 * -ENOTSUP this host has not the way of dirty tracking that was asked for
 * -ENOTCONN SNAPD_ATTACH_REQUIRE_SERVICE and no service
 * -EEXIST  the service already has a live VM of that name
 * On failure *ret is NULL and snapd_vm_error(NULL) has the reason (per thread).
 */
int snapd_vm_attach(const struct snapd_vm_config *config, struct snapd_vm **ret);

/*
 * End the connection, saying so to the service (a VMM that vanishes counts as dead), and
 * stop the agent's threads; nothing is freed, and vCPUs may run on.  For the VMM's exit.
 * Waits for a callback that is under way.  detach may follow.
 */
void snapd_vm_leave(struct snapd_vm *vm);

/* Stop the agent's thread and free everything.  No vCPU thread may be inside
 * snapd_vcpu_run().  Accepts NULL. */
void snapd_vm_detach(struct snapd_vm *vm);

/*
 * Add (size_bytes > 0) or delete (0) a memslot.  Stands for
 * ioctl(KVM_SET_USER_MEMORY_REGION); KVM_MEM_LOG_DIRTY_PAGES is always set on
 * writable slots.  Blocks while a snapshot has the VM paused, unless called on
 * a vCPU's thread.  vCPUs may be running: stores that hit the hole leave
 * snapd_vcpu_run() as KVM_EXIT_MMIO, and the VMM has to apply and mark them.
 *
 * -EINVAL  misaligned, or: private memory (fd = -1, not a shared file, or hva
 *          is not a MAP_SHARED mapping of it), which the service cannot see
 * -EEXIST  overlaps another slot, or the id is taken
 * -ENOENT  no such slot
 * other    as KVM returned it
 */
int snapd_vm_memslot(struct snapd_vm *vm, const struct snapd_memslot *slot);

/*
 * Tell of a block of RAM.  Blocks last until snapd_vm_ram_gone(), which is for memory that
 * was unplugged, all its slots deleted; it names the mapping, which must still be there.
 * Both wait while a snapshot has the VM paused, as snapd_vm_memslot() does.  With
 * SNAPD_ATTACH_TRACK_HOST_WRITES no I/O may be in flight into a block that is told.
 *
 * -EINVAL  misaligned, or private memory, as above
 * -EEXIST  part of it was told already
 * -EBUSY   with SNAPD_ATTACH_TRACK_HOST_WRITES: another userfaultfd watches it
 * -ENOENT  (gone) no block begins there
 */
int snapd_vm_ram(struct snapd_vm *vm, const struct snapd_ram *ram);
int snapd_vm_ram_gone(struct snapd_vm *vm, const void *hva);

/* With SNAPD_ATTACH_VMM_STATE: the machine is complete, and the callbacks can work. */
void snapd_vm_ready(struct snapd_vm *vm);

/*
 * What the VMM wants people to know of the VM, as a JSON object of at most
 * SNAPD_ABOUT_MAX bytes, for `snapctl vms`; and why it cannot be snapshotted, in words, or
 * NULL: then it can.  Each call replaces what the last one said.  -EINVAL: too long.
 */
#define SNAPD_ABOUT_MAX 16384u
int snapd_vm_about(struct snapd_vm *vm, const char *json, const char *refusal);

/* From within prepare, quiesce, save, load and check, before they return a failure: why. */
void snapd_vm_reason(struct snapd_vm *vm, const char *text);

/*
 * Hand over a device that KVM emulates and whose state only its own descriptor
 * gives: on arm64 the interrupt controller and each ITS (`type` is KVM's
 * KVM_DEV_TYPE_ARM_VGIC_V3, KVM_DEV_TYPE_ARM_VGIC_ITS).  After KVM_CREATE_DEVICE, and
 * before a vCPU runs; ITSes in the same order in every VMM that is to restore the
 * snapshot.  The VMM initializes the device (KVM_DEV_ARM_VGIC_CTRL_INIT) itself, before
 * it first calls snapd_vcpu_run().  `device_fd` is borrowed until detach.
 *
 * -EOPNOTSUPP  this architecture has no such device to save
 * -ENOSPC      more than SNAPD_DEVICES_MAX
 */
#define SNAPD_DEVICES_MAX 16
int snapd_vm_device(struct snapd_vm *vm, uint32_t type, int device_fd);

/*
 * Tell that the VMM itself wrote guest memory [gpa, gpa + len) in address
 * space 0: KVM never sees such writes.  Call it *after* the write, and before
 * the quiesce callback returns.  Cheap (an atomic OR per page and consumer).
 * Ranges without memory are ignored: a hole's backing is marked under the
 * address at which it was last seen.
 */
int snapd_vm_mark_dirty(struct snapd_vm *vm, uint64_t gpa, uint64_t len_bytes);

/*
 * The same by file and offset, for memory that has no GPA in address space 0 (SMRAM), or
 * whose GPA may change meanwhile.  Parts that were never in a memslot are ignored.
 * -EINVAL the range wraps; -EBADF.
 */
int snapd_vm_mark_file_dirty(struct snapd_vm *vm, int fd, uint64_t offset, uint64_t len_bytes);

/*
 * Tell that [offset, offset + len) of a RAM file was given back to the host: a balloon,
 * free page reporting, FALLOC_FL_PUNCH_HOLE, MADV_REMOVE.  The pages read as zeros now,
 * and KVM tells nobody.  Call it *after* the discard.  The next snapshot has zero pages
 * there and does not allocate them again.  Telling of a discard that freed nothing, or
 * of a page written since, is harmless.  Errors as above.
 */
int snapd_vm_discarded(struct snapd_vm *vm, int fd, uint64_t offset, uint64_t len_bytes);

/*
 * A dirty log for a device that writes guest memory by itself: one bit for each 4096
 * bytes of GPA in address space 0, bit n % 8 of byte n / 8, as VHOST_SET_LOG_BASE and
 * VHOST_USER_SET_LOG_BASE have it.  The device sets the bit (atomically) *after* it
 * wrote; the agent takes the bits at each harvest.  Several devices may share a log.
 *
 *   base, len_bytes  for VHOST_SET_LOG_BASE, or a thread of the VMM
 *   fd               for VHOST_USER_SET_LOG_BASE; the agent's, valid until destroy
 *
 * Bits mean the memory that is at the GPA: before a memslot is deleted or moved the
 * device must have stopped writing there (as VHOST_SET_MEM_TABLE makes it), and in
 * the quiesce callback it must stop and have logged everything.
 *
 * create: gpa_end is exclusive, bytes; -EINVAL beyond 2^52.  destroy: takes the last
 * bits; the device writes no more.  Accepts NULL.  Never from the callbacks.
 */
struct snapd_devlog_mem {
	void *base;
	uint64_t len_bytes;
	int fd;
	uint32_t reserved;
};
int snapd_devlog_create(struct snapd_vm *vm, uint64_t gpa_end, struct snapd_devlog **ret,
			struct snapd_devlog_mem *mem);
void snapd_devlog_destroy(struct snapd_devlog *log);

/* Attach a vCPU.  `vcpu_fd` is borrowed until detach. */
int snapd_vcpu_attach(struct snapd_vm *vm, int vcpu_fd, uint32_t vcpu_id, struct snapd_vcpu **ret);

/* The shared kvm_run page of the vCPU; valid until detach. */
struct kvm_run *snapd_vcpu_kvm_run(struct snapd_vcpu *vcpu);

/*
 * Run the vCPU on the calling thread, which becomes the vCPU's thread.  Stands
 * for ioctl(KVM_RUN) and returns as it does, except that dirty-ring-full exits,
 * pauses, and saving and loading of state are handled inside and never seen.
 *
 * The VMM may set kvm_run->immediate_exit as usual, to 0 or 1, for kicks of its
 * own; the agent uses the upper bits of that byte.
 *
 * 0        look at kvm_run->exit_reason
 * -EINTR   a signal that is not the agent's arrived
 * -ECANCELED snapd_vm_stop() was called: leave the loop
 * -EIO     the dirty ring is dead (KVM overran it); the guest cannot go on
 * -EREMOTEIO the snapshot to be restored was refused, or could not be loaded
 * other    as KVM returned it
 */
int snapd_vcpu_run(struct snapd_vcpu *vcpu);

/* Make every snapd_vcpu_run(), now and later, return -ECANCELED. */
void snapd_vm_stop(struct snapd_vm *vm);

/* Stop all vCPUs at an instruction boundary and wait for it; nests with the
 * service's own pauses.  Not from a vCPU's thread.  -ETIMEDOUT after
 * timeout_ms (0: 10 s), and the VM runs on. */
int snapd_vm_pause(struct snapd_vm *vm, uint32_t timeout_ms);
void snapd_vm_resume(struct snapd_vm *vm);

/* State of devices, in named, versioned pieces.  Names are at most 31 bytes.
 * put: copies `data`.  get: *data is borrowed until the callback returns;
 * -ENOENT when the snapshot has no such piece. */
int snapd_state_put(struct snapd_state_writer *w, const char *name, uint32_t instance,
		    uint16_t version, const void *data, size_t len_bytes);
int snapd_state_get(const struct snapd_state_reader *r, const char *name, uint32_t instance,
		    uint16_t *version, const void **data, size_t *len_bytes);

/*
 * Consumers inside the VMM (a framebuffer, a working-set recorder): each has a
 * set of its own, which only it empties, so that no consumer can take another's
 * dirty bit.  A new consumer starts with every frame dirty.
 */
int snapd_consumer_create(struct snapd_vm *vm, const char *name, struct snapd_consumer **ret);
/* Only what vCPUs write, not what SNAPD_ATTACH_TRACK_HOST_WRITES finds: the set from which a
 * VMM's KVM_GET_DIRTY_LOG is answered, since it notes its own writes itself. */
#define SNAPD_CONSUMER_VCPUS (1u << 0)
int snapd_consumer_create_for(struct snapd_vm *vm, const char *name, uint32_t flags,
			      struct snapd_consumer **ret);
void snapd_consumer_destroy(struct snapd_consumer *consumer);
/* Harvest, then move up to `max` dirty frames (GPA / page size, ascending) into
 * gfns[]; returns how many, 0 when none are left.  `again` is 0 for the first
 * call of a pass and 1 to continue it without another harvest. */
long snapd_consumer_take(struct snapd_consumer *consumer, uint64_t *gfns, size_t max, int again);

/*
 * Harvest, then move what is dirty behind one slot into a bitmap: KVM_GET_DIRTY_LOG.  Bit n of
 * the little-endian bitmap is the slot's page n; bytes beyond the slot's pages are left
 * alone.  Where several slots show one page, who asks first is told.
 * -ENOENT no such slot, or one that is not logged; -EINVAL the bitmap is too short.
 */
int snapd_consumer_take_slot(struct snapd_consumer *consumer, uint32_t as_id, uint32_t slot,
			     void *bitmap, size_t bitmap_bytes);

/* Figures since attach; all counts monotonic. */
struct snapd_vm_stats {
	uint64_t harvested;    /* ring entries collected */
	uint64_t reset;	       /* ring entries given back */
	uint64_t published;    /* frames set in the capture set, repeats included */
	uint64_t ring_full;    /* KVM_EXIT_DIRTY_RING_FULL seen */
	uint64_t unresolved;   /* entries that named no slot; each made all memory dirty */
	uint64_t host_marks;   /* frames marked by snapd_vm_mark_dirty() */
	uint64_t kicks;	       /* signals sent to vCPUs */
	uint64_t pauses;       /* whole-VM pauses */
	uint64_t reconnects;   /* times the service came (back) */
	uint64_t slot_changes; /* memslots added or deleted */
};
void snapd_vm_get_stats(struct snapd_vm *vm, struct snapd_vm_stats *ret);

/* The reason of the last failed call on this thread; "" when none.  `vm` is
 * unused and may be NULL.  Valid until the next call on this thread. */
const char *snapd_vm_error(const struct snapd_vm *vm);

#ifdef __cplusplus
}
#endif
