/* SPDX-License-Identifier: MIT */
/*
 * fake_agent: the agent's side of the protocol without KVM, for tests of the
 * service.  RAM and sets are real memfds; "vCPUs" are threads that write to RAM
 * and mark the page after the write, as I1 asks; everything may be told to go
 * wrong.
 *
 * It also is the oracle: at each PAUSE it keeps a copy of RAM, so a test can
 * compare what the store has with what was there.
 */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "include/snapd/protocol.h"
#include "snapd/gpaset.h"

#ifndef FA_PAGE
#define FA_PAGE 4096u /* tests are built with the page sizes of arm64 hosts, too */
#endif
#define FA_BLOCKS	 2 /* with a gap in guest addresses between them */
#define FA_MAX_WRITERS	 4
/* Where its layout has a block mapped; slot is 7 + block, generation 100 + block. */
#define FA_GPA(a, block) (((a)->home_gfn[block] + 0x100000) * FA_PAGE)

struct fake_agent {
	/* set before fa_connect(), or by fa_init() */
	const char *name;
	uint64_t block_pages[FA_BLOCKS]; /* 0: no such block */
	uint64_t home_gfn[FA_BLOCKS];
	uint32_t nr_vcpus;
	uint8_t instance[16];
	char restore[128];
	struct snapd_msg_hello hello; /* sent; tests may damage it after fa_init() */

	/* what to do wrong at a request of this type (SNAPD_MSG_SYNC…); 0: nothing */
	_Atomic int fail_at;	 /* answer FAILED, once */
	_Atomic int die_at;	 /* close the connection, once */
	_Atomic int lose_at;	 /* write page 42 of block 0 and mark nothing, once */
	_Atomic int shrink_at;	 /* truncate block 0, once, then answer */
	_Atomic int gone_at;	 /* tell that block 1 is gone, once, then answer */
	_Atomic int die_after;	 /* answer, then close the connection, once */
	_Atomic int die_mute_at; /* do as asked, give no answer, close the connection, once */

	_Atomic uint64_t paused_ns; /* how long a pause was, it says; 0: a microsecond */

	bool no_truth;		 /* keep no copy of RAM at PAUSE */
	bool dirty_all_at_pause; /* mark every page */

	/* memory */
	int shm_fd, ram_fd[FA_BLOCKS];
	struct snapd_shm *shm;
	size_t shm_bytes;
	struct gpaset dirty, inflight, discarded;
	uint8_t *ram[FA_BLOCKS];
	uint8_t *truth[FA_BLOCKS]; /* RAM at the last PAUSE */

	/* connection; the serving thread's while it runs */
	int sock;
	pthread_t server;
	int serves; /* type of the request under way */
	bool serving;
	bool rewriting;
	bool untouched; /* as the real one's: nobody can have written */
	struct snapd_point rewrite_to;
	_Atomic bool restore_pending;
	struct snapd_msg_welcome welcome;
	_Atomic int ended; /* 1: connection closed by the service; 2: REJECT, 3: ERROR */
	struct snapd_msg_error last_error;
	_Atomic uint64_t nr_loads, nr_pauses, nr_rewrites, nr_untouched;
	uint64_t state_value; /* "x86.regs" of vCPU 0 holds it */

	pthread_mutex_t gate; /* paused, nr_writing */
	pthread_cond_t gate_changed;
	bool paused;
	uint32_t nr_writing;
	pthread_t writers[FA_MAX_WRITERS];
	uint32_t nr_writers;
	_Atomic bool stop_writers;
	uint64_t seed;
	uint64_t hot_pages; /* writers prefer so many pages of block 0 */
	uint32_t write_pause_us;
};

/* Memory, nothing connected. */
void fa_init(struct fake_agent *a, const char *name, uint64_t pages0, uint64_t pages1);
void fa_deinit(struct fake_agent *a);
/* Say HELLO on one end of a socket pair; the other end is returned. */
int fa_connect(struct fake_agent *a);
/* Raw, for tests of bad input; fd -1: none.  len may disagree with the header. */
void fa_send(struct fake_agent *a, const void *msg, size_t len, int fd);
void fa_hello(struct fake_agent *a);
/* Next message into buf (SNAPD_MSG_MAX); 0: closed. */
size_t fa_recv(struct fake_agent *a, void *buf, int *fd);
void fa_tell(struct fake_agent *a); /* blocks, pieces, READY */
/* HELLO, await WELCOME, tell, and answer requests on a thread until closed.
 * false: refused; last_error says why. */
bool fa_attach(struct fake_agent *a);
/* Close the connection and join the thread; RAM, sets and instance stay. */
void fa_disconnect(struct fake_agent *a);

void fa_start_writers(struct fake_agent *a, uint32_t nr, uint64_t seed);
void fa_stop_writers(struct fake_agent *a);
/* Write one page as a vCPU would, and mark it. */
void fa_write(struct fake_agent *a, int block, uint64_t page, uint64_t value);
/* The same, but nobody is told: what an agent that loses marks does. */
void fa_write_unmarked(struct fake_agent *a, int block, uint64_t page, uint64_t value);
