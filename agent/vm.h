/* SPDX-License-Identifier: MIT */
/*
 * vm: the agent's own view of one attached VM; what its files share.
 *
 *   vm.c       attach, detach, figures, error texts
 *   backing.c  RAM files and pieces: which frames a slot's pages are
 *   ram.c      blocks of RAM that the VMM told of as a whole
 *   slots.c    memslots
 *   gpamap.c   which frames are at which GPA
 *   writers.c  who writes without a vCPU: marks, discards, device logs, backup bitmaps
 *   devices.c  what KVM emulates and the VMM handed over
 *   layout.c   the slots of a snapshot: record, apply; stale shadow pages
 *   reap.c     sources → sets; the harvest thread
 *   consumer.c sets of the VMM's own
 *   source.c   the dirty sources of a VM (source.h): ring.c, dirtylog.c,
 *              pagemap.c
 *   vcpu.c     running, parking and kicking vCPUs
 *   pause.c    holding them, waiting until they stand; work on their threads
 *   conn.c     the connection thread: reach the service, tell, dispatch
 *   request.c  SYNC, PAUSE, REWRITE, LOAD, RESUME
 *   vmstate.c  the state of a VM that stands, as a blob and back
 *   about.c    what the VMM says of itself and the VM
 *
 * Threads
 *   connection  conn.c, request.c, vmstate.c; runs every callback but log
 *   harvest     reap.c; looks at the rings, so that a service that hangs, or a
 *               VMM callback that takes long, never lets a ring run full
 *   vCPUs       vcpu.c; also harvest when they meet ring-full
 *   any other   snapd_vm_memslot(), marks, consumers
 *
 * Lock order: slots_lock → map_lock → harvest_lock; slots_lock → run_lock → harvest_lock;
 * run_lock → bind_lock.  No callback and no socket call is made under any of them, except
 * that slots_lock is held over KVM's memslot ioctls.
 */
#pragma once

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include <linux/kvm.h>

#include "agent/source.h"
#include "include/snapd/agent.h"
#include "include/snapd/protocol.h"
#include "snapd/arch/arch.h"
#include "snapd/gpaset.h"
#include "snapd/harvest.h"
#include "snapd/util/ablation.h"
#include "snapd/util/cleanup.h"
#include "snapd/util/err.h"

/* A RAM file.  Its descriptor is held while any piece lives, so that the inode
 * number cannot come to mean another file. */
struct block {
	dev_t dev;
	ino_t ino;
	bool is_private; /* no file: all memory that is the VMM's alone, by address; fd is -1 */
	int fd;		 /* owned; -1: no piece left */
	uint32_t page_size;
	uint64_t size_bytes; /* when first seen; a file that grew is one more block */
	int64_t told;	     /* index on the present connection; -1: not told */
	char *alias;	     /* a mapping of all of it for KVM alone; NULL: none made; owned */
};

struct piece {
	uint32_t block;
	bool gone;
	bool gone_told;
	uint64_t block_page;
	uint64_t nr_frames;
	uint64_t home_gfn;
	uint64_t first_frame;
	char *hva;    /* of its first page, where the VMM last showed it */
	int64_t told; /* as block.told */
};

/* A block of RAM that the VMM told of. */
struct ram {
	struct snapd_ram r; /* as the VMM gave it; r.fd is the block's */
	uint32_t block;
	uint32_t nr_runs;
	struct slot_run *runs; /* owned */
};

/* A live memslot. */
struct view {
	struct snapd_memslot m; /* as the VMM gave it; m.fd is the block's */
	void *kvm_hva;		/* what KVM maps: m.hva, or the same memory in block.alias */
	uint32_t block;		/* valid where nr_runs > 0 */
	uint32_t kernel_id;
	uint32_t nr_runs;      /* 0: not tracked (ROM) */
	struct slot_run *runs; /* owned */
};

/* GFNs of address space 0 → frames. */
struct gpa_range {
	uint64_t gfn;
	uint64_t nr;
	uint64_t first_frame;
};

struct range_list {
	struct gpa_range *r; /* owned */
	size_t nr, cap;
};

/* A set in this process, not shared. */
struct snapd_consumer {
	struct snapd_vm *vm;
	struct snapd_consumer *next; /* map_lock and harvest_lock to change, either to read */
	bool vcpus_only;	     /* nothing that only pagemap.c found */
	struct gpaset set;
	void *mem;
	uint64_t next_gfn; /* where take goes on; the taker's */
	char name[32];
};

/* A dirty log by GPA, written by a device. */
struct snapd_devlog {
	struct snapd_vm *vm;
	struct snapd_devlog *next; /* map_lock and harvest_lock to change, either to read */
	_Atomic uint64_t *words;   /* shared with the device; mapped here */
	size_t nr_words;
	int fd; /* owned */
};

enum vcpu_state {
	VCPU_NO_THREAD, /* no thread has it: cannot run, its state may be touched by anyone */
	VCPU_OUT,	/* its thread is in the VMM's code */
	VCPU_IN,	/* in snapd_vcpu_run(), perhaps in the guest */
	VCPU_PARKED,	/* waits in snapd_vcpu_run() for the end of a pause */
};

/* Slots deleted by a VMM after which it is one that punches holes. */
#define QUIRK_DELETES 64u

struct snapd_vcpu;
typedef int (*vcpu_job_fn)(struct snapd_vcpu *vcpu, struct err *e);

struct snapd_vcpu {
	struct snapd_vm *vm;
	int fd; /* borrowed */
	uint32_t id, index;
	struct kvm_run *run;
	size_t run_bytes, ring_bytes;
	void *ring_map;
	/* harvest_lock */
	struct harvest_ring ring;
	uint32_t budget;	 /* entries still to look for in the harvest under way */
	uint32_t collected_from; /* where this round of it began in the ring */
	/* its thread */
	bool io_pending; /* the last exit is completed by the next KVM_RUN only */
	uint32_t full_in_vain;
	uint32_t full_next;
	/* written by its thread, or under bind_lock when that has ended */
	_Atomic int state;
	/* bind_lock */
	struct vcpu_thread *thread;
	/* run_lock */
	uint64_t kicked_ns;
	vcpu_job_fn job; /* to be done; NULL: none */
	bool job_busy;	 /* being done */
	int job_result;
	struct err job_err;
	/* a job's, while it runs; else the connection thread's */
	struct snapd_state_writer save;
	const struct snapd_state_reader *load;
};

struct conn {
	int fd; /* -1: not connected */
	bool welcome;
	bool told_ready;
	uint32_t told_vcpus;
	bool wants_rings;
	uint32_t seen_vcpus;		 /* of vm.vcpus; counted while rings are told */
	uint32_t next_block, next_piece; /* wire indices on this connection */
	size_t seen_pieces;		 /* of vm.pieces */
	uint64_t seen_gone;		 /* of vm.gone_count */
	uint8_t *buf;			 /* SNAPD_MSG_MAX bytes */
	uint64_t backoff_ns;
	bool refused;	  /* for good */
	int logged_errno; /* of the last failed connect: said once */
};

struct ring_source {
	struct gpaset suspects; /* frames that KVM may have left unprotected */
	void *suspects_mem;
	bool has_suspects;
	_Atomic bool overran;	      /* to be said by the harvest thread */
	uint64_t unreset, unreset_at; /* collected, RESET still to come: ablation only */
};

struct log_slot {
	uint32_t slot; /* as KVM has it */
	uint64_t nr_pages;
	const struct slot_run *runs; /* the view's */
	uint32_t nr_runs;
	uint64_t *words; /* owned; what GET returned */
};

struct log_source {
	/* constant after attach */
	bool initially_set;
	bool get_clears; /* no MANUAL_DIRTY_LOG_PROTECT2 */
	/* harvest_lock */
	struct log_slot *slots; /* owned */
	size_t nr, cap;
	/* slots_lock */
	bool is_missed; /* the slot being deleted was not read */
};

/* Part of a mapping of the VMM's that is watched. */
struct watched {
	char *hva;
	uint64_t nr_pages;
	uint64_t first_frame;
};

struct page_region;
struct pagemap_source {
	int uffd, fd; /* fd: of /proc/self/pagemap */
	/* harvest_lock */
	struct watched *regions; /* owned; ascending by hva, disjoint */
	size_t nr;
	struct page_region *vec; /* owned; what a scan fills */
};

struct snapd_vm {
	/* constant after attach */
	bool track_host;   /* find the VMM's own writes, too */
	bool vmm_state;	   /* the VMM stops vCPUs, and saves and loads all but RAM */
	bool kvm_logs;	   /* slots have KVM_MEM_LOG_DIRTY_PAGES */
	bool two_mappings; /* KVM has block.alias, not the VMM's mapping */
	enum snapd_dirty want_dirty;
	const struct dirty_ops *sources[SOURCES_MAX];
	uint32_t nr_sources;
	struct arch_vm kvm;
	const struct arch_ops *arch;
	struct snapd_vm_callbacks cb;
	void *opaque;
	char name[SNAPD_NAME_MAX];
	char socket[108];
	char restore[128];
	uint8_t instance[16];
	uint32_t ring_entries;
	uint32_t max_vcpus;
	uint32_t address_spaces;
	bool backup_bitmap; /* KVM logs writes without a vCPU in a bitmap per slot */
	uint32_t page_size, page_shift;
	int kick_signal;
	struct snapd_state_writer host;	     /* "host.*", described once: 0.5 ms, not in a pause */
	struct snapd_state_reader host_said; /* the same, to read; borrowed from `host` */
	bool shadows;			     /* KVM shadows every guest's page tables */
	uint64_t harvest_min_ns, harvest_max_ns;

	int shm_fd;
	size_t shm_bytes;
	struct snapd_shm *shm; /* shared with the service, which may write anything here */
	struct gpaset dirty;
	struct gpaset discarded; /* frames that the VMM gave back: hints for the service */
	struct snapd_shm_slot *shown_slots; /* in shm; harvest_lock to write */

	struct arch_device devices[SNAPD_DEVICES_MAX]; /* grows under slots_lock */
	_Atomic uint32_t nr_devices;

	/* slots_lock */
	pthread_mutex_t slots_lock;
	pthread_cond_t slots_thawed;
	bool slots_frozen;   /* a snapshot has the VM paused */
	bool zap_all;	     /* deleting any slot drops every shadow page */
	bool keep_quirk;     /* and that stays so */
	uint32_t nr_deletes; /* by the VMM, while it may change */
	struct view *views;
	size_t nr_views, cap_views;
	struct view *roms; /* untracked slots ever seen, for layouts that bring them back */
	size_t nr_roms, cap_roms;
	struct block *blocks;
	size_t nr_blocks, cap_blocks;
	struct piece *pieces;
	size_t nr_pieces, cap_pieces;
	struct ram *rams;
	size_t nr_rams, cap_rams;
	uint64_t next_high_gfn;
	uint64_t gone_count;	 /* pieces that ended */
	struct gpaset unplugged; /* frames whose slot was deleted as GONE */
	void *unplugged_mem;
	_Atomic uint64_t next_frame; /* frames given out; readable by anyone */

	/* map_lock */
	pthread_rwlock_t map_lock;
	struct range_list mapped; /* ascending, disjoint */
	bool map_lossy;		  /* no memory for a range: a mark marks everything */
	struct range_list holes;  /* frames not mapped now, at the GFN where they last were */

	/* harvest_lock */
	pthread_mutex_t harvest_lock;
	struct slot_table table;
	uint64_t *frames; /* REAP_FRAMES */
	struct snapd_consumer *consumers;
	struct snapd_devlog *devlogs;
	struct ring_source ring;
	struct log_source log;
	struct pagemap_source pagemap;
	_Atomic bool tracking_dead; /* KVM and a source disagree for good */
	_Atomic uint32_t nr_vcpus;  /* grows under harvest_lock */
	struct snapd_vcpu **vcpus;  /* max_vcpus */
	int *vcpu_fds;		    /* theirs, borrowed */

	/* run_lock */
	pthread_mutex_t run_lock;
	pthread_cond_t run_changed;	 /* a vCPU parked, a job ended, a pause ended */
	uint32_t pauses;		 /* reasons for vCPUs to be parked */
	uint32_t leaving;		 /* let go, and not on their way into the guest yet */
	uint64_t left_ns;		 /* when the last of them was */
	_Atomic uint64_t awake_until_ns; /* vCPUs that wait yield till then; later they sleep */
	int refused;			 /* what every vcpu_run returns from now on; 0: none */
	bool stopping;
	bool intruded;		/* vmm_state: a vCPU came in while the service had the VM paused */
	_Atomic bool attention; /* any of the three: vCPUs look here */

	/* connection thread */
	struct conn conn;
	bool service_paused; /* holds one of `pauses`, and the VM is quiesced */
	bool quiesced;
	bool rewriting, loaded;
	uint64_t slots_at; /* vmm_state: slot_changes when it was quiesced */
	bool runs_on;	   /* the LOAD under way is to resume */
	bool untouched;	   /* RAM may be as PAUSE found it, the service knows */
	bool cured;	   /* no shadow page is stale, until a vCPU runs */
	uint64_t cure_ns;
	struct snapd_point rewrite_to;
	uint64_t paused_at_ns, lease_end_ns;

	/* about_lock */
	pthread_mutex_t about_lock;
	char *about;	/* owned; NULL: nothing said */
	char *refusal;	/* owned; NULL: can be snapshotted */
	bool about_new; /* to be told */

	_Atomic bool vmm_ready;	   /* vmm_state: READY may be told */
	_Atomic bool restore_wait; /* holds one of `pauses`, until LOAD and RESUME */
	_Atomic bool exiting;
	_Atomic int connect_result;  /* 1: not known yet; 0, -errno */
	int conn_wake, harvest_wake; /* eventfds */
	pthread_t conn_thread, harvest_thread;
	bool conn_started, harvest_started;
	pthread_mutex_t log_lock;
};

/* vm.c */
extern _Thread_local struct err agent_err; /* what snapd_vm_error() shows */
void vm_log(struct snapd_vm *vm, enum snapd_log_level level, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));
uint64_t now_ns(void); /* CLOCK_MONOTONIC */
int vm_ioctl(struct snapd_vm *vm, unsigned long request, void *arg);
/* The VM's answer, where it has one of its own; else the system's. */
int vm_check_extension(struct snapd_vm *vm, uint32_t cap);
int vm_enable_cap(struct snapd_vm *vm, uint32_t cap, uint64_t arg);
void wake_fd(int fd);
bool grow_array(void *array_ptr, size_t *cap, size_t want, size_t elem_bytes);
#define GROW(array, nr, cap) grow_array(&(array), &(cap), (nr) + 1, sizeof(*(array)))
/* Relaxed: a figure; nothing else is read on its strength. */
static inline void count(_Atomic uint64_t *c, uint64_t n)
{
	atomic_fetch_add_explicit(c, n, memory_order_relaxed);
}
static inline uint64_t frames_end(struct snapd_vm *vm)
{
	return atomic_load(&vm->next_frame);
}

/* ring.c */
bool ring_is_there(struct snapd_vm *vm);

/* backing.c, all under slots_lock */
int backing_check(const struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e);
/* The runs of frames behind a slot, in a malloc()ed array; new pieces are made
 * where the file was never shown, and are dirty in every set. */
int backing_resolve(struct snapd_vm *vm, const struct snapd_memslot *m, uint32_t *block,
		    struct slot_run **runs, uint32_t *nr_runs, struct err *e);
/* A slot was deleted as GONE: end the pieces that no slot shows any more and that
 * went in whole. */
void backing_unplug(struct snapd_vm *vm, const struct view *gone);
/* RAM is what a snapshot's was, whose pieces are `kept`: what is not among them was not
 * there then, and is given up.  slots_lock held, every vCPU stopped. */
void backing_keep(struct snapd_vm *vm, const struct state_piece *kept, size_t nr);
bool block_is(const struct block *b, const struct stat *st);
/* Where KVM is to find the slot's memory. */
int backing_for_kvm(struct snapd_vm *vm, uint32_t block, const struct snapd_memslot *m, void **ret,
		    struct err *e);
/* As backing_unplug(), by frames. */
void backing_unplug_runs(struct snapd_vm *vm, const struct slot_run *runs, uint32_t nr_runs);
struct piece *piece_of_frame(struct snapd_vm *vm, uint64_t frame);
struct piece *piece_of_home(struct snapd_vm *vm, uint64_t home_gfn);
void backing_deinit(struct snapd_vm *vm);

/* ram.c */
void rams_deinit(struct snapd_vm *vm);

/* about.c, connection thread.  -errno with the words of the VMM, taken. */
int about_tell(struct snapd_vm *vm);
int about_refusal(struct snapd_vm *vm, struct err *e);
int callback_failed(struct snapd_vm *vm, int code, const char *what, struct err *e);

/* slots.c; all but the public calls under slots_lock */
int view_add(struct snapd_vm *vm, const struct snapd_memslot *m, struct err *e);
int view_delete(struct snapd_vm *vm, struct view *v, struct err *e);
struct view *view_find(struct snapd_vm *vm, uint32_t as_id, uint32_t slot);
int slots_reprotect(struct snapd_vm *vm); /* every page of every slot; vCPUs stopped */
void quirk_count_delete(struct snapd_vm *vm);
int shadow_zap_all(struct snapd_vm *vm, struct err *e); /* needs vm.zap_all */
void slots_freeze(struct snapd_vm *vm, bool frozen);	/* takes slots_lock */
void slots_wait(struct snapd_vm *vm);			/* while frozen, and not a vCPU */
void slots_deinit(struct snapd_vm *vm);

/* gpamap.c */
void gpamap_show(struct snapd_vm *vm, const struct view *v); /* takes map_lock */
void gpamap_hide(struct snapd_vm *vm, const struct view *v);
void ranges_drop_frames(struct snapd_vm *vm, struct range_list *l, uint64_t first, uint64_t n);
/* GFNs [gfn, end) into every set; how many frames.  map_lock held. */
uint64_t gpamap_add_dirty(struct snapd_vm *vm, uint64_t gfn, uint64_t end);

/* writers.c */
/* Device logs → sets.  A harvest that ends an epoch, or tells anyone that all is
 * published, comes after it. */
void devlogs_collect(struct snapd_vm *vm);
void devlogs_collect_locked(struct snapd_vm *vm); /* map_lock held, harvest_lock not */
void devlogs_deinit(struct snapd_vm *vm);
/* KVM's backup bitmaps → sets, of all slots or one.  slots_lock held.  A slot's goes
 * with the slot; and saving or loading device state may set bits. */
int backup_collect(struct snapd_vm *vm);
int backup_collect_view(struct snapd_vm *vm, const struct view *v);

/* devices.c: the VM with its vCPUs and devices, for arch_ops.vm_save and .vm_load */
struct arch_vm arch_vm_whole(struct snapd_vm *vm);

/* layout.c, connection thread, vCPUs stopped; take slots_lock */
int layout_save(struct snapd_vm *vm, struct snapd_state_writer *w, struct err *e);
/* Drop stale shadow pages ahead of LOAD, while the service writes, where that is
 * harmless if no LOAD follows. */
void layout_cure_ahead(struct snapd_vm *vm);
/* Could it be loaded?  Changes nothing, and may come while vCPUs run. */
int layout_check(struct snapd_vm *vm, const struct snapd_state_reader *r, struct err *e);
int layout_load(struct snapd_vm *vm, const struct snapd_state_reader *r, uint64_t *layout_ns,
		uint64_t *cure_ns, struct err *e);

/* reap.c */
#define REAP_FRAMES 65536u
int reap(struct snapd_vm *vm);	     /* takes harvest_lock: harvest and publish */
int reap_vcpus(struct snapd_vm *vm); /* only what vCPUs wrote */
int reap_last(struct snapd_vm *vm);  /* the same with every vCPU and device stopped */
void *reap_thread(void *vm);
/* Into every set, under map_lock or harvest_lock; sets_*: take map_lock. */
void publish_frames(struct snapd_vm *vm, size_t n); /* vm.frames; harvest_lock */
void each_set_add(struct snapd_vm *vm, uint64_t first, uint64_t n);
void each_set_add_host(struct snapd_vm *vm, uint64_t first, uint64_t n); /* no vCPU wrote it */
void sets_add_range(struct snapd_vm *vm, uint64_t first, uint64_t n);
void sets_clear_range(struct snapd_vm *vm, uint64_t first, uint64_t n);
void consumers_add_all(struct snapd_vm *vm);
void *set_create(struct gpaset *set); /* anonymous memory of set_bytes() */
size_t set_bytes(void);
void consumer_free(struct snapd_consumer *c); /* consumer.c */

/* pause.c */
#define KICK_REPEAT_NS 1000000u
void vcpus_hold(struct snapd_vm *vm);	 /* one more reason to be parked */
void vcpus_release(struct snapd_vm *vm); /* one less */
/* Within a job given to all vCPUs: the release is near, who is done is not to sleep for a
 * fraction of a millisecond.  (Woken together, they queue for one core.) */
void vcpus_stay_awake(struct snapd_vm *vm);
uint64_t vcpus_wait_left(struct snapd_vm *vm); /* when the last one let go went on, in ns */
/* As wait_stopped, for what KVM does only: a vCPU in the VMM's code counts as stopped,
 * since it parks before it enters the guest.  From any thread. */
int vcpus_wait_out(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e);
int vcpus_wait_stopped(struct snapd_vm *vm, uint32_t timeout_ms, struct err *e);
/* Run `fn` for the first n vCPUs, on their own threads where they have one, all at
 * once.  The VM is held and stopped. */
int vcpus_do(struct snapd_vm *vm, vcpu_job_fn fn, uint32_t n, struct err *e);
bool vcpus_all_parked(struct snapd_vm *vm);
/* vmm_state: has a vCPU come to run since vcpus_hold(), or is one running? */
bool vcpus_intruded(struct snapd_vm *vm);
void vcpus_refuse(struct snapd_vm *vm, int code);
/* For a vCPU's own thread, run_lock held.  Do its job, with the lock dropped meanwhile; wait
 * until something changed, or so long. */
void vcpu_job_run(struct snapd_vcpu *v);
void vcpus_wait_changed(struct snapd_vm *vm, uint64_t timeout_ns);

/* vcpu.c */
void vcpu_kick(struct snapd_vcpu *v); /* out of KVM_RUN; not twice in KICK_REPEAT_NS */
bool on_vcpu_thread(const struct snapd_vm *vm);
int vcpu_signal_init(int sig, struct err *e);
void *vcpu_map(struct snapd_vcpu *v, size_t len_bytes, int64_t offset); /* of its fd; or NULL */
void vcpu_free(struct snapd_vcpu *v);

/* conn.c */
void *conn_thread(void *vm);
int conn_send(struct snapd_vm *vm, void *msg, size_t len_bytes, int fd);
int conn_tell(struct snapd_vm *vm); /* what is new since the last time */
void conn_drop(struct snapd_vm *vm, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* vmstate.c, connection thread, vCPUs and devices stopped */
/* The state's descriptor, the caller's to close. */
int vmstate_save(struct snapd_vm *vm, uint64_t *len_bytes, struct err *e);
/* `out` NULL: only look whether it could be loaded. */
int vmstate_load(struct snapd_vm *vm, int fd, uint64_t len_bytes, struct snapd_msg_loaded *out,
		 struct err *e);
/* Nobody may run the VM while the service has it paused, whoever resumes it. */
int vmstate_undisturbed(struct snapd_vm *vm, struct err *e);

/* request.c */
#define PAUSE_LEASE_NS (SNAPD_PAUSE_LEASE_MS * 1000000ull)
/* A whole message of a type a service may send, of at least its length; takes *fd
 * (-1: none came) when it uses it. */
void request_handle(struct snapd_vm *vm, const struct snapd_msg *h, int *fd);
/* The connection is gone: a VM paused for a snapshot runs on at once. */
void request_abandon(struct snapd_vm *vm);
/* The VM is being detached: devices go on, waiting memslot calls return. */
void request_end(struct snapd_vm *vm);
/* When the service's hold on the VM ends, in ns; UINT64_MAX: not limited. */
uint64_t request_lease_end(const struct snapd_vm *vm);
