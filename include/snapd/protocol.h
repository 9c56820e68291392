/* SPDX-License-Identifier: MIT */
/*
 * The wire between libsnapd-agent and snapd: messages on an AF_UNIX
 * SOCK_SEQPACKET socket, file descriptors by SCM_RIGHTS, and one shared-memory
 * file per VM.  Both ends run on one host, so integers are in host order.
 * docs/protocol.md tells the same in prose, with sequence diagrams.
 *
 * Rules:
 *  - every message starts with struct snapd_msg; `len` is the whole length and
 *    must equal what recvmsg() returned; a message is at most
 *    SNAPD_MSG_MAX bytes and carries at most one descriptor;
 *  - unknown types, wrong lengths, descriptors where none belong: the receiver
 *    closes the connection and says why (SNAPD_MSG_ERROR, where it still can);
 *  - fixed structs may grow at the end in a later minor version: a receiver
 *    accepts a longer struct and ignores the tail, and refuses a shorter one;
 *  - the agent speaks first (HELLO); requests flow from service to agent, each
 *    with a `req` number that the answer repeats; one request at a time.
 *
 * Identity.  Guest memory is told apart as RAM *blocks* (files; a block is an
 * inode).  The part of a block that a memslot shows gets, when first shown, a
 * *piece*: a run of frames with a permanent home GFN (the GPA at which the guest
 * first saw it, in address space 0 where possible) and a permanent run of bits
 * ("frames") in every dirty set.  Deleting and re-adding slots over the same
 * backing, at whatever id, size or address, never changes a piece: that is why a
 * hole punch loses nothing.  The store's key of a page is its home GFN.
 */
#pragma once

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define SNAPD_PROTO_MAJOR	   1
#define SNAPD_PROTO_MINOR	   4 /* docs/protocol.md, "Versions" */
#define SNAPD_MSG_MAX		   65536u
#define SNAPD_NAME_MAX		   64u /* VM names, including the NUL */
#define SNAPD_AGENT_SOCKET_DEFAULT "/run/snapd/agent.sock"
#define SNAPD_API_SOCKET_DEFAULT   "/run/snapd/api.sock"

enum snapd_msg_type {
	/* agent → service */
	SNAPD_MSG_HELLO = 1, /* + fd of the shared memory file */
	SNAPD_MSG_BLOCK = 2, /* + fd of the RAM block */
	SNAPD_MSG_PIECE = 3,
	SNAPD_MSG_GONE = 4,  /* a piece is gone for good */
	SNAPD_MSG_READY = 5, /* blocks and pieces so far are told; may come again */
	SNAPD_MSG_SYNCED = 6,
	SNAPD_MSG_PAUSED = 7, /* + fd of the state (a sealed memfd) */
	SNAPD_MSG_LOADED = 8,
	SNAPD_MSG_RESUMED = 9,
	SNAPD_MSG_FAILED = 10, /* the request `req` failed; the VM runs as before */
	SNAPD_MSG_BYE = 11,    /* the VMM detaches; no answer */
	SNAPD_MSG_ABOUT = 12,  /* what the VMM says of the VM; may come again */
	SNAPD_MSG_CHECKED = 13,
	SNAPD_MSG_VCPU = 14, /* + fd of the vCPU; to a service that asked for rings */
	/* service → agent */
	SNAPD_MSG_WELCOME = 32,
	SNAPD_MSG_REJECT = 33,
	SNAPD_MSG_SYNC = 34,
	SNAPD_MSG_PAUSE = 35,
	SNAPD_MSG_REWRITE = 36, /* no answer */
	SNAPD_MSG_LOAD = 37,	/* + fd of the state */
	SNAPD_MSG_RESUME = 38,
	SNAPD_MSG_CHECK = 39, /* + fd of the state */
	/* either way */
	SNAPD_MSG_ERROR = 64,
};

struct snapd_msg {
	uint32_t len;	/* bytes, this header included */
	uint16_t type;	/* enum snapd_msg_type */
	uint16_t flags; /* 0 */
	uint64_t req;	/* request number; 0 where there is none */
};
static_assert(sizeof(struct snapd_msg) == 16, "wire");

/* A point in the store: epoch `epoch` of timeline `timeline`; {0, 0} is none. */
struct snapd_point {
	uint64_t timeline;
	uint64_t epoch;
};

/* First message.  The service answers WELCOME or REJECT. */
#define SNAPD_HELLO_REWRITING (1u << 0) /* RAM was being rewritten towards `rewrite_to` */
#define SNAPD_HELLO_RESTORE   (1u << 1) /* wants `restore` loaded before it runs */
/* 1.3: the state is the VMM's, vCPUs included (STATE_VMM in it).  LOAD writes memory: the
 * service puts the snapshot's bytes there again, and sends RESUME by itself. */
#define SNAPD_HELLO_VMM_STATE (1u << 2)
struct snapd_msg_hello {
	struct snapd_msg h;
	uint16_t major;
	uint16_t minor;
	uint32_t flags;	      /* SNAPD_HELLO_* */
	uint8_t instance[16]; /* random, one per snapd_vm_attach() */
	char name[SNAPD_NAME_MAX];
	char arch[16];	    /* "x86_64", "aarch64" */
	uint32_t page_size; /* bytes; unit of frames */
	uint32_t pid;
	uint32_t nr_vcpus;     /* attached so far */
	uint32_t ring_entries; /* 0: no rings */
	uint64_t shm_bytes;    /* size of the shared memory file */
	struct snapd_point rewrite_to;
	char restore[128];  /* snapshot selector with RESTORE, else "" */
	char cmdline[4096]; /* /proc/self/cmdline with NULs as they are, for `snapctl restore` */
	uint32_t cmdline_len;
	uint32_t dirty_backend; /* SNAPD_DIRTY_* of agent.h; 0: not told */
};

/* A RAM block.  Sent before the pieces that name it. */
struct snapd_msg_block {
	struct snapd_msg h;
	uint32_t block;	     /* index, dense from 0 on each connection */
	uint32_t page_size;  /* of the file: 4096, or the huge page size */
	uint64_t size_bytes; /* of the file */
};

struct snapd_piece {
	uint32_t piece; /* index, dense from 0 on each connection; frames and home GFN last */
	uint32_t block;
	uint64_t block_page; /* first page within the block, in pages */
	uint64_t nr_frames;
	uint64_t home_gfn;    /* store key of the first page */
	uint64_t first_frame; /* bit of the first page in every set */
};
struct snapd_msg_piece {
	struct snapd_msg h;
	struct snapd_piece p;
};
struct snapd_msg_gone {
	struct snapd_msg h;
	uint32_t piece;
	uint32_t reserved;
};

/* All that can be told has been told: the service may capture.  Sent after
 * HELLO's blocks and pieces, and again when vCPUs were attached since. */
struct snapd_msg_ready {
	struct snapd_msg h;
	uint32_t nr_vcpus;
	uint32_t reserved;
};

/* BYE: the connection ends because the VMM wants it to.  One that ends without was lost,
 * and if the VMM is dead then, so was the VM: snapd may keep its memory.  Since 1.1. */
struct snapd_msg_bye {
	struct snapd_msg h;
};

/* ABOUT (1.3): what the VMM says of itself and the VM; replaces what the last one said.  With
 * a refusal the agent answers PAUSE with FAILED. */
struct snapd_msg_about {
	struct snapd_msg h;
	uint32_t json_len;
	uint32_t reserved;
	char refusal[320]; /* one line, NUL-terminated; "": none */
	char json[16384];  /* an object, or nothing */
};

/* VCPU (1.4): where the dirty ring of a vCPU is, for when the VMM is dead: the descriptor of
 * the vCPU is passed, and nobody touches the ring through it as long as the VMM lives. */
struct snapd_msg_vcpu {
	struct snapd_msg h;
	uint32_t vcpu;	     /* index, dense from 0 on each connection */
	uint32_t nr_entries; /* of struct kvm_dirty_gfn; a power of two */
	uint64_t offset;     /* of the ring in the vCPU's file, in bytes */
};

/* WELCOME: go on.  `head` is the point at which the service believes RAM and
 * the sets to be; {0,0}: everything is dirty.  With RINGS (1.4) it wants VCPU of each
 * vCPU that has a ring. */
#define SNAPD_WELCOME_RINGS (1u << 0)
struct snapd_msg_welcome {
	struct snapd_msg h;
	uint16_t major;
	uint16_t minor;
	uint32_t flags;
	uint8_t store[16]; /* uuid of the store */
	struct snapd_point head;
};

/* REJECT and ERROR and FAILED: why.  After REJECT with code EEXIST, EINVAL,
 * EPERM, EPROTO the agent does not try again; else it does. */
struct snapd_msg_error {
	struct snapd_msg h;
	int32_t code; /* positive errno */
	uint32_t reserved;
	char text[496]; /* one line, NUL-terminated */
};

/* SYNC: harvest, RESET and publish everything now; SYNCED when `publish_seq`
 * has moved past it.  A page found in the set after SYNCED may be copied while
 * the guest runs (invariant I1). */
struct snapd_msg_sync {
	struct snapd_msg h;
};
struct snapd_msg_synced {
	struct snapd_msg h;
	uint64_t publish_seq;
	uint64_t reset_entries;
	uint64_t took_ns;
};

/* PAUSE: stop vCPUs and devices, save state, then harvest and publish.  All
 * frames changed since the last point are in the set when PAUSED arrives.
 * With NO_STATE no state is saved and no descriptor comes (rollback: the state
 * is about to be replaced).  With REWRITE (1.2) the agent is, when it answers, as
 * after REWRITE to the point `to`, and drops stale shadow pages while the service
 * writes. */
#define SNAPD_PAUSE_NO_STATE (1u << 0)
#define SNAPD_PAUSE_REWRITE  (1u << 1)
/* A pause for a snapshot is a lease: after this time, or when the connection is
 * lost, the agent resumes the VM by itself and drops the connection.  Pages copied
 * in a pause belong to a snapshot only when RESUMED answered RESUME. */
#define SNAPD_PAUSE_LEASE_MS 30000u
struct snapd_msg_pause {
	struct snapd_msg h;
	uint32_t flags;
	uint32_t timeout_ms; /* for stopping; FAILED with ETIMEDOUT after it */
	/* 1.2, with SNAPD_PAUSE_REWRITE: */
	struct snapd_point to;
};
struct snapd_msg_paused {
	struct snapd_msg h;
	uint64_t state_bytes; /* 0 with NO_STATE */
	uint64_t publish_seq;
	uint64_t stop_ns;    /* begun to stop → all vCPUs stopped */
	uint64_t state_ns;   /* vCPU, VM and device state saved */
	uint64_t harvest_ns; /* last harvest and publish */
};

/* REWRITE: from here on RAM is being changed towards `to`.  Should the service
 * die now, the agent keeps the VM paused and says so in its next HELLO. */
struct snapd_msg_rewrite {
	struct snapd_msg h;
	struct snapd_point to;
};

/* LOAD: RAM is complete; bring memslots, VM, vCPUs and devices to the state in
 * the descriptor (format: snapd/state.h), cure stale shadow mappings.  Answer
 * LOADED (still paused) or FAILED (still paused, and the VM is unusable).  With
 * RESUME (1.2) LOADED says that the VM runs on: paused_ns is as in RESUMED. */
/* CHECK (1.3): could the VM load this state?  Host and memory layout are looked at; nothing
 * is touched, and the VM runs, or stands, as before.  CHECKED, or FAILED with the reason. */
struct snapd_msg_check {
	struct snapd_msg h;
	uint64_t state_bytes;
};
struct snapd_msg_checked {
	struct snapd_msg h;
};
#define SNAPD_LOAD_RESUME (1u << 0)
struct snapd_msg_load {
	struct snapd_msg h;
	uint64_t state_bytes;
	struct snapd_point point; /* becomes the base of the sets */
	/* 1.2: */
	uint32_t flags;
	uint32_t reserved;
};
struct snapd_msg_loaded {
	struct snapd_msg h;
	uint64_t layout_ns;
	uint64_t cure_ns;
	uint64_t load_ns;
	/* 1.2: */
	uint64_t paused_ns; /* with SNAPD_LOAD_RESUME */
};
/* RESUME.  UNTOUCHED (1.2): nothing was written to RAM since PAUSED answered PAUSE
 * with REWRITE, so the VM goes on as it was; refused after REWRITE, LOAD, or on
 * another connection than PAUSE's. */
#define SNAPD_RESUME_UNTOUCHED (1u << 0)
struct snapd_msg_resume {
	struct snapd_msg h;
	/* 1.2: */
	uint32_t flags;
	uint32_t reserved;
};
struct snapd_msg_resumed {
	struct snapd_msg h;
	uint64_t paused_ns; /* request seen → last vCPU on its way into the guest */
};

/* What 1.0 had of messages that have grown since: the least that must come. */
#define SNAPD_1_0_PAUSE_BYTES  offsetof(struct snapd_msg_pause, to)
#define SNAPD_1_0_LOAD_BYTES   offsetof(struct snapd_msg_load, flags)
#define SNAPD_1_0_LOADED_BYTES offsetof(struct snapd_msg_loaded, paused_ns)
#define SNAPD_1_0_RESUME_BYTES offsetof(struct snapd_msg_resume, flags)

/*
 * The shared memory file of a VM: a memfd that the agent creates, sized for
 * SNAPD_SHM_FRAMES frames and sealed against shrinking and growing (the service
 * checks that), sparse, so that it costs only what is touched.
 *
 *   offset 0       struct snapd_shm        (one page)
 *   dirty_off      gpaset: frames dirty and not yet taken
 *   inflight_off   gpaset: frames taken for the epoch that is being made
 *   discarded_off  gpaset: frames that the VMM once gave back to the host (balloon)
 *   slots_off      struct snapd_shm_slot[2][nr_slots]: what ring entries mean
 *
 * A gpaset of N frames (snapd/gpaset.h): bits u64[ceil(N/64)], then summary
 * u64[ceil(N/4096)], one bit for each word of bits, each part page aligned.
 *
 * Who writes what: the agent sets bits in `dirty` (release); the service takes
 * them: first it sets them in `inflight`, then it clears them in `dirty`; when
 * the epoch is durable it writes `base` and clears `inflight`; when the epoch
 * fails, or the service finds inflight bits after its own restart, it adds them
 * to `dirty` again.  So at every instant dirty ∪ inflight holds every frame that
 * differs from `base`.
 *
 * `discarded` is a hint and nothing more: the file may have a hole there, which reading
 * through a mapping would fill.  The agent sets it before the same frame in `dirty`; the
 * service clears it when it finds data there.
 */

/* By address space and kernel slot id, the upper and lower half of kvm_dirty_gfn.slot.  The
 * agent writes it before KVM has the slot; it holds until the id means another one, which is not
 * before every ring was emptied.  A slot that shows more than one piece has nr_pages 0. */
struct snapd_shm_slot {
	uint64_t nr_pages;
	uint64_t first_frame;
};

#define SNAPD_SHM_MAGIC	 0x314d485344504e53ull /* "SNPDSHM1" */
#define SNAPD_SHM_FRAMES (1ull << 28)	       /* 1 TiB of 4 KiB frames */

struct snapd_shm {
	uint64_t magic;
	uint32_t major;
	uint32_t header_bytes;
	uint64_t nr_frames; /* capacity of each set */
	uint64_t dirty_off;
	uint64_t inflight_off;
	uint64_t total_bytes;
	/* service writes; read at reconnect */
	uint8_t store[16]; /* uuid of the store that `base` is a point of */
	struct snapd_point base;
	/* agent writes (release), service reads (acquire) */
	_Alignas(64) _Atomic uint64_t publish_seq;
	_Atomic uint64_t harvested;
	_Atomic uint64_t reset;
	_Atomic uint64_t published;
	_Atomic uint64_t ring_full;
	_Atomic uint64_t unresolved;
	_Atomic uint64_t host_marks;
	_Atomic uint64_t kicks;
	_Atomic uint64_t pauses;
	_Atomic uint64_t reconnects;
	_Atomic uint64_t slot_changes;
	_Atomic uint64_t pending;    /* harvested, not yet reset and published */
	_Atomic uint64_t harvest_ns; /* spent in harvest + RESET */
	uint64_t discarded_off;	     /* constant; 0: no such set */
	uint64_t slots_off;	     /* constant, as nr_slots; 0: no such table */
	uint64_t nr_slots;
};
static_assert(sizeof(struct snapd_shm) <= 4096, "one page");
